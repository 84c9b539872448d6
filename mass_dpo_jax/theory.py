r"""The mathematics behind selection, in closed form: what tests and documents check against.

Setting: a log-linear policy, $\pi_\theta(y|x) \propto \exp(\theta^\top \psi(x, y))$. Its
normaliser does not depend on y, so for a chosen response $y_0$ and negatives $y_i$

$$
\begin{aligned}
\phi_i &= \psi(x, y_i) - \psi(x, y_0) \\
b_i &= \log \pi_\mathrm{ref}(y_i|x) - \log \pi_\mathrm{ref}(y_0|x) \\
s_i &= \beta (\theta^\top \phi_i - b_i)
\end{aligned}
$$

are the feature differences, the reference's log-ratios and the scores, the last of them linear in
$\theta$. (The reference enters with a minus; some of the paper's formulas drop it.) With

$$
Z = -\log \sum_i e^{s_i}, \qquad p_i = \frac{e^{s_i}}{\sum_j e^{s_j}}, \qquad
\bar\phi = \sum_i p_i \phi_i
$$

the Plackett-Luce loss (Eq. 8) is $L = -\log \sigma(Z)$, and since
$\nabla Z = -\beta \bar\phi$ and $\nabla \bar\phi = \beta \mathrm{Cov}_p(\phi)$:

$$
\begin{aligned}
\nabla L &= \beta (1 - \sigma(Z))\, \bar\phi && \text{(9)} \\
\nabla^2 L &= \beta^2 (1 - \sigma(Z)) \bigl[\mathrm{Cov}_p(\phi)
              + \sigma(Z)\, \bar\phi \bar\phi^\top\bigr] && \text{(10)} \\
\nabla^2 L &\succeq \beta^2 (1 - \sigma(Z))\, \mathrm{Cov}_p(\phi) && \text{(11)}
\end{aligned}
$$

Lemma 4.1 is (9), Lemma 4.2 is (10) and (11). What (11) drops, the rank-one term
$\beta^2 \sigma(Z) (1 - \sigma(Z)) \bar\phi \bar\phi^\top$, is the only part that depends on
the chosen response: $\mathrm{Cov}_p(\phi) = \mathrm{Cov}_p(\psi)$ does not. Nothing is
dropped in $\nabla^2 L = \beta^2 \mathrm{Cov}_q(\psi)$, q the softmax of the rewards over the
negatives *and* the chosen response. Around the chosen response instead of the mean, the same sum is

$$
\textstyle\sum_i p_i \phi_i \phi_i^\top = \mathrm{Cov}_p(\phi) + \bar\phi \bar\phi^\top
$$

which is (10) with $\sigma(Z)$ put to 1, hence above the exact Hessian where (11) is below.

Three criteria are made of these: `algorithm_1` (the vectors of Eq. 11), `contrast_vectors` (of the
last equation) and `set_fisher` (the exact Hessian). In them h is $\psi$, the feature of a
response, and row 0 belongs to the chosen one.

Sums run over the negatives given: the selected set for the loss, the whole pool for selection.
NumPy, float64, one prompt at a time; nothing here is on the path of training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Quantities(NamedTuple):
    """What Eqs. 9 to 11 are made of."""

    z: float
    """Z = -log sum_i exp(s_i)."""
    weights: np.ndarray
    """[N], p = softmax(s)."""
    mean: np.ndarray
    """[d], phi_bar = sum_i p_i phi_i."""
    covariance: np.ndarray
    """[d, d], Cov_p(phi) = sum_i p_i (phi_i - phi_bar) (phi_i - phi_bar)'."""


def quantities(theta: np.ndarray, phi: np.ndarray, b: np.ndarray, beta: float) -> Quantities:
    """Z, p, phi_bar and Cov_p(phi) at theta.

    Args:
        theta: [d].
        phi: [N, d], feature differences to the chosen response.
        b: [N], the reference's log-probabilities minus that of the chosen response.
        beta: above 0.
    """
    scores = beta * (phi @ theta - b)
    z = -np.logaddexp.reduce(scores)
    weights = _softmax(scores)
    mean = weights @ phi
    centred = phi - mean
    return Quantities(float(z), weights, mean, centred.T @ (weights[:, None] * centred))


def gradient(theta: np.ndarray, phi: np.ndarray, b: np.ndarray, beta: float) -> np.ndarray:
    """Eq. 9, beta (1 - sigma(Z)) phi_bar: [d]. Arguments as in `quantities`."""
    at = quantities(theta, phi, b, beta)
    return beta * _sigmoid(-at.z) * at.mean


def hessian(theta: np.ndarray, phi: np.ndarray, b: np.ndarray, beta: float) -> np.ndarray:
    """Eq. 10, the exact Hessian: [d, d]. Arguments as in `quantities`."""
    at = quantities(theta, phi, b, beta)
    rank_one = _sigmoid(at.z) * np.outer(at.mean, at.mean)
    return beta**2 * _sigmoid(-at.z) * (at.covariance + rank_one)


