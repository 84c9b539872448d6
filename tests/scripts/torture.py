r"""Kills a training run at random moments, again and again, and compares it with one left alone.

    python -m tests.scripts.torture --kills=50
    python -m tests.scripts.torture --kills=20 --processes=2
    python -m tests.scripts.torture --kills=20 --steps=200 --meshes

A run is started on a small model, killed by SIGKILL, started again by the same command, and so on.
A third of the kills come while a checkpoint is being written, a third at some moment of training or
evaluation, a third at any moment since the start of the process. When there were enough the run may
finish. Its weights, Adam's moments and every logged figure must be those of an uninterrupted run,
bit for bit.

With --processes=P every second start is of P processes with one device each, the others of one
process with P devices: the mesh stays the same.

With --meshes every start is on another mesh, of 1 to 8 devices and 1, 2 or 4 processes. The order
of summation then changes, so the sets of negatives are chosen once, recorded in the checkpoints,
and the losses must be the uninterrupted run's to 1e-5. At the end both policies choose a set for
every example: how many differ is how many near-ties the other order of summation flips.

Prints how many kills came when, and how many steps were lost: at most `train.checkpoint_every` and
those that were run while a save was not yet complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.helpers import write_jsonl
from tests.support.processes import ROOT, environment, free_port

EVERY = 5  # Steps between checkpoints.
SETTINGS = {
    "train.eval_every": 20, "train.checkpoint_every": EVERY, "train.keep_checkpoints": 2,
    "train.batch_size": 8, "train.micro_batch_size": 8, "train.learning_rate": 1e-3,
    "eval.batch_size": 8, "model.scratch.hidden_size": 32, "model.scratch.intermediate_size": 48,
    "model.scratch.num_layers": 2, "model.scratch.vocab_size": 300, "data.name": "jsonl",
    "data.chat_template": "none", "log.report": "False", "log.tensorboard": "False",
}  # fmt: skip
# Adam moves a weight whose gradient is rounding noise by the whole learning rate: two orders of
# summation agree only while that is small.
RECORDED = {"selection.refresh": "once", "train.learning_rate": 1e-5}
Way = tuple[int, Mapping[str, int]]  # How a run is started: processes, and the mesh over all.
MESHES: list[Way] = [
    (1, {"data": 2, "fsdp": 1, "tensor": 1}),
    (2, {"data": 1, "fsdp": 2, "tensor": 1}),
    (1, {"data": 1, "fsdp": 1, "tensor": 2}),
    (1, {"data": 2, "fsdp": 2, "tensor": 2}),
    (4, {"data": 2, "fsdp": 2, "tensor": 1}),
    (1, {"data": 1, "fsdp": 8, "tensor": 1}),
    (1, {"data": 1, "fsdp": 1, "tensor": 1}),
]


@dataclasses.dataclass
class Result:
    """kills: when they came. lost: steps to run again, by kill. starts: of the run. With meshes:
    difference, the largest one between two losses; flips, sets that differ, of so many."""

    kills: Counter[str]
    lost: list[int]
    starts: int
    difference: float = 0.0
    flips: int = 0
    sets: int = 0


class Run:
    """One training run in a folder, and how it is started."""

    def __init__(
        self, workdir: Path, data: Path, steps: int, more: Mapping[str, Any] | None = None
    ):
        self.workdir = workdir
        settings = {**SETTINGS, "train.steps": steps, "data.path": data, **(more or {})}
        # In a folder of its own: the reference pass is killed, too.
        settings["cache_dir"] = workdir.parent / f"{workdir.name}-cache"
        config = ROOT / "mass_dpo_jax" / "config.py"
        self.command = [
            sys.executable, "-m", "mass_dpo_jax.train", f"--config={config}",
            f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items()),
        ]  # fmt: skip

    def start(self, way: Way = (1, {"data": 1})) -> list[subprocess.Popen]:
        processes, mesh = way
        each = math.prod(mesh.values()) // processes
        address = f"127.0.0.1:{free_port()}"
        group = [f"--coordinator_address={address}", f"--num_processes={processes}"]
        log = (self.workdir.parent / f"{self.workdir.name}.log").open("a")
        return [
            subprocess.Popen(
                [
                    *self.command,
                    *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
                    *([*group, f"--process_id={i}"] if processes > 1 else []),
                ],
                env=environment(each, JAX_PLATFORMS="cpu"),
                stdout=log,
                stderr=log,
                cwd=self.workdir.parent,
            )
            for i in range(processes)
        ]

    def step(self) -> int:
        """The last step that is logged."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue  # Cut short by a kill.
        return 0

    def saved(self) -> int:
        """The newest complete checkpoint."""
        folder = self.workdir / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def saving(self) -> bool:
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def result(self) -> tuple[Any, list[dict[str, Any]]]:
        """Digests of the last state, and every logged figure but the speed."""
        about = self.workdir / "checkpoints" / str(self.saved()) / "run" / "metadata"
        lines = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        figures = [{k: v for k, v in x.items() if k != "examples_per_second"} for x in lines]
        return json.loads(about.read_text())["digests"], figures


