"""What both sides of `benchmarks.gpu` share: sizes, a job for one process, times and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cost
from benchmarks.workloads import Workload
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.positions import Llama3Scaling, Rope


@dataclasses.dataclass(frozen=True)
class Llama(Workload):
    """With Llama 3.2's rotary angles."""

    @property
    def model(self) -> DecoderConfig:
        return dataclasses.replace(
            super().model,
            max_positions=131072,
            rope=Rope(
                500000.0,
                Llama3Scaling(
                    factor=32.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_positions=8192,
                ),
            ),
        )


SIZES = {
    "3b": {
        "layers": 28, "width": 3072, "heads": 24, "kv_heads": 8, "mlp": 8192, "vocabulary": 128256,
    },
    "tiny": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp": 96, "vocabulary": 256},
}  # fmt: skip
SHAPES = {
    "G1": {"prompt": 160, "response": 10, "pool": 19, "negatives": 3},
    "G2": {"prompt": 128, "response": 256, "pool": 7, "negatives": 3, "layout": "rectangle"},
}


def workload(name: str, model: str) -> Llama:
    return Llama(**SHAPES[name], **SIZES[model])  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Job:
    """One side of one workload.

    Attributes:
      workload: without its batch, if `batch` is None.
      side: ours | peers.
      device: cuda | cpu, of PyTorch; ours is on what JAX finds.
      dtype: to multiply in.
      rounds: runs to time, if there is time.
      until: when to begin no further run, by time.time().
      batch: prompts in a step; None: the most that fits.
      remat, reuse: of ours, `model.remat` and `train.reuse_scoring`; None: what suits.
      attention: `config.model.attention` of ours.
      memory: bytes for ours; None: what the device has.
      result: a file for the figures.
    """

    workload: Llama
    side: str
    device: str
    dtype: str
    rounds: int
    until: float
    result: str
    batch: int | None = None
    remat: str | None = None
    reuse: bool | None = None
    attention: str = "auto"
    memory: int | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        return cls(**fields | {"workload": Llama(**fields["workload"])})

    def save(self, figures: dict[str, Any]) -> None:
        """Called whenever there is something new: a process may be stopped at any time."""
        Path(self.result).write_text(json.dumps(figures))


def timed(step: Callable[[], Any], rounds: int, until: float) -> np.ndarray:
    """Seconds of up to `rounds` runs, at least two, after one that does not count."""
    step()
    seconds: list[float] = []
    while len(seconds) < rounds and (len(seconds) < 2 or time.time() + max(seconds) < until):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return np.array(seconds)


def out_of_memory(error: Exception) -> bool:
    """Is it that? XLA, PyTorch, cuBLAS and the driver have words of their own for it."""
    words = str(error).lower().replace("_", " ")
    return any(x in words for x in ("out of memory", "resource exhausted", "alloc failed"))


def rate(product: Callable[[], Any], size: int) -> float:
    """FLOP/s of a product of square matrices: the fastest of 20."""
    return 2.0 * size**3 / timed(product, rounds=20, until=float("inf")).min()


def product_size(device: str) -> int:
    """Of matrices that a device multiplies at full speed."""
    return 512 if device == "cpu" else 8192


def useful(w: Workload, batch: int, scored: bool, reference: bool) -> tuple[float, float]:
    """Operations and tokens of a step on `batch` prompts: real ones, each prompt once.

    Args:
      scored: the whole pool is scored, which is the forward pass on what is selected, too.
      reference: the reference runs on what is trained on.
    """
    prompts = np.full(batch, w.prompt)
    pool = cost.useful(prompts, np.full((batch, 1 + w.pool), w.response))
    trained = cost.useful(prompts, np.full((batch, 1 + w.negatives), w.response))
    forward = pool if scored else trained
    flop = cost.forward(w.model, forward) + 2 * cost.forward(w.model, trained)
    if reference:
        flop += cost.forward(w.model, trained)
    return flop, forward.tokens


def check_first_loss(loss: float, job: Job) -> None:
    """Policy and reference are the same, up to roundings that differ between shapes of a batch.

    Raises:
      RuntimeError: the loss is not log(1 + n).
    """
    expected = math.log(1 + job.workload.negatives)
    most = 1e-3 if job.dtype == "float32" else 0.1
    if not abs(loss - expected) <= most:  # Nor is a NaN.
        raise RuntimeError(f"the first loss is {loss:.4f}, expected {expected:.4f} +- {most}")


def figures(
    seconds: np.ndarray, batch: int, flop: float, tokens: float, peak: int | None
) -> dict[str, Any]:
    """Of a program, as written to JSON.

    Args:
      flop, tokens: useful ones, of a step.
      peak: bytes on the device; None: unknown.
    """
    low, median, high = (float(x) for x in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return {
        "milliseconds": {"median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high},
        "rounds": len(seconds),
        "prompts": batch,
        "prompts_per_second": batch / median,
        "useful_tokens_per_second": tokens / median,
        "useful_tflop": flop / 1e12,
        "useful_tflops_per_second": flop / 1e12 / median,
        "peak_gb": None if peak is None else peak / 1e9,
    }
