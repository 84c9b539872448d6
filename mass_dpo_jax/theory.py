r"""The mathematics behind selection in closed form, which tests and documentation check against.

Equations, lemmas and theorems have the numbers of the MASS-DPO paper. Setting (Eq. 6): a log-linear
policy, $\pi_\theta(y|x) \propto \exp(\theta^\top \psi(x, y))$. Its normaliser does not depend on y,
so for a chosen response $y_0$ and negatives $y_i$

$$
\begin{aligned}
\phi_i &= \psi(x, y_i) - \psi(x, y_0) \\
b_i &= \log \pi_\mathrm{ref}(y_0|x) - \log \pi_\mathrm{ref}(y_i|x) \\
s_i &= \beta (\theta^\top \phi_i + b_i)
\end{aligned}
$$

are the feature differences, the reference's log-ratios and the scores, the last of them linear in
$\theta$. (Appendices A and B write $- b_i$ in places, a slip.) With Eq. 8,

$$
Z = -\log \sum_i e^{s_i}, \qquad p_i = \frac{e^{s_i}}{\sum_j e^{s_j}}, \qquad
\bar\phi = \sum_i p_i \phi_i,
$$

the Plackett-Luce loss (Eq. 7) is $L = -\log \sigma(Z)$, and since
$\nabla Z = -\beta \bar\phi$ and $\nabla \bar\phi = \beta \mathrm{Cov}_p(\phi)$:

$$
\begin{aligned}
\nabla L &= \beta (1 - \sigma(Z))\, \bar\phi && \text{(9)} \\
\nabla^2 L &= \beta^2 (1 - \sigma(Z)) \bigl[\sigma(Z)\, \bar\phi \bar\phi^\top
              + \mathrm{Cov}_p(\phi)\bigr] \\
           &\succeq \beta^2 (1 - \sigma(Z))\, \mathrm{Cov}_p(\phi) && \text{(10)}
\end{aligned}
$$

Lemma 4.1 is (9), Lemma 4.2 is both lines of (10). What the second drops, the rank-one term
$\beta^2 \sigma(Z) (1 - \sigma(Z)) \bar\phi \bar\phi^\top$, is the only part that depends on
the chosen response: $\mathrm{Cov}_p(\phi) = \mathrm{Cov}_p(\psi)$ does not. Nothing is
dropped in $\nabla^2 L = \beta^2 \mathrm{Cov}_q(\psi)$, q the softmax of the rewards over the
negatives *and* the chosen response. Around the chosen response instead of the mean, the same sum is
$\sum_i p_i \phi_i \phi_i^\top = \mathrm{Cov}_p(\phi) + \bar\phi \bar\phi^\top$: the first
line of (10) with $\sigma(Z)$ put to 1, hence above the exact Hessian where the second is below.

Three criteria are made of these: `algorithm_1` (the vectors v of Eq. 11), `contrast_vectors` (of
the last equation) and `set_fisher` (the exact Hessian). In them h is $\psi$, the feature of a
response, and row 0 belongs to the chosen one.

Sums run over the negatives given: the selected set for the loss, the whole pool for selection.
NumPy, float64, one example at a time, with d the width of features; training uses none of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Quantities(NamedTuple):
    """What Eqs. 9 to 11 are made of: those of Eq. 8, and two moments.

    Attributes:
        z: Z = -log sum_i exp(s_i).
        weights: p = softmax(s).
        mean: phi_bar = sum_i p_i phi_i.
        covariance: Cov_p(phi) = sum_i p_i (phi_i - phi_bar) (phi_i - phi_bar)'.
    """

    z: float
    weights: Float[np.ndarray, " N"]
    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def quantities(
    theta: Float[np.ndarray, " d"],
    phi: Float[np.ndarray, "N d"],
    b: Float[np.ndarray, " N"],
    beta: float,
) -> Quantities:
    """Computes Z, p, phi_bar and Cov_p(phi) at theta.

    Args:
        theta: parameters of the policy.
        phi: feature differences to the chosen response.
        b: the reference's log-probability of the chosen response minus those of the negatives.
        beta: above 0.
    """
    scores = beta * (phi @ theta + b)
    z = -np.logaddexp.reduce(scores)
    weights = _softmax(scores)
    mean = weights @ phi
    centred = phi - mean
    return Quantities(float(z), weights, mean, centred.T @ (weights[:, None] * centred))


def gradient(
    theta: Float[np.ndarray, " d"],
    phi: Float[np.ndarray, "N d"],
    b: Float[np.ndarray, " N"],
    beta: float,
) -> Float[np.ndarray, " d"]:
    """Computes Eq. 9, beta (1 - sigma(Z)) phi_bar; arguments as in `quantities`."""
    moments = quantities(theta, phi, b, beta)
    return beta * _sigmoid(-moments.z) * moments.mean


def hessian(
    theta: Float[np.ndarray, " d"],
    phi: Float[np.ndarray, "N d"],
    b: Float[np.ndarray, " N"],
    beta: float,
) -> Float[np.ndarray, "d d"]:
    """Computes the first line of Eq. 10, the exact Hessian; arguments as in `quantities`."""
    moments = quantities(theta, phi, b, beta)
    rank_one = _sigmoid(moments.z) * np.outer(moments.mean, moments.mean)
    return beta**2 * _sigmoid(-moments.z) * (moments.covariance + rank_one)


def hessian_bound(
    theta: Float[np.ndarray, " d"],
    phi: Float[np.ndarray, "N d"],
    b: Float[np.ndarray, " N"],
    beta: float,
) -> Float[np.ndarray, "d d"]:
    """Computes the second line of Eq. 10, a lower bound; arguments as in `quantities`."""
    moments = quantities(theta, phi, b, beta)
    return beta**2 * _sigmoid(-moments.z) * moments.covariance


def algorithm_1(
    phi: Float[np.ndarray, "N d"], scores: Float[np.ndarray, " N"], n: int, ridge: float
) -> tuple[list[int], list[float]]:
    """Selects by Algorithm 1 of MASS-DPO as it is written, with d x d inverses.

    Args:
        phi: features; subtracting one vector from every row changes nothing.
        scores: s.
        n: number of negatives to select, at most N.
        ridge: H starts as ridge times the identity.

    Returns:
        The indices in order of choice, and v' H^-1 v of each at the moment of choice.
    """
    return greedy(pool_fisher_vectors(phi, scores), n, ridge)


def pool_fisher_vectors(
    phi: Float[np.ndarray, "N d"], scores: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "N d"]:
    """Computes v_i = sqrt(p_i) (phi_i - sum_j p_j phi_j): V'V is the Cov_p(phi) of Eq. 10.

    Subtracting one vector from every phi, or a number from every score, changes nothing.
    """
    weights = _softmax(scores)
    return np.sqrt(weights)[:, None] * (phi - weights @ phi)


def contrast_vectors(
    features: Float[np.ndarray, "C d"], scores: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "N d"]:
    """Computes v_i = sqrt(p_i) (h_i - h_0): V'V is Cov_p(phi) + phi_bar phi_bar'.

    The chosen response is the first of the features, C = 1 + N. Adding a number to every score
    changes nothing.
    """
    return np.sqrt(_softmax(scores))[:, None] * (features[1:] - features[0])


def greedy(
    vectors: Float[np.ndarray, "N d"], n: int, ridge: float
) -> tuple[list[int], list[float]]:
    """Selects by Algorithm 1's greedy loop from design vectors; ties go to the lowest index."""
    inverse = np.eye(vectors.shape[1]) / ridge
    chosen: list[int] = []
    gains: list[float] = []
    for _ in range(n):
        gain = np.sum(vectors @ inverse * vectors, axis=1)
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        gains.append(float(gain[best]))
        column = inverse @ vectors[best]
        inverse -= np.outer(column, column) / (1.0 + vectors[best] @ column)
    return chosen, gains


