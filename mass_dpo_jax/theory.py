r"""The mathematics behind selection, in closed form: what tests and documents check against.

Setting: a log-linear policy, :math:`\pi_\theta(y|x) \propto \exp(\theta^\top \psi(x, y))`. Its
normaliser does not depend on y, so for a chosen response :math:`y_0` and negatives :math:`y_i`

.. math::
    \phi_i = \psi(x, y_i) - \psi(x, y_0), \qquad
    b_i = \log \pi_\mathrm{ref}(y_i|x) - \log \pi_\mathrm{ref}(y_0|x), \qquad
    s_i = \beta (\theta^\top \phi_i - b_i)

are the feature differences, the reference's log-ratios and the scores, the last of them linear in
:math:`\theta`. (The reference enters with a minus; some of the paper's formulas drop it.) With

.. math::
    Z = -\log \sum_i e^{s_i}, \qquad p_i = \frac{e^{s_i}}{\sum_j e^{s_j}}, \qquad
    \bar\phi = \sum_i p_i \phi_i

the Plackett-Luce loss (Eq. 8) is :math:`L = -\log \sigma(Z)`, and since
:math:`\nabla Z = -\beta \bar\phi` and :math:`\nabla \bar\phi = \beta \mathrm{Cov}_p(\phi)`:

.. math::
    \nabla L &= \beta (1 - \sigma(Z))\, \bar\phi                            \tag{9}\\
    \nabla^2 L &= \beta^2 (1 - \sigma(Z)) \bigl[\mathrm{Cov}_p(\phi)
                  + \sigma(Z)\, \bar\phi \bar\phi^\top\bigr]                \tag{10}\\
    \nabla^2 L &\succeq \beta^2 (1 - \sigma(Z))\, \mathrm{Cov}_p(\phi)      \tag{11}

Lemma 4.1 is (9), Lemma 4.2 is (10) and (11). What (11) drops, the rank-one term
:math:`\beta^2 \sigma(Z) (1 - \sigma(Z)) \bar\phi \bar\phi^\top`, is the only part that depends on
the chosen response: :math:`\mathrm{Cov}_p(\phi) = \mathrm{Cov}_p(\psi)` does not. Nothing is
dropped in :math:`\nabla^2 L = \beta^2 \mathrm{Cov}_q(\psi)`, q the softmax of the rewards over the
negatives *and* the chosen response.

Sums run over the negatives given: the selected set for the loss, the whole pool for selection.
NumPy, float64, one prompt at a time; nothing here is on the path of training.
"""

from __future__ import annotations

import itertools
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
        beta: > 0.
    """
    scores = beta * (phi @ theta - b)
    exponentials = np.exp(scores - scores.max())
    z = -(scores.max() + np.log(exponentials.sum()))
    weights = exponentials / exponentials.sum()
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
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    vectors = np.sqrt(weights)[:, None] * (phi - weights @ phi)
    return greedy(vectors, n, ridge)


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


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))