def wait(started: list[subprocess.Popen], run: Run) -> None:
    codes = [process.wait() for process in started]
    if any(codes):
        raise AssertionError((run.workdir.parent / f"{run.workdir.name}.log").read_text()[-3000:])


def torture(run: Run, kills: int, rng: random.Random, ways: Sequence[Way]) -> Result:
    """Starts in each way in turn and kills, then lets it finish."""
    found = Result(Counter(), [], 0)
    startup = 20.0  # Seconds; then as the last start took.
    while sum(found.kills.values()) < kills:
        began, before = time.monotonic(), run.step()
        started = run.start(ways[found.starts % len(ways)])
        found.starts += 1
        how = ("in a save", "in training", "at any time")[sum(found.kills.values()) % 3]
        delay = rng.uniform(0, 1.0)
        anywhere = rng.uniform(0, startup + 1.0)
        moved = None
        while all(process.poll() is None for process in started):
            now = time.monotonic()
            if moved is None and run.step() > before:
                moved, startup = now, now - began
            if how == "at any time" and now - began > anywhere:
                break
            if moved is not None and now - moved > delay and (how != "in a save" or run.saving()):
                break
            time.sleep(0.002 if how == "in a save" else 0.01)
        else:
            wait(started, run)
            break  # It finished.
        saving = run.saving()
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.wait()
        phase = "before its first step" if moved is None else "in training"
        found.kills["in a save" if saving and moved is not None else phase] += 1
        found.lost.append(max(run.step() - run.saved(), 0))
    wait(run.start(ways[found.starts % len(ways)]), run)
    found.starts += 1
    return found


def compare(folder: Path, kills: int, steps: int, seed: int, processes: int = 1) -> Result:
    """A tortured run and one left alone, which must be equal.

    Raises:
      AssertionError: they are not, or a start failed.
    """
    data = write_jsonl(folder / "data.jsonl", examples=40)
    mesh = {"data": processes}
    alone, run = Run(folder / "alone", data, steps), Run(folder / "run", data, steps)
    wait(alone.start((1, mesh)), alone)
    found = torture(run, kills, random.Random(seed), [(1, mesh), (processes, mesh)])
    digests, figures = run.result()
    expected, lines = alone.result()
    assert len(figures) == len(lines) and run.saved() == steps
    for line, other in zip(figures, lines, strict=True):
        assert line == other, (line, other)
    assert digests == expected
    return found


def compare_meshes(folder: Path, kills: int, steps: int, seed: int) -> Result:
    """A run on one mesh after the other, and one left alone on one device: losses to 1e-5.

    Raises:
      AssertionError: they differ by more, or a start failed.
    """
    data = write_jsonl(folder / "data.jsonl", examples=40)
    alone, run = (Run(folder / name, data, steps, RECORDED) for name in ("alone", "run"))
    wait(alone.start(), alone)
    found = torture(run, kills, random.Random(seed), MESHES)
    losses, expected = (
        {line["step"]: line["loss"] for line in each.result()[1] if "loss" in line}
        for each in (run, alone)
    )
    assert len(losses) == len(expected) == steps
    found.difference = max(abs(losses[step] - loss) for step, loss in expected.items())
    assert found.difference <= 1e-5
    ours, theirs = chosen_by(run), chosen_by(alone)
    found.sets = len(ours)
    found.flips = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return found


def chosen_by(run: Run) -> list[list[int]]:
    """The set that the end of a run chooses for each example."""
    output = run.workdir.parent / f"{run.workdir.name}-selected.jsonl"
    subprocess.run(
        [
            sys.executable, "-m", "mass_dpo_jax.select", f"--workdir={run.workdir}",
            f"--output={output}", f"--config={ROOT / 'mass_dpo_jax' / 'config.py'}:{run.workdir}",
            *(f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return [json.loads(line)["selected"] for line in output.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--meshes", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        which = Path(folder), given.kills, given.steps, given.seed
        found = compare_meshes(*which) if given.meshes else compare(*which, given.processes)
        minutes = (time.monotonic() - began) / 60
    print(f"{found.starts} starts, {sum(found.kills.values())} kills in {minutes:.0f} min:")
    for phase, count in found.kills.most_common():
        print(f"  {count} {phase}")
    lost = sorted(found.lost)
    print(f"steps lost by a kill: {lost[len(lost) // 2]} (median), {lost[-1]} (most)")
    if given.meshes:
        print(
            f"after {given.steps} steps: losses as on one device without a kill, to "
            f"{found.difference:.1e}; {found.flips} of {found.sets} sets would be chosen otherwise"
        )
    else:
        print(f"after {given.steps} steps: weights, moments, figures as without a kill, to the bit")


if __name__ == "__main__":
    main()
