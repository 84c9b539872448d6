"""Training methods: which negatives of a pool the loss sees, and the loss itself.

`METHODS` has one entry for every value of `config.method`; `config.METHOD_SUMMARIES` says in a line
what each one does, without importing JAX. Random negatives are redrawn as `selection.refresh` says:
`once` draws them once per example, as the authors of S-DPO do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import losses
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings
from mass_dpo_jax.selection.registry import CRITERIA


class Responses(NamedTuple):
    """The input of a loss: the chosen response in column 0, then n negatives.

    Attributes:
        logps: summed log-probabilities under the policy, float32, in nats.
        log_ratios: log-probabilities minus those under the reference; 0 where `valid` is False.
        lengths: lengths in tokens.
        valid: whether each of the responses exists.
        grades: how good the data says responses are, larger for better (`Tokens.grades`); None
            where it says only which one is chosen.
        weights: weights of negatives drawn from the policy's pool weights; else None.
        pool_loss: Plackett-Luce loss of the whole pool, with `weights`.
        log_weights: how many responses each negative stands for (`Tokens.log_weights`); None where
            all stand for themselves.
    """

    logps: Float[Array, "B 1+n"]
    log_ratios: Float[Array, "B 1+n"]
    lengths: Int[Array, "B 1+n"]
    valid: Bool[Array, "B 1+n"]
    grades: Float[Array, "B 1+n"] | None
    weights: Float[Array, "B n"] | None
    pool_loss: Float[Array, " B"] | None
    log_weights: Float[Array, "B 1+n"] | None = None


Loss = Callable[[Responses, "Method"], Float[Array, " B"]]


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """The meaning of one value of `config.method`.

    Attributes:
        loss: the loss of each prompt.
        description: the loss in words, for model cards.
        criterion: a name in `registry.CRITERIA`; "" for `config.selection.criterion`.
        uses_reference: whether the loss compares the policy with a reference.
        max_negatives: upper bound on `config.num_negatives`; None for no bound.
        uses_order: whether the loss is that of a graded list: its responses include those as good
            as the chosen one, which other losses never see.
        uses_draws_of_data: whether the loss is a function of a sum over negatives that a sum over
            drawn ones with `Tokens.log_weights` estimates.
    """

    loss: Loss
    description: str
    criterion: str = "random"
    uses_reference: bool = True
    max_negatives: int | None = None
    uses_order: bool = False
    uses_draws_of_data: bool = False


def _plackett_luce(x: Responses, m: Method) -> Array:
    return losses.plackett_luce(x.log_ratios, x.valid, m.beta, x.log_weights)


def _sampled_plackett_luce(x: Responses, m: Method) -> Array:
    assert x.weights is not None and x.pool_loss is not None
    return losses.sampled_plackett_luce(x.log_ratios, x.valid, m.beta, x.weights, x.pool_loss)


def _odpo(x: Responses, m: Method) -> Array:
    assert x.grades is not None
    difference = x.grades[:, :1] - x.grades[:, 1:]
    margins = m.odpo_alpha * jnp.log(jnp.where(x.valid[:, 1:], difference, 1.0))
    return losses.odpo(x.log_ratios, x.valid, m.beta, margins)


def _graded(loss: Callable[..., Array]) -> Loss:
    """Makes the method's loss of one that takes log-ratios and grades."""

    def compute(x: Responses, m: Method) -> Array:
        assert x.grades is not None
        return loss(x.log_ratios, x.valid, m.beta, x.grades)

    return compute


def _pl_rank(x: Responses, m: Method) -> Array:
    assert x.grades is not None
    return losses.pl_rank(x.log_ratios, x.valid, m.beta, x.grades, m.rank_top)


