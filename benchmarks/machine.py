"""What every benchmark shares: is the machine quiet, how fast can it multiply, times side by side.

Times of different programs are comparable only if they were taken in turns on a machine that does
nothing else. So `measure` runs each program once a round, in an order that changes, and ratios are
taken within rounds; `check_quiet` refuses a machine that is busy with something else.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mass_dpo_jax.errors import UserError

BUSY = 0.15  # Cores that may be in use by others, of all cores together.
LOOK = 2.0  # Seconds to look for that.
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")


class Ratio(NamedTuple):
    """Of two programs' times, within each round: the median, and the quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def busy_cores(seconds: float = LOOK) -> float:
    """How many cores are in use while this process waits; NaN where the system does not say."""

    def used() -> tuple[float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        ticks = [int(field) for field in fields[:8]]  # Without guests: user time has them.
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, sum(ticks)

    before = used()
    time.sleep(seconds)
    after = used()
    if before is None or after is None or after[1] == before[1]:
        return float("nan")
    return (after[0] - before[0]) / (after[1] - before[1]) * (os.cpu_count() or 1)


def check_quiet(allow_busy: bool) -> float:
    """Cores that others use now.

    Raises:
      UserError: more than `BUSY` cores, and not `allow_busy`.
    """
    found = busy_cores()
    if found > BUSY and not allow_busy:
        raise UserError(
            f"the machine is busy: other programs use {found:.2f} cores (at most {BUSY} would do), "
            "so times would mean nothing; stop them, or give --allow_busy to see the table without "
            "recording it"
        )
    return found


def measure(
    programs: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1
) -> dict[str, np.ndarray]:
    """Seconds of every program in every round: float64 [rounds] each.

    Args:
      programs: by name; each must wait for its result.
      rounds: in each, all programs run once, beginning with another one every time.
      warm: runs of each before, which do not count: compilation, caches.
    """
    for program in programs.values():
        for _ in range(warm):
            program()
    names = list(programs)
    seconds = {name: np.zeros(rounds) for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            began = time.perf_counter()
            programs[name]()
            seconds[name][r] = time.perf_counter() - began
    return seconds


def ratio(theirs: np.ndarray, ours: np.ndarray) -> Ratio:
    """How many times as long theirs took, round by round."""
    low, median, high = np.quantile(theirs / ours, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


def jax_product(m: int, k: int, n: int, dtype: Any = jnp.float32) -> Callable[[], Any]:
    """A product [m, k] x [k, n] as a program for `measure`; it costs 2 m k n operations."""
    a, b = (jnp.asarray(x, dtype) for x in _factors(m, k, n))
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: jax.block_until_ready(multiply(a, b))


def _factors(m: int, k: int, n: int) -> list[np.ndarray]:
    """Random, since a card multiplies what is constant at a higher clock than real data."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for size in ((m, k), (k, n))]


def torch_product(
    m: int, k: int, n: int, dtype: str = "float32", device: str = "cpu"
) -> Callable[[], Any]:
    """As `jax_product`, in PyTorch."""
    import torch

    kind = getattr(torch, dtype)
    a, b = (torch.from_numpy(x).to(device, kind) for x in _factors(m, k, n))

    def multiply() -> None:
        a @ b
        torch_wait(device)

    return multiply


def torch_wait(device: str) -> None:
    """Until a GPU has done what it was told; a CPU has."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def best_threads(program: Callable[[], Any], most: int | None = None, runs: int = 2) -> int:
    """Sets PyTorch to the number of threads that is fastest for a program; that number."""
    import torch

    times = {}
    for count in range(1, (most or os.cpu_count() or 1) + 1):
        torch.set_num_threads(count)
        times[count] = measure({"it": program}, runs)["it"].min()
    best = min(times, key=lambda count: times[count])
    torch.set_num_threads(best)
    return best


def hardware() -> dict[str, Any]:
    """What a reader of figures has to know of the machine and its libraries."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": name,
        "cores": os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "python": platform.python_version(),
        **versions,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def define_flags() -> tuple[flags.FlagHolder[str | None], flags.FlagHolder[bool]]:
    """--output and --allow_busy."""
    return (
        flags.DEFINE_string("output", None, "A JSON file to write the figures to."),
        flags.DEFINE_bool(
            "allow_busy", False, "Measure although the machine is busy; records nothing."
        ),
    )


def record(output: str | None, busy: float, figures: Mapping[str, Any]) -> None:
    """Writes figures with the machine they are of, unless it was busy (then says so)."""
    if output is None:
        return
    if busy > BUSY:
        print(f"not written to {output}: the machine was busy")
        return
    text = json.dumps({"machine": hardware(), "busy_cores": round(busy, 2), **figures}, indent=2)
    Path(output).write_text(text + "\n")
    print(f"written to {output}")
