"""The command of `benchmarks.gpu`: a process for each side of each workload, then a table."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import machine
from benchmarks.gpu.job import SHAPES, SIZES, Job, workload
from benchmarks.workloads import changed
from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.decoder import REMAT

# Peer / ours at least, and ours' utilisation at least.
GOALS: dict[str, dict[str, float]] = {
    "G1": {"utilisation": 0.5, "a": 3.0, "c": 6.0},
    "G2": {"c": 1.5},
}
PEERS = {
    "a": "(a) PyTorch S-DPO",
    "b": "(b) PyTorch S-DPO, cached reference",
    "c": "(c) PyTorch MASS-DPO",
}
# Dense bfloat16 TFLOP/s by the makers' data sheets, for parts of a device's name: the first that
# fits.
DATA_SHEETS = {
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}
SHARES = {"ours": 1.2, "peers": 1.0}  # Of the time that is left: ours compiles.
# Of the time that is left, after which a process is stopped: later ones may have to do with less
# than their share, but what has begun should end.
MOST = 0.6
DEFAULT_BATCH = 16  # Of the peers, where ours did not run.
MOST_SAID = 20_000  # Characters of a process's errors to show.


def run(jobs: Sequence[tuple[str, Job]], budget: float, output: str | None) -> dict[str, Any]:
    """Runs every job in a process of its own; figures by workload and side.

    Args:
      jobs: by workload, ours before its peers. `until`, `result` and the peers' batch are set here.
      budget: seconds for all of them.
    """
    began = time.time()
    found: dict[str, Any] = {name: {} for name, _ in jobs}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, job) in enumerate(jobs):
            now = time.time()
            left = began + budget - now
            shares = [SHARES[later.side] for _, later in jobs[i:]]
            until = now + left * shares[0] / sum(shares)
            batch = job.batch
            if job.side == "peers":
                batch = found[name].get("ours", {}).get("prompts", batch or DEFAULT_BATCH)
            job = dataclasses.replace(
                job, until=until, batch=batch, result=str(Path(folder) / f"{i}.json")
            )
            hard = left if i == len(jobs) - 1 else max(until - now, MOST * left)
            print(f"{name}, {job.side}: {max(left, 0.0):.0f} s left", flush=True)
            made = start_job(job, Path(folder) / f"{i}-job.json", hard)
            if made.get("exit_status") and job.side == "ours" and job.attention == "auto":
                # A kernel that cannot run may end the process, without an error to catch.
                again = dataclasses.replace(job, attention="plain")
                hard -= time.time() - now
                made = start_job(again, Path(folder) / f"{i}-plain.json", hard) | {
                    "failed_with_auto_attention": made["not_run"]
                }
            found[name][job.side] = made
            found[name]["ratios"] = ratios(name, found[name])
            machine.record(output, 0.0, {"seconds": time.time() - began, "workloads": found})
    return found


def start_job(job: Job, path: Path, seconds: float) -> dict[str, Any]:
    """What a process of its own found; what it had found when it was stopped or failed."""
    if seconds <= 0:
        return {"not_run": "out of time"}
    job.write(path)
    environment = dict(os.environ)
    if job.side == "ours":
        # Only one side is on the card at a time. Whole from the start, it is not in pieces later.
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    else:
        environment["JAX_PLATFORMS"] = "cpu"  # It checks the peers and must not take the card.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment.setdefault("JAX_TRACEBACK_FILTERING", "off")  # A note on it would come last.
    command = [sys.executable, "-m", "benchmarks.gpu", f"--job={path}"]
    why, status = "", 0
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            status = subprocess.run(
                command, env=environment, cwd=Path(__file__).parents[2], timeout=seconds,
                stderr=errors, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            why = f"out of time: stopped after {seconds:.0f} s"
        errors.seek(0)
        said = errors.read().strip()
    if status:
        why = f"exit status {status}: {said.splitlines()[-1] if said else 'no message'}"
    # Warnings of a run that went well too: XLA says here what it computes again to save memory.
    print(said[-MOST_SAID:], file=sys.stderr, flush=True)
    result = Path(job.result)
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if why:
        found["not_run" if "milliseconds" not in found else "failed_after"] = why
        print(f"{job.side}: {why}", flush=True)
    return found | ({"exit_status": status} if status else {})


def ratios(name: str, sides: Mapping[str, Any]) -> dict[str, Any]:
    """Peer's step / ours, on the same number of prompts, by medians; and utilisation."""
    ours = sides.get("ours", {})
    if "milliseconds" not in ours:
        return {}
    goals = GOALS.get(name, {})
    found: dict[str, Any] = {}
    for letter in PEERS:
        peer = sides.get("peers", {}).get("programs", {}).get(letter, {})
        if "milliseconds" in peer:
            ratio = peer["milliseconds"]["median"] / ours["milliseconds"]["median"]
            found[letter] = {"ratio": ratio, "goal": goals.get(letter)}
    found["utilisation"] = {
        "of_data_sheet": utilisation(ours, data_sheet(ours["device"])),
        "of_product": utilisation(ours, ours["product_tflops_per_second"]),
        "goal": goals.get("utilisation"),
    }
    return found


