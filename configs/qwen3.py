r"""MASS-DPO on Qwen3 with the paper's settings.

    python -m mass_dpo_jax.train --config=configs/qwen3.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/qwen3

Model: a folder with Qwen/Qwen3-4B as downloaded from Hugging Face. The
family needs no settings of its own: `paper` in mass_dpo_jax/config.py has them all.
Hardware: weights, gradients and Adam's moments are split over all devices; with 3B weights they
take 51 GB in all. --config.dry_run=True prints what a step needs, also for other machines.
Time and results: not measured.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
