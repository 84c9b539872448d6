r"""Memory of a train step: our estimate of it, XLA's, and what PyTorch keeps for its backward pass.

    python -m benchmarks.memory
    python -m benchmarks.memory --shape=prompt=160,response=10,pool=19,batch=4 --remat=full

The first table is about small models in float32 on this machine's CPU, in 10^6 bytes:

- ours, and ours without prefix sharing (every response behind its own copy of the prompt): the
  estimate's temporaries beside `temp_size_in_bytes` of the compiled train step. That includes
  gradients and leaves out weights, optimizer state and batch. XLA is told to schedule for memory;
  its default on CPUs starts independent parts early, and held up to 20 % more. Compiled, not run.
- kept: what the backward pass needs of the forward pass, by the estimate, and by PyTorch's S-DPO on
  the same 1 + n responses, a row each behind its prompt: bytes of distinct storages that autograd
  saves (torch.autograd.graph.saved_tensors_hooks), weights left out. No peak: temporaries come on
  top. It compares with remat=dots; PyTorch's checkpointing is not on.

The second table is the estimate alone, for Llama 3.2 3B's sizes on one card and on eight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from benchmarks import machine
from benchmarks.workloads import Case, Workload, changed, trace
from mass_dpo_jax import cli
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate import memory as memory_lib
from mass_dpo_jax.estimate.memory import MemoryEstimate, StepLayout
from mass_dpo_jax.estimate.sizes import BatchLayout, Chunks, DeviceModel
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import REMAT
from mass_dpo_jax.models.fused_attention import FusedAttention
from mass_dpo_jax.training.mesh import abstract_mesh
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.step import Program

SMALL = Workload(
    batch=4, prompt=64, response=8, pool=15, layers=3, width=64, heads=4, mlp=192, vocabulary=1000
)
SHAPES = ("prompt=64", "prompt=256,response=16", "prompt=32,response=32,pool=7")
OPTIONS: dict[str, Any] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,  # Of machine code: buffers stay the same.
}
CARDS = (80, 24)  # GB.
MEGABYTE = 1e6


def compiled_bytes(case: Case, program: Program) -> int:
    """XLA's temporaries of the train step on the first batch."""
    found = trace(case, program).lower().compile(compiler_options=OPTIONS).memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def estimate_case(
    case: Case,
    remat: str,
    shared: bool = True,
    reuse: bool = True,
    method: str = "mass_dpo",
    at_a_time: int = 0,
) -> MemoryEstimate:
    """Returns our estimate of the same step, on one device of the case's mesh.

    `method` is mass_dpo or pl_all, `at_a_time` is `train.responses_at_a_time`.
    """
    w, shape, sizes = case.workload, case.shapes[0], case.mesh.shape
    batch = w.batch // (sizes["data"] * sizes["fsdp"])
    model = DeviceModel.from_decoder(
        case.model,
        jnp.dtype(case.dtype).itemsize,
        remat,
        sizes["fsdp"],
        sizes["tensor"],
        fused=isinstance(case.attention, FusedAttention),
        max_logits=case.max_logits,
    )
    optimizer = make_optimizer(case.config.train, 1)
    chunks = trained_chunks = None
    if not shared:
        pool, trained = (
            BatchLayout(batch * count, shape.prompt, 1, case.max_response)
            for count in (1 + w.pool, 1 + w.negatives)
        )
    elif w.layout == "packed":
        pool = BatchLayout(batch, shape.prompt, 1, shape.responses)
        trained = pool._replace(length=shape.selected)
    else:
        pool = BatchLayout(batch, shape.prompt, 1 + w.pool, case.max_response)
        trained = pool._replace(groups=1 + w.negatives)
    if shared:
        divide = functools.partial(Chunks.divide, w.layout, max_response=case.max_response)
        at_once = at_a_time or (1 + w.negatives if w.layout == "rectangle" else 0)
        chunks = divide(1 + w.pool, at_once, packed_length=shape.responses)
        trained_chunks = divide(1 + w.negatives, at_a_time, packed_length=shape.selected)
    scores = method == "mass_dpo"
    return memory_lib.estimate_step(
        model,
        memory_lib.state_bytes(case.model, case.mesh, optimizer),
        memory_lib.batch_bytes(batch, shape.prompt, shape.responses, 1 + w.pool),
        StepLayout(
            pool if scores else None,
            chunks,
            trained,
            reuse=scores and shared and reuse and not at_a_time,
            trained_chunks=trained_chunks,
        ),
    )


def saved_by_torch(case: Case) -> int:
    """Bytes that S-DPO's loss in PyTorch saves for its backward pass, see above."""
    import numpy as np
    import torch

    from benchmarks.peers import Peer, Pool, to_torch

    w = case.workload
    peer = Peer(to_torch(case.model, case.params), beta=0.1, learning_rate=0.0, clip=1.0)
    numbers = np.tile(np.arange(1, 1 + w.negatives), (w.batch, 1))
    rows, reference = peer.collate(Pool(case.batches[0]), numbers)
    weights = {x.untyped_storage().data_ptr() for x in peer.model.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Any) -> Any:  # The graph keeps x, so no storage is counted that was used again.
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = peer.loss(rows, reference)
    loss.backward()
    return sum(saved.values())


