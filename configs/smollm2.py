r"""The paper's experiment scaled down to SmolLM2-135M-Instruct and two CPU cores.

    python -m mass_dpo_jax.train --config=configs/smollm2.py --workdir=runs/smollm2 \
        --config.model.path=SmolLM2-135M-Instruct --config.data.name=qasc --config.data.path=DIR

192 training rows once instead of 20,000 three times, 24 updates of 8 prompts instead of 468 of 128,
adapters (LoRA) instead of all weights, and prompts without the list of candidates, which a model
this small cannot use. `bash launch/paper.sh SMOLLM2=DIR QASC=DIR LASTFM=DIR` runs the paper's grid
with it. Hardware: a CPU and 4 GB; three to six minutes a run of QASC on two cores.
"""

from ml_collections import ConfigDict

from mass_dpo_jax import config


def get_config() -> ConfigDict:
    """Returns the configuration."""
    c = config.default()
    c.model.lora.rank = 16
    c.model.lora.base = "float32"
    c.data.list_candidates = False
    c.data.max_train = 192
    c.data.max_validation = 40
    c.data.max_test = 300
    c.data.max_shapes = 2  # Compiling takes as long as some hundred prompts.
    c.train.epochs = 1
    c.train.batch_size = 8
    c.train.micro_batch_size = 8
    c.train.learning_rate = 1e-3  # Adapters start at zero, and 24 updates are few.
    c.train.clip = 1.0
    c.train.eval_every = 6
    c.train.keep_checkpoints = 1
    c.log.report = False  # It selects negatives of test rows, which takes as long as to test.
    return c
