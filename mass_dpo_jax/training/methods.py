"""What a method is: which negatives of a pool it trains on, and by which loss.

    mass_dpo    n chosen by selection.criterion, Plackett-Luce loss
    pl_sampled  n drawn from the pool weights, the whole pool's Plackett-Luce gradient estimated
    pl_all      the whole pool, Plackett-Luce loss
    sdpo        n random ones, Plackett-Luce loss
    dpo         one random one
    dpo_k       n random ones, the mean of DPO's loss over the pairs
    dmpo        n random ones, DPO's loss against their average
    odpo        n random ones, DPO's loss with a margin for each pair
    mppo        n random ones, likelihoods per token; no reference
    sft         none: the likelihood of the chosen response; no reference

Random negatives are drawn anew at each `selection.refresh`: `once` is one draw per example, as
S-DPO's authors do it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from mass_dpo_jax import losses
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings
from mass_dpo_jax.selection.registry import CRITERIA


class Responses(NamedTuple):
    """What a loss may look at: the chosen response in column 0, then n negatives.

    logps, log_ratios: float32 [B, 1 + n]; lengths: int32, in tokens; valid: bool.
    grades: float32 [B, 1 + n] from the data's scores or ranks, or None.
    weights: float32 [B, n] and pool_loss: float32 [B], of drawn negatives, or None.
    """

    logps: Array
    log_ratios: Array
    lengths: Array
    valid: Array
    grades: Array | None
    weights: Array | None
    pool_loss: Array | None


Loss = Callable[[Responses, "Method"], Array]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What `config.method` decides.

    Attributes:
      loss: float32 [B] of a micro-batch.
      criterion: of `registry.CRITERIA`; "" for the one in `config.selection`.
      reference: does the loss know a reference?
      most: of negatives, whatever `config.num_negatives` says; None: no limit.
    """

    loss: Loss
    criterion: str = "random"
    reference: bool = True
    most: int | None = None


def _plackett_luce(x: Responses, m: Method) -> Array:
    return losses.plackett_luce(x.log_ratios, x.valid, m.beta)


def _sampled(x: Responses, m: Method) -> Array:
    assert x.weights is not None and x.pool_loss is not None
    return losses.sampled_plackett_luce(x.log_ratios, x.valid, m.beta, x.weights, x.pool_loss)


def _odpo(x: Responses, m: Method) -> Array:
    assert x.grades is not None
    difference = x.grades[:, :1] - x.grades[:, 1:]
    margins = m.odpo_alpha * jnp.log(jnp.where(x.valid[:, 1:], difference, 1.0))
    return losses.odpo(x.log_ratios, x.valid, m.beta, margins)


