"""Variances and biases against explicit vectors, all subsets and all draws; the sketch; a model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mass_dpo_jax
from benchmarks import estimators, gradient_tables, gradients
from mass_dpo_jax import losses
from mass_dpo_jax.errors import UserError
from tests.benchmarks.questions import TEMPLATE, write_questions
from tests.support.run_homes import write_base
from tests.support.runs import on_one_device

BETA = 0.7


class World:
    """A pool of `size` with explicit gradients of logps, the chosen response's first."""

    def __init__(self, size: int, seed: int = 0, spread: float = 1.5):
        rng = np.random.default_rng(seed)
        self.logps = spread * rng.normal(size=1 + size)
        self.ref_logps = rng.normal(size=1 + size)
        self.gradients = rng.normal(size=(1 + size, 4)) + 1
        features = rng.normal(size=(1 + size, 3)).astype(np.float32)
        self.prompt = estimators.Prompt(
            self.logps, self.ref_logps, self.gradients @ self.gradients.T, features @ features.T
        )
        self.scores = self.prompt.scores(BETA)
        odds = np.exp(self.scores)
        self.p, self.c = odds / odds.sum(), 1 - 1 / (1 + odds.sum())
        self.of_scores = BETA * (self.gradients[1:] - self.gradients[0])  # G
        self.full = self.c * self.p @ self.of_scores

    def error(self, weights: np.ndarray) -> float:
        """Squared length of the error of a weight vector that replaces c p."""
        return float(((weights @ self.of_scores - self.full) ** 2).sum())


