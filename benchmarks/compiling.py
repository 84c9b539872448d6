r"""How long compiling a train step takes, for a shallow and a deep model.

    python -m benchmarks.compiling --layers=4,28

Layers are one program that runs once a layer, so that depth should not matter. MASS-DPO's step on
W1's sizes, traced and compiled without weights and without a cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import machine
from benchmarks.workloads import WORKLOADS, Case, Workload, trace
from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError


def compile_step(workload: Workload) -> None:
    """Traces and compiles, from nothing."""
    jax.clear_caches()
    case = Case.without_weights(workload)
    trace(case, case.program("mass_dpo", "full")).lower().compile()


def run(
    workload: Workload, layers: tuple[int, int], rounds: int, allow_busy: bool, output: str | None
) -> dict[str, Any]:
    """Measures and prints.

    Raises:
      UserError: the machine is busy.
    """
    busy = machine.check_quiet(allow_busy)
    programs = {
        str(n): functools.partial(compile_step, dataclasses.replace(workload, layers=n))
        for n in layers
    }
    seconds = machine.measure(programs, rounds)
    shallow, deep = (seconds[str(n)] for n in layers)
    ratio = machine.ratio(deep, shallow)
    rows = [[name, f"{np.median(x):.2f}"] for name, x in seconds.items()]
    print(machine.table(["layers", "seconds to compile"], rows))
    print(f"{layers[1]} layers / {layers[0]}: {ratio}; goal: at most 1.3")
    found = {"seconds": {name: x.tolist() for name, x in seconds.items()}}
    found |= {"ratio": ratio._asdict()}
    machine.record(output, busy, {"rounds": rounds, "compiling": found})
    return found


def main() -> None:
    words = _LAYERS.value
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--layers={','.join(words)}: expected two numbers, such as 4,28")
    shallow, deep = (int(word) for word in words)
    if shallow == deep:
        raise UserError(f"--layers={shallow},{deep}: expected two different numbers")
    run(WORKLOADS["W1"], (shallow, deep), _ROUNDS.value, _BUSY.value, _OUTPUT.value)


if __name__ == "__main__":
    _LAYERS = flags.DEFINE_list("layers", ["4", "28"], "Of the shallow model and of the deep one.")
    _ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is compiled.", lower_bound=1)
    _OUTPUT, _BUSY = machine.define_flags()
    cli.run(main)