def small(workload: Workload, remats: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of one shape, in bytes, a row for each remat."""
    case = Case.make(workload)
    torch = saved_by_torch(case)
    rows = []
    for remat in remats:
        row: dict[str, Any] = {**dataclasses.asdict(workload), "remat": remat}
        for name, shared in (("ours", True), ("unshared", False)):
            estimate = estimate_case(case, remat, shared)
            row[f"{name}/estimate"] = estimate.temporaries
            row[f"{name}/xla"] = compiled_bytes(case, case.program("mass_dpo", remat, shared))
            row[f"{name}/kept"] = estimate.kept
        rows.append(row | {"torch/saved": torch})
    return rows


def llama_3b() -> DecoderConfig:
    """Llama 3.2 3B's sizes; nothing is loaded."""
    return DecoderConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        "Llama 3.2 3B",
    )


def large(
    fsdp: int, moments: str, offload: bool, batch: int = 128, micro: int = 16
) -> MemoryEstimate:
    """P = 160, R = 10, N = 19, n = 3 in bfloat16, remat=full, on one of `fsdp` devices."""
    config = config_lib.paper()
    config.train.update(moments_dtype=moments, offload_moments=offload)
    config.mesh.update(data=1, fsdp=fsdp)
    mesh = abstract_mesh(config.mesh, devices=fsdp)
    model = llama_3b()
    optimizer = make_optimizer(config.train, 1)
    pool, trained = (BatchLayout(micro // fsdp, 160, 1, length) for length in (200, 40))
    return memory_lib.estimate_step(
        DeviceModel.from_decoder(model, itemsize=2, remat="full", fsdp=fsdp),
        memory_lib.state_bytes(model, mesh, optimizer),
        memory_lib.batch_bytes(batch // fsdp, 160, 200, 20),
        StepLayout(pool, None, trained, batch // micro, reuse=True),
        offload,
    )


def large_rows() -> list[dict[str, Any]]:
    rows = []
    for fsdp in (1, 8):
        for moments, offload in (("float32", False), ("bfloat16", False), ("float32", True)):
            estimate = large(fsdp, moments, offload)
            row = {"devices": fsdp, "moments": moments, "offloaded": offload, "peak": estimate.peak}
            rows.append(row | dataclasses.asdict(estimate) | {"phases": estimate.phases})
    return rows


def small_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["P, R, N, n, B", "layout", "remat", "ours: estimate / XLA",
              "unshared: estimate / XLA", "unshared / ours, XLA", "kept: ours", "unshared",
              "PyTorch"]  # fmt: skip

    def pair(row: dict[str, Any], name: str) -> str:
        ours, xla = row[f"{name}/estimate"], row[f"{name}/xla"]
        return f"{ours / MEGABYTE:.1f} / {xla / MEGABYTE:.1f} = {ours / xla:.2f}"

    lines = [
        [
            ", ".join(str(row[k]) for k in ("prompt", "response", "pool", "negatives", "batch")),
            row["layout"],
            row["remat"],
            pair(row, "ours"),
            pair(row, "unshared"),
            f"{row['unshared/xla'] / row['ours/xla']:.1f}",
            *(f"{row[k] / MEGABYTE:.1f}" for k in ("ours/kept", "unshared/kept", "torch/saved")),
        ]
        for row in rows
    ]
    return machine.table(header, lines)


def large_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = {
        "parameters": "weights", "gradients": "gradient", "gradient_sums": "its sum",
        "optimizer": "moments", "kept": "kept", "scoring": "scoring", "other_layer": "a layer",
        "peak": "peak",
    }  # fmt: skip
    header = ["devices", "moments", *columns.values(), *(f"{card} GB card" for card in CARDS)]
    lines = [
        [
            str(row["devices"]),
            row["moments"] + (", host" if row["offloaded"] else ""),
            *(f"{row[part] / 1e9:.1f}" for part in columns),
            *("fits" if row["peak"] <= card * 1e9 else "does not fit" for card in CARDS),
        ]
        for row in rows
    ]
    return machine.table(header, lines)


def main() -> None:
    for remat in _REMAT.value:
        if remat not in REMAT:
            raise UserError(f"--remat={remat}: expected some of {', '.join(REMAT)}")
    base = dataclasses.replace(SMALL, layout=_LAYOUT.value)
    workloads = [changed(base, shape.split(",")) for shape in _SHAPE.value]
    for w in workloads:
        if w.negatives > w.pool:
            raise UserError(f"--shape: negatives={w.negatives}, more than pool={w.pool}")
    figures = [row for workload in workloads for row in small(workload, _REMAT.value)]
    print("temporaries of a train step in float32, 10^6 bytes\n")
    print(small_table(figures))
    print("\nthe estimate of Llama 3.2 3B, bfloat16, remat=full, P=160 R=10 N=19 n=3, "
          "16 prompts at a time of 128: 10^9 bytes a device\n")  # fmt: skip
    print(large_table(large_rows()))
    # Bytes do not depend on what else the machine does.
    machine.record(_OUTPUT.value, 0.0, {"small": figures, "llama_3b": large_rows()})


if __name__ == "__main__":
    _SHAPE = flags.DEFINE_multi_string(
        "shape", list(SHAPES), "Sizes that differ from the default, as prompt=64,response=8."
    )
    _REMAT = flags.DEFINE_list("remat", ["dots", "full"], "Of dots, full.")
    _LAYOUT = flags.DEFINE_enum("layout", "packed", ["packed", "rectangle"], "Ours.")
    _OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write the figures to.")
    cli.run(main)
