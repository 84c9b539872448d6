"""The gradient of a few responses at a time: that of all of them at once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.memory import compiled_bytes
from benchmarks.workloads import Case, Workload
from mass_dpo_jax.models import chunked_replay
from mass_dpo_jax.models.fused_attention import FusedAttention
from mass_dpo_jax.models.response_layout import Picks, deal, gather_candidates
from mass_dpo_jax.models.shared_prefix import score
from mass_dpo_jax.training.methods import METHODS
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Reference
from mass_dpo_jax.training.step import average_micro_batches
from mass_dpo_jax.training.updates import Batches
from tests.models.test_lora import ALL, stored, weights_of
from tests.support.helpers import slow, write_jsonl
from tests.support.helpers import tiny_config as run_config
from tests.support.models import Candidates, random_candidates, random_decoder, tiny_config

pytestmark = pytest.mark.usefixtures("strict_jax")

RESPONSE = 7


def some_picks(pool: Candidates) -> Picks:
    """Returns the first candidate and some others in another order, one twice, a few not valid."""
    rng = np.random.default_rng(0)
    batch, candidates = pool.response_lengths.shape
    others = np.stack([rng.permutation(np.arange(1, candidates)) for _ in range(batch)])
    others[0, -1] = others[0, 0]
    ids = np.pad(others, ((0, 0), (1, 0)))
    valid = np.take_along_axis(pool.response_lengths, ids, 1) > 0
    valid[0, 2] = False
    return Picks(jnp.asarray(ids), jnp.asarray(valid), pool.responses.shape[1] + RESPONSE)


def loss(logps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A loss in which the weight of each response depends on all others."""
    scales = jnp.linspace(0.5, 1.5, logps.size).reshape(logps.shape)
    return jnp.mean(jax.nn.logsumexp(0.1 * scales * logps, axis=1) - 0.2 * logps[:, 0]), logps


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def differentiate(
    graphdef: Any,
    layout: str,
    at_a_time: int,
    static: tuple[int, Any],
    trained: Any,
    frozen: Any,
    arrays: Any,
    chosen: Any,
) -> Any:
    """Returns the loss, log-probabilities and gradient: in chunks, or for 0 by JAX, of one pass."""
    packed_length, attention = static
    picks = Picks(*chosen, packed_length)
    settings: Any = {"layout": layout, "max_response": RESPONSE}
    if attention is not None:
        settings["attention"] = attention

    def build(trained: Any) -> Any:
        return nnx.merge(graphdef, {**frozen, **trained})

    if at_a_time:
        return chunked_replay.value_and_grad(
            loss, build, trained, *arrays, picks, at_a_time, **settings
        )

    def joint(trained: Any) -> Any:
        some = gather_candidates(*arrays[2:], picks)
        return loss(score(build(trained), *arrays[:2], *some, pooling=None, **settings).logps)

    return jax.value_and_grad(joint, has_aux=True)(trained)


def check(
    model: Any,
    layout: str,
    at_a_time: int,
    pool: Candidates,
    attention: Any = None,
    trained: Any = None,
    frozen: Any = None,
) -> None:
    graphdef, state = nnx.split(model)
    if trained is None:
        trained, frozen = nnx.to_pure_dict(state), {}
    picks = some_picks(pool)
    arrays = tuple(map(jnp.asarray, pool))
    static = picks.packed_length, attention
    args = trained, frozen, arrays, tuple(picks[:2])
    (value, logps), found = differentiate(graphdef, layout, at_a_time, static, *args)
    (expected_value, others), expected = differentiate(graphdef, layout, 0, static, *args)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(logps, others, rtol=1e-5, atol=1e-4)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        norm = float(jnp.linalg.norm(b))
        assert norm > 0, path
        assert float(jnp.linalg.norm(a - b)) < 1e-5 * norm, path


@pytest.mark.parametrize(
    ("model_type", "remat", "layout", "at_a_time"),
    [
        ("qwen3", "dots", "packed", 2),
        ("smollm3", "full", "rectangle", 3),
        ("llama", "full", "packed", 1),
        slow("llama", "dots", "rectangle", 1),
        slow("smollm3", "full", "packed", 5),
        slow("qwen3", "dots", "packed", 9),
        slow("qwen3", "full", "rectangle", 9),
        ("qwen2", "dots", "rectangle", 2),
        slow("mistral", "full", "packed", 2),
    ],
)
def test_the_gradient_is_that_of_all_at_once(
    model_type: str, remat: str, layout: str, at_a_time: int
) -> None:
    tied = model_type == "smollm3"
    model = random_decoder(tiny_config(model_type, tie_word_embeddings=tied), remat=remat)
    check(model, layout, at_a_time, random_candidates(response=RESPONSE))


