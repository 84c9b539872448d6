r"""MASS-DPO on Qwen3 with the paper's settings, which are the defaults.

    python -m mass_dpo_jax.train --config=configs/qwen3.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/qwen3

where model.path is a folder with Qwen/Qwen3-4B as downloaded from Hugging Face.
"""

from ml_collections import ConfigDict

from mass_dpo_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.model.dtype = "bfloat16"  # Compute; the trained weights are float32.
    c.data.chat_template = "tokenizer"  # The model's own.
    c.mesh.data = 1
    c.mesh.fsdp = -1  # All devices share the weights: 3B with Adam needs some 50 GB in all.
    return c
