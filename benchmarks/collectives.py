r"""What devices send each other in a train step: bytes of every collective in the compiled program.

    python -m benchmarks.collectives --config=configs/tiny.py --devices=8,64 --tensor=1,2

Compiles the real train step for simulated devices, without weights and without running it, and adds
up the results of all collectives in the program of one device, those in loops as often as the loop
runs. Two meshes for each number of devices: all along `data`, all along `fsdp`, the latter with
each value of --tensor. Prompts per device stay the same (--rows).

Beside the sums stand the weights of one device after gathering. With `fsdp` each pass over the
layers (scoring, which is the forward pass too, and backward) has to gather them once and the
gradients have to be summed once; with `data` only the latter; selection sends nothing. XLA's CPU
backend knows no reduce-scatter, so that a gradient's sum is an all-reduce here, which costs twice
as much. Time on a network is not in these figures.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from benchmarks import machine
from mass_dpo_jax import cli
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Setup
from mass_dpo_jax.training.updates import abstract_state

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(")
# What a collective that is started and waited for later is of: (operands), results.
_STARTED = re.compile(r"\(\((?:[^()]|\([^()]*\))*\), (.*)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def of_step(setup: Setup, rows: int) -> Counter[str]:
    """`collective_bytes` of the train step on the largest shape of batch, `rows` prompts in all."""
    shape = setup.buckets["train"].shapes[-1]
    candidates = setup.tokens["train"].response_lengths.shape[1]
    optimizer = make_optimizer(setup.train, 1000)
    split = mesh_lib.batch_sharding(setup.mesh, leading=1)

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, rows, *sizes), dtype, sharding=split)

    batch = Batch(
        prompts=array(shape.prompt),
        prompt_lengths=array(),
        responses=array(shape.responses),
        response_lengths=array(candidates),
        ref_logps=array(candidates, dtype=jnp.float32),
        index=array(),
    )
    step = setup.program.train_step.lower(
        setup.program,
        optimizer,
        abstract_state(setup, optimizer),
        batch,
        None,
        jax.random.key(0),
        shape.selected,
    )
    return collective_bytes(str(step.compile().as_text()))


def collective_bytes(hlo: str) -> Counter[str]:
    """Bytes of the results of each kind of collective in a compiled module, loops unrolled.

    Raises:
      ValueError: a loop with a collective in it does not say how often it runs.
    """
    bodies, entry = _computations(hlo)
    known: dict[str, Counter[str]] = {}

    def total(name: str) -> Counter[str]:
        if name not in known:
            known[name] = Counter()
            for line in bodies.get(name, ()):
                known[name] += _of_line(line, total)
        return known[name]

    return total(entry)


def _of_line(line: str, total: Callable[[str], Counter[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    if match := _INSTRUCTION.search(line):
        started = _STARTED.fullmatch(match[1])
        results = started[1] if started else match[1]
        found[match[2]] += sum(_size(*shape) for shape in _SHAPE.findall(results))
    inner: Counter[str] = Counter()
    names = _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    for name in names:
        inner += total(name)
    if " while(" in line and inner:
        trips = _TRIPS.search(line)
        if trips is None:
            raise ValueError(f"a loop of unknown length: {line.strip()[:200]}")
        inner = Counter({kind: size * int(trips[1]) for kind, size in inner.items()})
    return found + inner


def _size(dtype: str, dims: str) -> int:
    size = BYTES.get(dtype, 0)
    for dim in filter(None, dims.split(",")):
        size *= int(dim)
    return size


def _computations(hlo: str) -> tuple[Mapping[str, list[str]], str]:
    """The lines of each computation, and the name of the one that runs."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name:
            bodies[name].append(line)
    return bodies, entry


def weights_bytes(setup: Setup) -> int:
    """float32 bytes of all weights, over the devices along `tensor`."""
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.policy.abstract))
    return 4 * total // int(setup.mesh.shape["tensor"])


def one(config: ConfigDict, rows: int) -> dict[str, Any]:
    """The figures of the mesh in a configuration, on the devices of this process."""
    total = rows * jax.device_count()
    config.train.update(micro_batch_size=total, batch_size=total)
    config.eval.batch_size = jax.device_count()
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(config, Path(folder), ("train",))
    return {"weights": weights_bytes(setup), "collectives": dict(of_step(setup, total))}


def _in_process(devices: int, mesh: Mapping[str, int]) -> dict[str, Any]:
    """`one` in a process of its own: the number of simulated devices is set when it starts."""
    shape = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.collectives", *sys.argv[1:], *shape, "--one"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
    )
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    config = cli.read_config()
    if _ONE.value:
        print(json.dumps(one(config, _ROWS.value)))
        return
    rows, figures = [], []
    for devices in map(int, _DEVICES.value):
        meshes = [{"data": -1, "fsdp": 1, "tensor": 1}]
        meshes += [{"data": 1, "fsdp": -1, "tensor": int(ways)} for ways in _TENSOR.value]
        for mesh in meshes:
            found = _in_process(devices, mesh)
            name = "data" if mesh["fsdp"] == 1 else f"fsdp, tensor={mesh['tensor']}"
            figures.append({"devices": devices, "mesh": mesh, **found})
            sent = found["collectives"]
            cells = [f"{sent.get(kind, 0) / 1e6:.2f}" for kind in KINDS]
            rows.append([str(devices), name, f"{found['weights'] / 1e6:.2f}", *cells])
            print(f"{devices} devices, {name}: {sum(sent.values()) / 1e6:.2f} MB", flush=True)
    print("\nMB for each device and step\n")
    print(machine.table(["devices", "mesh", "weights", *KINDS], rows))
    machine.record(_OUTPUT.value, 0.0, {"rows_per_device": _ROWS.value, "figures": figures})


if __name__ == "__main__":
    cli.define_config()
    _DEVICES = flags.DEFINE_list("devices", ["8", "64", "256"], "Numbers of simulated devices.")
    _TENSOR = flags.DEFINE_list("tensor", ["1", "2"], "Devices along `tensor`, beside `fsdp`.")
    _ROWS = flags.DEFINE_integer("rows", 4, "Prompts for each device.", lower_bound=1)
    _OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write the figures to.")
    _ONE = flags.DEFINE_bool("one", False, "Only the mesh of --config, on the devices there are.")
    cli.run(main)
