r"""MASS-DPO on Llama 3.2 with the paper's settings.

    python -m mass_dpo_jax.train --config=configs/llama3.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/llama3

where model.path is a folder with meta-llama/Llama-3.2-3B-Instruct as downloaded from Hugging Face.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
