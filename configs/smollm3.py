r"""MASS-DPO on SmolLM3 with the paper's settings.

    python -m mass_dpo_jax.train --config=configs/smollm3.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/smollm3

Model: a folder with HuggingFaceTB/SmolLM3-3B as downloaded from Hugging Face. The
family needs no settings of its own: `paper` in mass_dpo_jax/config.py has them all.
Hardware: weights, gradients and Adam's moments are split over all devices; with 3B weights they
take 51 GB in all. --config.dry_run=True prints what a step needs, also for other machines.
Time and results: not measured.
"""

from ml_collections import ConfigDict

from mass_dpo_jax import config


def get_config() -> ConfigDict:
    """Returns the defaults with bfloat16, weights split over all devices and 20,000 training rows.

    The limit of rows applies to the paper's own datasets.
    """
    return config.paper()
