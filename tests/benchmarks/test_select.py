"""The selection benchmark: its peers choose what ours does, and it fails when one does not."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import machine, select
from mass_dpo_jax import theory
from mass_dpo_jax.errors import UserError
from tests.support.processes import command, refused

RIDGE = select.RIDGE
PICKS = 3


def small(prompts: int = 2) -> dict[str, select.Program]:
    return select.small_pools(prompts, candidates=7, width=12, n=PICKS, paper_prompts=1)


def large(case: select.Case = select.CASES[0]) -> dict[str, select.Program]:
    return select.large_pool(120, 8, PICKS, case)[0]


@pytest.mark.parametrize("form", ["inverses", "cholesky", "low_rank"])
def test_peers_are_algorithm_1(form: str) -> None:
    rng = np.random.default_rng(1)
    h = rng.normal(size=(30, 9)).astype(np.float32)
    scores = rng.normal(size=30).astype(np.float32)
    want, gains = theory.algorithm_1(h.astype(np.float64), scores, PICKS, RIDGE)
    v = select.design_vectors(h, scores, RIDGE)
    got = {
        "inverses": lambda: select.inverses(v, PICKS),
        "cholesky": lambda: select.cholesky(v @ v.T, PICKS),
        "low_rank": lambda: [x[0] for x in select.low_rank(h, scores, PICKS, RIDGE)],
    }[form]()
    assert got[0].tolist() == list(want)
    np.testing.assert_allclose(got[1], gains, rtol=1e-4)


@pytest.mark.parametrize("programs", [small, large])
def test_a_peer_with_another_result_stops_the_benchmark(programs: Any) -> None:
    good = programs()
    rows = select.compare(good, rounds=2)
    assert set(rows) == set(good)
    assert rows[select.OURS]["over_ours"]["median"] == 1.0
    assert all(row["milliseconds"] > 0 for row in rows.values())
    name = list(good)[-1]
    indices, gains = good[name].picks(good[name].run())  # type: ignore[misc]
    for k in range(PICKS):  # Another candidate, at any place of the last prompt.
        other = indices.copy(), gains.copy()
        other[0][-1, k] += 1
        other[1][-1, k] *= 0.99
        bad = good[name]._replace(picks=lambda _, other=other: other)
        with pytest.raises(UserError, match=f"{name}: prompt {len(indices) - 1}, expected picks"):
            select.compare({**good, name: bad}, rounds=1)
    with pytest.raises(UserError, match="expected picks"):  # The right ones with a wrong gain.
        select.check_same(name, (indices, 1.01 * gains), (indices, gains))


def test_after_a_tie_any_order_will_do() -> None:
    ours = np.array([[4, 2, 1]]), np.array([[3.0, 1.0, 0.5]])
    select.check_same("peer", (np.array([[4, 1, 2]]), np.array([[3.0, 1.00001, 0.4]])), ours)
    with pytest.raises(UserError, match="peer"):
        select.check_same("peer", (np.array([[4, 1, 2]]), np.array([[3.0, 0.9, 0.5]])), ours)


def test_only_a_part_of_the_work_counts_in_full() -> None:
    calls: list[int] = []
    picks = np.array([[0]]), np.array([[1.0]])
    ours = select.Program(lambda: calls.append(1), lambda _: picks)
    rows = select.compare({select.OURS: ours, "peer": ours._replace(times=1000.0)}, rounds=5)
    assert rows["peer"]["over_ours"]["median"] > 100


def test_every_kind_of_large_pool_is_chosen_from_alike() -> None:
    for case in select.CASES:
        programs, touched = select.large_pool(120, 8, PICKS, case)
        found = {name: x.picks(x.run()) for name, x in programs.items() if x.picks}
        for name, picks in found.items():
            select.check_same(name, picks, found[select.OURS])
        assert 0 < touched <= 1


def test_submodlib_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submodlib", None)
    assert "submodlib" not in small()
    rows = {select.OURS: {"milliseconds": 1.0, **_ratios()}}
    assert "submodlib | not installed" in select.small_table(rows, 1)


def test_submodlib_is_called_with_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    class LogDeterminantFunction:
        """Takes and gives what submodlib's does: pairs of an index and a growth of log det."""

        def __init__(self, n: int, mode: str, lambdaVal: float, sijs: np.ndarray) -> None:
            assert (n, mode, lambdaVal) == (len(sijs), "dense", 1.0)
            self.gram = sijs

        def maximize(self, budget: int, **options: Any) -> list[tuple[int, float]]:
            assert options["optimizer"] == "NaiveGreedy"
            indices, gains = select.cholesky(self.gram, budget)
            return list(zip(indices.tolist(), np.log1p(gains).tolist(), strict=True))

    module = types.SimpleNamespace(LogDeterminantFunction=LogDeterminantFunction)
    monkeypatch.setitem(sys.modules, "submodlib", module)
    rows = select.compare(small(), rounds=1)
    assert rows["submodlib"]["milliseconds"] > 0
    assert "not installed" not in select.small_table(rows, 1)


def _ratios() -> dict[str, Any]:
    one = machine.Ratio(1.0, 1.0, 1.0)._asdict()
    return {"over_ours": one, "ours_over": one}


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "select.json"
    sizes = "--prompts=2 --candidates=5 --width=8 --n=2 --pool=60 --pool_width=4 --pool_n=3"
    run = ("benchmarks.select", *sizes.split(), "--rounds=2", "--allow_busy")
    done = command(*run, f"--output={output}", check=True)
    assert "2 x 5 x 8, n = 2" in done.stdout and "60 x 4, n = 3" in done.stdout
    for name in ("numpy inverses (2 prompts, scaled)", "numpy low-rank", "JAX dense", "touched"):
        assert name in done.stdout
    if output.exists():  # Only where nothing else was running.
        figures = json.loads(output.read_text())
        assert len(figures["large"]["60 x 4, n = 3"]) == len(select.CASES)
    else:
        assert "the machine was busy" in done.stdout
    assert "expected at most --candidates - 2 = 3" in refused(*run, "--n=5")
