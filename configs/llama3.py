r"""MASS-DPO on Llama 3.2 with the paper's settings, which need nothing else for this family.

    python -m mass_dpo_jax.train --config=configs/llama3.py --workdir=runs/llama3 \
        --config.model.path=Llama-3.2-3B-Instruct --config.data.name=lastfm --config.data.path=DIR

The model is a folder with meta-llama/Llama-3.2-3B-Instruct. Time and results: not measured.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