def data_sheet(device: str) -> float | None:
    """TFLOP/s in bfloat16 of a device by its name."""
    return next((peak for part, peak in DATA_SHEETS.items() if part in device), None)


def utilisation(program: Mapping[str, Any], peak: float | None) -> float | None:
    return None if peak is None else program["useful_tflops_per_second"] / peak


def describe(name: str, sides: Mapping[str, Any]) -> str:
    """The figures of a workload as text."""
    ours, peers = sides.get("ours", {}), sides.get("peers", {})
    peak = data_sheet(ours.get("device", ""))
    programs = {"**ours**": ours}
    for letter, label in PEERS.items():
        missing = {"not_run": peers.get("not_run", "not reached")}
        programs[label] = peers.get("programs", {}).get(letter, missing)
    rows = []
    for label, x in programs.items():
        if "milliseconds" not in x:
            rows.append([label, f"not run: {x.get('not_run', 'no figures')}", *[""] * 7])
            continue
        letter = label[1] if label.startswith("(") else ""
        ratio = sides["ratios"].get(letter)
        goal = f" (goal {ratio['goal']:g})" if ratio and ratio["goal"] else ""
        if letter:
            ways = "checkpointing" if x["checkpointing"] else "no checkpointing"
            how = f"{x['parts']} part(s), {ways}"
        else:
            reuse = "" if x["reuse_scoring"] else ", scoring not reused"
            how = f"remat={x['remat']}{reuse}, {x['attention']} attention"
        ms = x["milliseconds"]
        use = utilisation(x, peak)
        rows.append(
            [
                label,
                f"{ms['median']:.0f} ({ms['low']:.0f} to {ms['high']:.0f})",
                f"{ratio['ratio']:.2f}{goal}" if ratio else "",
                f"{x['useful_tokens_per_second']:.0f}",
                f"{x['useful_tflops_per_second']:.3g}",
                "" if use is None else f"{use:.1%}",
                "" if x["peak_gb"] is None else f"{x['peak_gb']:.1f}",
                f"{x['prompts']}",
                how,
            ]
        )
    header = ["program", "ms a step", "times ours", "useful tokens/s", "useful TFLOP/s",
              "of the data sheet", "peak GB", "prompts", "how"]  # fmt: skip
    lines = [name, machine.table(header, rows)]
    rates = {
        side: found["product_tflops_per_second"]
        for side, found in (("jax", ours), ("torch", peers))
        if "product_tflops_per_second" in found
    }
    shown = ", ".join(f"{library} {rate:.3g}" for library, rate in rates.items())
    known = f"; data sheet {peak:g} (bfloat16, dense)" if peak else ""
    lines.append(f"{ours.get('device', 'unknown device')}: products, TFLOP/s: {shown}{known}")
    used = sides["ratios"].get("utilisation")
    if used:
        parts = [f"{used['of_product']:.1%} of the measured product"]
        if used["of_data_sheet"] is not None:
            parts.insert(0, f"{used['of_data_sheet']:.1%} of the data sheet")
        goal = f" (goal {used['goal']:.0%} of the data sheet)" if used["goal"] else ""
        lines.append(f"ours, useful operations: {', '.join(parts)}{goal}")
    if "losses" in ours:
        firsts = {
            letter: f"{x['first_loss']:.4f}"
            for letter, x in peers.get("programs", {}).items()
            if "first_loss" in x
        }
        lines.append(f"first losses: ours {ours['losses'][0]:.4f}, peers {firsts}")
    for key in (
        "attention_difference", "attention_obstacle", "failed_before", "failed_after",
        "failed_with_auto_attention",
    ):  # fmt: skip
        if ours.get(key):
            lines.append(f"ours, {key.replace('_', ' ')}: {ours[key]}")
    return "\n".join(lines)


