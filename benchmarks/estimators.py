"""What a choice of n negatives does to a prompt's gradient, as arithmetic on Gram matrices.

With scores s_i = beta (log-ratio of negative i - that of the chosen response), p = softmax(s),
G_i the gradient of s_i and c = 1 - sigma(Z), the gradient of the Plackett-Luce loss on the pool is
g = c sum_i p_i G_i. Whatever trains on n negatives replaces c p by a weight vector v with at most
n entries that are not 0; its squared error is (v - c p)' K (v - c p), K_ij = G_i' G_j. So with K
known, the variance and the bias of every choice are sums over N numbers, without a model.

All figures are float64 and of one prompt. `measure` gives them all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mass_dpo_jax.selection import Pool, Selection, Settings
from mass_dpo_jax.selection.criteria import sampled

DRAWS = 4000  # Of a Monte Carlo estimate: its error is about 2 %.
CHUNK = 4096  # Sets that are looked at together.
SWEEPS = 3  # Passes of the search for a partition.


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt's pool of N negatives, C = 1 + N, the chosen response first.

    Attributes:
        logps: [C], nats, by the policy.
        ref_logps: [C], by the reference.
        gradients: [C, C], products of the gradients of the policy's logps.
        features: float32 [C, C], products of the mean-pooled hidden states, as criteria see them.
    """

    logps: np.ndarray
    ref_logps: np.ndarray
    gradients: np.ndarray
    features: np.ndarray

    def scores(self, beta: float) -> np.ndarray:
        rewards = beta * (self.logps - self.ref_logps)
        return rewards[1:] - rewards[0]

    def gram(self, beta: float) -> np.ndarray:
        """K [N, N], products of the gradients of scores."""
        k = self.gradients
        return beta**2 * (k[1:, 1:] - k[1:, :1] - k[:1, 1:] + k[0, 0])


