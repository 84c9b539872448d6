"""AdamW with linear warm-up, cosine decay and a clipped gradient, as the paper trains."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict


def learning_rate(train: ConfigDict, total_steps: int) -> optax.Schedule:
    """Peak learning rate after warm-up, zero after `total_steps` updates."""
    warmup = round(train.warmup_ratio * total_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else train.learning_rate,
        peak_value=train.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
    )


def make_optimizer(train: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.adamw(learning_rate(train, total_steps), weight_decay=train.weight_decay),
    )
