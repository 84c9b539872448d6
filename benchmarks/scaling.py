r"""What a step costs against N, n, P and R: choosing negatives, taking all, or taking random ones.

    python -m benchmarks.scaling --plot=docs/scaling.png --output=scaling.json

Times our own train step on a small model, one size at a time changed around a base, for the methods
`mass_dpo` (score the pool, select n, train on them), `pl_all` (train on all N) and `sdpo` (train on
n random ones), beside the FLOPs of each.

The model of the cost. With a shared prompt a forward pass over x negatives costs

    F(x) = a + (1 + x) r

where a is the prompt's part, P tokens, and r one response's: its R tokens through the layers and to
the vocabulary, and their attention to the prompt and to each other. Forward and backward is 3 F.
The pass that scores a pool is the forward pass on the set as well; if sets are chosen anew only
every k steps (`selection.refresh`), the set has a pass of its own:

    mass_dpo   F(N) + 2 F(n), or F(N) / k + 3 F(n)
    pl_all     3 F(N)
    sdpo       3 F(n)

So choosing at every step costs less than taking all whenever there is something to choose, N > n,
and choosing every k > 1 steps where

    1 + N  >  (3 (1 + n) + a / (k r)) / (3 - 1 / k)

The gain at every step is 2 (N - n) r: least, in proportion, for long prompts with short responses
(a / r large), where either method mostly encodes prompts. It is at most a factor of 3 k, for pools
much larger than the set. Random negatives always cost less, by F(N) - F(n) = (N - n) r at every
step. This counts FLOPs; what the choice does for learning is another matter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import cost, machine
from benchmarks.workloads import Case, Ours, Workload, changed
from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig

BASE = Workload(layers=2, width=128, heads=4, kv_heads=2, mlp=384, vocabulary=1024)
SIZES = {
    "pool": (5, 10, 20, 50, 100),
    "negatives": (1, 3, 5, 10),
    "prompt": (40, 80, 160, 320),
    "response": (5, 10, 20, 40),
}
SYMBOLS = {"pool": "N", "negatives": "n", "prompt": "P", "response": "R"}
METHODS = ("mass_dpo", "pl_all", "sdpo")


def pays_from(
    model: DecoderConfig, prompt: int, response: int, negatives: int, refresh: int = 1
) -> float:
    """The pool size N above which choosing n negatives every so-many steps costs less than all."""
    if refresh == 1:
        return negatives
    one = np.array([prompt])
    # A response of no tokens leaves the prompt's part.
    a, whole = (
        cost.forward(model, cost.useful(one, np.array([[length]]))) for length in (0, response)
    )
    return (3 * (1 + negatives) + a / (refresh * (whole - a))) / (3 - 1 / refresh) - 1


def points(base: Workload, sizes: Mapping[str, Sequence[int]]) -> list[tuple[str, Workload]]:
    """Each size varied around the base, under its name; sets no larger than their pools."""
    found = []
    for name, values in sizes.items():
        for value in values:
            size: Any = {name: value}
            workload = dataclasses.replace(base, **size)
            if workload.negatives <= workload.pool:
                found.append((name, workload))
    return found


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Milliseconds and GFLOP of a step by each method."""
    case = Case.make(workload)

    def run(ours: Ours) -> None:
        ours.step(0)
        jax.block_until_ready(ours.state)

    programs = {
        method: functools.partial(run, Ours(case, case.program(method, "dots")))
        for method in METHODS
    }
    seconds = machine.measure(programs, rounds)
    whole, some = case.passes(case.shapes[0])
    _, everyone = case.passes(case.shapes[0], negatives=workload.pool)
    train = functools.partial(cost.train_ours, workload.model, remat="dots")
    flops = {
        "mass_dpo": cost.forward(workload.model, whole) + train(size=some, recorded=True),
        "pl_all": train(size=everyone),
        "sdpo": train(size=some),
    }
    return {
        "milliseconds": {method: 1e3 * float(np.median(s)) for method, s in seconds.items()},
        "gflop": {method: flops[method] / 1e9 for method in METHODS},
        # How many times as long all negatives take as chosen ones.
        "all / chosen": machine.ratio(seconds["pl_all"], seconds["mass_dpo"])._asdict(),
        "pays_from": pays_from(
            workload.model, workload.prompt, workload.response, workload.negatives
        ),
    }


