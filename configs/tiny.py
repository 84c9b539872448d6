"""A small model with random weights on synthetic data: nothing to download.

    python -m mass_dpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

Hardware: a CPU is enough. `launch/quickstart.sh` trains with these settings in two stages, a
supervised warm start and MASS-DPO, in about two minutes on two cores; README.md has its result.
"""

from ml_collections import ConfigDict

from mass_dpo_jax import config


def get_config() -> ConfigDict:
    """Returns the configuration."""
    c = config.default()
    c.model.remat = "dots"  # Memory is no constraint here.
    c.data.name = "synthetic"
    c.data.chat_template = "none"
    c.data.list_candidates = False  # A model this small cannot copy names from a list.
    c.data.max_validation = 1000
    c.beta = 1.0  # The reference is a poor model: no reason to stay close to it.
    c.train.steps = 400
    c.train.batch_size = 32
    c.train.micro_batch_size = 32
    c.train.learning_rate = 1e-3  # The paper's 1e-5 and clip 0.3 are for billions of weights.
    c.train.clip = 1.0
    c.train.eval_every = 50
    return c
