"""What a method is: a loss, and how its negatives are chosen."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from mass_dpo_jax.selection import Settings


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
      supervised: train on the likelihood of chosen responses; no negatives, no reference.
      num_negatives: n, how many negatives of each pool the loss sees; 0 when supervised.
      selection: how they are chosen.
    """

    supervised: bool
    num_negatives: int
    selection: Settings


def make_method(config: ConfigDict, largest_pool: int) -> Method:
    """The method that `config.method` names, for pools of at most `largest_pool` negatives."""
    criterion = config.selection.criterion if config.method == "mass_dpo" else "random"
    settings = Settings(
        criterion=criterion,
        ridge=config.selection.ridge,
        feature_norm=config.selection.feature_norm,
        fisher_scale=config.selection.fisher_scale,
        beta=config.beta,
    )
    n = {"sft": 0, "dpo": 1}.get(config.method, config.num_negatives)
    if n and criterion == "all":
        n = largest_pool
    return Method(supervised=config.method == "sft", num_negatives=n, selection=settings)