PLACKETT_LUCE = (
    "The loss of a prompt is the Plackett-Luce negative log-likelihood that the chosen response is "
    "the best of those in the set: -log( exp(r_chosen) / (exp(r_chosen) + sum_i exp(r_i)) )"
)
METHODS = {
    "mass_dpo": MethodSpec(
        _plackett_luce,
        f"{PLACKETT_LUCE}, the sum over the selected negatives.",
        criterion="",
        uses_draws_of_data=True,
    ),
    "pl_sampled": MethodSpec(
        _sampled_plackett_luce,
        f"{PLACKETT_LUCE}, the sum over the whole pool; its gradient is estimated, without bias, "
        "from negatives drawn with the pool's softmax weights.",
        criterion="sampled",
        uses_draws_of_data=True,
    ),
    "pl_all": MethodSpec(
        _plackett_luce,
        f"{PLACKETT_LUCE}, the sum over all negatives of the pool.",
        criterion="all",
        uses_draws_of_data=True,
    ),
    "sdpo": MethodSpec(
        _plackett_luce,
        f"{PLACKETT_LUCE}, the sum over random negatives (S-DPO, Softmax DPO).",
        uses_draws_of_data=True,
    ),
    "dpo": MethodSpec(
        lambda x, m: losses.dpo(x.log_ratios, x.valid, m.beta),
        "The loss of a prompt is DPO's with one random negative: "
        "-log sigmoid(r_chosen - r_negative).",
        max_negatives=1,
    ),
    "dpo_k": MethodSpec(
        lambda x, m: losses.dpo_k(x.log_ratios, x.valid, m.beta),
        "The loss of a prompt is the mean over random negatives of DPO's: "
        "-log sigmoid(r_chosen - r_i).",
    ),
    "dmpo": MethodSpec(
        lambda x, m: losses.dmpo(x.log_ratios, x.valid, m.beta),
        "The loss of a prompt is DPO's against the average of random negatives (DMPO): "
        "-log sigmoid(r_chosen - mean_i r_i).",
    ),
    "odpo": MethodSpec(
        _odpo,
        "The loss of a prompt is the mean over random negatives of DPO's with an offset (ODPO): "
        "-log sigmoid(r_chosen - r_i - d_i), where d_i = alpha * log of how much better the "
        "chosen response was graded.",
    ),
    "mppo": MethodSpec(
        lambda x, m: losses.mppo(x.logps, x.lengths, x.valid),
        "There is no reference. The loss of a prompt is -log sigmoid(n * p_chosen - sum_i p_i), "
        "where p is a response's likelihood per token, a geometric mean (MPPO).",
        uses_reference=False,
    ),
    "pl_rank": MethodSpec(
        _pl_rank,
        "The loss of a prompt is the Plackett-Luce negative log-likelihood of its responses' "
        "ranking: the sum over responses of -log( exp(r_i) / (exp(r_i) + sum_j exp(r_j)) ), the "
        "sum over those that are worse than i.",
        criterion="all",
        uses_order=True,
    ),
    "lipo_lambda": MethodSpec(
        _graded(losses.lipo_lambda),
        "The loss of a prompt is the sum of DPO's over all pairs of responses with different "
        "grades, each weighted by how much exchanging the two would change the list's DCG "
        "(LiPO-lambda).",
        criterion="all",
        uses_order=True,
    ),
    "tree_po": MethodSpec(
        _graded(losses.tree_po),
        "The loss of a prompt is the mean of DPO's over all pairs of responses of its tree with "
        "different grades, each weighted by how much exchanging the two would change the list's "
        "DCG (Tree Preference Optimization, without its adaptive step reward).",
        criterion="all",
        uses_order=True,
    ),
    "sft": MethodSpec(
        lambda x, m: losses.supervised(x.logps[:, 0], x.lengths[:, 0]),
        "Supervised fine-tuning: the loss is the negative log-likelihood per token of the "
        "chosen response. There are no negatives and no reference.",
        uses_reference=False,
        max_negatives=0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method with its settings. Hashable.

    Attributes:
        name: a key of `METHODS`.
        num_negatives: n, the negatives of each pool that the loss sees; 0 for sft.
        selection: the settings that they are chosen by.
        beta: factor from log-ratios to rewards.
        sft_weight: weight of a supervised term on the chosen response.
        uses_scores: whether the data's scores are the grades (odpo by score).
        odpo_alpha: margin per log difference of grades.
        rank_top: places of a ranking that count, for pl_rank; 0: all.
        frozen_features: whether criteria see the reference's hidden states.
    """

    name: str
    num_negatives: int
    selection: Settings
    beta: float
    sft_weight: float
    uses_scores: bool
    odpo_alpha: float
    rank_top: int
    frozen_features: bool

    @property
    def is_supervised(self) -> bool:
        """Whether the method trains on the chosen response alone."""
        return self.num_negatives == 0

    @property
    def uses_whole_pool(self) -> bool:
        """Whether every negative is trained on; n is then the size of the largest pool."""
        return self.selection.criterion == "all"

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the reference's log-probabilities."""
        return METHODS[self.name].uses_reference

    @property
    def uses_order(self) -> bool:
        """Whether the loss sees responses that are as good as the chosen one."""
        return METHODS[self.name].uses_order

    @property
    def uses_draws_of_data(self) -> bool:
        """Whether the loss can be corrected for how the data's negatives were drawn."""
        return METHODS[self.name].uses_draws_of_data

    @property
    def uses_draws(self) -> bool:
        """Whether the loss needs the weights of negatives drawn at the current policy."""
        return self.selection.criterion == "sampled"

    @property
    def scores_pools(self) -> bool:
        """Whether choosing the negatives takes a pass over the whole pools."""
        return self.selection.needs_scoring and not self.is_supervised

    def loss(self, x: Responses) -> Float[Array, " B"]:
        """Computes the loss of each prompt."""
        loss = METHODS[self.name].loss(x, self)
        if self.sft_weight:
            loss += self.sft_weight * losses.supervised(x.logps[:, 0], x.lengths[:, 0])
        return loss

    def rewards(self, x: Responses) -> Float[Array, "B 1+n"]:
        """Computes what the loss takes for the responses' rewards."""
        if self.uses_reference:
            return self.beta * x.log_ratios
        return losses.likelihood_per_token(x.logps, x.lengths, x.valid)


def make_method(config: ConfigDict, largest_pool: int) -> Method:
    """Returns the method of a configuration.

    Args:
        config: the configuration; `method`, `num_negatives`, `beta`, `sft_weight`, `selection`,
            `odpo` and `pl_rank` are read.
        largest_pool: the most negatives that any pool has.

    Raises:
        UserError: settings do not go together.
    """
    spec = METHODS[config.method]
    criterion = spec.criterion or config.selection.criterion
    if criterion == "sampled" and config.selection.refresh != "step":
        raise UserError(
            f"config.selection.refresh={config.selection.refresh}: config.method=pl_sampled draws "
            "at every step (its weights are those of the current policy); expected step"
        )
    settings = Settings(
        criterion=criterion,
        ridge=config.selection.ridge,
        feature_norm=config.selection.feature_norm,
        fisher_scale=config.selection.fisher_scale,
        beta=config.beta,
        draw=config.selection.draw,
        top=config.selection.top,
    )
    bounds = [config.num_negatives, spec.max_negatives]
    n = min(bound for bound in bounds if bound is not None)
    return Method(
        name=config.method,
        num_negatives=largest_pool if criterion == "all" else n,
        selection=settings,
        beta=config.beta,
        sft_weight=config.sft_weight,
        uses_scores=config.method == "odpo" and config.odpo.offset == "score",
        odpo_alpha=config.odpo.alpha,
        rank_top=config.pl_rank.top,
        frozen_features=config.selection.features == "reference" and settings.needs_features,
    )


def find_unread(config: ConfigDict) -> list[str]:
    """Returns the settings that nothing reads in a training with this configuration.

    An entry that ends with a dot stands for a whole group.
    """
    spec = METHODS[config.method]
    criterion = CRITERIA[spec.criterion or config.selection.criterion]
    selects = criterion is not CRITERIA["all"] and spec.max_negatives != 0
    uses_lora = bool(config.model.lora.rank or config.model.lora.path)
    is_design = criterion.design is not None and spec.max_negatives != 0
    draws_by_features = criterion.weighted and config.selection.draw in config_lib.FEATURE_DRAWS
    reads_features = (criterion.needs_features and spec.max_negatives != 0) or draws_by_features
    by_design = config.selection.prompts == "design"
    is_read = {
        "selection.criterion": not spec.criterion,
        "selection.ridge": is_design or by_design,
        "selection.fisher_scale": is_design,
        "selection.feature_norm selection.pooling": reads_features or by_design,
        "selection.features": reads_features,
        "selection.prompt_budget selection.prompt_refresh": config.selection.prompts != "all",
        "selection.draw": criterion.weighted,
        "selection.top": criterion is CRITERIA["topk"],
        "selection.refresh": selects,
        "num_negatives": selects and spec.max_negatives is None,
        # Other negatives are the same whenever they are chosen with the same weights.
        "log.draw_noise_every": criterion in (CRITERIA["random"], CRITERIA["sampled"])
        and config.selection.refresh == "step"
        and spec.max_negatives != 0,
        "odpo.offset odpo.alpha": config.method == "odpo",
        "pl_rank.top": config.method == "pl_rank",
        "beta model.reference_path": spec.uses_reference,
        "model.lora.alpha model.lora.rank_stabilized model.lora.targets": uses_lora,
        "model.lora.base model.lora.dropout": uses_lora,
        "model.scratch.": not config.model.path,
        "train.reuse_scoring": not config.train.responses_at_a_time
        and not config.model.lora.dropout,
        "train.epochs": not config.train.steps,
        "device_memory_gb": config.dry_run,
    }
    return [name for names, read in is_read.items() if not read for name in names.split()]