def logdet(gram: Float[np.ndarray, "N N"], indices: list[int]) -> float:
    """Computes log det(I + G_SS).

    With G = V V' / ridge, that is log det(ridge I + sum v v') - d log ridge.
    """
    block = gram[np.ix_(indices, indices)]
    return float(np.linalg.slogdet(np.eye(len(block)) + block)[1])


def exhaustive(
    gram: Float[np.ndarray, "N N"], n: int, mask: Bool[np.ndarray, " N"]
) -> tuple[list[int], float]:
    """Finds the best set of n candidates by looking at all sets: C(19, 3) = 969.

    This is Eq. 12. Greedy choice reaches at least 1 - 1/e of its value, for log det(I + G_SS) is
    monotone and submodular and 0 for the empty set. It does not always reach all of it: Lemma 4.3
    (Eq. 15) is false.

    Args:
        gram: design vectors' products over the ridge.
        n: size of the set; all valid candidates where there are fewer.
        mask: True for the valid candidates.

    Returns:
        The indices in increasing order, the first such set on ties; and log det(I + G_SS).
    """
    candidates = np.flatnonzero(mask)
    sets = itertools.combinations(candidates.tolist(), min(n, len(candidates)))
    best, value = max(((list(s), logdet(gram, list(s))) for s in sets), key=lambda pair: pair[1])
    return best, value