def run(
    base: Workload,
    sizes: Mapping[str, Sequence[int]],
    rounds: int,
    allow_busy: bool = False,
    output: str | None = None,
    plot: str | None = None,
) -> list[dict[str, Any]]:
    """Measures and prints; a row for each point.

    Raises:
      UserError: the machine is busy.
    """
    busy = machine.check_quiet(allow_busy)
    known: dict[Workload, dict[str, Any]] = {}
    rows = []
    for name, workload in points(base, sizes):
        if workload not in known:  # The base is a point of every size.
            known[workload] = measure(workload, rounds)
            jax.clear_caches()
        rows.append(
            {"varied": name, **{k: getattr(workload, k) for k in SYMBOLS}, **known[workload]}
        )
    print(describe(rows))
    if plot:
        draw(rows, Path(plot))
        print(f"drawn in {plot}")
    machine.record(
        output, busy, {"rounds": rounds, "base": dataclasses.asdict(base), "points": rows}
    )
    return rows


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """The points as a table."""
    lines = []
    for row in rows:
        times, flops = row["milliseconds"], row["gflop"]
        lines.append(
            [
                f"{SYMBOLS[row['varied']]} = {row[row['varied']]}",
                *(f"{times[method]:.1f}" for method in METHODS),
                *(f"{flops[method]:.2f}" for method in METHODS),
                str(machine.Ratio(**row["all / chosen"])),
                f"{flops['pl_all'] / flops['mass_dpo']:.2f}",
                f"{row['pays_from']:.0f}",
            ]
        )
    header = ["", *(f"{m}, ms" for m in METHODS), *(f"{m}, GFLOP" for m in METHODS)]
    header += ["all / chosen, time", "FLOP", "pays from N ="]
    base = ", ".join(f"{s} = {dict(_base(rows))[k]}" for k, s in SYMBOLS.items())
    return f"around {base}:\n{machine.table(header, lines)}"


def _base(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Of each size, the value that it has where another one is varied."""
    found = []
    for name in SYMBOLS:
        others = [row[name] for row in rows if row["varied"] != name]
        found.append((name, others[0] if others else rows[0][name]))
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each size that was varied: measured times and, dashed, what FLOPs alone say, at
    the rate of the S-DPO step with which the panel begins."""
    from matplotlib.figure import Figure

    names = [name for name in SYMBOLS if any(row["varied"] == name for row in rows)]
    figure = Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        part = [row for row in rows if row["varied"] == name]
        values = [row[name] for row in part]
        rate = part[0]["milliseconds"]["sdpo"] / part[0]["gflop"]["sdpo"]
        for i, method in enumerate(METHODS):
            axes.plot(
                values, [row["milliseconds"][method] for row in part], f"C{i}.-", label=method
            )
            axes.plot(values, [rate * row["gflop"][method] for row in part], f"C{i}--", lw=0.8)
        axes.set(xlabel=SYMBOLS[name], ylim=(0, None))
    panels[0].set_ylabel("ms a step (dashed: by FLOPs)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    # An empty list leaves a size as it is in the base.
    sizes = {name: _numbers(holder) for name, holder in _SIZES.items() if holder.value}
    base = changed(BASE, _CHANGE.value)
    run(base, sizes, _ROUNDS.value, _BUSY.value, _OUTPUT.value, _PLOT.value)


def _numbers(holder: flags.FlagHolder[list[str]]) -> list[int]:
    for word in holder.value:
        if not word.isdecimal() or not int(word):
            raise UserError(f"--{holder.name}: {word!r}: expected numbers above 0, commas between")
    return sorted(int(word) for word in holder.value)


if __name__ == "__main__":
    _SIZES = {
        name: flags.DEFINE_list(name, [str(x) for x in values], f"{SYMBOLS[name]}, to be varied.")
        for name, values in SIZES.items()
    }
    _CHANGE = flags.DEFINE_list("change", [], "Other sizes of the base: layers=4,width=256.")
    _ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each step is timed.", lower_bound=1)
    _PLOT = flags.DEFINE_string("plot", None, "A picture to draw.")
    _OUTPUT, _BUSY = machine.define_flags()
    cli.run(main)
