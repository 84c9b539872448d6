"""Metrics: hand-worked cases, ties, NaN, masks, standard errors."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from mass_dpo_jax import metrics
from mass_dpo_jax.config import default
from mass_dpo_jax.config_values import parse_cutoffs
from mass_dpo_jax.metrics import Lists

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
    lists = Lists(ALL, grades=grades)
    plain = metrics.evaluate_logps(SCORES, SCORES[::-1], Lists(ALL))
    graded = metrics.evaluate_logps(SCORES, SCORES[::-1], lists)
    assert {name: graded[name] for name in plain} == plain
    assert set(graded) - set(plain) == {
        f"{by}/{name}{end}" for by in ("policy", "reward")
        for name in ("map", "gain_ndcg@1", "gain_ndcg@3") for end in ("", "_se")
    }  # fmt: skip
    values = metrics.per_example_gain_ndcg(SCORES, ALL, grades)["gain_ndcg@3"]
    assert graded["policy/gain_ndcg@3"] == pytest.approx(sum(values) / 4)
    gains = metrics.ranking_gains(SCORES, SCORES[::-1], lists)
    assert gains["policy/gain_ndcg@3"] == pytest.approx(0.0)
    expected = np.std(values - values[::-1], ddof=1)
    other = metrics.per_example_gain_ndcg(SCORES[::-1], ALL, grades)["gain_ndcg@3"]
    assert other == pytest.approx(values[::-1])
    assert gains["policy/gain_ndcg@3_se"] == pytest.approx(expected / 2)


def list_metrics(order, relevant, cutoffs):
    """The textbook's metrics of a list, the positions of the best first."""
    hits = [c in relevant for c in order]
    first = hits.index(True) + 1
    values = {"accuracy": float(hits[0]), "mrr": 1 / first}
    for k in cutoffs:
        found = [1 / math.log2(1 + rank) for rank, hit in enumerate(hits[:k], 1) if hit]
        best = [1 / math.log2(1 + rank) for rank in range(1, min(k, len(relevant)) + 1)]
        values[f"recall@{k}"] = len(found) / len(relevant)
        values[f"ndcg@{k}"] = sum(found) / sum(best)
    places = [rank for rank, hit in enumerate(hits, 1) if hit]
    values["map"] = sum(n / rank for n, rank in enumerate(places, 1)) / len(places)
    return values


def test_metrics_of_several_relevant_are_those_of_the_worst_order():
    rng = np.random.default_rng(1)
    scores = rng.integers(-3, 3, (80, 5)).astype(np.float32)
    valid, relevant = np.arange(5) < rng.integers(1, 6, (80, 1)), rng.random((80, 5)) < 0.4
    relevant[:, 0] = True
    scores[~valid] = np.nan
    grades = np.where(relevant, 1.0, 0.0)
    got = metrics.per_example_metrics(scores, Lists(valid, relevant, grades))
    for i, exists in enumerate(valid):
        row, size = scores[i].tolist(), int(exists.sum())
        best = {c for c in range(size) if relevant[i, c]}
        wanted = [
            list_metrics(order, best, (1, 3, 5))
            for order in itertools.permutations(range(size))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order))
        ]
        assert set(wanted[0]) == {name for name in got if "gain" not in name}
        for name in wanted[0]:
            assert got[name][i] == pytest.approx(min(values[name] for values in wanted)), name


def test_one_relevant_response_has_the_metrics_that_it_always_had():
    rng = np.random.default_rng(2)
    scores = rng.integers(-4, 4, (200, 12)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.05] = np.nan
    valid = np.arange(12) < rng.integers(1, 13, (200, 1))
    only_first = np.zeros_like(valid)
    only_first[:, 0] = True
    plain = metrics.per_example_ranking(metrics.per_example_rank(scores, valid))
    got = metrics.per_example_metrics(scores, Lists(valid, only_first, only_first * 1.0))
    assert set(got) - set(plain) == {"map", *(f"gain_ndcg@{k}" for k in (1, 3, 5, 10))}
    for name, values in plain.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    np.testing.assert_array_equal(got["map"], plain["mrr"])
    without = metrics.per_example_metrics(scores, Lists(valid, None, only_first * 1.0))
    assert all(np.array_equal(without[name], got[name]) for name in got)