def set_information(
    features: Float[np.ndarray, "C d"], scores: Float[np.ndarray, " N"], indices: Sequence[int]
) -> Float[np.ndarray, "d d"]:
    """Computes Cov_q(h), the exact Hessian over beta^2 of the loss on a set.

    q is the softmax of the rewards over the chosen response (reward 0) and the selected negatives
    (their scores): what is not in the set is not in the loss.

    Args:
        features: the chosen response first.
        scores: the negatives' scores.
        indices: indices of the set's members among the N negatives.
    """
    members = [0, *(1 + i for i in indices)]
    q = _softmax(np.append(0.0, scores)[members])
    centred = features[members] - q @ features[members]
    return centred.T @ (q[:, None] * centred)


def set_logdet(
    features: Float[np.ndarray, "C d"],
    scores: Float[np.ndarray, " N"],
    indices: Sequence[int],
    ridge: float,
) -> float:
    """Computes log det(ridge I + set_information) - d log ridge; 0 for the empty set."""
    matrix = np.eye(features.shape[1]) + set_information(features, scores, indices) / ridge
    return float(np.linalg.slogdet(matrix)[1])


def set_fisher(
    features: Float[np.ndarray, "C d"], scores: Float[np.ndarray, " N"], n: int, ridge: float
) -> tuple[list[int], list[float]]:
    """Selects greedily by `set_logdet`; ties go to the lowest index.

    A new member takes probability from the others, so the logdet can fall: the best candidate is
    taken even then. The value is not monotone and not submodular: nothing bounds the result.

    Args:
        features: the chosen response first.
        scores: the negatives' scores.
        n: number of negatives to select, at most N.
        ridge: above 0.

    Returns:
        The indices in order of choice, and the increase of `set_logdet` by each.
    """
    chosen: list[int] = []
    gains: list[float] = []
    value = 0.0
    for _ in range(n):
        free = [i for i in range(len(scores)) if i not in chosen]
        values = [set_logdet(features, scores, [*chosen, i], ridge) for i in free]
        best = int(np.argmax(values))
        gains.append(values[best] - value)
        value = values[best]
        chosen.append(free[best])
    return chosen, gains


def set_exhaustive(
    features: Float[np.ndarray, "C d"], scores: Float[np.ndarray, " N"], n: int, ridge: float
) -> tuple[list[int], float]:
    """Finds the best set of exactly n negatives by `set_logdet`; returns it with its value."""
    sets = (list(s) for s in itertools.combinations(range(len(scores)), n))
    values = ((s, set_logdet(features, scores, s, ridge)) for s in sets)
    return max(values, key=lambda pair: pair[1])


def exchange(
    value: Callable[[list[int]], float], chosen: Sequence[int], candidates: Sequence[int]
) -> list[int]:
    """Improves a set by swapping one member for one outsider, the best swap first, until none does.

    A local optimum, never worse than the set it starts from. Ties between swaps go to the lowest
    slot, then the lowest index.

    Args:
        value: function of a list of indices, to be maximized.
        chosen: the set to start from.
        candidates: all that may be in the set, members included.

    Returns:
        The set, with each newcomer in the slot of the member that it replaces.
    """
    current, best = list(chosen), value(list(chosen))
    while True:
        outside = sorted(set(candidates) - set(current))
        swaps = [
            [*current[:slot], new, *current[slot + 1 :]]
            for slot in range(len(current))
            for new in outside
        ]
        values = [value(swap) for swap in swaps]
        if not values or max(values) <= best + 1e-12 * max(1.0, abs(best)):  # Not by rounding.
            return current
        best = max(values)
        current = swaps[values.index(best)]


def batch_design_bound(k: int, d: int, c_min: float, ridge: float, delta: float) -> float:
    """Computes the right side of Eq. 16 (again in Eq. 27), which Theorem 5.2 gives as a bound.

    It is none: the error exceeds it more often than with probability delta, see docs/theory.md.

    Args:
        k: number of prompts.
        d: width of features.
        c_min: lower bound on beta^2 (1 - sigma(Z)) p_i, Assumption B.2.
        ridge: gamma.
        delta: probability that the bound is said to fail with.

    Raises:
        ValueError: it is undefined, for c_min k >= ridge.
    """
    used = k * c_min / ridge
    if used >= 1:
        raise ValueError(f"Eq. 16 is undefined: k c_min / ridge is {used:g}, and must be below 1")
    log = np.log(1 / delta + used / ((1 - used) ** (1 / d) * delta))
    return float(np.sqrt(d / 4 * log) + 2 * np.sqrt(ridge))


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))
