"""Ranking and reward metrics over a split, with standard errors. NumPy, outside of `jit`.

Arrays are [M, C]: M examples, C candidates of each, the chosen response in column 0. `valid` says
which candidates exist; the others may hold anything.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "evaluate_logps",
    "metric_names",
    "paired_difference",
    "per_example_rank",
    "per_example_ranking",
    "ranking",
    "ranking_gains",
    "reward_metrics",
    "standard_error",
]

CUTOFFS = (1, 3)


def per_example_rank(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Rank of the chosen response among the candidates: 1 is best.

    The rank is 1 + the number of negatives whose score is not below the chosen one's, compared in
    float32: ties count against the model, and so does every comparison with NaN, so a chosen
    response whose score is NaN is last.

    Args:
        scores: [M, C].
        valid: bool [M, C].

    Returns:
        int64 [M].

    Raises:
        ValueError: shapes differ, or a row's chosen response is not valid.
    """
    scores, valid = _checked(scores, valid)
    below = scores[:, 1:] < scores[:, :1]
    return 1 + np.sum(valid[:, 1:] & ~below, axis=1)


def per_example_ranking(
    ranks: np.ndarray, cutoffs: tuple[int, ...] = CUTOFFS
) -> dict[str, np.ndarray]:
    r"""Metrics of every example: float64 [M] each.

    With one relevant candidate at rank $r$: `accuracy` is 1 where r = 1; `mrr` is 1/r;
    `recall@k` is 1 where $r \le k$; `ndcg@k` is $1 / \log_2(1 + r)$ where
    $r \le k$, else 0.
    """
    values = {"accuracy": (ranks == 1).astype(np.float64), "mrr": 1.0 / ranks}
    for k in cutoffs:
        values[f"recall@{k}"] = (ranks <= k).astype(np.float64)
        values[f"ndcg@{k}"] = np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)
    return values


def ranking(
    scores: np.ndarray, valid: np.ndarray, prefix: str, cutoffs: tuple[int, ...] = CUTOFFS
) -> dict[str, float]:
    """Ranking metrics of a split.

    Args:
        scores: [M, C], what the candidates are ranked by: summed log-probabilities (`policy`) or
            log-ratios to the reference (`reward`).
        valid: bool [M, C].
        prefix: goes before every name, with a slash between.
        cutoffs: the k of Recall@k and NDCG@k.

    Returns:
        The mean of every metric of `per_example_ranking` over the examples, and under NAME_se its
        standard error.
    """
    values = per_example_ranking(per_example_rank(scores, valid), cutoffs)
    summary = {}
    for name, value in values.items():
        summary[f"{prefix}/{name}"] = float(np.mean(value))
        summary[f"{prefix}/{name}_se"] = standard_error(value)
    return summary


def reward_metrics(rewards: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """TRL's reward metrics, for several negatives, and the margin to the hardest of them.

    Every example counts once: a quantity is first averaged over its negatives. An example without
    negatives counts in `rewards/chosen` only.

    Args:
        rewards: [M, C], beta times the log-ratios.
        valid: bool [M, C].

    Returns:
        `rewards/chosen` and `rewards/rejected`, means; `rewards/accuracies`, the share of negatives
        whose reward is below the chosen one's; `rewards/margins`, chosen minus the mean negative;
        `rewards/margins_hard`, chosen minus the largest negative. 0 where no example has negatives.
    """
    rewards, valid = _checked(rewards, valid)
    some = valid[:, 1:].any(axis=1)
    present = valid[some, 1:]
    chosen = rewards[some, :1].astype(np.float64)
    rejected = np.where(present, rewards[some, 1:], 0.0).astype(np.float64)
    count = present.sum(axis=1)
    mean_rejected = rejected.sum(axis=1) / count
    hardest = np.max(rejected, axis=1, where=present, initial=-np.inf)
    wins = (present & (rejected < chosen)).sum(axis=1) / count

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values)) if some.any() else 0.0

    return {
        "rewards/chosen": float(np.mean(rewards[:, 0], dtype=np.float64)),
        "rewards/rejected": mean(mean_rejected),
        "rewards/accuracies": mean(wins),
        "rewards/margins": mean(chosen[:, 0] - mean_rejected),
        "rewards/margins_hard": mean(chosen[:, 0] - hardest),
    }


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of [M] values: their standard deviation (M - 1) over sqrt(M).

    One value says nothing about its spread: 0, not NaN, so that reports stay valid JSON.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean of ours - theirs over the same examples, and its standard error.

    Args:
        ours: [M], one metric of every example under one model.
        theirs: [M], the same metric of the same examples in the same order under another.

    Raises:
        ValueError: shapes differ or there are no examples.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"expected two [M] arrays, M >= 1: {ours.shape}, {theirs.shape}")
    difference = ours - theirs
    return float(np.mean(difference)), standard_error(difference)


def evaluate_logps(
    logps: np.ndarray, ref_logps: np.ndarray | None, valid: np.ndarray, beta: float
) -> dict[str, float]:
    """Computes both rankings and TRL's reward metrics of a policy on a split.

    Args:
        logps: float32 [M, C], the policy's summed log-probabilities in nats, chosen first.
        ref_logps: float32 [M, C], the reference's, or None where there is none. Where the policy
            is the reference, pass None too: its log-ratios are rounding noise.
        valid: bool [M, C].
        beta: factor from log-ratios to rewards.

    Returns:
        `policy/*` and, with a reference, `reward/*`, each with `*_se`; and `rewards/*`.
    """
    values = ranking(logps, valid, "policy")
    if ref_logps is not None:
        rewards = np.float32(beta) * (logps - ref_logps)
        values |= ranking(rewards, valid, "reward")
        values |= reward_metrics(rewards, valid)
    return values


def metric_names(has_reference: bool) -> list[str]:
    """Lists the metrics of `evaluate_logps` without their standard errors."""
    logps = np.zeros((1, 2), np.float32)
    values = evaluate_logps(logps, logps if has_reference else None, np.ones((1, 2), bool), 1.0)
    return [name for name in values if not name.endswith("_se")]


def ranking_gains(after: np.ndarray, before: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Computes how much a policy's ranking of the same examples improved.

    Args:
        after: float32 [M, C], log-probabilities after training.
        before: float32 [M, C], log-probabilities before it.
        valid: bool [M, C].

    Returns:
        The mean difference of every metric of `per_example_ranking`, under `policy/NAME`, and its
        paired standard error under `policy/NAME_se`.
    """
    ours, theirs = (per_example_ranking(per_example_rank(x, valid)) for x in (after, before))
    gains = {}
    for name in ours:
        gains[f"policy/{name}"], gains[f"policy/{name}_se"] = paired_difference(
            ours[name], theirs[name]
        )
    return gains


def _checked(scores: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, valid = np.asarray(scores, np.float32), np.asarray(valid, bool)
    if scores.shape != valid.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(f"expected two [M, C] arrays, M >= 1: {scores.shape}, {valid.shape}")
    if not valid[:, 0].all():
        raise ValueError(f"row {int(np.argmin(valid[:, 0]))}: the chosen response is not valid")
    return scores, valid
