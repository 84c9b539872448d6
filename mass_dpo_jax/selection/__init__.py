"""Which n of N negatives a prompt is trained on.

`select_negatives` chooses in the pools of a batch, `catalogue` in one pool of up to a million;
`design` and `criterion` register a criterion of one's own, beside those in `criteria`.
"""

from mass_dpo_jax.selection.batch import check, diagnostics, excess, grams, select, select_negatives
from mass_dpo_jax.selection.criteria import pool_loss, pool_weights
from mass_dpo_jax.selection.designs import Design, Selection
from mass_dpo_jax.selection.registry import Pool, Settings, criterion, design, in_order, names

__all__ = [
    "Design",
    "Pool",
    "Selection",
    "Settings",
    "check",
    "criterion",
    "design",
    "diagnostics",
    "excess",
    "grams",
    "in_order",
    "names",
    "pool_loss",
    "pool_weights",
    "select",
    "select_negatives",
]