def pool_weights(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p [N] and c; [..., N] gives [..., N] and [...]."""
    top = scores.max(-1, keepdims=True)
    odds = np.exp(scores - top)
    total = odds.sum(-1, keepdims=True)
    c = 1 / (1 + np.exp(-top) / total)  # sigma(log sum_i exp(s_i))
    return odds / total, c[..., 0]


def distances(gram: np.ndarray) -> np.ndarray:
    """Squared distances [N, N] of points with these products."""
    norms = np.diagonal(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)


def quadratic(gram: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """e' K e of each row e."""
    return np.einsum("...i,ij,...j->...", errors, gram, errors, optimize=True)


def independent(p: np.ndarray, gram: np.ndarray, n: int) -> float:
    """Variance of n independent draws from p, in units of c^2: tr Cov_p(G) / n."""
    return float(p @ distances(gram) @ p) / 2 / n


def one_per_cell(p: np.ndarray, gram: np.ndarray, cells: np.ndarray) -> float:
    """Variance of one draw from each cell, weighted by the cell's share of p, in units of c^2.

    Args:
        cells: int [N], which cell each negative is in.
    """
    together = cells[:, None] == cells[None, :]
    return float(p @ (distances(gram) * together) @ p) / 2


def partition(p: np.ndarray, gram: np.ndarray, n: int, shrink: float = 1.0) -> np.ndarray:
    """Cuts the pool into n cells with little of p_i p_j D_ij within them: cells int [N].

    Greedily, the largest sums first, then moves of single negatives. Of n independent draws in the
    metric it is made with, its draw never has more variance.

    Args:
        gram: products of whatever stands for gradients.
        shrink: the share of the metric that is `gram`'s, the rest being "all equally far".
    """
    total = independent(p, gram, 1)
    far = 2 * (1 - np.eye(len(p)))
    metric = shrink * distances(gram) / max(total, 1e-300) + (1 - shrink) * far
    ties = p[:, None] * p[None, :] * metric
    cells = np.full(len(p), -1)
    for _ in range(SWEEPS):
        for i in np.argsort(-ties.sum(1), kind="stable"):
            cells[i] = -1
            cells[i] = np.argmin([ties[i][cells == h].sum() for h in range(n)])
    return cells


def nearest(gram: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The cells of the centres: for each negative, which of them is nearest."""
    cells = np.argmin(distances(gram)[:, centres], axis=1)
    cells[centres] = np.arange(len(centres))
    return cells


def gumbel_weights(p: np.ndarray, n: int, rng: np.random.Generator, count: int) -> np.ndarray:
    """The weights [count, N] of an earlier draw without replacement, for the record.

    The n largest of log p + Gumbel noise; p_i over the probability to exceed the next one. They do
    not add up to 1, and for n = 1 their variance is infinite.
    """
    noisy = np.log(p) + rng.gumbel(size=(count, len(p)))
    kappa = np.sort(noisy, axis=1)[:, [-n - 1]]
    weights = p / -np.expm1(-np.exp(np.log(p) - kappa))
    return np.where(noisy > kappa, weights, 0.0)


def drawn_weights(
    scores: np.ndarray, features: np.ndarray, n: int, draw: str, count: int, seed: int = 0
) -> np.ndarray:
    """The weights [count, N] of the package's own draws."""
    pool = jnp.asarray(scores, jnp.float32), jnp.asarray(features, jnp.float32)
    keys = jax.random.split(jax.random.key(seed), count)
    weights = _draw(n, Settings(criterion="sampled", draw=draw), *pool, keys)
    return np.asarray(weights, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(
    n: int, settings: Settings, scores: jax.Array, features: jax.Array, keys: jax.Array
) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        picks = sampled(Pool(features, scores, jnp.ones(len(scores), bool), key), n, settings)
        return jnp.zeros(len(scores)).at[picks.indices].add(picks.weights)

    return jax.vmap(one)(keys)


def chosen(criterion: str, scores: np.ndarray, features: np.ndarray, n: int) -> np.ndarray:
    """The n negatives that a criterion of the package chooses, at its default settings."""
    return next(_choose(criterion, scores, scores, features, n, 1, 0))


def _choose(
    criterion: str,
    scores: np.ndarray,
    policy_scores: np.ndarray,
    features: np.ndarray,
    n: int,
    count: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """Yields `count` draws of what a criterion chooses, int [n or fewer] each."""
    pool = tuple(jnp.asarray(x, jnp.float32) for x in (features, scores, policy_scores))
    keys = jax.random.split(jax.random.key(seed), count)
    picks = jax.device_get(_select(n, Settings(criterion=criterion), *pool, keys))
    for indices, valid in zip(picks.indices, picks.valid, strict=True):
        yield indices[valid]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _select(
    n: int,
    settings: Settings,
    features: jax.Array,
    scores: jax.Array,
    policy_scores: jax.Array,
    keys: jax.Array,
) -> Selection:
    def one(key: jax.Array) -> Selection:
        pool = Pool(features, scores, jnp.ones(len(scores), bool), key, policy_scores)
        return settings.definition.choose(pool, n, settings)

    return jax.vmap(one)(keys)


def subsets(size: int, n: int) -> Iterator[np.ndarray]:
    """All sets of n, in chunks [at most CHUNK, n]."""
    sets = itertools.combinations(range(size), n)
    while chunk := list(itertools.islice(sets, CHUNK)):
        yield np.array(chunk)


def loss_weights(scores: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """v [S, N] of the Plackett-Luce loss on each set [S, n] alone: S-DPO's, and MASS-DPO's."""
    p, c = pool_weights(scores[sets])
    weights = np.zeros((len(sets), len(scores)))
    np.put_along_axis(weights, sets, p * c[:, None], axis=1)
    return weights


@dataclasses.dataclass(frozen=True)
class Error:
    """What a choice of negatives does to one prompt's gradient g, in the units of ||g||^2.

    Attributes:
        variance: of the draw.
        bias: squared length of its mean error.
        overlap: (mean estimate)' g; with `length` it says which common factor would mend the bias.
        length: squared length of the mean estimate.
    """

    variance: float
    bias: float
    overlap: float
    length: float


def error_of_mean(gram: np.ndarray, target: np.ndarray, mean: np.ndarray, mse: float) -> Error:
    """Splits a mean squared error into variance and bias.

    Args:
        target: c p.
        mean: mean of the weight vectors.
        mse: mean of (v - c p)' K (v - c p).
    """
    bias = float(quadratic(gram, mean - target))
    return Error(mse - bias, bias, float(mean @ gram @ target), float(quadratic(gram, mean)))


def uniform_sets(scores: np.ndarray, gram: np.ndarray, n: int) -> Error:
    """n negatives drawn uniformly, and the loss on them alone (S-DPO): all sets, one by one."""
    p, c = pool_weights(scores)
    target, mean, mse, count = c * p, np.zeros(len(p)), 0.0, 0
    for sets in subsets(len(p), n):
        weights = loss_weights(scores, sets)
        mean += weights.sum(0)
        mse += float(quadratic(gram, weights - target).sum())
        count += len(sets)
    return error_of_mean(gram, target, mean / count, mse / count)


def chosen_set(scores: np.ndarray, gram: np.ndarray, picks: np.ndarray) -> Error:
    """The loss on one set, always the same: all of its error is bias."""
    p, c = pool_weights(scores)
    weights = loss_weights(scores, picks[None])[0]
    return error_of_mean(gram, c * p, weights, float(quadratic(gram, weights - c * p)))


def drawn_sets(
    criterion: str, prompt: Prompt, beta: float, n: int, count: int, seed: int = 0
) -> Error:
    """The loss on the set that a criterion draws, with what is random in it: Monte Carlo."""
    scores, gram = prompt.scores(beta), prompt.gram(beta)
    policy_scores = prompt.logps[1:] - prompt.logps[0]
    p, c = pool_weights(scores)
    draws = _choose(criterion, scores, policy_scores, prompt.features, n, count, seed)
    sets = Counter(tuple(sorted(map(int, picks))) for picks in draws)
    weights = np.stack([loss_weights(scores, np.array([picks]))[0] for picks in sets])
    shares = np.array([*sets.values()]) / count
    mse = float(shares @ quadratic(gram, weights - c * p))
    return error_of_mean(gram, c * p, shares @ weights, mse)


CRITERIA = ("pool_fisher", "contrast", "set_fisher", "kmedoids")
DRAWN_CRITERIA = ("topk", "boundary")  # Which negatives they choose is in part random.
LABELS = {
    "independent": "independent draws, with replacement",
    "gumbel": "distinct draws by Gumbel noise (retired)",
    "pivotal": "pivotal",
    "local": "local pivotal, by features",
    "cut": "partition by features",
    "cut-shrunk": "partition by features, lambda 1/2",
    "cut-oracle": "partition by the true gradients (oracle)",
    "cells": "one per cell around Algorithm 1's picks",
    "uniform": "uniform sets, loss on the set (S-DPO)",
    **{name: f"the set of {name}, loss on the set" for name in (*CRITERIA, *DRAWN_CRITERIA)},
}
UNBIASED = tuple(LABELS)[:8]


def measure(
    prompt: Prompt, beta: float, n: int, count: int = DRAWS, seed: int = 0
) -> dict[str, Error]:
    """The errors of everything in `LABELS` on one prompt.

    Args:
        n: negatives to choose, below N.
        count: draws where there is no closed form.
        seed: of the draws.
    """
    scores, gram = prompt.scores(beta), prompt.gram(beta)
    p, c = pool_weights(scores)
    seen = np.asarray(prompt.features, np.float64)[1:, 1:]
    full = float(c**2 * p @ gram @ p)

    def unbiased(variance: float) -> Error:
        return Error(variance, 0.0, full, full)

    def monte_carlo(weights: np.ndarray) -> Error:
        return unbiased(float(c**2 * quadratic(gram, weights - p).mean()))

    def cells(which: np.ndarray) -> Error:
        return unbiased(float(c**2 * one_per_cell(p, gram, which)))

    def draw(kind: str) -> np.ndarray:
        return drawn_weights(scores, prompt.features, n, kind, count, seed)

    picks = {name: chosen(name, scores, prompt.features, n) for name in CRITERIA}
    noise = np.random.default_rng(seed)
    return {
        "independent": unbiased(float(c**2 * independent(p, gram, n))),
        "gumbel": monte_carlo(gumbel_weights(p, n, noise, count)),
        "pivotal": monte_carlo(draw("pivotal")),
        "local": monte_carlo(draw("local")),
        "cut": cells(partition(p, seen, n)),
        "cut-shrunk": cells(partition(p, seen, n, 0.5)),
        "cut-oracle": cells(partition(p, gram, n)),
        "cells": cells(nearest(seen, picks["pool_fisher"])),
        "uniform": uniform_sets(scores, gram, n),
        **{name: chosen_set(scores, gram, picks[name]) for name in CRITERIA},
        **{name: drawn_sets(name, prompt, beta, n, count, seed) for name in DRAWN_CRITERIA},
    }


def effective_rank(gram: np.ndarray) -> float:
    """exp(entropy) of the shares of the eigenvalues of the centred gradients; at most N - 1."""
    centre = np.eye(len(gram)) - 1 / len(gram)
    values = np.maximum(np.linalg.eigvalsh(centre @ gram @ centre), 0.0)
    return exp_entropy(values / values.sum())


def exp_entropy(shares: np.ndarray) -> float:
    return float(np.exp(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum()))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, between the distances within a pool of two sets of products [N, N]."""
    above = np.triu_indices(len(a), 1)
    ranks_a, ranks_b = (_ranks(distances(x)[above]) for x in (a, b))
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
