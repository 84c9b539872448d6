r"""MASS-DPO on adapters beside a frozen model in 4 bits (QLoRA): 3B to 4B models on one 24 GB card.

    python -m mass_dpo_jax.train --config=configs/qlora.py \
        --config.model.path=DIR --config.data.name=lastfm --config.data.path=DIR \
        --workdir=runs/qlora

Model: a folder with a Llama 3.x, Qwen3 or SmolLM3 as downloaded from Hugging Face. For plain LoRA,
--config.model.lora.base=bfloat16 keeps the frozen weights as most are published.
Hardware: each device holds a whole model. --config.dry_run=True prints what a step needs.
Time and results: not measured.
"""

from ml_collections import ConfigDict

from mass_dpo_jax import config


def get_config() -> ConfigDict:
    """Returns the configuration."""
    c = config.paper()
    c.model.lora.rank = 16
    c.model.lora.alpha = 32.0
    c.model.lora.base = "nf4"
    c.mesh.data = -1  # The frozen weights are small: every device holds a whole model.
    c.mesh.fsdp = 1
    c.train.micro_batch_size = 8
    c.eval.batch_size = 8
    c.train.learning_rate = 1e-4  # Adapters start at zero and take larger steps than weights do.
    return c