def main() -> None:
    if _JOB.value:
        job = Job.read(Path(_JOB.value))
        if job.side == "ours":
            from benchmarks.gpu import ours

            ours.run(job)
        else:
            from benchmarks.gpu import peers

            peers.run(job)
        return
    jax.config.update("jax_platforms", "cpu")  # The card is for the processes started here.
    for name in _WORKLOADS.value:
        if name not in SHAPES:
            raise UserError(f"--workloads: no {name!r}; expected {', '.join(SHAPES)}")
    if _DEVICE.value == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("PyTorch sees no GPU; --device=cpu --model=tiny tries the programs")
    if _DEVICE.value == "cpu" and not (_BATCH.value or _MEMORY.value):
        raise UserError("--device=cpu: give --batch or --memory_gb")
    jobs = [
        (
            name,
            Job(
                changed(workload(name, _MODEL.value), _CHANGE.value), side, _DEVICE.value,
                _DTYPE.value, _ROUNDS.value, 0.0, "", _BATCH.value, _REMAT.value, _REUSE.value,
                _ATTENTION.value, int(_MEMORY.value * 1e9) if _MEMORY.value else None,
            ),
        )
        for name in _WORKLOADS.value
        for side in SHARES
    ]  # fmt: skip
    began = time.time()
    found = run(jobs, _BUDGET.value, _OUTPUT.value)
    for name, sides in found.items():
        print("\n" + describe(name, sides))
    print(f"\n{time.time() - began:.0f} s in all")


def start() -> None:
    cli.run(main)


_WORKLOADS = flags.DEFINE_list("workloads", list(SHAPES), "Which.")
_MODEL = flags.DEFINE_enum("model", "3b", list(SIZES), "Sizes of the decoder.")
_CHANGE = flags.DEFINE_list("change", [], "Other sizes for all of them: layers=4,pool=7.")
_DEVICE = flags.DEFINE_enum("device", "cuda", ["cuda", "cpu"], "PyTorch's; ours is on JAX's own.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "To multiply in.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Steps timed, if there is time.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", None, "Prompts in a step; left out: what fits.", 1)
_REMAT = flags.DEFINE_enum("remat", None, list(REMAT), "Ours; left out: what suits.")
_REUSE = flags.DEFINE_bool("reuse", None, "train.reuse_scoring of ours; left out: what suits.")
_ATTENTION = flags.DEFINE_enum("attention", "auto", ["auto", "plain", "fused"], "Ours.")
_MEMORY = flags.DEFINE_float("memory_gb", None, "For ours, 10^9 bytes; left out: all of it.")
_BUDGET = flags.DEFINE_float("budget", 460.0, "Seconds for everything.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write the figures to.")
_JOB = flags.DEFINE_string("job", None, "Run one side: this command starts itself with it.")