def pivotal(p: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """The weights of one pivotal draw in random order, candidate after candidate."""
    certain = np.zeros(len(p), bool)
    while True:
        m, rest = n - certain.sum(), p[~certain].sum()
        pi = np.where(certain, 1.0, m * p / rest)
        if not (new := (pi >= 1) & ~certain).any():
            break
        certain |= new
    chances = pi.copy()
    order = rng.permutation(np.flatnonzero(~certain))
    holder = order[0]
    for other in order[1:]:
        a, b = chances[holder], chances[other]
        if a + b < 1:
            stays = rng.random() < a / (a + b)
            winner, loser = (holder, other) if stays else (other, holder)
            chances[loser], chances[winner] = 0, a + b
        else:
            stays = rng.random() < (1 - a) / (2 - a - b)
            winner, loser = (holder, other) if stays else (other, holder)
            chances[loser], chances[winner] = 1, a + b - 1
        holder = winner
    drawn = certain | (chances > 0.5)
    assert drawn.sum() == n
    return np.where(drawn, p / pi, 0.0)


def test_gradients_and_weights_of_the_whole_pool():
    world = World(5)
    np.testing.assert_allclose(
        world.prompt.gram(BETA), world.of_scores @ world.of_scores.T, atol=1e-12
    )
    p, c = estimators.pool_weights(world.scores)
    np.testing.assert_allclose(p, world.p)
    assert c == pytest.approx(world.c)


def test_loss_weights_are_the_gradient_of_the_loss_on_the_set():
    world, sets = World(5), np.array([[0, 3], [4, 1]])
    for members, found in zip(sets, estimators.loss_weights(world.scores, sets), strict=True):
        ratios = jnp.asarray(world.logps - world.ref_logps)[jnp.array([0, *(members + 1)])]

        def loss(ratios: jax.Array) -> jax.Array:
            return losses.plackett_luce(ratios[None], jnp.ones((1, 3), bool), BETA)[0]

        expected = np.asarray(jax.grad(loss)(ratios.astype(jnp.float32)))[1:] / BETA
        np.testing.assert_allclose(found[members], expected, rtol=1e-5)
        assert (np.delete(found, members) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_independent_draws(n: int):
    """All N^n of them, with their probabilities."""
    world = World(4, seed=n)
    expected = 0.0
    for drawn in itertools.product(range(4), repeat=n):
        weights = np.bincount(drawn, minlength=4) / n
        expected += world.p[list(drawn)].prod() * world.error(world.c * weights)
    found = estimators.independent(world.p, world.prompt.gram(BETA), n)
    assert world.c**2 * found == pytest.approx(expected)


def test_one_draw_from_each_cell():
    world, cells = World(5, seed=4), np.array([0, 1, 0, 2, 0])
    expected = 0.0
    shares = np.array([world.p[cells == h].sum() for h in range(3)])
    for drawn in itertools.product(*(np.flatnonzero(cells == h) for h in range(3))):
        weights = np.zeros(5)
        weights[list(drawn)] = shares
        chance = (world.p[list(drawn)] / shares).prod()
        expected += chance * world.error(world.c * weights)
    found = estimators.one_per_cell(world.p, world.prompt.gram(BETA), cells)
    assert world.c**2 * found == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_uniform_sets(n: int):
    world = World(6, seed=n)
    found = estimators.uniform_sets(world.scores, world.prompt.gram(BETA), n)
    estimates = []
    for members in map(list, itertools.combinations(range(6), n)):
        odds = np.exp(world.scores[members])
        estimates.append(odds / (1 + odds.sum()) @ world.of_scores[members])
    mean = np.mean(estimates, axis=0)
    assert found.variance == pytest.approx(((estimates - mean) ** 2).sum(1).mean())
    assert found.bias == pytest.approx(((mean - world.full) ** 2).sum())
    assert found.overlap == pytest.approx(mean @ world.full)
    assert found.length == pytest.approx(mean @ mean)
    only = estimators.chosen_set(world.scores, world.prompt.gram(BETA), np.arange(n))
    assert only.variance == pytest.approx(0.0, abs=1e-12)
    assert only.bias == pytest.approx(((estimates[0] - world.full) ** 2).sum())


def test_drawn_sets_of_equal_scores_are_uniform_sets():
    world = World(6, seed=4)
    even = dataclasses.replace(world.prompt, logps=np.zeros(7), ref_logps=np.zeros(7))
    exact = estimators.uniform_sets(np.zeros(6), even.gram(BETA), 2)
    for name in estimators.DRAWN_CRITERIA:
        found = estimators.drawn_sets(name, even, BETA, 2, 20_000)
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(exact), rel=0.05)


def test_the_packages_pivotal_draw_against_another_program():
    world, n, count = World(7, seed=1), 3, 20_000
    gram = world.prompt.gram(BETA)
    ours = estimators.drawn_weights(world.scores, world.prompt.features, n, "pivotal", count)
    rng = np.random.default_rng(0)
    theirs = np.stack([pivotal(world.p, n, rng) for _ in range(count)])
    errors = [estimators.quadratic(gram, weights - world.p) for weights in (ours, theirs)]
    noise = sum(float(e.var()) / count for e in errors) ** 0.5
    assert errors[0].mean() == pytest.approx(errors[1].mean(), abs=4 * noise)
    assert noise < 0.02 * errors[0].mean()
    spread = ours.std(0) / count**0.5
    np.testing.assert_allclose(ours.mean(0), world.p, atol=5 * spread.max() + 1e-6)
    np.testing.assert_allclose(ours.sum(1), 1.0, rtol=1e-5)


def test_at_equal_weights_pivotal_is_simple_random_sampling():
    """(N - n) / (N - 1) of independent draws, whatever the gradients."""
    gram, scores = World(6).prompt.gram(BETA), np.zeros(6)
    p = np.full(6, 1 / 6)
    weights = estimators.drawn_weights(scores, np.eye(7), 2, "pivotal", 40_000)
    found = estimators.quadratic(gram, weights - p).mean()
    assert found / estimators.independent(p, gram, 2) == pytest.approx(4 / 5, rel=0.02)


def test_gumbel_weights_are_unbiased_and_do_not_add_up():
    p = World(5).p
    weights = estimators.gumbel_weights(p, 4, np.random.default_rng(0), 200_000)
    assert ((weights > 0).sum(1) == 4).all()
    np.testing.assert_allclose(weights.mean(0), p, rtol=0.05)
    assert weights.sum(1).std() > 0.1


@pytest.mark.parametrize("seed", range(20))
def test_a_partition_is_between_the_best_one_and_independent_draws(seed: int):
    world = World(6, seed)
    gram, n = world.prompt.gram(BETA), 2
    best = min(
        estimators.one_per_cell(world.p, gram, np.array(cells))
        for cells in itertools.product(range(n), repeat=6)
    )
    cells = estimators.partition(world.p, gram, n)
    found = estimators.one_per_cell(world.p, gram, cells)
    assert best - 1e-12 <= found <= estimators.independent(world.p, gram, n) + 1e-12
    assert found <= 1.3 * best  # Greedy, but no bad one in pools this small.
    # Wholly shrunk, all are equally far: the cells share p out evenly.
    shrunk = estimators.partition(np.full(6, 1 / 6), gram, n, shrink=0.0)
    assert sorted(np.bincount(shrunk)) == [3, 3]


def test_nearest():
    points = np.array([0.0, 1.0, 5.0, 5.5, 0.2])[:, None]
    np.testing.assert_array_equal(
        estimators.nearest(points @ points.T, np.array([2, 0])), [1, 1, 0, 0, 1]
    )


def test_ranks_and_rank_of_gradients():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(6, 3))
    assert estimators.rank_correlation(points @ points.T, 4 * points @ points.T) == pytest.approx(1)
    far, one_line = np.eye(6), np.outer(np.arange(6.0), np.arange(6.0))
    assert estimators.effective_rank(far) == pytest.approx(5)
    assert estimators.effective_rank(one_line) == pytest.approx(1)
    # Distances of pairs 1, 9, 4 and 1, 9, 16: ranks 1, 3, 2 and 1, 2, 3.
    a, b = (np.array(x)[:, None] for x in ([0.0, 1.0, 3.0], [0.0, 1.0, -3.0]))
    assert estimators.rank_correlation(a @ a.T, b @ b.T) == pytest.approx(0.5)


