"""The embedded default: a small model, its tokenizer and its world are made on the spot.

    python -m mass_dpo_jax.train --config=configs/tiny.py --workdir=runs/tiny

`launch/quickstart.sh` runs it in two stages, a supervised warm start and MASS-DPO.
"""

from ml_collections import ConfigDict

from mass_dpo_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.model.remat = "dots"  # There is memory enough.
    c.data.name = "synthetic"
    c.data.chat_template = "none"
    c.data.list_candidates = False  # A model this small cannot look names up in a list.
    c.data.max_validation = 1000
    c.beta = 1.0  # A small model far from done: the reference is no place to stay close to.
    c.train.steps = 400
    c.train.batch_size = 32
    c.train.micro_batch_size = 32
    c.train.learning_rate = 1e-3  # The paper's 1e-5 and clip 0.3 are for billions of weights.
    c.train.clip = 1.0
    c.train.eval_every = 50
    return c
