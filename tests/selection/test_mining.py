"""The best items of a catalogue against a full sort in float64; draws against their sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax.config import CHOICES
from mass_dpo_jax.selection import mining


@pytest.mark.parametrize("block", [3, 7, 100])
def test_blocks_keep_what_a_full_sort_keeps(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(mining, "ITEMS_AT_A_TIME", block)
    rng = np.random.default_rng(0)
    table = rng.integers(0, 12, (5, 41)).astype(np.float32)  # With ties, across blocks.
    valid = rng.random(41) < 0.8
    scores, indices = mining.rank_items(lambda part: jnp.asarray(table[:, part]), valid, 9)
    for row in range(5):
        want = sorted(np.flatnonzero(valid), key=lambda i: (-float(table[row, i]), i))[:9]
        assert indices[row].tolist() == want
        np.testing.assert_array_equal(scores[row], table[row, want])


def test_fewer_valid_items_than_asked_for_are_minus_infinity() -> None:
    table = jnp.zeros((2, 4))
    scores, indices = mining.rank_items(
        lambda part: table[:, part], np.array([False, True, False, True]), 9
    )
    assert scores.shape == (2, 4) and np.isfinite(scores).sum(1).tolist() == [2, 2]
    assert indices[:, :2].tolist() == [[1, 3], [1, 3]]


@pytest.mark.parametrize(
    ("limits", "chosen", "ceiling"),
    [
        ({}, 0.5, np.inf),
        ({"margin": 0.2}, 0.5, 0.3),
        ({"relative_margin": 0.1}, 0.5, 0.45),
        ({"relative_margin": 0.1}, -2.0, -2.2),  # Below it, where scores are negative too.
        ({"max_score": 0.25, "margin": 0.2}, 0.5, 0.25),
        ({"max_score": 0.25}, None, 0.25),
    ],
)
def test_margins(limits: dict[str, float], chosen: float | None, ceiling: float) -> None:
    scores = np.linspace(-3, 1, 4001)
    allowed = mining.Limits(0, 9, **limits).allow(scores, chosen)
    assert (allowed == (scores <= ceiling)).all()
    assert mining.Limits(0, 9, **limits).need_chosen == any("margin" in name for name in limits)


@pytest.mark.parametrize("how", ["softmax", "uniform"])
def test_the_mean_over_draws_of_corrected_sums_is_the_full_sum(how: str) -> None:
    rng = np.random.default_rng(1)
    scores = np.sort(rng.normal(size=12).astype(np.float32))[::-1]
    mask, f = rng.random(12) < 0.8, rng.normal(size=12) + 3.0
    draws, n, temperature = 4000, 4, 0.2  # Cold: some are certain.
    keys = jax.random.split(jax.random.key(0), draws)
    drawn, pi, weights = map(
        np.asarray,
        mining.draw_items(
            jnp.broadcast_to(scores, (draws, 12)),
            jnp.broadcast_to(mask, (draws, 12)),
            n,
            how,
            jnp.float32(temperature),
            keys,
        ),
    )
    assert (drawn.sum(1) == n).all() and not drawn[:, ~mask].any()
    logits = scores.astype(np.float64) / temperature if how == "softmax" else np.zeros(12)
    p = np.where(mask, np.exp(logits), 0.0)
    p /= p.sum()

    def agrees(sums: np.ndarray, want: float) -> bool:
        return bool(abs(sums.mean() - want) < 4 * sums.std() / draws**0.5 + 1e-5)

    assert agrees((weights * f).sum(1), float(p @ f))
    inverse = np.where(drawn, 1 / np.maximum(pi, 1e-30), 0.0)
    assert agrees((inverse * f).sum(1), float(f[mask].sum()))
    # The test can see an error of this size: without the correction it is another number.
    assert not agrees((drawn * f).sum(1) / n, float(p @ f)) or how == "uniform"
    np.testing.assert_allclose(drawn.mean(0), pi[0] * mask, atol=0.04)


def test_top_takes_the_first_ones() -> None:
    mask = jnp.array([[True, False, True, True], [False, True, False, False]])
    keys = jax.random.split(jax.random.key(0), 2)
    drawn, pi, weights = mining.draw_items(
        jnp.zeros((2, 4)), mask, 2, "top", jnp.float32(1.0), keys
    )
    assert drawn.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert pi.tolist() == drawn.astype(float).tolist()
    assert weights.tolist() == [[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_the_setting_has_the_draws_there_are() -> None:
    assert CHOICES["mine.draw"] == mining.DRAWS
