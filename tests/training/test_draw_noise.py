"""The draw's share of a gradient's noise, against all draws counted out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax.training import draw_noise
from mass_dpo_jax.training.loop import train
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import Batches, TrainStep
from tests.support.helpers import log_lines, slow, tiny_config, write_jsonl


def open_run(tmp_path: Path, **changes: Any) -> tuple[Batches, Any]:
    """Returns the batches of a small run, and its first weights."""
    data = write_jsonl(tmp_path / "data.jsonl", negatives=4)
    config = tiny_config(data, **{"cache_dir": str(tmp_path / "cache"), "beta": 1.0, **changes})
    setup = prepare(config, tmp_path / "run", ("train",))
    params, _ = setup.policy.read("", setup.seed)
    return Batches(setup, setup.score_reference(params)), params


def flatten(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_two_draws_differ_by_twice_the_variance_of_one(tmp_path: Path) -> None:
    batches, params = open_run(tmp_path, method="dpo")
    program, batch = batches.setup.program, batches[0]
    micro_batch = jax.tree.map(lambda x: x[0], batch.arrays)
    gradient = jax.jit(
        lambda ids: program.gradient(
            params, {}, micro_batch, ids, jax.random.key(0), batch.packed_length
        )[0]
    )
    size = len(batch.rows)
    variance = 0.0
    for row in range(size):
        ids = np.ones((size, 1), np.int32)
        gradients = []
        for candidate in range(1, 5):
            ids[row] = candidate
            gradients.append(flatten(gradient(jnp.asarray(ids))))
        variance += np.var(gradients, axis=0).sum()  # Of the batch's mean, by this prompt's draw.

    first = (batch.arrays, batch.packed_length)
    keys = jax.random.split(jax.random.key(3), 60)
    distances = [
        float(draw_noise.measure_distances(program, params, {}, first, first, key)[0])
        for key in keys
    ]
    error = np.std(distances) / np.sqrt(len(keys))
    assert np.mean(distances) == pytest.approx(2 * variance, abs=4 * error)
    assert 4 * error < variance  # The test could notice a factor of two.


@pytest.mark.parametrize("draw", ["pivotal", slow("local"), slow("independent")])
def test_gradients_of_a_batch_average_to_that_of_all_negatives(tmp_path: Path, draw: str) -> None:
    drawn = {"method": "pl_sampled", "num_negatives": 2, "selection.draw": draw}
    batches, params = open_run(tmp_path, **drawn)
    # Away from the reference, where pool weights differ.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)

    def gradient(batches: Batches) -> Any:
        micro_batch = jax.tree.map(lambda x: x[0], batches[0].arrays)
        program, length = batches.setup.program, batches[0].packed_length
        return jax.jit(lambda key: program.gradient(params, {}, micro_batch, None, key, length)[0])

    everything, _ = open_run(tmp_path, method="pl_all")
    expected = flatten(gradient(everything)(jax.random.key(0)))
    compute = gradient(batches)
    gradients = np.stack([flatten(compute(key)) for key in jax.random.split(jax.random.key(2), 80)])
    error = ((gradients.mean(0) - expected) ** 2).sum()
    variance = gradients.var(0, ddof=1).sum()
    assert error < 3 * variance / len(gradients)  # Its expectation is a third of this.
    assert variance > 1e-3 * (expected**2).sum()


def test_all_of_the_noise_is_the_draws_where_the_prompts_are_the_same(tmp_path: Path) -> None:
    batches, params = open_run(tmp_path, method="pl_sampled", num_negatives=2)
    step = TrainStep(batches, make_optimizer(batches.setup.train, 4), {})
    state = step.init(params)
    assert float(step.measure_draw_noise(state, batches[0], batches[1])) < 1
    args = batches.setup.program, params, {}
    first, second = ((b.arrays, b.packed_length) for b in (batches[0], batches[1]))
    key = jax.random.key(0)
    drawn, total = draw_noise.measure_distances(*args, first, second, key)
    assert 0 < drawn < total
    assert draw_noise.measure_distances(*args, first, first, key)[1] == 0


def test_nothing_is_drawn_where_every_negative_is_taken(tmp_path: Path) -> None:
    batches, params = open_run(tmp_path, method="pl_sampled", num_negatives=4)
    first, second = ((b.arrays, b.packed_length) for b in (batches[0], batches[1]))
    args = batches.setup.program, params, {}, first, second, jax.random.key(0)
    assert float(draw_noise.measure(*args)) < 1e-6


def test_a_run_logs_the_share_when_asked_for(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    asked = {"log.draw_noise_every": 2, "cache_dir": str(tmp_path / "cache"), "train.eval_every": 0}
    for method, steps in {"pl_sampled": [2, 4], "mass_dpo": []}.items():
        config = tiny_config(data, **asked, method=method, num_negatives=2)
        train(config, tmp_path / method)
        name = "selection/draw_noise"
        rows = {row["step"]: row[name] for row in log_lines(tmp_path / method) if name in row}
        assert list(rows) == steps
        assert all(0 < share < 2 for share in rows.values())
