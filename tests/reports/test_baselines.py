from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax import config
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.reports import baselines


def example(history: str, chosen: str, *rejected: str) -> Example:
    prompt = History("", tuple(history.split()), "")
    return Example("", prompt, f" {chosen}", tuple(f" {r}" for r in rejected), "")


TRAIN = [
    example("a b", "x", "y"),
    example("a", "y", "z"),
    example("b b", "x", "z"),
    example("c", "z", "x"),
]


def test_popularity_counts_chosen_responses():
    test = [example("a", "y", "x", "z", "new"), example("b", "x", "new")]
    scores = baselines.popularity(TRAIN, test)
    np.testing.assert_array_equal(scores, [[1, 2, 1, 0], [2, 0, -np.inf, -np.inf]])


def test_cooccurrence_by_hand():
    test = [example("b a a", "x", "y", "z", "new")]
    # count(a) = count(b) = 2; x was chosen after a once and after b twice; y after a once.
    x = (1 + 2 / 4) / 3 + (2 + 2 / 4) / 3
    y = (1 + 1 / 4) / 3 + (0 + 1 / 4) / 3
    z = 2 * (0 + 1 / 4) / 3
    np.testing.assert_allclose(baselines.cooccurrence(TRAIN, test), [[x, y, z, 0]])


def test_unseen_histories_are_ranked_by_popularity():
    test = [example("unseen", "x", "y", "new"), example("", "x", "y", "new")]
    plain = Example("", "b", " x", (" y", " new"), "")
    scores = baselines.cooccurrence(TRAIN, [*test, plain])
    np.testing.assert_allclose(scores, [[2 / 4, 1 / 4, 0]] * 3)


def test_responses_may_be_messages():
    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    test = [Example("", History("", ("b",), ""), message("x"), (message("y"),), "")]
    as_strings = [example("b", "x", "y")]
    for baseline in (baselines.popularity, baselines.cooccurrence):
        np.testing.assert_array_equal(baseline(TRAIN, test), baseline(TRAIN, as_strings))


@pytest.mark.slow(reason="reads all of the real LastFM")
def test_lastfm(real_data: Path):
    """The accuracies on all test rows that a trained model has to beat; ties count as errors."""
    c = config.default()
    c.data.name, c.data.path, c.data.max_test = "lastfm", str(real_data / "lastfm"), 0
    train, test = (load_examples(c.data, split, seed=0) for split in ("train", "test"))
    assert len(test) == 2495
    accuracy = {}
    for baseline in (baselines.popularity, baselines.cooccurrence):
        scores = baseline(train, test)
        accuracy[baseline.__name__] = np.mean((scores[:, 1:] < scores[:, :1]).all(axis=1))
    assert accuracy == pytest.approx({"popularity": 0.258, "cooccurrence": 0.664}, abs=5e-4)
