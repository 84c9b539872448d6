"""Ranking and reward metrics over a split, with standard errors. NumPy, outside `jit`.

Arrays are [M, C]: M examples, C candidates of each, the chosen response in column 0. `valid` says
which candidates exist; the others may hold anything. *Relevant* are the candidates that the data
calls chosen: the first, and any that are as good as it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

__all__ = [
    "Lists",
    "evaluate_logps",
    "metric_names",
    "paired_difference",
    "per_example_gain_ndcg",
    "per_example_items",
    "per_example_metrics",
    "per_example_rank",
    "per_example_ranking",
    "ranking",
    "ranking_gains",
    "reward_metrics",
    "standard_error",
    "summarize",
]

CUTOFFS = (1, 3, 5, 10)  # The default of `eval.cutoffs`.


class Lists(NamedTuple):
    """What the data says about the candidates that are ranked.

    Attributes:
        valid: bool [M, C], True for the candidates that exist.
        relevant: bool [M, C], which of them the data calls chosen; None: the first alone.
        grades: float [M, C], how good they are, larger for better; None where the data has none.
        items: int [M, C], a number that equal responses of all lists share; None where responses
            are not items that several lists have.
    """

    valid: np.ndarray
    relevant: np.ndarray | None = None
    grades: np.ndarray | None = None
    items: np.ndarray | None = None

    @property
    def compared(self) -> np.ndarray:
        """The chosen response and those below it: what rewards are compared over, bool [M, C]."""
        if self.relevant is None:
            return self.valid
        return self.valid & (~self.relevant | (np.arange(self.valid.shape[1]) == 0))


def per_example_rank(
    scores: Float[np.ndarray, "M C"], valid: Bool[np.ndarray, "M C"]
) -> Integer[np.ndarray, " M"]:
    """Ranks the chosen response among the candidates: 1 is best.

    The rank is 1 + the number of negatives whose score is not below the chosen one's, compared in
    float32: ties count against the model, and so does every comparison with NaN, so a chosen
    response whose score is NaN is last.

    Raises:
        ValueError: shapes differ, or a row's chosen response is not valid.
    """
    scores, valid = _check(scores, valid)
    below = scores[:, 1:] < scores[:, :1]
    return 1 + np.sum(valid[:, 1:] & ~below, axis=1)


def per_example_ranking(
    ranks: Integer[np.ndarray, " M"], cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Float[np.ndarray, " M"]]:
    r"""Computes ranking metrics of examples with one relevant candidate, in float64.

    With that at rank $r$: `accuracy` is 1 where r = 1; `mrr` is 1/r;
    `recall@k` is 1 where $r \le k$; `ndcg@k` is $1 / \log_2(1 + r)$ where $r \le k$, else 0.
    """
    values = {"accuracy": (ranks == 1).astype(np.float64), "mrr": 1.0 / ranks}
    for k in cutoffs:
        values[f"recall@{k}"] = (ranks <= k).astype(np.float64)
        values[f"ndcg@{k}"] = np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)
    return values


def per_example_metrics(
    scores: Float[np.ndarray, "M C"], lists: Lists, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Float[np.ndarray, " M"]]:
    """Computes all ranking metrics of every example, in float64.

    Those of `per_example_ranking`; with several relevant candidates, `accuracy` is 1 where one of
    them is first, `mrr` is 1 over the rank of the first of them, `recall@k` is the share of them in
    the first k, and `ndcg@k` is `gain_ndcg@k` of grades 1 and 0. With grades also `gain_ndcg@k` and
    `map`, average precision: the mean, over the relevant candidates, of the share of relevant ones
    among all ranked down to each.

    Args:
        scores: values that rank the candidates, compared in float32.
        lists: what the data says of them.
        cutoffs: the k; one above C is left out.

    Raises:
        ValueError: shapes differ, or a row's chosen response is not valid.
    """
    scores, valid = _check(scores, lists.valid)
    cutoffs = [k for k in cutoffs if k <= scores.shape[1]]
    if lists.relevant is None:
        values = per_example_ranking(per_example_rank(scores, valid), cutoffs)
        precision = values["mrr"]
    else:
        relevant = valid & lists.relevant
        ranked = np.take_along_axis(relevant, _rank_worst(scores, valid, relevant), axis=1)
        found, count = np.cumsum(ranked, axis=1), relevant.sum(axis=1)
        values = per_example_ranking(1 + ranked.argmax(axis=1), [])
        ndcg = per_example_gain_ndcg(scores, valid, relevant.astype(np.float64), cutoffs)
        for k in cutoffs:
            values[f"recall@{k}"] = found[:, k - 1] / count
            values[f"ndcg@{k}"] = ndcg[f"gain_ndcg@{k}"]
        precision = (ranked * found / (1 + np.arange(scores.shape[1]))).sum(axis=1) / count
    if lists.grades is not None:
        values["map"] = precision
        values |= per_example_gain_ndcg(scores, valid, lists.grades, cutoffs)
    return values


def per_example_gain_ndcg(
    scores: Float[np.ndarray, "M C"],
    valid: Bool[np.ndarray, "M C"],
    grades: Float[np.ndarray, "M C"],
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, Float[np.ndarray, " M"]]:
    r"""Computes the NDCG of every example's graded list, in float64, as `gain_ndcg@k`.

    The candidate at rank $r \le k$ adds $g / \log_2(1 + r)$; the sum is divided by its largest
    value over all orders. Gains are linear, as in trec_eval: $g$ is the grade minus the lowest of
    the list, so grades may be negative, and a constant added to all changes nothing. The value of a
    list of equal grades is 1.

    Of equal scores, the lower grade comes first: ties count against the model. So do scores that
    are NaN: their candidates come first if their grade is the lowest of the list, else last.

    Args:
        scores: values that rank the candidates, compared in float32.
        valid: True for the candidates that exist.
        grades: how good they are, larger for better.
        cutoffs: the k; one above C is left out.

    Raises:
        ValueError: shapes differ, or a row's chosen response is not valid.
    """
    scores, valid = _check(scores, valid)
    if np.shape(grades) != scores.shape:
        raise ValueError(f"expected grades {scores.shape}: {np.shape(grades)}")
    # Grades of missing candidates may be anything. They have no gain, and stand last.
    present = np.where(valid, np.asarray(grades, np.float64), np.inf)
    gains = np.where(valid, present - present.min(axis=1, keepdims=True), 0.0)
    order = _rank_worst(scores, valid, gains)
    ranked, ideal = np.take_along_axis(gains, order, axis=1), -np.sort(-gains, axis=1)
    discounts = 1.0 / np.log2(2.0 + np.arange(scores.shape[1]))
    values = {}
    for k in cutoffs:
        if k <= scores.shape[1]:
            reached, best = ((x * discounts)[:, :k].sum(axis=1) for x in (ranked, ideal))
            values[f"gain_ndcg@{k}"] = np.where(best > 0, reached / np.where(best > 0, best, 1), 1)
    return values


def per_example_items(
    scores: Float[np.ndarray, "M C"], lists: Lists
) -> dict[str, Float[np.ndarray, " M"]]:
    """Computes which items are ranked first, where responses are items of a catalogue, in float64.

    The mean of `coverage` is the share of all items in the lists that are ranked first in some
    list. That is no mean over lists, so the values are the jackknife's pseudo-values, shifted to
    have this mean: their standard error is the jackknife's, taking the items in the lists as given.
    `popularity` is the share of the *other* lists in which the item ranked first is relevant.

    Args:
        scores: values that rank the candidates. Of equal ones, those not relevant come first.
        lists: what the data says about them, with `items`.

    Raises:
        ValueError: shapes differ, or a row's chosen response is not valid.
    """
    assert lists.items is not None
    scores, valid = _check(scores, lists.valid)
    relevant = np.zeros_like(valid) if lists.relevant is None else valid & lists.relevant
    relevant[:, 0] = True
    first = _rank_worst(scores, valid, relevant)[:, :1]
    item = np.take_along_axis(lists.items, first, axis=1)[:, 0]
    is_relevant = np.take_along_axis(relevant, first, axis=1)[:, 0]
    times_relevant = np.bincount(lists.items[relevant], minlength=item.max() + 1)
    others, times_first = len(item) - 1, np.bincount(item)
    # Without a list there is one item less if it is first in that list alone.
    alone, num_items = times_first[item] == 1, len(np.unique(lists.items[valid]))
    covered = np.count_nonzero(times_first) + others * (alone - alone.mean())
    return {
        "coverage": covered / num_items,
        "popularity": (times_relevant[item] - is_relevant) / max(1, others),
    }


def ranking(
    scores: Float[np.ndarray, "M C"],
    valid: Bool[np.ndarray, "M C"],
    prefix: str,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, float]:
    """Computes ranking metrics of a split in which only the first candidates are relevant.

    Args:
        scores: values that rank the candidates: summed log-probabilities (`policy`) or rewards
            (`reward`).
        valid: True for the candidates that exist.
        prefix: precedes every name, with a slash between.
        cutoffs: the k of Recall@k and NDCG@k; one above C is left out.

    Returns:
        The mean of every metric of `per_example_ranking` over the examples, and under NAME_se its
        standard error.
    """
    return summarize(per_example_metrics(scores, Lists(valid), cutoffs), prefix)


def reward_metrics(
    rewards: Float[np.ndarray, "M C"], valid: Bool[np.ndarray, "M C"]
) -> dict[str, float]:
    """Computes TRL's reward metrics for several negatives, and the margin to the hardest of them.

    Every example counts once: a quantity is first averaged over its negatives. An example without
    negatives counts in `rewards/chosen` only.

    Args:
        rewards: beta times the log-ratios, or what else the loss takes for rewards.
        valid: True for the candidates that exist.

    Returns:
        `rewards/chosen` and `rewards/rejected`, means; `rewards/accuracies`, the share of negatives
        whose reward is below the chosen one's; `rewards/margins`, chosen minus the mean negative;
        `rewards/margins_hard`, chosen minus the largest negative; 0 where no example has negatives.
        Under NAME_se, the standard error of each.
    """
    rewards, valid = _check(rewards, valid)
    has_negatives = valid[:, 1:].any(axis=1)
    present = valid[has_negatives, 1:]
    chosen = rewards[has_negatives, :1].astype(np.float64)
    rejected = np.where(present, rewards[has_negatives, 1:], 0.0).astype(np.float64)
    count = present.sum(axis=1)
    mean_rejected = rejected.sum(axis=1) / count
    hardest = np.max(rejected, axis=1, where=present, initial=-np.inf)
    wins = (present & (rejected < chosen)).sum(axis=1) / count

    values = {
        "rewards/chosen": rewards[:, 0].astype(np.float64),
        "rewards/rejected": mean_rejected,
        "rewards/accuracies": wins,
        "rewards/margins": chosen[:, 0] - mean_rejected,
        "rewards/margins_hard": chosen[:, 0] - hardest,
    }
    summary = {}
    for name, value in values.items():
        summary[name] = float(np.mean(value)) if len(value) else 0.0
        summary[f"{name}_se"] = standard_error(value)
    return summary


def standard_error(values: Shaped[np.ndarray, " M"]) -> float:
    """Computes the standard error of a mean: the sample standard deviation over sqrt(M).

    A single value says nothing about the spread: 0 instead of NaN keeps reports valid JSON.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired_difference(
    ours: Shaped[np.ndarray, " M"], theirs: Shaped[np.ndarray, " M"]
) -> tuple[float, float]:
    """Computes the mean of ours - theirs over the same examples, and its standard error.

    Args:
        ours: one metric of every example under one model.
        theirs: the same metric of the same examples, in the same order, under another.

    Raises:
        ValueError: shapes differ or there are no examples.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"expected two [M] arrays, M >= 1: {ours.shape}, {theirs.shape}")
    difference = ours - theirs
    return float(np.mean(difference)), standard_error(difference)


def evaluate_logps(
    logps: Float[np.ndarray, "M C"],
    rewards: Float[np.ndarray, "M C"] | None,
    lists: Lists,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, float]:
    """Computes both rankings and TRL's reward metrics of a policy on a split.

    Args:
        logps: the policy's summed log-probabilities in nats.
        rewards: its implicit rewards, such as beta times log-ratios; None where there are none.
            Where the policy is the reference, pass None too: its log-ratios are rounding noise.
        lists: what the data says of the candidates.
        cutoffs: the k of recall and NDCG; one above C is left out.

    Returns:
        `policy/*` and, with rewards, `reward/*`, each with `*_se`; and `rewards/*`. With items
        `chosen/*` too: those of `per_example_items` where the chosen responses are ranked first.
    """
    rankings = {"policy": logps}
    if rewards is not None:
        rankings["reward"] = rewards
    values: dict[str, float] = {}
    for prefix, scores in rankings.items():
        values |= summarize(per_example_metrics(scores, lists, cutoffs), prefix)
        if lists.items is not None:
            values |= summarize(per_example_items(scores, lists), prefix)
    if rewards is not None:
        values |= reward_metrics(rewards, lists.compared)
    if lists.items is not None:
        chosen_first = np.zeros_like(logps)
        chosen_first[:, 0] = 1
        values |= summarize(per_example_items(chosen_first, lists), "chosen")
    return values


def metric_names(
    has_rewards: bool, candidates: int, graded: bool, cutoffs: Sequence[int] = CUTOFFS
) -> list[str]:
    """Lists the metrics of `evaluate_logps`, without standard errors and metrics of items.

    Args:
        has_rewards: whether there are rewards.
        candidates: C, the most candidates of an example.
        graded: whether they have grades.
        cutoffs: the k of recall and NDCG.
    """
    logps = np.zeros((1, candidates), np.float32)
    lists = Lists(np.ones(logps.shape, bool), grades=logps if graded else None)
    values = evaluate_logps(logps, logps if has_rewards else None, lists, cutoffs)
    return [name for name in values if not name.endswith("_se")]


def ranking_gains(
    after: Float[np.ndarray, "M C"],
    before: Float[np.ndarray, "M C"],
    lists: Lists,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, float]:
    """Computes how much a policy's ranking of the same examples improved.

    Args:
        after: log-probabilities after training.
        before: log-probabilities before it.
        lists: what the data says of the candidates.
        cutoffs: the k of recall and NDCG; one above C is left out.

    Returns:
        The mean difference of every metric of `per_example_metrics` and, with items, of
        `per_example_items` under `policy/NAME`, and its paired standard error under
        `policy/NAME_se`.
    """
    ours, theirs = (per_example_metrics(x, lists, cutoffs) for x in (after, before))
    if lists.items is not None:
        ours |= per_example_items(after, lists)
        theirs |= per_example_items(before, lists)
    gains = {}
    for name in ours:
        gains[f"policy/{name}"], gains[f"policy/{name}_se"] = paired_difference(
            ours[name], theirs[name]
        )
    return gains


def summarize(values: dict[str, Float[np.ndarray, " M"]], prefix: str) -> dict[str, float]:
    """Returns the mean of every metric under PREFIX/NAME, and its error under PREFIX/NAME_se."""
    summary = {}
    for name, value in values.items():
        summary[f"{prefix}/{name}"] = float(np.mean(value))
        summary[f"{prefix}/{name}_se"] = standard_error(value)
    return summary


def _rank_worst(scores: np.ndarray, valid: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Sorts candidates by score, the worst order that ties and NaN allow; int [M, C].

    Of equal scores the smaller gain comes first. Candidates whose score is NaN are first if they
    have no gain, else last. What does not exist comes after all others.
    """
    scores = np.where(np.isnan(scores), np.where(gains == 0, np.inf, -np.inf), scores)
    return np.lexsort((gains, -scores, ~valid), axis=1)


def _check(
    scores: Float[np.ndarray, "M C"], valid: Bool[np.ndarray, "M C"]
) -> tuple[Float[np.ndarray, "M C"], Bool[np.ndarray, "M C"]]:
    scores, valid = np.asarray(scores, np.float32), np.asarray(valid, bool)
    if scores.shape != valid.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(f"expected two [M, C] arrays, M >= 1: {scores.shape}, {valid.shape}")
    if not valid[:, 0].all():
        raise ValueError(f"row {int(np.argmin(valid[:, 0]))}: the chosen response is not valid")
    return scores, valid