def test_measure_knows_what_is_unbiased_and_what_is_certain():
    world = World(5, seed=2)
    found = estimators.measure(world.prompt, BETA, 3, count=500)
    assert set(found) == set(estimators.LABELS)
    full = world.full @ world.full
    for name, error in found.items():
        unbiased = name in estimators.UNBIASED
        assert (error.bias == 0) == unbiased, name
        if name != "boundary":  # Certain where no more than n are above the chosen response.
            assert (error.variance > 1e-9) == (unbiased or name in ("uniform", "topk")), name
        if unbiased:
            assert error.length == error.overlap == pytest.approx(full)
    assert found["cut-oracle"].variance <= found["independent"].variance


class TestSketch:
    def leaves(self, seed: int) -> list[jax.Array]:
        rng = np.random.default_rng(seed)
        shapes = [(70, 90), (30,), (50, 40, 3)]
        return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def test_products_are_those_of_the_arrays_up_to_its_error(self):
        vectors = [np.concatenate([np.ravel(x) for x in self.leaves(s)]) for s in range(12)]
        sketches = [np.asarray(gradients.sketch(self.leaves(s), 512)) for s in range(12)]
        exact, found = (np.array(x, float) @ np.array(x, float).T for x in (vectors, sketches))
        lengths = np.sqrt(np.diagonal(exact))
        relative = (found - exact) / np.outer(lengths, lengths)
        above = relative[np.triu_indices(12, 1)]
        assert above.std() == pytest.approx(512**-0.5, rel=0.3)
        assert abs(above.mean()) < 4 * above.std() / len(above) ** 0.5

    def test_is_linear_and_keeps_every_entry(self):
        one, other = self.leaves(0), self.leaves(1)
        both = [2 * a - b for a, b in zip(one, other, strict=True)]
        np.testing.assert_allclose(
            gradients.sketch(both, 512),
            2 * gradients.sketch(one, 512) - gradients.sketch(other, 512),
            atol=1e-3,
        )
        for leaf in range(3):
            lone = [jnp.zeros_like(x) for x in one]
            lone[leaf] = lone[leaf].ravel().at[-1].set(3.0).reshape(lone[leaf].shape)
            found = np.asarray(gradients.sketch(lone, 512))
            assert sorted(np.abs(found))[-2:] == [0.0, 3.0]

    def test_signs_are_as_often_either_and_depend_on_the_place_alone(self):
        found = np.asarray(gradients.signs(0, 10_000, 1))
        assert set(found) == {-1.0, 1.0}
        assert abs(found.mean()) < 0.04
        assert abs((found[1:] * found[:-1]).mean()) < 0.04
        np.testing.assert_array_equal(gradients.signs(7, 50, 1), found[7:57])


