r"""A step on all N negatives, at once and a few responses at a time: its memory and its time.

    python -m benchmarks.responses
    python -m benchmarks.responses --pools=7,31 --at_a_time=8 --rounds=5 --layout=rectangle

The method is pl_all in float32. Memory: temporaries of the compiled step, XLA's, beside our
estimate of them, as in benchmarks/memory.py. Time, with --rounds: of whole updates of the largest
pool, in turns, relative to the same `model.remat` at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import machine
from benchmarks.memory import MEGABYTE, compiled_bytes, estimate_case
from benchmarks.workloads import Case, Ours, Workload, changed
from mass_dpo_jax import cli
from mass_dpo_jax.models.decoder import REMAT

LONG = Workload(batch=1, prompt=128, response=128)
METHOD = "pl_all"


def of_pool(workload: Workload, pool: int, layout: str) -> Workload:
    """The workload with so many negatives, all of which are trained on."""
    return dataclasses.replace(workload, pool=pool, negatives=pool, layout=layout)


def measure_memory(case: Case, at_a_time: int) -> list[dict[str, Any]]:
    """Bytes of temporaries, a row for each remat and for all at once and some at a time."""
    rows = []
    for remat in REMAT:
        for some in (0, at_a_time):
            estimate = estimate_case(case, remat, method=METHOD, at_a_time=some)
            compiled = compiled_bytes(case, case.program(METHOD, remat, at_a_time=some))
            row = {"pool": case.workload.pool, "remat": remat, "at_a_time": some}
            rows.append({**row, "xla": compiled, "estimate": estimate.temporaries})
    return rows


def measure_time(case: Case, at_a_time: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of an update, a row for each remat and for all at once and some at a time."""

    def make(remat: str, some: int) -> Callable[[], Any]:
        ours = Ours(case, case.program(METHOD, remat, at_a_time=some))

        def run() -> None:
            ours.step(0)
            jax.block_until_ready(ours.state)

        return run

    names = {f"{remat} {some}": (remat, some) for remat in REMAT for some in (0, at_a_time)}
    seconds = machine.measure({name: make(*key) for name, key in names.items()}, rounds)
    return [
        {
            "remat": remat,
            "at_a_time": some,
            "seconds": float(np.median(seconds[name])),
            "ratio": machine.ratio(seconds[name], seconds[f"{remat} 0"])._asdict(),
        }
        for name, (remat, some) in names.items()
    ]


def describe(memory: list[dict[str, Any]], time: list[dict[str, Any]]) -> str:
    """Both tables as text."""
    text = machine.table(
        ["N", "remat", "at a time", "XLA, MB", "estimate / XLA"],
        [
            [
                str(x["pool"]),
                x["remat"],
                str(x["at_a_time"] or "all"),
                f"{x['xla'] / MEGABYTE:.1f}",
                f"{x['estimate'] / x['xla']:.2f}",
            ]
            for x in memory
        ],
    )
    if not time:
        return text
    lines = [
        [
            x["remat"],
            str(x["at_a_time"] or "all"),
            f"{x['seconds']:.2f}",
            str(machine.Ratio(**x["ratio"])),
        ]
        for x in time
    ]
    header = ["remat", "at a time", "seconds", "times all at once, same remat"]
    return f"{text}\n\n{machine.table(header, lines)}"


def main() -> None:
    workload, layout = changed(LONG, _CHANGE.value), _LAYOUT.value
    pools = sorted(int(pool) for pool in _POOLS.value)
    memory: list[dict[str, Any]] = []
    for pool in pools:
        case = Case.without_weights(of_pool(workload, pool, layout))
        memory += measure_memory(case, _AT_A_TIME.value)
    busy, time = 0.0, []
    if _ROUNDS.value:
        busy = machine.check_quiet(_ALLOW_BUSY.value)
        case = Case.make(of_pool(workload, pools[-1], layout))
        time = measure_time(case, _AT_A_TIME.value, _ROUNDS.value)
    print(describe(memory, time))
    machine.record(_OUTPUT.value, busy, {"memory": memory, "time": time, "layout": layout})


if __name__ == "__main__":
    _POOLS = flags.DEFINE_list("pools", ["7", "63"], "Numbers of negatives N.")
    _AT_A_TIME = flags.DEFINE_integer("at_a_time", 8, "train.responses_at_a_time.", lower_bound=1)
    _ROUNDS = flags.DEFINE_integer("rounds", 0, "Rounds of timing; 0: memory alone.", lower_bound=0)
    _LAYOUT = flags.DEFINE_enum("layout", "packed", ["packed", "rectangle"], "model.layout.")
    _CHANGE = flags.DEFINE_list("change", [], "Sizes that differ, as batch=2,response=64.")
    _ALLOW_BUSY = flags.DEFINE_bool("allow_busy", False, "Time on a machine that is not quiet.")
    _OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write the figures to.")
    cli.run(main)