def hessian_bound(theta: np.ndarray, phi: np.ndarray, b: np.ndarray, beta: float) -> np.ndarray:
    """Eq. 11, Lemma 4.2's lower bound on the Hessian: [d, d]. Arguments as in `quantities`."""
    at = quantities(theta, phi, b, beta)
    return beta**2 * _sigmoid(-at.z) * at.covariance


def algorithm_1(
    phi: np.ndarray, scores: np.ndarray, n: int, ridge: float
) -> tuple[list[int], list[float]]:
    """Algorithm 1 of MASS-DPO as it is written, with d x d inverses.

    Args:
        phi: [N, d]; subtracting one vector from every row changes nothing.
        scores: [N].
        n: how many to select, at most N.
        ridge: H starts as ridge times the identity.

    Returns:
        The indices in order of choice, and v' H^-1 v of each at the moment of choice.
    """
    return greedy(pool_fisher_vectors(phi, scores), n, ridge)


def pool_fisher_vectors(phi: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """v_i = sqrt(p_i) (phi_i - sum_j p_j phi_j), p = softmax(scores): V'V is Cov_p(phi), Eq. 11's.

    Args:
        phi: [N, d]; subtracting one vector from every row changes nothing.
        scores: [N]; neither does adding a number to all.

    Returns:
        [N, d].
    """
    weights = _softmax(scores)
    return np.sqrt(weights)[:, None] * (phi - weights @ phi)


def contrast_vectors(features: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """v_i = sqrt(p_i) (h_i - h_0), p = softmax(scores): V'V is Cov_p(phi) + phi_bar phi_bar'.

    Args:
        features: [C, d], C = 1 + N, the chosen response first.
        scores: [N]; adding a number to all changes nothing.

    Returns:
        [N, d].
    """
    return np.sqrt(_softmax(scores))[:, None] * (features[1:] - features[0])


def greedy(vectors: np.ndarray, n: int, ridge: float) -> tuple[list[int], list[float]]:
    """The greedy loop of Algorithm 1 on given design vectors [N, d]; ties to the lowest index."""
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


def logdet(gram: np.ndarray, indices: list[int]) -> float:
    """log det(I + G_SS): with G = V V' / ridge, log det(ridge I + sum v v') - d log ridge."""
    block = gram[np.ix_(indices, indices)]
    return float(np.linalg.slogdet(np.eye(len(block)) + block)[1])


def exhaustive(gram: np.ndarray, n: int, mask: np.ndarray) -> tuple[list[int], float]:
    """The best set of n candidates, by looking at all of them: C(19, 3) = 969.

    Greedy choice reaches at least 1 - 1/e of this optimum, for log det(I + G_SS) is monotone and
    submodular and 0 for the empty set. It does not always reach all of it: Lemma 4.3 is false.

    Args:
        gram: [N, N], design vectors' products over the ridge.
        n: size of the set; all valid candidates where there are fewer.
        mask: bool [N].

    Returns:
        The indices in increasing order, the first such set on ties; and log det(I + G_SS).
    """
    candidates = np.flatnonzero(mask)
    sets = itertools.combinations(candidates.tolist(), min(n, len(candidates)))
    best, value = max(((list(s), logdet(gram, list(s))) for s in sets), key=lambda pair: pair[1])
    return best, value


def set_information(features: np.ndarray, scores: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """The exact Hessian over beta^2 of the loss on a set: Cov_q(h), [d, d].

    q is the softmax of the rewards over the chosen response (reward 0) and the negatives selected
    (their scores), nothing else: what is not in the set is not in the loss.

    Args:
        features: [C, d], the chosen response first.
        scores: [N].
        indices: which of the N negatives.
    """
    members = [0, *(1 + i for i in indices)]
    q = _softmax(np.append(0.0, scores)[members])
    centred = features[members] - q @ features[members]
    return centred.T @ (q[:, None] * centred)


def set_logdet(
    features: np.ndarray, scores: np.ndarray, indices: Sequence[int], ridge: float
) -> float:
    """log det(ridge I + set_information) - d log ridge; 0 for the empty set."""
    matrix = np.eye(features.shape[1]) + set_information(features, scores, indices) / ridge
    return float(np.linalg.slogdet(matrix)[1])


def set_fisher(
    features: np.ndarray, scores: np.ndarray, n: int, ridge: float
) -> tuple[list[int], list[float]]:
    """Greedy choice of the set by `set_logdet`; ties to the lowest index.

    A new member takes probability from the others, so the logdet can fall: the best candidate is
    taken even then. Not monotone and not submodular, so nothing is guaranteed of the result.

    Args:
        features: [C, d], the chosen response first.
        scores: [N].
        n: how many to select, at most N.
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
    features: np.ndarray, scores: np.ndarray, n: int, ridge: float
) -> tuple[list[int], float]:
    """The best set of exactly n negatives by `set_logdet`, by looking at all; and its value."""
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
        value: what to raise, of a list of indices.
        chosen: the set to start from.
        candidates: all that may be in the set, members included.

    Returns:
        The set, a newcomer in the slot of the member that it replaces.
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


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))
