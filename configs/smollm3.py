r"""MASS-DPO on SmolLM3 with the paper's settings.

    python -m mass_dpo_jax.train --config=configs/smollm3.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/smollm3

where model.path is a folder with HuggingFaceTB/SmolLM3-3B as downloaded from Hugging Face.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