def test_a_model(tmp_path: Path, torch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Lines against transformers' gradients; a second call computes nothing; the tables."""
    base = write_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    output = tmp_path / "lines.jsonl"
    data = {"name": "qasc", "path": str(write_questions(tmp_path / "data"))}
    bench = gradients.Bench(str(base), "", data, output, prompts=2)
    examples = bench.examples()
    assert [len(row.rejected) for row in examples] == [gradients.POOL] * 2
    assert all(len({row.chosen, *row.rejected}) == gradients.POOL + 1 for row in examples)
    with on_one_device():
        bench.run()

    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base).double()
    tokenizer = mass_dpo_jax.load_model(base).tokenizer
    for example, line in zip(examples, gradient_tables.read_prompts(output), strict=True):
        prompt = gradient_tables.as_prompt(line)
        start = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        rows, logps = [], []
        for response in example.responses:
            answer = tokenizer(response, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([*start, *answer, tokenizer.eos_token_id])
            theirs.zero_grad()
            predicted = torch.log_softmax(theirs(ids[None]).logits[0, len(start) - 1 : -1], -1)
            logp = predicted.gather(1, ids[len(start) :, None]).sum()
            logp.backward()
            logps.append(logp.item())
            rows.append(torch.cat([x.grad.ravel() for x in theirs.parameters()]).numpy())
        exact = np.array(rows) @ np.array(rows).T
        np.testing.assert_allclose(prompt.logps, logps, atol=1e-3)
        np.testing.assert_allclose(line["norms"], np.diagonal(exact), rtol=1e-3)
        scale = np.sqrt(np.outer(np.diagonal(exact), np.diagonal(exact)))
        np.testing.assert_allclose(prompt.gradients / scale, exact / scale, atol=0.01)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(mass_dpo_jax, "load_model", refuse)
    bench.run()
    monkeypatch.setattr(gradient_tables, "SIZES", (2,))
    text = gradient_tables.tables(output, 0.1)
    assert all(label in text for label in estimators.LABELS.values())
    assert "| independent draws, with replacement | 1.00 ± 0.00 |" in text
    with pytest.raises(UserError, match="0 prompts; expected two or more"):
        gradient_tables.tables(tmp_path / "none.jsonl", 0.1)


def test_errors_by_leaving_out_are_those_of_a_mean():
    values = np.array([1.0, 4.0, 2.0, 9.0])
    found, error = gradient_tables.with_error(lambda i: float(values[i].mean()), 4)
    assert (found, error) == (4.0, pytest.approx(values.std(ddof=1) / 2))


def test_at_equal_weights_uniform_sets_are_right_but_for_a_factor():
    """Rescaled they are simple random sampling; as they are, n / (n + 1) stands for N / (N + 1)."""
    found = []
    for seed in range(3):
        world = World(6, seed)
        even = dataclasses.replace(world.prompt, ref_logps=world.prompt.logps)
        found.append(estimators.measure(even, BETA, 2, count=10))
    [row] = [x for x in gradient_tables._biases(found, 2).splitlines() if "S-DPO" in x]
    values = [float(cell.split(" ± ")[0]) for cell in row.strip("| ").split(" | ")[1:]]
    size = sum(one["independent"].length for one in found)
    unit = sum(one["independent"].variance for one in found)
    factor = (2 / 3) / (6 / 7)
    expected = [0.8 * factor**2, (1 - factor) ** 2 * size / unit, 0.8, 0.0]
    assert values == pytest.approx(expected, abs=0.0051)
