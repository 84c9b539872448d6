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
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from mass_dpo_jax import losses
from mass_dpo_jax.selection import Settings


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
        log_weights: log of how many responses each negative stands for (`Tokens.log_weights`);
            None where each stands for itself alone.
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
        takes: the settings of `config.loss` that the method reads; others must have their default.
        uses_draws_of_data: whether the loss is a function of a sum over negatives that a sum over
            drawn ones with `Tokens.log_weights` estimates.
    """

    loss: Loss
    description: str
    criterion: str = "random"
    uses_reference: bool = True
    max_negatives: int | None = None
    uses_order: bool = False
    takes: tuple[str, ...] = ()
    uses_draws_of_data: bool = False


REWARD = ("reward", "reference")  # What all losses of rewards read.
LEAD = (*REWARD, "link", "margin")  # And losses of the chosen response's lead over negatives.


def _lead(aggregation: str) -> Loss:
    """Makes a method's loss from an aggregation of `losses.preference_loss`."""

    def compute(x: Responses, m: Method) -> Array:
        return losses.preference_loss(
            m.unscaled_rewards(x),
            x.valid,
            m.beta,
            aggregation,
            m.link,
            m.label_smoothing,
            m.margins(x),
        )

    return compute


def _sampled_plackett_luce(x: Responses, m: Method) -> Array:
    assert x.weights is not None and x.pool_loss is not None
    values = m.unscaled_rewards(x)  # Margins are constants: only the weights depend on them.
    return losses.sampled_plackett_luce(values, x.valid, m.beta, x.weights, x.pool_loss)


def _graded(loss: Callable[..., Array]) -> Loss:
    """Makes a method's loss from a function of log-ratios and grades."""

    def compute(x: Responses, m: Method) -> Array:
        assert x.grades is not None
        return loss(m.unscaled_rewards(x), x.valid, m.beta, x.grades)

    return compute


def _pl_rank(x: Responses, m: Method) -> Array:
    assert x.grades is not None
    return losses.pl_rank(m.unscaled_rewards(x), x.valid, m.beta, x.grades, m.rank_top)


