r"""MASS-DPO on Qwen3 with the paper's settings.

    python -m mass_dpo_jax.train --config=configs/qwen3.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/qwen3

where model.path is a folder with Qwen/Qwen3-4B as downloaded from Hugging Face.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