def test_cutoffs_beyond_the_longest_list_are_left_out():
    got = metrics.per_example_metrics(SCORES, Lists(ALL, ALL & (np.arange(4) < 2)), (2, 4, 5))
    assert [name for name in got if "@" in name] == ["recall@2", "ndcg@2", "recall@4", "ndcg@4"]
    assert got["recall@4"].tolist() == [1.0] * 4
    assert parse_cutoffs(default().eval.cutoffs) == metrics.CUTOFFS


def test_rewards_are_compared_with_what_is_below_the_chosen_response():
    relevant = np.array([[True, False, False, True]] * 4)
    values = metrics.evaluate_logps(SCORES, SCORES, Lists(ALL, relevant, SCORES))
    wanted = metrics.reward_metrics(SCORES[:, :3], ALL[:, :3])
    assert {name: values[name] for name in wanted} == wanted


def test_coverage_and_popularity_of_what_is_ranked_first():
    rng = np.random.default_rng(3)
    items = np.array([rng.choice(9, 4, replace=False) for _ in range(30)])
    valid, relevant = np.arange(4) < rng.integers(2, 5, (30, 1)), rng.random((30, 4)) < 0.3
    relevant[:, 0] = True
    scores = rng.integers(0, 3, (30, 4)).astype(np.float32)
    items.sort(axis=1)  # Some are never chosen, and some are never first.
    items[~valid] = 0
    lists = Lists(valid, relevant, None, items)
    got = metrics.summarize(metrics.per_example_items(scores, lists), "policy")

    def ranked_first(scores):
        for row, is_relevant, names, exists in zip(scores, relevant, items, valid, strict=True):
            listed = zip(-row[exists], is_relevant[exists], range(4), names[exists], strict=False)
            yield min(listed)[-1]

    shown, others = list(ranked_first(scores)), list(ranked_first(-scores))
    catalogue = set(items[valid].tolist())

    def coverage(rows, shown):
        return len({shown[i] for i in rows}) / len(catalogue)

    def jackknife(estimate):
        left_out = np.array([estimate(set(range(30)) - {i}) for i in range(30)])
        return math.sqrt(29 / 30 * np.sum((left_out - left_out.mean()) ** 2))

    popularity = [
        np.mean([(valid & relevant & (items == shown[i]))[j].sum() for j in range(30) if j != i])
        for i in range(30)
    ]
    assert got == pytest.approx({
        "policy/coverage": coverage(range(30), shown),
        "policy/coverage_se": jackknife(lambda rows: coverage(rows, shown)),
        "policy/popularity": np.mean(popularity),
        "policy/popularity_se": np.std(popularity, ddof=1) / math.sqrt(30),
    })  # fmt: skip
    assert 0 < got["policy/coverage"] < 1 and got["policy/coverage_se"] > 0

    def difference(rows):
        return coverage(rows, shown) - coverage(rows, others)

    gains = metrics.ranking_gains(scores, -scores, lists)
    assert gains["policy/coverage"] == pytest.approx(difference(range(30)))
    assert gains["policy/coverage_se"] == pytest.approx(jackknife(difference))
    assert gains["policy/popularity_se"] > 0


def test_items_have_metrics_of_the_chosen_responses_beside():
    items = np.array([[0, 1], [0, 2], [1, 0], [0, 2]])
    valid = np.ones((4, 2), bool)
    logps = -np.array([[1.0, 2], [2, 1], [2, 1], [2, 1]], np.float32)
    got = metrics.evaluate_logps(logps, None, Lists(valid, items=items))
    names = [name for name in got if name.startswith("chosen")]
    assert names == [f"chosen/{x}{end}" for x in ("coverage", "popularity") for end in ("", "_se")]
    # First are 0, 2, 0, 2; chosen 0, 0, 1, 0. Of the others: 2/3, 2/3, 0, 2/3.
    assert got["policy/coverage"] == got["chosen/coverage"] == pytest.approx(2 / 3)
    assert got["chosen/popularity"] == pytest.approx(1 / 2)
    assert got["policy/popularity"] == pytest.approx((2 / 3 + 0 + 1 + 0) / 4)


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
