"""The estimate of a train step, against arrays, residuals, counted products and XLA's buffers."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import cost
from benchmarks.memory import compiled_bytes, estimate_case
from benchmarks.workloads import Case, Workload
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate import activations
from mass_dpo_jax.estimate import dry_run as dry_run_lib
from mass_dpo_jax.estimate import flops as flops_lib
from mass_dpo_jax.estimate import memory as memory_lib
from mass_dpo_jax.estimate.dry_run import dry_run
from mass_dpo_jax.estimate.memory import StateBytes, StepLayout
from mass_dpo_jax.estimate.sizes import BatchLayout, Chunks, DeviceModel
from mass_dpo_jax.models.candidate_scores import CandidateScores
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.fused_attention import FusedAttention
from mass_dpo_jax.training import loop as train_lib
from mass_dpo_jax.training.mesh import abstract_mesh
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.scorer import Scorer
from mass_dpo_jax.training.setup import Reference
from mass_dpo_jax.training.step import Choice, Program
from mass_dpo_jax.training.updates import Batches, abstract_state
from tests.support.helpers import WORDS, slow, tiny_config, write_jsonl
from tests.support.models import hf_config, pretend_a_gpu
from tests.support.processes import command, refused

MODEL = DecoderConfig.from_hf(  # H K is not D, and K KV is neither.
    hf_config(
        vocab_size=2000, hidden_size=48, intermediate_size=112, num_attention_heads=6, head_dim=12,
        tie_word_embeddings=True,
    ),
    "config.json",
)  # fmt: skip
PROMPT, RESPONSE, POOL, NEGATIVES = 40, 16, 7, 2


def on_device(tree: Any) -> int:
    """Returns the bytes that the first device really holds."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_optimizer_are_exact_on_a_mesh(tmp_path: Path, dtype: str) -> None:
    changes = {"model.scratch.intermediate_size": 45, "train.moments_dtype": dtype}
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl"), **changes)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    setup = prepare(config, tmp_path / "run", ("train",))
    optimizer = make_optimizer(config.train, 4)
    like = abstract_state(setup, optimizer)
    params = setup.policy.weights("", 0)
    assert params["blocks"]["gate"]["kernel"].addressable_shards[0].data.shape == (2, 16, 45)
    places = jax.tree.map(lambda x: x.sharding, like.opt_state)
    state = jax.jit(optimizer.init, out_shardings=places)(params)
    mesh = abstract_mesh(config.mesh, 8)
    found = memory_lib.state_bytes(setup.policy.config, mesh, optimizer)
    assert found == (on_device(params), 0, on_device(state))
    gradient = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))(params)
    assert found.trained == on_device(gradient)

    shape = setup.buckets["train"].shapes[-1]
    batch = Batches(setup, Reference({}))[0].arrays
    found = dry_run_lib.estimate_shape(setup, mesh, shape)
    assert found.batch == on_device(batch)
    assert found.parameters == found.gradients == on_device(params)


def program(remat: str, layout: str, dtype: str, model: DecoderConfig = MODEL) -> Program:
    config = config_lib.default()
    config.num_negatives = NEGATIVES
    graphdef, _ = nnx.split(abstract_decoder(model, dtype=jnp.dtype(dtype), remat=remat))
    scorer = Scorer(
        graphdef=graphdef,
        layout=layout,
        max_response=RESPONSE,
        chunk=1 + NEGATIVES if layout == "rectangle" else None,
        pooling="response",
    )
    return Program(scorer, make_method(config, POOL), None)


def arguments(rows: int, model: DecoderConfig = MODEL) -> tuple[Any, Batch]:
    """Returns shapes of weights and of a batch."""
    params = nnx.to_pure_dict(nnx.state(abstract_decoder(model), nnx.Param))
    integers = [(rows, PROMPT), (rows,), (rows, (1 + POOL) * RESPONSE), (rows, 1 + POOL)]
    made = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers]
    reference = jax.ShapeDtypeStruct((rows, 1 + POOL), jnp.float32)
    index = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return params, Batch(*made, ref_logps=reference, index=index)


def layouts(layout: str, rows: int) -> tuple[BatchLayout, Chunks | None, BatchLayout]:
    """Returns the layout of the pool, its chunks, and the layout of what is trained on."""
    if layout == "packed":
        pool, trained = (
            BatchLayout(rows, PROMPT, 1, n * RESPONSE) for n in (1 + POOL, 1 + NEGATIVES)
        )
        return pool, None, trained
    pool, trained = (BatchLayout(rows, PROMPT, n, RESPONSE) for n in (1 + POOL, 1 + NEGATIVES))
    chunks = Chunks.divide(layout, 1 + POOL, 1 + NEGATIVES, RESPONSE, (1 + POOL) * RESPONSE)
    return pool, chunks, trained


