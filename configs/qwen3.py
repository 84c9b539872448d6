r"""MASS-DPO on Qwen3 with the paper's settings, which need nothing else for this family.

    python -m mass_dpo_jax.train --config=configs/qwen3.py --workdir=runs/qwen3 \
        --config.model.path=Qwen3-4B --config.data.name=lastfm --config.data.path=DIR

The model is a folder with Qwen/Qwen3-4B. Time and results: not measured.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
