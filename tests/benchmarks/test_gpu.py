"""The benchmark for a card, on a CPU with tiny models: what it runs, checks, plans and reports."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.gpu import command, compiled, job, ours
from benchmarks.gpu.job import Job, workload
from benchmarks.workloads import changed, trace
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate import flops as flops_lib
from mass_dpo_jax.estimate.sizes import DeviceModel
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.fused_attention import FusedAttention
from tests.support.models import pretend_a_gpu
from tests.support.processes import python, refused

CHANGES = ("prompt=20", "response=5", "pool=5", "negatives=2")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    """Most of these tests' time would be compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch, torch: ModuleType) -> None:
    monkeypatch.setattr(job, "product_size", lambda device: 64)
    torch.set_num_threads(1)


def tiny(name: str, side: str, folder: Path, **fields: Any) -> Job:
    made = Job(
        changed(workload(name, "tiny"), CHANGES), side, "cpu", "float32", 2, time.time() + 300,
        str(folder / f"{name}-{side}.json"), batch=2, remat="full", reuse=True,
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


# ---------------------------------------------------------------- both sides


@pytest.mark.slow(reason="the whole benchmark, PyTorch included, on a tiny shape")
def test_both_sides_of_a_rectangle(tmp_path: Path) -> None:
    """In this process; the packed workload is below."""
    from benchmarks.gpu import peers

    own = ours.run(tiny("G2", "ours", tmp_path))
    assert own["losses"][0] == pytest.approx(math.log(3), abs=1e-4)
    assert own["losses"][-1] < own["losses"][0]  # It trains: three steps on one batch.
    assert own["attention"] == "plain" and own["remat"] == "full" and own["rounds"] == 2
    other = peers.run(tiny("G2", "peers", tmp_path))
    assert other["differences"]["picks"] == 0 and other["differences"]["loss"] < 1e-5
    assert set(other["programs"]) == set(command.PEERS)
    for letter, program in other["programs"].items():
        assert program["first_loss"] == pytest.approx(math.log(3), abs=1e-4)
        assert {way["checkpointing"] for way in program["tried"]} == {True, False}
        work, tokens = job.useful(workload_of(tmp_path), 2, letter == "c", letter == "a")
        assert program["useful_tflop"] * 1e12 == pytest.approx(work)
        seconds = program["milliseconds"]["median"] / 1e3
        assert program["useful_tokens_per_second"] * seconds == pytest.approx(tokens)
    assert other["programs"]["c"]["useful_tflop"] == own["useful_tflop"]
    for side, found in (("ours", own), ("peers", other)):
        assert json.loads((tmp_path / f"G2-{side}.json").read_text()) == found


def workload_of(folder: Path) -> job.Llama:
    return tiny("G2", "ours", folder).workload


@pytest.mark.slow(reason="the benchmark's table, with PyTorch")
def test_peers_that_compute_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import peers

    right = peers.MassDpo.choose
    monkeypatch.setattr(peers.MassDpo, "choose", lambda *args: right(*args) % 6 + 1)
    with pytest.raises(RuntimeError, match=r"\(c\) .*: picks: off by .* at most 0.0"):
        peers.agree(tiny("G1", "peers", tmp_path))
    with pytest.raises(RuntimeError, match=r"first loss is 1.2000, expected 1.0986 \+- 0.001"):
        job.check_first_loss(1.2, tiny("G1", "ours", tmp_path))
    job.check_first_loss(1.15, tiny("G1", "ours", tmp_path, dtype="bfloat16"))


def test_autocast_keeps_weights_and_rotary_angles_in_float32(
    tmp_path: Path, torch: ModuleType
) -> None:
    """The peers' way with bfloat16, close to float32 and not equal to it."""
    from benchmarks.gpu import peers

    exact = tiny("G1", "peers", tmp_path)
    rough = dataclasses.replace(exact, dtype="bfloat16")
    batch = ours.case_of(exact, 2, fused_attention.plain).batches[0]
    torch.manual_seed(0)
    model = peers.random_torch(exact.workload.model, "cpu")
    found, expected = (peers.reference(model, batch, which) for which in (rough, exact))
    assert 1e-4 < np.abs(found - expected).max() < 0.5
    other = peers.reference_model(model, torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(other.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    numbers = np.array([[1, 2], [3, 4]])
    batch = batch._replace(ref_logps=found)
    stepper = peers.Stepper(rough, "a", model, batch, numbers, 0.1)
    assert stepper.first_loss() == pytest.approx(math.log(3), abs=0.02)
    before = model.lm_head.weight.detach().clone()
    stepper.step(parts=2)()
    assert model.lm_head.weight.dtype == torch.float32
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.slow(reason="the benchmark's table, with PyTorch")
def test_a_peer_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import peers

    def measure(made: Any, job: Job, until: float) -> dict[str, Any]:
        if made.letter == "c":
            raise KeyError("exp_avg")
        return {"milliseconds": {"median": 1.0}}

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "agree", lambda job: {})
    programs = peers.run(tiny("G1", "peers", tmp_path))["programs"]
    assert programs["c"] == {"not_run": "KeyError: 'exp_avg'"}
    assert all("milliseconds" in programs[letter] for letter in "ab")


def test_words_for_out_of_memory(torch: ModuleType) -> None:
    for words in (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    ):
        assert job.out_of_memory(RuntimeError(words))
    assert job.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not job.out_of_memory(RuntimeError("INTERNAL: no engine"))


@pytest.mark.slow(reason="the benchmark's search, step by step")
def test_out_of_memory_means_more_parts(
    tmp_path: Path, torch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import peers

    asked = []

    class Made:
        size, letter = 6, "b"
        peer = type("P", (), {"model": torch.nn.Linear(1, 1)})()

        def first_loss(self) -> float:
            return math.log(3)

        def step(self, parts: int) -> Any:
            def run() -> None:
                asked.append((checkpointing[-1], parts))
                if parts < (6 if checkpointing[-1] else 99):
                    raise torch.OutOfMemoryError("CUDA out of memory")

            return run

    checkpointing: list[bool] = []
    monkeypatch.setattr(peers, "_checkpoint", lambda model, on: checkpointing.append(on))
    some = tiny("G1", "peers", tmp_path)
    found = peers.measure(Made(), some, time.time() + 100)  # type: ignore[arg-type]
    # Parts of 6 prompts: 1 and 2, since 4 would be unequal.
    assert found["not_run"].count("out of memory") == 4 and set(asked) == {
        (False, 1), (False, 2), (True, 1), (True, 2)
    }  # fmt: skip
    Made.size = 8
    asked.clear()
    found = peers.measure(Made(), some, time.time() + 100)  # type: ignore[arg-type]
    assert (found["parts"], found["checkpointing"]) == (8, True)
    assert len(found["failed_before"]) == 4 + 3
    assert "out of time" in peers.measure(Made(), some, 0.0)["not_run"]  # type: ignore[arg-type]


# ---------------------------------------------------------------- what fits


@pytest.mark.slow(reason="the benchmark's search, step by step")
def test_the_plan_for_a_card_of_80_gb(tmp_path: Path) -> None:
    for name in job.SHAPES:
        big = Job(workload(name, "3b"), "ours", "cuda", "bfloat16", 7, 0.0, "", memory=int(78.6e9))
        best = ours.plan(big, FusedAttention())
        assert best == (32, {"G1": "dots", "G2": "full"}[name], True)
        double = best._replace(batch=2 * best.batch)
        limit = ours.MARGIN * 78.6e9
        assert (
            ours.peak(big, best, FusedAttention())
            <= limit
            < ours.peak(big, double, FusedAttention())
        )
        for remat, reuse in (("dots", False), ("full", False)):
            other = ours.plan(dataclasses.replace(big, remat=remat, reuse=reuse), FusedAttention())
            assert other.batch > 1 and ours.effort(big, other) > ours.effort(big, best)
        less, second = ours.smaller(big, best, FusedAttention())
        assert ours.peak(big, second, FusedAttention()) <= 0.95 * ours.peak(
            big, best, FusedAttention()
        )
        assert ours.effort(big, second) >= ours.effort(big, best)
        assert ours.smaller(less, second, FusedAttention())[1] != second
        assert (
            ours.smaller(dataclasses.replace(big, batch=8), best, FusedAttention())[1].batch == 16
        )
        asked = dataclasses.replace(big, batch=4, memory=None, remat="dots", reuse=False)
        assert ours.plan(asked, FusedAttention()) == (4, "dots", False)
        assert ours.plan(dataclasses.replace(big, memory=int(1e9)), FusedAttention()) == (
            1,
            "full",
            False,
        )


@pytest.mark.slow(reason="the benchmark's search, step by step")
def test_a_step_that_does_not_fit_or_run_is_tried_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours.fused_attention, "choose_attention", lambda *args: FusedAttention())
    monkeypatch.setattr(ours.fused_attention, "measure_error", lambda *args: 0.005)
    tried: list[tuple[int, bool]] = []

    def attempt(some: Job, how: ours.Plan, attention: Any) -> dict[str, Any]:
        tried.append((how.batch, isinstance(attention, FusedAttention)))
        if how.batch > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        if isinstance(attention, FusedAttention):
            raise jax.errors.JaxRuntimeError("INTERNAL: no engine")
        return {"prompts": how.batch}

    monkeypatch.setattr(ours, "attempt", attempt)
    some = tiny("G1", "ours", tmp_path, batch=8)
    found = ours.run(some)
    assert tried == [(8, True), (4, True), (2, True), (8, False), (4, False), (2, False)]
    assert (found["prompts"], found["attention"]) == (2, "plain")
    assert len(found["failed_before"]) == 5
    assert found["failed_before"][2].endswith("fused attention: INTERNAL: no engine")
    assert "out of time" in ours.run(tiny("G1", "ours", tmp_path, batch=8, until=0.0))["not_run"]

    def stopped(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    Path(some.result).unlink()
    monkeypatch.setattr(ours, "attempt", stopped)
    with pytest.raises(KeyboardInterrupt):
        ours.run(some)
    assert json.loads(Path(some.result).read_text())["attention_difference"] == 0.005


def test_without_a_gpu_nothing_is_tried_on_the_host(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="JAX sees no GPU, but cpu"):
        ours.run(tiny("G1", "ours", tmp_path, device="cuda"))


@pytest.mark.parametrize("name", list(job.SHAPES))
def test_useful_operations_are_those_of_the_estimate(name: str) -> None:
    """Two formulas, and Llama 3.2 3B's size."""
    w, batch = workload(name, "3b"), 5
    model = DeviceModel.from_decoder(w.model, 2, "full")
    prompts = np.full(batch, w.prompt)
    of_prompts, behind = flops_lib.useful_flops(
        model, prompts, np.full((batch, 1 + w.pool), w.response)
    )
    sets = behind[:, : 1 + w.negatives]
    expected = (of_prompts + behind.sum(1)).sum() + 2 * (of_prompts + sets.sum(1)).sum()
    found, tokens = job.useful(w, batch, scored=True, reference=False)
    assert found == pytest.approx(expected, rel=1e-12)
    assert tokens == batch * (w.prompt + (1 + w.pool) * w.response)
    with_reference, _ = job.useful(w, batch, scored=False, reference=True)
    without, _ = job.useful(w, batch, scored=False, reference=False)
    assert with_reference == pytest.approx(without * 4 / 3)
    assert model.layers * model.layer_weights + model.hidden * model.vocabulary == pytest.approx(
        3_212_749_824, rel=1e-4
    )


# ---------------------------------------------------------------- the command


@pytest.mark.slow(reason="the whole benchmark in processes of its own, on a tiny shape")
def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Processes as on a card: figures, the table and the file."""
    output = tmp_path / "gpu.json"
    jobs = [("G1", tiny("G1", side, tmp_path)) for side in ("ours", "peers")]
    found = command.run(jobs, budget=300.0, output=str(output))
    sides = found["G1"]
    assert "not_run" not in sides["ours"] and sides["ours"]["prompts"] == 2
    for letter in command.PEERS:
        peer = sides["peers"]["programs"][letter]
        ratio = peer["milliseconds"]["median"] / sides["ours"]["milliseconds"]["median"]
        assert sides["ratios"][letter]["ratio"] == ratio
        assert peer["prompts"] == 2
    assert [sides["ratios"][letter]["goal"] for letter in "abc"] == [3.0, None, 6.0]
    used = sides["ratios"]["utilisation"]
    assert used["of_data_sheet"] is None and 0 < used["of_product"] < 2
    written = json.loads(output.read_text())
    assert written["workloads"] == found and written["machine"]["torch"]
    text = command.describe("G1", sides)
    for words in ("| **ours** |", "| (a) PyTorch S-DPO |", "(goal 6)", "first losses: ours 1.09"):
        assert words in text
    assert "largest differences in float32 on a tiny model: {'picks': 0.0" in capfd.readouterr().out


@pytest.mark.slow(reason="the benchmark in a process of its own")
def test_what_did_not_run_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    some = tiny("G1", "ours", tmp_path)
    assert command.start_job(some, tmp_path / "job", 0.0) == {"not_run": "out of time"}
    stopped = command.start_job(some, tmp_path / "job", 0.3)
    assert stopped == {"not_run": "out of time: stopped after 0 s"}
    some.save({"milliseconds": {"median": 1.0}, "prompts": 4})  # Before it was stopped.
    assert command.start_job(some, tmp_path / "job", 0.3)["failed_after"].startswith("out of time")
    Path(some.result).unlink()
    broken = dataclasses.replace(some, attention="fused")
    failed = command.start_job(broken, tmp_path / "job", 100.0)
    assert "error: config.model.attention=fused" in capfd.readouterr().err
    assert "config.model.attention=fused: the kernel is cuDNN's" in failed["not_run"]

    assert failed["exit_status"] == 2

    sides = {"ours": failed, "peers": {"not_run": "out of time"}, "ratios": {}}
    text = command.describe("G1", sides)
    assert text.count("not run: ") == 4 and "cuDNN's" in text
    assert command.ratios("G1", sides) == {}


def test_a_process_that_the_kernel_ends_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int | None]] = []

    def start(some: Job, path: Path, seconds: float) -> dict[str, Any]:
        asked.append((some.side, some.attention, some.batch))
        assert some.until > time.time() and 0 < seconds <= 100
        if some.side == "peers":
            return {"not_run": "out of time"}
        if some.attention == "auto":
            return {"not_run": "exit status -11: no message", "exit_status": -11}
        return {"prompts": 32}

    monkeypatch.setattr(command, "start_job", start)
    jobs = [("G1", tiny("G1", side, tmp_path, batch=None)) for side in ("ours", "peers")]
    found = command.run(jobs, budget=100.0, output=None)["G1"]
    # The peers get as many prompts as ours had.
    assert asked == [("ours", "auto", None), ("ours", "plain", None), ("peers", "auto", 32)]
    assert found["ours"]["failed_with_auto_attention"] == "exit status -11: no message"
    assert "| **ours** | not run: no figures |" in command.describe("G1", found)


def test_peaks_by_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.0,
        "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA GH200 480GB": 989.4,
        "NVIDIA B200": 2250.0, "cpu": None,
    }  # fmt: skip
    assert {name: command.data_sheet(name) for name in names} == names
    assert command.utilisation({"useful_tflops_per_second": 494.7}, 989.4) == 0.5
    assert set(command.GOALS) <= set(job.SHAPES)


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused("benchmarks.gpu", "--workloads=G9", "--device=cpu")
    assert "--workloads: no 'G9'; expected G1, G2" in line
    line = refused("benchmarks.gpu", "--device=cpu", "--model=tiny")
    assert "--device=cpu: give --batch or --memory_gb" in line
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    with pytest.raises(SystemExit, match=r"has no transformers, which benchmarks\.gpu needs"):
        runpy.run_module("benchmarks.gpu", run_name="__main__")


def test_every_package_that_is_needed_is_asked_for_first() -> None:
    """What our modules import as they are loaded, in a process that loads nothing else."""
    code = (
        "import sys, benchmarks.gpu.command, benchmarks.gpu.ours, benchmarks.gpu.peers\n"
        "for name, module in sys.modules.items():\n"
        "    if name.partition('.')[0] in ('benchmarks', 'mass_dpo_jax'): print(module.__file__)"
    )
    done = python("-c", code, check=True)
    found = set()
    for file in done.stdout.split():
        for node in ast.parse(Path(file).read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    others = found - set(sys.stdlib_module_names) - {"benchmarks", "mass_dpo_jax"}
    asked = set(runpy.run_module("benchmarks.gpu.__main__")["NEEDED"])
    assert "qwix" in others and others <= asked


@pytest.mark.parametrize("name", list(job.SHAPES))
def test_the_planned_step_lowers_for_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size: jax takes the shapes, and no array of scores is left."""
    pretend_a_gpu(monkeypatch)
    big = Job(workload(name, "3b"), "ours", "cuda", "bfloat16", 7, 0.0, "", batch=8)
    case = ours.case_of(big, 8, FusedAttention())
    traced = trace(case, case.program("mass_dpo", "full"))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 3
    prompt, size, w = case.shapes[0].prompt, case.shapes[0].selected, case.workload
    assert f"tensor<8x8x1x3x{prompt}x{prompt}xf32>" not in text
    # The kernel's bias: 16 bits, one for all heads, keys of the prompt and the group.
    rows, length = (8, size) if w.layout == "packed" else (8 * (1 + w.negatives), w.response)
    assert f"tensor<{rows}x1x{length}x{prompt + length}xbf16>" in text


def test_a_step_compiled_for_a_device() -> None:
    case = ours.case_of(tiny("G1", "ours", Path()), 2, fused_attention.plain)
    # It takes the weights and both moments in float32, and its results take their place.
    params = nnx.state(abstract_decoder(case.model), nnx.Param)
    least = 3 * 4 * sum(x.size for x in jax.tree.leaves(params))
    step = trace(case, case.program("mass_dpo", "full")).lower().compile()
    held = compiled.held(step)
    assert least < held < 3 * least


def test_compiling_for_a_card_needs_the_plugin() -> None:
    words = ("benchmarks.gpu.compiled", "--model=tiny", "--batch=1")
    assert 'expected its plugin: pip install "jax[cuda13]"' in refused(*words)