KINDS = {
    "mass_dpo": Kind(_plackett_luce, criterion=""),
    "pl_sampled": Kind(_sampled, criterion="sampled"),
    "pl_all": Kind(_plackett_luce, criterion="all"),
    "sdpo": Kind(_plackett_luce),
    "dpo": Kind(lambda x, m: losses.dpo(x.log_ratios, x.valid, m.beta), most=1),
    "dpo_k": Kind(lambda x, m: losses.dpo_k(x.log_ratios, x.valid, m.beta)),
    "dmpo": Kind(lambda x, m: losses.dmpo(x.log_ratios, x.valid, m.beta)),
    "odpo": Kind(_odpo),
    "mppo": Kind(lambda x, m: losses.mppo(x.logps, x.lengths, x.valid), reference=False),
    "sft": Kind(
        lambda x, m: losses.supervised(x.logps[:, 0], x.lengths[:, 0]), reference=False, most=0
    ),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method with its settings. Hashable.

    Attributes:
      name: of `KINDS`.
      num_negatives: n, how many negatives of each pool the loss sees; 0 for sft.
      selection: how they are chosen.
      beta: from log-ratios to rewards.
      sft_weight: of a supervised term on the chosen response.
      graded: the data's scores are read (odpo by score).
      odpo_alpha: margin over log difference.
      frozen_features: criteria see the reference's hidden states.
    """

    name: str
    num_negatives: int
    selection: Settings
    beta: float
    sft_weight: float
    graded: bool
    odpo_alpha: float
    frozen_features: bool

    @property
    def supervised(self) -> bool:
        """Are there no negatives at all?"""
        return self.num_negatives == 0

    @property
    def whole_pool(self) -> bool:
        """Is every negative trained on, so that n is that of the largest pool?"""
        return self.selection.criterion == "all"

    @property
    def reference(self) -> bool:
        """Are the reference's log-probs needed?"""
        return KINDS[self.name].reference

    @property
    def sampled(self) -> bool:
        """Does the loss need the weights of a draw at the current policy?"""
        return self.selection.criterion == "sampled"

    def loss(self, x: Responses) -> Array:
        """float32 [B]."""
        loss = KINDS[self.name].loss(x, self)
        if self.sft_weight:
            loss += self.sft_weight * losses.supervised(x.logps[:, 0], x.lengths[:, 0])
        return loss

    def rewards(self, x: Responses) -> Array:
        """float32 [B, 1 + n]: what the loss takes for the responses' rewards."""
        if self.reference:
            return self.beta * x.log_ratios
        return losses.likelihood_per_token(x.logps, x.lengths, x.valid)


def uses_reference(name: str) -> bool:
    """Whether the method `config.method` names knows a reference."""
    return KINDS[name].reference


def make_method(config: ConfigDict, largest_pool: int) -> Method:
    """The method that `config.method` names, for pools of at most `largest_pool` negatives.

    Raises:
      UserError: settings that do not go together.
    """
    kind = KINDS[config.method]
    criterion = kind.criterion or config.selection.criterion
    if criterion == "sampled" and config.selection.refresh != "step":
        raise UserError(
            f"config.selection.refresh={config.selection.refresh}: config.method=pl_sampled draws "
            "at every step (its weights are those of the current policy); expected step"
        )
    settings = Settings(
        criterion=criterion,
        search=config.selection.search,
        ridge=config.selection.ridge,
        feature_norm=config.selection.feature_norm,
        fisher_scale=config.selection.fisher_scale,
        beta=config.beta,
        replacement=config.selection.replacement,
    )
    n = config.num_negatives if kind.most is None else min(kind.most, config.num_negatives)
    return Method(
        name=config.method,
        num_negatives=largest_pool if criterion == "all" else n,
        selection=settings,
        beta=config.beta,
        sft_weight=config.sft_weight,
        graded=config.method == "odpo" and config.odpo.offset == "score",
        odpo_alpha=config.odpo.alpha,
        frozen_features=config.selection.features == "reference" and settings.needs_features,
    )


def unread(config: ConfigDict) -> list[str]:
    """Returns the settings that nothing reads in a training with this configuration."""
    kind = KINDS[config.method]
    criterion = CRITERIA[kind.criterion or config.selection.criterion]
    chosen = criterion is not CRITERIA["all"] and kind.most != 0
    lora = bool(config.model.lora.rank or config.model.lora.path)
    design = (
        "selection.search selection.ridge selection.feature_norm selection.fisher_scale "
        "selection.features selection.pooling"
    )
    read = {
        "selection.criterion": not kind.criterion,
        design: criterion.design is not None and kind.most != 0,
        "selection.replacement": criterion.weighted,
        "selection.refresh": chosen,
        "num_negatives": chosen and kind.most is None,
        "odpo.offset odpo.alpha": config.method == "odpo",
        "beta model.reference_path": kind.reference,
        "model.lora.alpha model.lora.targets model.lora.base": lora,
        "model.scratch.": not config.model.path,
        "train.epochs": not config.train.steps,
        "device_memory_gb": config.dry_run,
    }
    return [name for names, is_read in read.items() if not is_read for name in names.split()]