def loss(made: Program) -> Any:
    """Returns the loss of weights, batch and candidates, as the train step computes it."""
    size = (1 + NEGATIVES) * RESPONSE
    return lambda params, batch, numbers: made.loss(params, batch, Choice(numbers), size)[0]


def numbers(rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, NEGATIVES), jnp.int32)


def saved(made: Program, rows: int, model: DecoderConfig = MODEL) -> int:
    """Returns the bytes of a pool's record, and of what differentiation keeps beside it."""

    def held(params: Any, batch: Batch, numbers: Any) -> Any:
        record = made.scorer(params, batch, record=True).record
        size = (1 + NEGATIVES) * RESPONSE

        def trained(params: Any) -> Any:
            return made.loss(params, batch, Choice(numbers), size, record)[0]

        return record, jax.vjp(trained, params)[1]

    found = jax.eval_shape(held, *arguments(rows, model), numbers(rows))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))


CASES = [
    ("dots", "packed", "float32"), ("dots", "rectangle", "bfloat16"),
    ("full", "packed", "bfloat16"), ("full", "rectangle", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("remat", "layout", "dtype"), CASES)
def test_kept_bytes_are_the_record_and_what_differentiation_saves(
    remat: str, layout: str, dtype: str
) -> None:
    model = DeviceModel.from_decoder(MODEL, jnp.dtype(dtype).itemsize, remat)

    def kept(rows: int) -> int:
        pool, _, trained = layouts(layout, rows)
        return activations.kept_bytes(model, pool, trained)

    made = program(remat, layout, dtype)
    # What does not grow with the batch are weights.
    assert kept(6) - kept(2) == pytest.approx(saved(made, 6) - saved(made, 2), rel=0.04)


@pytest.mark.parametrize("layout", ["packed", "rectangle"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_kept_bytes_of_a_fused_kernel(
    remat: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, not run: nothing beside the record."""
    pretend_a_gpu(monkeypatch)
    config = dataclasses.replace(MODEL, head_dim=16)  # The kernel takes multiples of 8.
    model = DeviceModel.from_decoder(config, 2, remat, fused=True)
    made = program(remat, layout, "bfloat16", config)
    made = dataclasses.replace(
        made, scorer=dataclasses.replace(made.scorer, attention=FusedAttention())
    )

    pool, _, trained = layouts(layout, 4)
    found = saved(made, 6, config) - saved(made, 2, config)
    assert activations.kept_bytes(model, pool, trained) == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_fused_kernel_holds_no_scores(remat: str) -> None:
    """Temporaries grow with the number of heads by no pair of tokens."""
    one = DeviceModel.from_decoder(MODEL, 2, remat, fused=True)
    many = dataclasses.replace(one, heads=one.heads + 1)
    pool, chunks, trained = layouts("rectangle", 2)
    for layout in (trained, trained._replace(prompt=400)):
        for count in (activations.backward_bytes, activations.forward_bytes):
            assert count(many, layout) - count(one, layout) <= 4 * layout.tokens * one.layers
    assert activations.scoring_bytes(one, pool, chunks) < activations.scoring_bytes(
        dataclasses.replace(one, fused=False, heads=24), pool, chunks
    )


@pytest.mark.parametrize(("remat", "layout"), [case[:2] for case in CASES])
def test_flops_are_those_of_the_programs_products(remat: str, layout: str) -> None:
    """In float32: in bfloat16 the traced program has products whose results nothing uses."""
    rows = 3
    made = program(remat, layout, "float32")
    model = DeviceModel.from_decoder(MODEL, 4, remat)
    pool, chunks, trained = layouts(layout, rows)
    params, batch = arguments(rows)
    counted = cost.counted(jax.make_jaxpr(jax.grad(loss(made)))(params, batch, numbers(rows)).jaxpr)
    assert flops_lib.training_flops(model, trained) == pytest.approx(counted, rel=0.02)
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = cost.counted(jax.make_jaxpr(made.choose_batch)(params, batch, key).jaxpr)
    assert flops_lib.scoring_flops(model, pool, chunks) == pytest.approx(counted, rel=0.02)


def test_useful_flops_count_pairs_that_see_each_other() -> None:
    model = DeviceModel.from_decoder(MODEL, 4, "dots")
    prompts, responses = np.array([5, 3]), np.array([[2, 4], [1, 0]])
    of_prompts, behind = flops_lib.useful_flops(model, prompts, responses)
    for b in range(2):
        # Query by query: a token of a prompt sees those before it, of a response the prompt too.
        want = 0
        for layer in range(model.layers):
            for place in range(prompts[b]):
                if layer < model.layers - 1 or place == prompts[b] - 1:
                    want += 2 * model.layer_weights + 4 * model.query_width * (place + 1)
                else:  # The last layer needs only what other tokens see: keys and values.
                    want += 2 * model.hidden * 2 * model.key_width
        assert of_prompts[b] == want
        for c, length in enumerate(responses[b]):
            pairs = sum(prompts[b] + i + 1 for i in range(length))
            token = 2 * (model.layers * model.layer_weights + model.hidden * model.vocabulary)
            assert behind[b, c] == 4 * model.layers * model.query_width * pairs + token * length


WORKLOAD = Workload(
    batch=6, prompt=96, response=8, pool=11, layers=3, width=64, heads=4, mlp=160, vocabulary=1000
)


@pytest.mark.parametrize(
    ("remat", "changes"),
    [
        slow("full", {}),
        ("dots", {}),
        slow("full", {"layout": "rectangle", "response": 48, "pool": 5, "prompt": 48}),
    ],
)
def test_temporaries_are_near_those_of_xla(remat: str, changes: dict[str, Any]) -> None:
    """For the whole train step in float32, where activations are most of it."""
    case = Case.make(dataclasses.replace(WORKLOAD, **changes))
    found = estimate_case(case, remat)
    assert found.temporaries > 3 * found.gradients
    compiled = compiled_bytes(case, case.program("mass_dpo", remat))
    assert found.temporaries == pytest.approx(compiled, rel=0.2)


LONG = {"batch": 2, "prompt": 48, "response": 64, "pool": 19, "negatives": 19}


@pytest.mark.parametrize(
    ("remat", "method", "changes"),
    [
        ("dots", "pl_all", LONG),
        slow("full", "pl_all", {**LONG, "layout": "rectangle"}),
        slow("dots", "pl_all", {**LONG, "prompt": 256, "response": 16}),  # The prompt's own pass.
        slow("full", "mass_dpo", {**LONG, "negatives": 7}),
        slow("dots", "mass_dpo", {**LONG, "negatives": 7, "layout": "rectangle"}),
    ],
)
def test_temporaries_of_a_few_responses_at_a_time(
    remat: str, method: str, changes: dict[str, Any]
) -> None:
    case = Case.without_weights(dataclasses.replace(WORKLOAD, **changes))
    found = estimate_case(case, remat, method=method, at_a_time=4).temporaries
    compiled = compiled_bytes(case, case.program(method, remat, at_a_time=4))
    assert found == pytest.approx(compiled, rel=0.2)
    assert found < 0.5 * estimate_case(case, remat, method=method).temporaries


@pytest.mark.parametrize("layout", ["packed", "rectangle"])
@pytest.mark.parametrize("scored", [False, True])
def test_flops_of_a_few_responses_at_a_time(layout: str, scored: bool) -> None:
    rows, made = 3, program("full", layout, "float32")
    made = dataclasses.replace(made, at_a_time=2)
    params, batch = arguments(rows)
    scores = CandidateScores(jnp.zeros((rows, 1 + POOL))) if scored else None

    def differentiate(params: Any, batch: Batch, numbers: Any) -> Any:
        size = (1 + NEGATIVES) * RESPONSE
        return made.value_and_grad(params, {}, batch, Choice(numbers), size, scores)

    counted = cost.counted(jax.make_jaxpr(differentiate)(params, batch, numbers(rows)).jaxpr)
    _, _, trained = layouts(layout, rows)
    chunks = Chunks.divide(layout, 1 + NEGATIVES, 2, RESPONSE, (1 + NEGATIVES) * RESPONSE)
    assert chunks is not None
    model = DeviceModel.from_decoder(MODEL, 4, "full")
    found = flops_lib.chunked_training_flops(model, trained, chunks, scored)
    assert found == pytest.approx(counted, rel=0.02)


@pytest.mark.usefixtures("one_device")
def test_dry_run_of_a_few_responses_at_a_time(tmp_path: Path) -> None:
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl"), method="pl_all")
    config.train.update(batch_size=3200, micro_batch_size=3200)
    at_once = dry_run(config, None, train_lib.SPLITS)
    config.train.responses_at_a_time = 2
    few = dry_run(config, None, train_lib.SPLITS)
    assert gigabytes(few, "kept") < gigabytes(at_once, "kept")
    assert "all at once: prompt" in few and "all at once: prompt" not in at_once


def test_peak_with_an_offloaded_state_and_several_micro_batches() -> None:
    model = DeviceModel.from_decoder(MODEL, 2, "full")
    pool, chunks, trained = layouts("packed", 2)
    state = StateBytes(trained=100, frozen=0, optimizer=200)
    step = StepLayout(pool, chunks, trained, micro_batches=1)
    one = memory_lib.estimate_step(model, state, 7, step)
    many = memory_lib.estimate_step(model, state, 7, step._replace(micro_batches=4), offloaded=True)
    assert one.phases["update"] == many.phases["update"] == 100 + 100 + 200 + 7
    for name in ("scoring", "vocabulary", "layers"):
        assert many.phases[name] == one.phases[name] - 200 + 100
    assert one.peak == max(one.phases.values()) == one.temporaries + 307


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A model folder with architecture and tokenizer, without weights."""
    folder = tmp_path / "model"
    train_tokenizer([" ".join(WORDS)], 300, folder)
    (folder / "config.json").write_text(json.dumps(hf_config(vocab_size=320)))
    return folder


def gigabytes(text: str, term: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(term)]
    return float(re.findall(r"([\d.]+) GB$", line)[0])


def test_dry_run_of_a_mesh_that_is_not_here(tmp_path: Path, hf_folder: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    config = tiny_config(data, **{"model.path": str(hf_folder), "cache_dir": str(tmp_path / "c")})
    config.train.update(batch_size=64, micro_batch_size=32)
    config.eval.batch_size = 32
    config.mesh.update(data=2, fsdp=8, tensor=2)
    before = sorted(tmp_path.rglob("*"))
    text = dry_run(config, None, train_lib.SPLITS)
    assert "one device of 32 (data=2 fsdp=8 tensor=2)" in text and "fit" not in text
    assert sorted(path for path in tmp_path.rglob("*") if "c" not in path.parts) == before

    peak = gigabytes(text, "peak")
    for memory, verdict in ((peak + 0.001, "fits: needs"), (peak / 2, "does not fit: needs")):
        config.device_memory_gb = memory
        config.model.update(dtype="float32", remat="full")
        assert dry_run(config, None, train_lib.SPLITS).splitlines()[-1].startswith(verdict)

    many = config.copy_and_resolve_references()
    many.train.update(batch_size=3200, micro_batch_size=3200)
    many.model.dtype = "bfloat16"
    plain = dry_run(many, None, train_lib.SPLITS)
    many.model.attention = "fused"  # Nor need the kernel be here.
    fused = dry_run(many, None, train_lib.SPLITS)
    term = "estimate: temporaries of the loss, another layer"
    assert 0 < gigabytes(fused, term) < 0.9 * gigabytes(plain, term)

    config.mesh.update(data=-1, fsdp=3)
    with pytest.raises(UserError, match=r"the 8 device\(s\) here, .* no multiple of 6"):
        dry_run(config, None, train_lib.SPLITS)
    config.mesh.update(data=3, fsdp=1)
    with pytest.raises(UserError, match=r"micro_batch_size=32: expected a multiple of .* = 3"):
        dry_run(config, None, train_lib.SPLITS)


@pytest.mark.usefixtures("one_device")
def test_dry_run_leaves_a_run_as_it_is(tmp_path: Path) -> None:
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl"))
    config.train.update(steps=1, eval_every=0)
    run = tmp_path / "run"
    train_lib.train(config, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    known, new = (dry_run(config, folder, train_lib.SPLITS) for folder in (run, None))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert known == new  # The tokenizer is trained again on the same text.
    assert "(scoring 0" not in known
    for changes in ({"method": "sdpo"}, {"selection.refresh": "epoch"}):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        assert "(scoring 0" in dry_run(other, None, train_lib.SPLITS)


def test_the_command_needs_no_workdir(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    words = ("mass_dpo_jax.train", "--config=configs/tiny.py", "--config.dry_run=True",
             "--config.data.name=jsonl", f"--config.data.path={data}",
             "--config.data.chat_template=none")  # fmt: skip
    done = command(*words, "--config.device_memory_gb=1e-5")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^does not fit: needs \d+\.\d\d GB of 1e-05 GB$", done.stdout, re.M)
    line = refused(*words, "--config.device_memory_gb=-1")
    assert "config.device_memory_gb=-1.0: expected 0 or more" in line
