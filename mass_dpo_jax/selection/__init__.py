"""Which n of N negatives an example is trained on.

batch.py           in the pools of a batch: `select`, `select_negatives`, diagnostics
catalogue.py       in one pool of up to a million: `select_from_catalogue`
prompts.py         which prompts: `select_prompts`
sharded_search.py  greedy search for both, over devices
shards.py          candidates that are split over devices
blocks.py          what several vectors at once add to a determinant
registry.py        `Settings`; `criterion` and `design` register a criterion
criteria.py        the built-in criteria
baselines.py       criteria of other papers
draws.py           weighted random draws: pivotal, local, partition, independent
search.py          which set has a large determinant
gram.py            Gram matrices of features and of designs
types.py           `Pool`, `Selection`, `Design`
arrays.py          reads the arrays of other libraries
"""

from mass_dpo_jax.selection.batch import (
    check_selection,
    compute_grams,
    diagnose,
    float32_excess,
    select,
    select_negatives,
)
from mass_dpo_jax.selection.criteria import pool_loss, pool_weights
from mass_dpo_jax.selection.draws import effective_pool
from mass_dpo_jax.selection.gram import from_origin
from mass_dpo_jax.selection.registry import Settings, criterion, design, in_order, names
from mass_dpo_jax.selection.types import Design, Pool, Selection

__all__ = [
    "Design",
    "Pool",
    "Selection",
    "Settings",
    "check_selection",
    "compute_grams",
    "criterion",
    "design",
    "diagnose",
    "effective_pool",
    "float32_excess",
    "from_origin",
    "in_order",
    "names",
    "pool_loss",
    "pool_weights",
    "select",
    "select_negatives",
]
