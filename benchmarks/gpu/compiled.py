"""What XLA makes of our train step for an H100, compiled without one: its memory, its kernels.

    pip install "jax[cuda13]"     # No card and no driver are needed.
    JAX_PLATFORMS=cpu python -m benchmarks.gpu.compiled --workload=G1 --batch=32 --remat=dots

Memory is that of arguments, results and temporaries as XLA has laid them out for a card, beside our
estimate of the same step. What a kernel takes as its workspace is chosen on a card, and not in it.
--data, --fsdp and --tensor are the sizes of a mesh, and --output writes the program's text.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from absl import flags
from jax._src.cudnn import fused_attention_stablehlo as kernel
from jax.experimental import topologies

from benchmarks import memory
from benchmarks.collectives import collective_bytes
from benchmarks.gpu.job import SHAPES, SIZES, workload
from benchmarks.workloads import Case, trace
from mass_dpo_jax import cli
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.decoder import REMAT
from mass_dpo_jax.models.fused_attention import FusedAttention
from mass_dpo_jax.models.logprobs import choose_max_logits
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.utils import mesh_axes

# An H100 SXM with 80 GB, in the words of XLA's GpuTargetConfig.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84978434048  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"  device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 19 patch: 0 }  runtime_version { major: 13 minor: 0 patch: 0 }
"""
# Calls in a program's text: products by cuBLAS or by XLA's own kernels, attention by cuDNN.
KERNELS = {
    "matrix products": r'custom_call_target="__cublas\$|"kind":"__triton_nested_gemm_fusion"',
    "attention kernels": r'custom_call_target="__cudnn\$fmha',
}


def cards(count: int) -> list[Any]:
    """Devices that can be compiled for and not run on.

    Raises:
      UserError: JAX has no CUDA plugin.
    """
    # These ask the card that is there.
    kernel.check_cudnn_version = lambda: 91900
    kernel.check_compute_capability = lambda capability: True
    try:
        found = topologies.get_topology_desc(
            "cards", "cuda", target_config=H100, topology=f"1x{count}x1"
        )
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot compile for CUDA here ({error}); expected its plugin: "
            'pip install "jax[cuda13]"'
        ) from None
    devices: list[Any] = found.devices
    return devices


def held(program: Any) -> int:
    """Bytes that are there while it runs."""
    found = program.memory_analysis()
    size: int = found.argument_size_in_bytes + found.output_size_in_bytes
    return size - found.alias_size_in_bytes + found.temp_size_in_bytes


def main() -> None:
    sizes = config_lib.default().mesh
    sizes.update(data=_DATA.value, fsdp=_FSDP.value, tensor=_TENSOR.value)
    mesh = mesh_lib.make_mesh(sizes, cards(_DATA.value * _FSDP.value * _TENSOR.value))
    case = Case.without_weights(
        dataclasses.replace(workload(_WORKLOAD.value, _MODEL.value), batch=_BATCH.value),
        dtype="bfloat16",
        attention=FusedAttention.for_mesh(mesh)
        if _ATTENTION.value == "fused"
        else fused_attention.plain,
        max_logits=choose_max_logits("gpu"),
        mesh=mesh,
    )
    began = time.perf_counter()
    step = case.program("mass_dpo", _REMAT.value, reuse=_REUSE.value)
    program = trace(case, step).lower().compile()
    seconds, text = time.perf_counter() - began, program.as_text()
    estimate = memory.estimate_case(case, _REMAT.value, reuse=_REUSE.value).peak
    print(f"for {mesh.size} x {mesh.devices.flat[0].device_kind}, in {seconds:.0f} s")
    print(f"estimate {estimate / 1e9:.1f} GB, XLA {held(program) / 1e9:.1f} GB: ", end="")
    print(f"{held(program) / estimate:.2f}")
    for name, pattern in KERNELS.items():
        print(f"{name}: {len(re.findall(pattern, text))} in its text")
    for kind, size in collective_bytes(text).items():
        print(f"{kind}: {size / 1e9:.2f} GB of results on a card")
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text)


if __name__ == "__main__":
    _WORKLOAD = flags.DEFINE_enum("workload", "G1", list(SHAPES), "Shapes: see benchmarks.gpu.")
    _MODEL = flags.DEFINE_enum("model", "3b", list(SIZES), "Sizes of the model.")
    _BATCH = flags.DEFINE_integer("batch", 32, "Prompts, of all cards.", lower_bound=1)
    _DATA, _FSDP, _TENSOR = (
        flags.DEFINE_integer(name, 1, f"Cards along {name}.", lower_bound=1)
        for name in mesh_axes.AXES
    )
    _REMAT = flags.DEFINE_enum("remat", "dots", REMAT, "model.remat.")
    _REUSE = flags.DEFINE_bool("reuse", True, "train.reuse_scoring.")
    _ATTENTION = flags.DEFINE_enum("attention", "fused", ["fused", "plain"], "model.attention.")
    _OUTPUT = flags.DEFINE_string("output", None, "A file for the program's text.")
    cli.run(main)
