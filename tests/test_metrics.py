"""Metrics: hand-worked cases, ties, NaN, masks, standard errors."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from mass_dpo_jax import metrics

SCORES = np.array(
    [
        [3.0, 1.0, 2.0, 0.0],  # rank 1
        [2.0, 3.0, 1.0, 0.0],  # rank 2
        [1.0, 1.0, 2.0, 0.0],  # rank 3: the tie counts against
        [0.0, 1.0, 2.0, 3.0],  # rank 4
    ]
)
ALL = np.ones((4, 4), bool)


def test_rank_is_one_plus_the_negatives_that_are_not_below():
    assert metrics.per_example_rank(SCORES, ALL).tolist() == [1, 2, 3, 4]


def test_scores_are_compared_in_float32():
    scores = np.array([[1.0, 1.0 - 1e-12]])
    assert metrics.per_example_rank(scores, np.ones((1, 2), bool)).tolist() == [2]


def test_nan_is_never_in_the_models_favour():
    scores = np.array([[np.nan, 1.0, 2.0], [5.0, np.nan, 1.0], [np.nan, np.nan, np.nan]])
    ranks = metrics.per_example_rank(scores, np.ones((3, 3), bool))
    assert ranks.tolist() == [3, 2, 3]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_candidates_that_do_not_exist_do_not_count(garbage):
    scores = np.array([[1.0, garbage, 2.0], [1.0, 0.0, garbage], [1.0, garbage, garbage]])
    valid = np.array([[True, False, True], [True, True, False], [True, False, False]])
    assert metrics.per_example_rank(scores, valid).tolist() == [2, 1, 1]
    rewards = metrics.reward_metrics(scores, valid)
    assert {name: value for name, value in rewards.items() if not name.endswith("_se")} == {
        "rewards/chosen": 1.0,
        "rewards/rejected": 1.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "rewards/margins_hard": 0.0,
    }


def test_ranking_metrics_and_their_standard_errors():
    got = metrics.ranking(SCORES, ALL, "policy")
    values = {
        "accuracy": [1, 0, 0, 0],
        "mrr": [1, 1 / 2, 1 / 3, 1 / 4],
        "recall@1": [1, 0, 0, 0],
        "recall@3": [1, 1, 1, 0],
        "ndcg@1": [1, 0, 0, 0],
        "ndcg@3": [1, 1 / math.log2(3), 1 / 2, 0],
    }
    assert set(got) == {f"policy/{k}{end}" for k in values for end in ("", "_se")}
    for name, value in values.items():
        mean = sum(value) / 4
        assert got[f"policy/{name}"] == pytest.approx(mean)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in value) / 3)
        assert got[f"policy/{name}_se"] == pytest.approx(deviation / 2)


def test_other_cutoffs():
    got = metrics.ranking(SCORES, ALL, "reward", cutoffs=(2,))
    assert got["reward/recall@2"] == 0.5
    assert got["reward/ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert "reward/recall@1" not in got


def gain_ndcg(scores, grades, k):
    """The lowest DCG of all orders that the scores allow, over the largest of all orders."""
    if k > len(scores):
        return None

    def dcg(order):
        return sum(
            (grades[c] - min(grades)) / math.log2(1 + rank) for rank, c in enumerate(order[:k], 1)
        )

    orders = list(itertools.permutations(range(len(scores))))
    allowed = [o for o in orders if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]
    best = max(map(dcg, orders))
    return min(map(dcg, allowed)) / best if best else 1.0


def test_ndcg_with_gains_is_the_worst_order_that_the_scores_allow():
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 3, (60, 5)).astype(np.float32)
    grades = rng.integers(-4, 4, (60, 5)).astype(np.float32)
    grades[0], scores[1] = 2.0, [np.inf, -np.inf, 0.0, -np.inf, np.inf]
    grades[2] = [1e30, 0.0, -1e30, 5.0, 1.0]
    valid = np.arange(5) < rng.integers(1, 6, (60, 1))
    scores[~valid], grades[~valid] = np.nan, np.nan
    got = metrics.per_example_gain_ndcg(scores, valid, grades)
    assert list(got) == ["gain_ndcg@1", "gain_ndcg@3", "gain_ndcg@5"]
    for k in (1, 3, 5):
        for i, exists in enumerate(valid):
            row = scores[i, exists].astype(float).tolist(), grades[i, exists].astype(float).tolist()
            assert got[f"gain_ndcg@{k}"][i] == pytest.approx(gain_ndcg(*row, min(k, exists.sum())))


def test_nan_is_never_in_favour_of_a_graded_list():
    scores, grades = np.array([[np.nan, 1.0, 0.0]]), np.array([[2.0, 1.0, 0.0]])
    valid = np.ones((1, 3), bool)
    got = metrics.per_example_gain_ndcg(scores, valid, grades, (3,))["gain_ndcg@3"]
    assert got == pytest.approx((1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3)))
    scores = np.array([[2.0, 1.0, np.nan]])
    got = metrics.per_example_gain_ndcg(scores, valid, grades, (1,))["gain_ndcg@1"]
    assert got == 0.0


def test_grades_add_metrics_and_change_no_other():
    grades = np.array([[3.0, 2.0, 1.0, 0.0]] * 4)
    plain = metrics.evaluate_logps(SCORES, SCORES[::-1], ALL, 0.1)
    graded = metrics.evaluate_logps(SCORES, SCORES[::-1], ALL, 0.1, grades)
    assert {name: graded[name] for name in plain} == plain
    assert set(graded) - set(plain) == {
        f"{by}/gain_ndcg@{k}{end}"
        for by in ("policy", "reward") for k in (1, 3) for end in ("", "_se")
    }  # fmt: skip
    values = metrics.per_example_gain_ndcg(SCORES, ALL, grades)["gain_ndcg@3"]
    assert graded["policy/gain_ndcg@3"] == pytest.approx(sum(values) / 4)
    gains = metrics.ranking_gains(SCORES, SCORES[::-1], ALL, grades)
    assert gains["policy/gain_ndcg@3"] == pytest.approx(0.0)
    expected = np.std(values - values[::-1], ddof=1)
    other = metrics.per_example_gain_ndcg(SCORES[::-1], ALL, grades)["gain_ndcg@3"]
    assert other == pytest.approx(values[::-1])
    assert gains["policy/gain_ndcg@3_se"] == pytest.approx(expected / 2)


@pytest.mark.usefixtures("shapes_unchecked")
def test_grades_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"grades \(4, 4\): \(4, 3\)"):
        metrics.per_example_gain_ndcg(SCORES, ALL, np.zeros((4, 3)))


def test_one_example_has_no_spread_and_the_report_stays_json():
    got = metrics.ranking(SCORES[:1], ALL[:1], "policy")
    assert got["policy/mrr_se"] == 0.0
    json.dumps(got | metrics.reward_metrics(SCORES[:1], ALL[:1]), allow_nan=False)


def test_reward_metrics_average_over_the_negatives_of_each_example_first():
    rewards = np.array([[1.0, 0.0, 2.0, 5.0], [3.0, 1.0, -1.0, 7.0]])
    valid = np.array([[True, True, True, False], [True, True, True, True]])
    got = metrics.reward_metrics(rewards, valid)
    assert got["rewards/chosen"] == 2.0
    assert got["rewards/rejected"] == pytest.approx((1.0 + 7 / 3) / 2)
    assert got["rewards/accuracies"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert got["rewards/margins"] == pytest.approx((0.0 + 2 / 3) / 2)
    assert got["rewards/margins_hard"] == pytest.approx((-1.0 - 4.0) / 2)
    # Two examples' values differ by twice the error of their mean.
    errors = {"chosen": 2 / 2, "rejected": (7 / 3 - 1) / 2, "accuracies": (2 / 3 - 1 / 2) / 2,
              "margins": (2 / 3) / 2, "margins_hard": 3 / 2}  # fmt: skip
    for name, error in errors.items():
        assert got[f"rewards/{name}_se"] == pytest.approx(error)


def test_equal_rewards_are_not_a_win():
    got = metrics.reward_metrics(np.zeros((3, 4)), np.ones((3, 4), bool))
    assert got["rewards/accuracies"] == 0.0 and got["rewards/margins"] == 0.0


def test_no_negatives_at_all():
    got = metrics.reward_metrics(np.array([[2.0, np.nan]]), np.array([[True, False]]))
    assert got["rewards/chosen"] == 2.0
    json.dumps(got, allow_nan=False)


def test_standard_error_estimates_the_spread_of_means():
    rng = np.random.default_rng(0)
    samples = rng.normal(2.0, 3.0, (2000, 50))
    errors = [metrics.standard_error(sample) for sample in samples]
    assert np.mean(errors) == pytest.approx(samples.mean(1).std(), rel=0.05)


def test_pairing_removes_what_two_runs_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 400)
    ours, theirs = shared + rng.normal(0.5, 1, 400), shared + rng.normal(0, 1, 400)
    difference, error = metrics.paired_difference(ours, theirs)
    assert difference == pytest.approx((ours - theirs).mean())
    assert error == pytest.approx(np.std(ours - theirs, ddof=1) / 20)
    assert error < metrics.standard_error(ours) / 5


@pytest.mark.usefixtures("shapes_unchecked")
def test_malformed_input_is_refused():
    with pytest.raises(ValueError, match="row 1: the chosen response is not valid"):
        metrics.per_example_rank(np.zeros((2, 2)), np.array([[True, True], [False, True]]))
    with pytest.raises(ValueError, match=r"\(2, 2\), \(2, 3\)"):
        metrics.ranking(np.zeros((2, 2)), np.ones((2, 3), bool), "policy")
    with pytest.raises(ValueError, match="M >= 1"):
        metrics.ranking(np.zeros((0, 2)), np.ones((0, 2), bool), "policy")
    with pytest.raises(ValueError, match="M >= 1"):
        metrics.paired_difference(np.zeros(2), np.zeros(3))
