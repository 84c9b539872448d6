r"""MASS-DPO on SmolLM3 with the paper's settings, which need nothing else for this family.

    python -m mass_dpo_jax.train --config=configs/smollm3.py --workdir=runs/smollm3 \
        --config.model.path=SmolLM3-3B --config.data.name=lastfm --config.data.path=DIR

The model is a folder with HuggingFaceTB/SmolLM3-3B. Time and results: not measured.
"""

from mass_dpo_jax.config import paper as get_config

__all__ = ["get_config"]
