"""The simulation's gradient, draws, optimum and measures; the command on a very small setting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import simulation, simulation_worlds
from mass_dpo_jax import losses, selection

KEY = jax.random.key(0)
FEW = (
    "random, once",
    "pool_fisher, once",
    "hardest, every 20",
    "pl_sampled (pivotal), each step",
    "all",
)


@pytest.fixture(scope="module")
def world():
    return simulation_worlds.draw_world(KEY, "clusters", 8)


def scores_of(world, theta):
    logits = world.features @ theta
    return logits[:, 1:] - logits[:, :1]


def test_a_world_is_what_it_says(world):
    np.testing.assert_allclose(np.linalg.norm(world.features, axis=-1), 1.0, rtol=1e-5)
    assert float(jnp.linalg.norm(world.theta)) == pytest.approx(1.5 * 8**0.5, rel=1e-5)
    # The chosen response is a draw of the model: it is first as often as its probability says.
    chances = jax.nn.softmax(world.features @ world.theta)[:, 0]
    best = jnp.mean(jnp.all(scores_of(world, world.theta) < 0, axis=1))
    everyone = jax.nn.softmax(world.fresh @ world.theta)
    assert float(best) == pytest.approx(float(everyone.max(1).mean()), abs=0.08)
    assert float(chances.mean()) == pytest.approx(float((everyone**2).sum(1).mean()), abs=0.05)


@pytest.mark.parametrize("size", [3, 19])
def test_the_gradient_is_that_of_the_loss_that_training_uses(world, size):
    members = jnp.arange(19) < size
    theta = world.theta / 2

    def loss(theta):
        valid = jnp.broadcast_to(jnp.pad(members, (1, 0), constant_values=True), (500, 20))
        return losses.plackett_luce(world.features @ theta, valid, 1.0).mean()

    rows = jnp.broadcast_to(members, (500, 19))
    scores = scores_of(world, theta)
    got = simulation_worlds.gradient(world.features, scores, rows, None)
    np.testing.assert_allclose(got, jax.grad(loss)(theta), atol=1e-6)
    if size == 19:  # The pool's weights are what draws estimate.
        weighted = simulation_worlds.gradient(world.features, scores, rows, jax.nn.softmax(scores))
        np.testing.assert_allclose(weighted, got, atol=1e-6)


@pytest.mark.parametrize("criterion", simulation_worlds.DRAWS)
@pytest.mark.parametrize("n", [1, 4, 19])
def test_draws_are_unbiased(criterion, n):
    scores = jnp.tile(2 * jax.random.normal(KEY, (19,)), (20_000, 1))
    weights = np.asarray(
        simulation_worlds.draw(scores, jax.random.key(1), criterion, n), np.float64
    )
    p = np.asarray(jax.nn.softmax(scores[0]))
    error = weights.std(axis=0) / np.sqrt(len(weights))
    assert (np.abs(weights.mean(axis=0) - p) < 5 * error + 1e-5).all()
    drawn = (weights > 0).sum(axis=1)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    if criterion == "independent":
        assert drawn.max() <= n
    else:
        assert (drawn == n).all()


@pytest.mark.parametrize("criterion", ["random", "pool_fisher", "contrast", "set_fisher"])
def test_a_set_is_the_beginning_of_a_larger_one(world, criterion):
    everyone = jnp.ones((500, 19), bool)
    gram = selection.compute_grams(world.features, everyone, selection.Settings())
    small, large = (
        simulation_worlds.choose(gram, jnp.zeros((500, 19)), KEY, criterion, n) for n in (2, 4)
    )
    np.testing.assert_array_equal(small < 2, large < 2)
    assert ((large < 4).sum(axis=1) == 4).all()


def test_training_reaches_the_minimum(world):
    members = simulation_worlds.choose(None, jnp.zeros((500, 19)), KEY, "random", 3) < 3
    gram = jnp.zeros((500, 20, 20))
    theta = simulation_worlds.fit(
        world.features, gram, members, KEY, simulation_worlds.METHODS["all"], 0
    )

    def slope(theta):
        return simulation_worlds.gradient(world.features, scores_of(world, theta), members, None)

    assert jnp.linalg.norm(slope(theta)) < 1e-3 * jnp.linalg.norm(slope(jnp.zeros(8)))


def test_measures_of_the_truth_of_nothing_and_of_the_wrong_scale(world):
    def measured(theta):
        return np.array(simulation_worlds.measure(theta, world))

    np.testing.assert_allclose(measured(world.theta), [0, 1, 0], atol=1e-3)
    np.testing.assert_allclose(measured(3 * world.theta), [2, 3, 0], atol=1e-3)
    np.testing.assert_allclose(measured(jnp.zeros(8))[:2], [1, 0], atol=1e-6)
    across = jnp.roll(world.theta, 1)
    error, scale, rescaled = measured(world.theta + across)
    assert error > rescaled and error**2 == pytest.approx(
        float((scale - 1) ** 2 + (scale * rescaled) ** 2 / (1 - rescaled**2)), rel=1e-3
    )


def test_the_table_pairs_seeds():
    base = np.array([[0.1], [0.3]])
    results = {
        "a": np.stack([base, base, base], axis=-1),
        "b": np.stack([base + 0.05] * 3, axis=-1),
    }
    assert simulation_worlds.table(results, ["n = 3"], "a").splitlines() == [
        "| | n = 3 |",
        "|---|---|",
        "| a | 20.0 ± 10.0 |",
        "| b | 25.0 (+5.0 ± 0.0) |",
    ]


@pytest.mark.slow(reason="the whole simulation, small")
def test_the_command(monkeypatch, tmp_path, capsys):
    for name, value in {
        "PROMPTS": 30, "STEPS": 5, "SIZES": (1, 19), "DIMENSION": 4, "DIMENSIONS": (4,),
        "SIZE": 1, "WORLDS": ("clusters",),
    }.items():  # fmt: skip
        monkeypatch.setattr(simulation_worlds, name, value)
    for name in ("METHODS", "LINES"):  # All of them take a minute to compile.
        few = {k: v for k, v in getattr(simulation_worlds, name).items() if k in FEW}
        monkeypatch.setattr(simulation_worlds, name, few)
    output = tmp_path / "a" / "picture.png"
    simulation.main(["--seeds=2", f"--output={output}"])
    assert output.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    for name in FEW:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 3
    last = [line.split("|")[-2] for line in lines if line.startswith("| pool_fisher, once |")]
    assert last[0].endswith("(+0.0 ± 0.0) ")  # With n = N everybody trains on all.


@pytest.mark.slow(reason="the whole simulation, small")
def test_one_seed_has_no_error(capsys):
    with pytest.raises(SystemExit):
        simulation.main(["--seeds=1", "--output=x.png"])
    assert "at least 2" in capsys.readouterr().err