def test_known_logps_are_not_computed_again() -> None:
    """Nor looked at otherwise: the loss is that of what is passed."""
    graphdef, state = nnx.split(random_decoder(tiny_config(num_hidden_layers=1)))
    pool = random_candidates(response=RESPONSE)
    picks = some_picks(pool)
    known = jnp.linspace(-3.0, -1.0, picks.valid.size).reshape(picks.valid.shape)

    @jax.jit
    def compute(params: Any) -> Any:
        return chunked_replay.value_and_grad(
            loss,
            lambda trained: nnx.merge(graphdef, trained),
            params,
            *map(jnp.asarray, pool),
            picks,
            2,
            known,
            max_response=RESPONSE,
        )[0]

    value, logps = compute(nnx.to_pure_dict(state))
    np.testing.assert_array_equal(logps, known)
    assert float(value) == pytest.approx(float(loss(known)[0]))


@pytest.mark.parametrize("kind", ["float32", slow("int8"), "nf4"])
def test_adapters(kind: str) -> None:
    model = random_decoder(tiny_config("qwen3"), lora=ALL, remat="dots")
    frozen = stored(weights_of(model), kind)
    adapters = {"adapters": frozen.pop("adapters")}
    pool = random_candidates(response=RESPONSE)
    check(model, "packed", 2, pool, trained=adapters, frozen=frozen)


@pytest.mark.parametrize("layout", ["packed", slow("rectangle")])
def test_the_calls_of_a_fused_kernel(layout: str) -> None:
    """In plain operations, of kernels that take several responses and several prompts."""
    model = random_decoder(tiny_config(), remat="full")
    pool = random_candidates(response=RESPONSE)
    check(model, layout, 2, pool, attention=FusedAttention("xla"))


def test_bfloat16_loses_nothing_to_the_chunks() -> None:
    """The prompt's gradient adds up in float32: one response at a time is as good as all."""
    pool = random_candidates(response=RESPONSE, candidates=12)
    picks = some_picks(pool)
    args = tuple(map(jnp.asarray, pool)), tuple(picks[:2])
    found = {}
    for dtype, at_a_time in (("float32", 0), ("bfloat16", 0), ("bfloat16", 1)):
        model = random_decoder(tiny_config(), dtype=jnp.dtype(dtype))
        graphdef, state = nnx.split(model)
        static = graphdef, "rectangle", at_a_time, (picks.packed_length, None)
        (_, _), grads = differentiate(*static, nnx.to_pure_dict(state), {}, *args)
        found[dtype, at_a_time] = jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])
    exact = found["float32", 0]
    joint, chunked = (
        float(jnp.linalg.norm(found["bfloat16", k] - exact) / jnp.linalg.norm(exact))
        for k in (0, 1)
    )
    assert chunked < 1.1 * joint < 0.1


