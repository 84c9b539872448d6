"""Metrics of a policy on the full candidate lists of a split."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mass_dpo_jax import metrics


def evaluate_logps(
    logps: np.ndarray, ref_logps: np.ndarray | None, valid: np.ndarray, beta: float
) -> dict[str, float]:
    """Both rankings and TRL's reward metrics.

    Args:
      logps: float32 `[M, C]`, chosen first.
      ref_logps: the reference's, or None where there is none. Where it is the policy itself, pass
        None too: its log-ratios are rounding noise.
      valid: bool `[M, C]`.
      beta: the factor from log-ratios to rewards.

    Returns:
      `policy/*` and, with a reference, `reward/*`, each with `*_se`; and `rewards/*`.
    """
    found = metrics.ranking(logps, valid, "policy")
    if ref_logps is not None:
        rewards = np.float32(beta) * (logps - ref_logps)
        found |= metrics.ranking(rewards, valid, "reward")
        found |= metrics.reward_metrics(rewards, valid)
    return found


def names(reference: bool) -> list[str]:
    """The metrics of `evaluate_logps`, without their errors, with a reference or without."""
    logps = np.zeros((1, 2), np.float32)
    found = evaluate_logps(logps, logps if reference else None, np.ones((1, 2), bool), 1.0)
    return [name for name in found if not name.endswith("_se")]


def gains(after: np.ndarray, before: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """How much the policy's ranking of the same examples improved, with paired standard errors."""
    values = [
        metrics.per_example_ranking(metrics.per_example_rank(x, valid)) for x in (after, before)
    ]
    found = {}
    for name in values[0]:
        found[f"policy/{name}"], found[f"policy/{name}_se"] = metrics.paired_difference(
            values[0][name], values[1][name]
        )
    return found


def line(found: Mapping[str, float]) -> str:
    """The headline figures in one line of text, in per cent."""
    parts = []
    for prefix in ("policy", "reward"):
        if f"{prefix}/accuracy" in found:
            parts.append(
                f"{prefix} accuracy {100 * found[f'{prefix}/accuracy']:.1f} "
                f"± {100 * found[f'{prefix}/accuracy_se']:.1f}%, mrr {found[f'{prefix}/mrr']:.3f}"
            )
    if "rewards/margins" in found:
        parts.append(f"margin {found['rewards/margins']:.3f}")
    return "; ".join(parts)
