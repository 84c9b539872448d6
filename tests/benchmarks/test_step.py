"""The step's benchmarks: programs that agree, FLOPs that are counted, commands that run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cost, machine, scaling, step
from benchmarks.workloads import WORKLOADS, Case, Ours, Workload, changed
from mass_dpo_jax.errors import UserError
from tests.support.data import write_lines
from tests.support.helpers import slow
from tests.support.processes import refused
from tests.support.tokenizers import small

TINY = Workload(
    batch=3, prompt=20, response=5, pool=6, negatives=2, layers=2, width=32, heads=4, kv_heads=2,
    mlp=48, vocabulary=64,
)  # fmt: skip
RECTANGLE = dataclasses.replace(TINY, layout="rectangle", response=9)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    """Most of these tests' time would be compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _no_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A quiet machine without large products, which would take most of the time; and one thread,
    since PyTorch's wait for each other in a loop, also where others want the core."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    monkeypatch.setattr(machine, "best_threads", lambda program, runs: (program(), 1)[1])
    monkeypatch.setattr(machine, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(step, "PRODUCTS", {step.FLOOR_PRODUCT: ((64, 32, 48), 2)})
    yield


def lastfm(folder: Path) -> tuple[str, str]:
    """Folders with S-DPO's training file, twelve rows of several lengths, and a tokenizer."""
    data, tokenizer = folder / "data", folder / "tokenizer"
    data.mkdir()
    names = [f"band {'x' * (i % 5)}{i}" for i in range(30)]
    rows = [
        {
            "historyList": "::".join(names[i % 7 : i % 7 + 3 + i % 4]),
            "itemList": names[i : i + 6],
            "trueSelection": names[i + 2],
        }
        for i in range(12)
    ]
    write_lines(data / "lastfm-train.json", [json.dumps(rows)])
    small().save_pretrained(tokenizer)
    return str(data), str(tokenizer)


# ---------------------------------------------------------------- everybody computes the same


@pytest.mark.slow(reason="the whole benchmark's programs, PyTorch's included")
def test_agreement_and_its_failure(torch: ModuleType) -> None:
    """A rectangle; LastFM's rows below are packed."""
    bench = step.Bench(Case.make(RECTANGLE))
    del bench.ours["ours, remat full"]  # A compilation less; it is below.
    peer = bench.peers["b"]
    inputs = peer.collate(bench.pools[0], bench.random[0])
    # Not the number that every program has when policy and reference are the same.
    assert abs(peer.loss(*inputs).item() - math.log(3)) > 1e-3
    errors = bench.agree()
    assert errors["picks"] == 0
    assert errors["loss"] < 1e-5
    assert errors["update"] < 1e-2
    with torch.no_grad():
        bench.peers["d"].model.model.norm.weight[0] += 1.0
    with pytest.raises(RuntimeError, match=r"\(d\) .*: loss: off by .* at most 0.0001"):
        bench.agree()


def test_algorithm_1_is_brute_force_in_float64(torch: ModuleType) -> None:
    """Greedy by determinants of d x d matrices, one prompt at a time."""
    from benchmarks.peers import algorithm_1

    rng = np.random.default_rng(0)
    features, scores = rng.normal(size=(3, 7, 5)), rng.normal(size=(3, 7))
    found = algorithm_1(torch.tensor(features).float(), torch.tensor(scores).float(), 3, 0.1)
    for b in range(3):
        p = np.exp(scores[b]) / np.exp(scores[b]).sum()
        v = np.sqrt(p)[:, None] * (features[b] - p @ features[b])
        information, picks = 0.1 * np.eye(5), []
        for _ in range(3):
            values = [
                -math.inf if i in picks else np.linalg.slogdet(information + np.outer(x, x))[1]
                for i, x in enumerate(v)
            ]
            picks.append(int(np.argmax(values)))
            information += np.outer(v[picks[-1]], v[picks[-1]])
        assert found[b].tolist() == picks


# ---------------------------------------------------------------- FLOPs


@pytest.fixture(scope="module", params=["W1", "W3"])
def wide(request: pytest.FixtureRequest) -> Case:
    """As wide as the real workloads; one prompt and two layers."""
    return Case.make(dataclasses.replace(WORKLOADS[request.param], layers=2, batch=1))


def products(case: Case, method: str, remat: str, shared: bool = True, reuse: bool = True) -> int:
    """FLOPs of the matrix products in the package's own train step."""
    ours = Ours(case, case.program(method, remat, shared, reuse))
    return cost.counted(jax.make_jaxpr(lambda: ours.step(0))().jaxpr)


@pytest.mark.parametrize(
    ("remat", "shared", "reuse"),
    [
        ("dots", True, True),
        ("full", True, True),
        slow("full", True, False),
        slow("dots", False, False),
        slow("full", False, False),
    ],
)
def test_flops_are_those_of_the_step(wide: Case, remat: str, shared: bool, reuse: bool) -> None:
    whole, some = wide.passes(wide.shapes[0], shared)
    train = cost.train_ours(wide.model, some, remat, recorded=reuse)
    counted = products(wide, "mass_dpo", remat, shared, reuse)
    assert cost.forward(wide.model, whole) + train == pytest.approx(counted, rel=0.03)
    if not reuse:
        assert products(wide, "sdpo", remat, shared) == pytest.approx(train, rel=0.03)


def test_flops_of_all_negatives(wide: Case) -> None:
    _, everyone = wide.passes(wide.shapes[0], negatives=wide.workload.pool)
    counted = products(wide, "pl_all", "dots")
    assert cost.train_ours(wide.model, everyone, "dots") == pytest.approx(counted, rel=0.03)


def test_flops_of_pytorch(torch: ModuleType) -> None:
    """By PyTorch's own counter, which does not know of fused attention on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import peers

    case = Case.make(TINY)
    pool = peers.Pool(case.batches[0])
    numbers = np.array([[1, 4]] * TINY.batch)
    lengths = np.full((TINY.batch, 3), TINY.response)
    for shared, formula in ((False, cost.rows), (True, cost.masked)):
        model = peers.to_torch(case.model, case.params)
        peer = peers.Peer(model, 0.1, 1e-5, 0.3, shared=shared)
        inputs = peer.collate(pool, numbers)
        with FlopCounterMode(display=False) as counter:
            peer.step(*inputs)
        size = formula(pool.prompts, lengths)._replace(pairs=0, end_pairs=0)
        found = counter.get_total_flops()
        assert found == pytest.approx(cost.train(case.model, size), rel=0.03)


def test_useful_tokens_are_counted_one_by_one() -> None:
    prompts, responses = np.array([3, 5]), np.array([[2, 1, 0], [4, 2, 2]])
    pairs = tokens = ends = end_pairs = 0
    for p, row in zip(prompts, responses, strict=True):
        behind = sum(p + place + 1 for length in row for place in range(length))
        tokens += p + row.sum()
        pairs += sum(range(1, p + 1)) + behind
        ends += 1 + row.sum()  # Of the prompt, its last token.
        end_pairs += p + behind
    found = cost.useful(prompts, responses)
    assert found == cost.Pass(tokens, pairs, responses.sum(), ends, end_pairs)


def test_counting() -> None:
    def program(x: jax.Array) -> jax.Array:
        once = x @ x  # 2 * 4 * 4 * 4 = 128.
        many = jax.lax.scan(lambda c, _: (jax.checkpoint(jnp.dot)(c, x), None), once, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, jax.jit(jnp.dot)(many, x))

    assert cost.counted(jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr) == 128 * (1 + 5 + 1 + 1)

    def endless(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x)

    with pytest.raises(ValueError, match="unknown length"):
        cost.counted(jax.make_jaxpr(endless)(jnp.ones((4, 4))).jaxpr)


# ---------------------------------------------------------------- the commands


@pytest.mark.slow(reason="the whole benchmark, PyTorch included, on a tiny shape")
def test_step_measures(torch: ModuleType, tmp_path: Path, capsys: Any) -> None:
    """On LastFM's rows; figures are written when the machine is quiet."""
    data, tokenizer = lastfm(tmp_path)
    output = tmp_path / "step.json"
    workload = {"W2": dataclasses.replace(TINY, lastfm=True)}
    found = step.run(workload, rounds=2, output=str(output), data=data, tokenizer=tokenizer)["W2"]
    assert found["differences"]["loss"] < 1e-5
    ours = found["programs"][found["ours"]]
    assert ours["ratio"]["median"] == ours["flop_ratio"] == 1.0
    assert set(step.PEERS.values()) < set(found["programs"])
    assert found["programs"][step.PEERS["c"]]["goal"] == 10.0
    assert found["floor"]["gflop"] < ours["gflop"]  # A part of what our step computes.
    assert 0 < found["useful_tokens"]["scoring"] < 1  # Real rows differ in length.
    assert 0 < found["useful_tokens"]["training"] <= 1
    assert found["selection_share"][step.SELECTION] > 0
    assert "| (c) PyTorch MASS-DPO |" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["workloads"]["W2"] == found
    assert written["machine"]["cores"]


def test_step_without_data_skips_lastfm(capsys: Any) -> None:
    assert step.run({"W2": WORKLOADS["W2"]}, rounds=1) == {}
    assert "W2: skipped: give --data=" in capsys.readouterr().out


@pytest.mark.slow(reason="the whole benchmark, PyTorch included, on a tiny shape")
def test_scaling_measures(tmp_path: Path, capsys: Any) -> None:
    output, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    sizes = {"pool": (1, 6), "response": (5,)}  # A pool of 1 has no set of 2.
    rows = scaling.run(TINY, sizes, rounds=2, output=str(output), plot=str(plot))
    assert [(row["varied"], row["pool"], row["response"]) for row in rows] == [
        ("pool", 6, 5),
        ("response", 6, 5),
    ]
    assert rows[0]["milliseconds"] == rows[1]["milliseconds"]  # The base, measured once.
    text = capsys.readouterr().out
    assert "around N = 6, n = 2, P = 20, R = 5:" in text
    assert "| N = 6 |" in text
    assert json.loads(output.read_text())["base"]["width"] == 32
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("refresh", [1, 4])
def test_pays_from_is_where_flops_cross(refresh: int) -> None:
    w = WORKLOADS["W1"]
    border = scaling.pays_from(w.model, w.prompt, w.response, w.negatives, refresh)

    def saved(pool: int) -> float:
        whole, some = (
            cost.forward(w.model, cost.useful(np.array([160]), np.full((1, 1 + k), 10)))
            for k in (pool, w.negatives)
        )
        return 3 * whole - (whole + 2 * some if refresh == 1 else whole / refresh + 3 * some)

    assert saved(math.floor(border)) <= 0 < saved(math.floor(border) + 1)


def test_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "busy_cores", lambda: 1.5)
    with pytest.raises(UserError, match=r"other programs use 1.50 cores"):
        step.run({"W1": TINY}, rounds=1)
    with pytest.raises(UserError, match=r"other programs use 1.50 cores"):
        scaling.run(TINY, {"pool": (4,)}, rounds=1)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="--workloads: no 'W9'; expected W1, W2, W3"):
        step.chosen(["W9"])
    for change in ("layers=0", "layers", "layout=1", "layers=x", "speed=3"):
        with pytest.raises(UserError, match=f"--change={change}: expected NAME=NUMBER"):
            changed(TINY, [change])
    assert changed(TINY, ["pool=9", "layers=3"]) == dataclasses.replace(TINY, pool=9, layers=3)


@pytest.mark.parametrize("command", ["step", "scaling"])
def test_commands(command: str) -> None:
    """The commands as they are typed: a mistake is one line and exit status 2."""
    line = refused(f"benchmarks.{command}", "--change=layers=0")
    assert line.startswith("error: --change=layers=0: expected")