PLACKETT_LUCE = (
    "The loss of a prompt is the Plackett-Luce negative log-likelihood that the chosen response is "
    "the best of those in the set: -log( exp(r_chosen) / (exp(r_chosen) + sum_i exp(r_i)) )"
)
METHODS = {
    "mass_dpo": MethodSpec(
        _lead("softmax"),
        f"{PLACKETT_LUCE}, the sum over the selected negatives.",
        criterion="",
        takes=LEAD,
        uses_draws_of_data=True,
    ),
    "pl_sampled": MethodSpec(
        _sampled_plackett_luce,
        f"{PLACKETT_LUCE}, the sum over the whole pool; its gradient is estimated, without bias, "
        "from negatives drawn with the pool's softmax weights.",
        criterion="sampled",
        takes=(*REWARD, "margin"),
        uses_draws_of_data=True,
    ),
    "pl_all": MethodSpec(
        _lead("softmax"),
        f"{PLACKETT_LUCE}, the sum over all negatives of the pool.",
        criterion="all",
        takes=LEAD,
        uses_draws_of_data=True,
    ),
    "sdpo": MethodSpec(
        _lead("softmax"),
        f"{PLACKETT_LUCE}, the sum over random negatives (S-DPO, Softmax DPO).",
        takes=LEAD,
        uses_draws_of_data=True,
    ),
    "dpo": MethodSpec(
        _lead("pairs"),
        "The loss of a prompt is DPO's with one random negative: "
        "-log sigmoid(r_chosen - r_negative).",
        max_negatives=1,
        takes=LEAD,
    ),
    "dpo_k": MethodSpec(
        _lead("pairs"),
        "The loss of a prompt is the mean over random negatives of DPO's: "
        "-log sigmoid(r_chosen - r_i).",
        takes=LEAD,
    ),
    "dmpo": MethodSpec(
        _lead("mean"),
        "The loss of a prompt is DPO's against the average of random negatives (DMPO): "
        "-log sigmoid(r_chosen - mean_i r_i).",
        takes=LEAD,
    ),
    "odpo": MethodSpec(
        _lead("pairs"),
        "The loss of a prompt is the mean over random negatives of DPO's with an offset (ODPO): "
        "-log sigmoid(r_chosen - r_i - d_i), where d_i = alpha * log of how much better the "
        "chosen response was graded.",
        takes=(*REWARD, "link"),
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
        takes=REWARD,
    ),
    "lipo_lambda": MethodSpec(
        _graded(losses.lipo_lambda),
        "The loss of a prompt is the sum of DPO's over all pairs of responses with different "
        "grades, each weighted by how much exchanging the two would change the list's DCG "
        "(LiPO-lambda).",
        criterion="all",
        uses_order=True,
        takes=REWARD,
    ),
    "tree_po": MethodSpec(
        _graded(losses.tree_po),
        "The loss of a prompt is the sum of DPO's over the pairs of responses of its tree with "
        "different grades, each weighted by how much exchanging the two would change the list's "
        "DCG, over the number of all pairs (Tree Preference Optimization, without its adaptive "
        "step reward).",
        criterion="all",
        uses_order=True,
        takes=REWARD,
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
        beta: factor from unscaled rewards to rewards.
        sft_weight: weight of a supervised term on the chosen response.
        link: see `losses.preference_loss`.
        label_smoothing: likewise.
        per_token: whether rewards are divided by the responses' lengths.
        uses_reference: whether rewards are of log-ratios to a reference, not of log-probabilities.
        margin: none, constant or grade.
        gamma: the constant margin.
        margin_alpha: factor from the log of a difference in grade to the margin.
        uses_scores: whether the data's scores are the grades of margins.
        rank_top: places of a ranking that count, for pl_rank; 0: all.
        frozen_features: whether criteria see the reference's hidden states.
    """

    name: str
    num_negatives: int
    selection: Settings
    beta: float
    sft_weight: float
    link: str
    label_smoothing: float
    per_token: bool
    uses_reference: bool
    margin: str
    gamma: float
    margin_alpha: float
    uses_scores: bool
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
        """Computes the responses' rewards in this loss; for one without, likelihoods per token."""
        if METHODS[self.name].takes:
            return self.beta * self.unscaled_rewards(x)
        return losses.likelihood_per_token(x.logps, x.lengths, x.valid)

    def unscaled_rewards(self, x: Responses) -> Float[Array, "B 1+n"]:
        """Computes rewards divided by beta, in nats or nats per token."""
        values = x.log_ratios if self.uses_reference else x.logps
        return values / jnp.maximum(x.lengths, 1) if self.per_token else values

    def implicit_rewards(
        self, logps: np.ndarray, ref_logps: np.ndarray | None, lengths: np.ndarray
    ) -> np.ndarray | None:
        """Computes the rewards of scored responses, float32 [M, C], by which they can be ranked.

        None where the reference is missing, or where they would rank as log-probabilities do.

        Args:
            logps: summed log-probabilities under the policy.
            ref_logps: under the reference; None where there is none, or where the policy is the
                reference.
            lengths: int [M, C], in tokens.
        """
        per_token = self.per_token and bool(METHODS[self.name].takes)
        if ref_logps is None and (self.uses_reference or not per_token):
            return None
        values = logps if ref_logps is None else logps - ref_logps
        if per_token:
            values = values / np.maximum(lengths, 1).astype(np.float32)
        return np.float32(self.beta) * values

    def margins(self, x: Responses) -> Float[Array, "B n"] | None:
        """Computes by how much the reward of each negative should be below the chosen one's.

        The log w of a drawn negative that stands for w responses is added: in a softmax it then
        counts w times.
        """
        margins = self._margins_of_settings(x)
        if x.log_weights is None:
            return margins
        log_weights = x.log_weights[:, 1:]
        return log_weights if margins is None else margins + log_weights

    def _margins_of_settings(self, x: Responses) -> Float[Array, "B n"] | None:
        if self.margin == "none":
            return None
        if self.margin == "constant":
            return jnp.full(x.valid[:, 1:].shape, self.gamma)
        assert x.grades is not None
        difference = x.grades[:, :1] - x.grades[:, 1:]
        return self.margin_alpha * jnp.log(jnp.where(x.valid[:, 1:], difference, 1.0))

    def scores(self, x: Responses) -> Float[Array, "B n"]:
        """Computes how far negatives' rewards, with their margins, are above the chosen one's.

        Criteria choose by those of the whole pool.
        """
        rewards, margins = self.beta * self.unscaled_rewards(x), self.margins(x)
        scores = rewards[:, 1:] - rewards[:, :1]
        return scores if margins is None else scores + margins