@pytest.mark.parametrize("layout", ["packed", "rectangle"])
def test_every_candidate_is_in_one_chunk_and_fits(layout: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        count, at_a_time, longest = rng.integers(1, 30), rng.integers(1, 12), rng.integers(1, 40)
        lengths = rng.integers(0, longest + 1, (4, count)) * (rng.random((4, count)) < 0.7)
        lengths[0] = longest  # As full as can be.
        lengths[1] = np.where(np.arange(count) < 2, longest, 1)  # As uneven.
        room = int(lengths.sum(1).max())
        chunks = deal(layout, jnp.asarray(lengths), int(at_a_time), int(longest), room)
        columns = np.asarray(chunks.columns)  # [m, B, K]
        assert columns.shape[0] == -(-count // at_a_time) and columns.shape[2] <= at_a_time
        for row in range(4):
            of_row = columns[:, row]
            assert sorted(of_row[of_row < count]) == list(range(count))
            sums = np.pad(lengths[row], (0, 1))[of_row].sum(1)
            assert sums.max() <= chunks.packed_length
        values = rng.normal(size=(4, count))
        split = chunks.split(jnp.asarray(values))
        assert np.all(np.asarray(split)[columns == count] == 0)
        np.testing.assert_allclose(chunks.join(split, int(count)), values, rtol=1e-6)
    assert chunks.packed_length <= room + longest


METHODS_TO_TEST = [
    ({"method": "pl_all"}, 2),
    ({"method": "mass_dpo", "num_negatives": 4, "train.micro_batch_size": 4}, 2),
    slow({"method": "mass_dpo", "num_negatives": 4, "model.layout": "rectangle"}, 3),
    slow({"method": "mass_dpo", "selection.pooling": "all", "model.remat": "full"}, 3),
    slow({"method": "pl_all", "sft_weight": 0.5, "model.layout": "rectangle"}, 1),
    slow({"method": "pl_sampled", "num_negatives": 4, "selection.draw": "local"}, 2),
    slow({"method": "pl_sampled", "num_negatives": 4, "model.layout": "rectangle"}, 4),
    slow({"method": "sdpo", "num_negatives": 5}, 3),
    slow({"method": "dpo"}, 1),
    slow({"method": "dpo_k", "num_negatives": 5, "train.micro_batch_size": 2}, 4),
    slow({"method": "dmpo", "num_negatives": 5, "model.layout": "rectangle"}, 2),
    slow({"method": "odpo", "num_negatives": 5, "sft_weight": 0.5}, 2),
    slow({"method": "mppo", "num_negatives": 5}, 2),
    slow({"method": "mppo", "num_negatives": 5, "model.layout": "rectangle"}, 1),
    slow({"method": "pl_rank"}, 2),
    slow({"method": "lipo_lambda", "model.layout": "rectangle"}, 2),
    slow({"method": "tree_po"}, 3),
    slow({"method": "sft"}, 1),
    # More at a time than there are picks, but fewer than candidates.
    slow({"method": "mass_dpo", "num_negatives": 2}, 4),
]


def first_step(config: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Returns gradient, metrics and negatives of a run's first step, away from the reference."""
    setup = prepare(config, folder, ("train",))
    params = setup.policy.weights("", 0)
    table = setup.score(setup.policy.weights("", 1), "train", "reference")
    batch = Batches(setup, Reference({"train": table} if setup.method.uses_reference else {}))[0]

    @jax.jit
    def step(params: Any, arrays: Any) -> Any:
        def micro_step(arrays: Any) -> Any:
            grads, metrics, used = setup.program.gradient(
                params, {}, arrays, None, setup.key(0), batch.packed_length
            )
            return (grads, metrics), used.candidate_ids

        return average_micro_batches(micro_step, arrays)

    (grads, metrics), ids = step(params, batch.arrays)
    return grads, metrics, ids


def check_steps(config: Any, at_a_time: int, folder: Path) -> None:
    expected_grads, expected, expected_ids = first_step(config, folder)
    config.train.responses_at_a_time = at_a_time
    grads, metrics, ids = first_step(config, folder)
    np.testing.assert_array_equal(ids, expected_ids)
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b), path


@pytest.mark.parametrize(("changes", "at_a_time"), METHODS_TO_TEST)
@pytest.mark.usefixtures("one_device")
def test_a_step_of_every_method(tmp_path: Path, changes: dict[str, Any], at_a_time: int) -> None:
    changes = {"model.remat": "dots", **changes}
    data = write_jsonl(tmp_path / "data.jsonl")
    check_steps(run_config(data, **changes), at_a_time, tmp_path / "run")


def test_every_method_is_tested() -> None:
    tested = {getattr(case, "values", case)[0]["method"] for case in METHODS_TO_TEST}
    assert tested == set(METHODS)


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, "packed"),
        slow({"data": 1, "fsdp": 8, "tensor": 1}, "rectangle"),
    ],
)
def test_a_step_on_eight_devices(tmp_path: Path, sizes: dict[str, int], layout: str) -> None:
    changes = {"method": "pl_all", "model.layout": layout}
    config = run_config(write_jsonl(tmp_path / "data.jsonl"), **changes)
    config.mesh.update(sizes)
    check_steps(config, 2, tmp_path / "run")


@pytest.mark.parametrize("layout", ["packed", slow("rectangle")])
def test_memory_does_not_grow_with_the_number_of_responses(layout: str) -> None:
    """By XLA's own figure, of a whole train step; all at once takes several times as much."""
    found = {}
    for pool, at_a_time in ((7, 4), (31, 4), (31, 0)):
        workload = Workload(
            batch=2, prompt=32, response=32, pool=pool, negatives=pool, layout=layout, layers=3,
            width=48, heads=4, mlp=96, vocabulary=300,
        )  # fmt: skip
        case = Case.without_weights(workload)
        program = case.program("pl_all", "dots", at_a_time=at_a_time)
        found[pool, at_a_time] = compiled_bytes(case, program)
    assert found[31, 4] < 1.05 * found[7, 4]
    assert found[31, 0] > 3 * found[31, 4]
