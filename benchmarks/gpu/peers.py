"""PyTorch's side of `benchmarks.gpu`: the peers of benchmarks/peers.py on a card."""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.gpu.job import (
    Job,
    Llama,
    check_first_loss,
    figures,
    out_of_memory,
    product_size,
    rate,
    timed,
    useful,
)
from benchmarks.peers import (
    MassDpo,
    Peer,
    Pool,
    hidden_states,
    logps,
    random_torch,
    to_torch,
)
from benchmarks.workloads import Case, Ours
from mass_dpo_jax.data.batches import Batch

LETTERS = {
    "c": "(c) PyTorch MASS-DPO",
    "a": "(a) PyTorch S-DPO",
    "b": "(b) PyTorch S-DPO, cached reference",
}
LOSS_ERROR, NORM_ERROR = 1e-4, 1e-3


def run(job: Job) -> dict[str, Any]:
    """Figures of every peer, or why there are none; saved after each.

    Raises:
      RuntimeError: PyTorch and ours do not compute the same.
    """
    assert job.batch is not None
    w, size = dataclasses.replace(job.workload, batch=job.batch), product_size(job.device)
    product = machine.torch_product(size, size, size, job.dtype, job.device)
    found: dict[str, Any] = {
        "differences": agree(job),
        "product_tflops_per_second": rate(product, size) / 1e12,
        "programs": {},
    }
    print(f"peers: largest differences in float32 on a tiny model: {found['differences']}")
    case = Case.without_weights(w)
    batch, ridge = case.batches[0], case.config.selection.ridge
    model = random_torch(w.model, job.device)
    rng = np.random.default_rng(0)
    numbers = np.argsort(rng.random((w.batch, w.pool)), 1)[:, : w.negatives] + 1
    for i, letter in enumerate(LETTERS):
        now = time.time()
        until = now + (job.until - now) / (len(LETTERS) - i)
        if now >= job.until:
            found["programs"][letter] = {"not_run": "out of time"}
        else:
            found["programs"][letter] = attempt(job, letter, model, batch, numbers, ridge, until)
            _free(model)
        job.save(found)
    return found


def attempt(
    job: Job, letter: str, model: Any, batch: Batch, numbers: np.ndarray, ridge: float, until: float
) -> dict[str, Any]:
    """Figures of a peer, or why there are none; nothing of its moments is left."""
    try:
        # The reference is the policy as it is now, so the first loss is known.
        batch = batch._replace(ref_logps=reference(model, batch, job))
        return measure(Stepper(job, letter, model, batch, numbers, ridge), job, until)
    except Exception as error:  # Whatever it is, the other peers may still run.
        traceback.print_exc()
        return {"not_run": f"{type(error).__name__}: {error}".splitlines()[0]}


class Stepper:
    """A peer's step on a batch in any number of parts."""

    def __init__(
        self, job: Job, letter: str, model: Any, batch: Batch, numbers: np.ndarray, ridge: float
    ):
        config, dtype = Case.without_weights(job.workload).config, autocast_type(job)
        other = reference_model(model, dtype) if letter == "a" else None
        kind = MassDpo if letter == "c" else Peer
        self.peer = kind(
            model, config.beta, config.train.learning_rate, config.train.clip, other, dtype=dtype
        )
        self.letter, self._device, self._ridge = letter, job.device, ridge
        self._batch, self._numbers = batch, numbers

    @property
    def size(self) -> int:
        return len(self._numbers)

    def first_loss(self) -> float:
        """On one prompt."""
        pool = Pool(part_of(self._batch, slice(0, 1)), self._device)
        with torch.no_grad():
            return float(self.peer.loss(*self.peer.collate(pool, self._numbers[:1])))

    def step(self, parts: int) -> Callable[[], None]:
        """An update on the whole batch, gradients accumulated over equal parts of it."""
        rows = self.size // parts
        cuts = [slice(i * rows, (i + 1) * rows) for i in range(parts)]
        pools = [Pool(part_of(self._batch, cut), self._device) for cut in cuts]
        peer = self.peer
        if isinstance(peer, MassDpo):
            candidates = np.tile(np.arange(1, pools[0].lengths.shape[1]), (rows, 1))
            whole: Any = [(pool, peer.collate(pool, candidates)[0]) for pool in pools]
            n, ridge = self._numbers.shape[1], self._ridge
            update = lambda: peer.select_and_steps(whole, n, ridge)  # noqa: E731
        else:
            ready = [
                peer.collate(pool, self._numbers[cut])
                for pool, cut in zip(pools, cuts, strict=True)
            ]
            update = lambda: peer.steps(ready)  # type: ignore[assignment, return-value]  # noqa: E731

        def wait() -> None:
            update()
            machine.torch_wait(self._device)

        return wait


def measure(made: Stepper, job: Job, until: float) -> dict[str, Any]:
    """Figures with the fastest of both ways to have room, or why there are none."""
    model, loss = made.peer.model, made.first_loss()
    check_first_loss(loss, job)
    ways: dict[tuple[bool, int], float] = {}
    failures: list[str] = []
    for checkpointing in (False, True):
        _checkpoint(model, checkpointing)
        parts = 1
        while parts <= made.size and time.time() < until:
            if made.size % parts == 0:
                print(f"{LETTERS[made.letter]}: {parts=} {checkpointing=}", flush=True)
                seconds = trial(made, parts)
                if seconds is not None:
                    ways[checkpointing, parts] = seconds
                    break
                failures.append(f"{checkpointing=}, {parts=}: out of memory")
            parts *= 2
    if not ways:
        why = "; ".join(failures) if time.time() < until else f"out of time; {failures}"
        return {"not_run": why or "out of time"}
    checkpointing, parts = min(ways, key=lambda way: ways[way])
    _checkpoint(model, checkpointing)
    _free(model)
    if job.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = timed(made.step(parts), job.rounds, until)
    peak = torch.cuda.max_memory_allocated() if job.device != "cpu" else None
    work = useful(job.workload, made.size, made.letter == "c", made.letter == "a")
    return {
        **figures(times, made.size, *work, peak),
        "parts": parts,
        "checkpointing": checkpointing,
        "first_loss": loss,
        "tried": [
            {"checkpointing": how, "parts": count, "milliseconds": 1e3 * found}
            for (how, count), found in ways.items()
        ],
        "failed_before": failures,
    }


def trial(made: Stepper, parts: int) -> float | None:
    """Seconds of a second step; None: out of memory."""
    try:
        return float(timed(made.step(parts), rounds=1, until=0.0).min())
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # Its frames held tensors until here.
    _free(made.peer.model)
    return None


def _checkpoint(model: Any, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _free(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def autocast_type(job: Job) -> torch.dtype | None:
    return None if job.dtype == "float32" else getattr(torch, job.dtype)


def reference_model(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy with weights in the type they are multiplied in. Not `model.to`, which would round the
    rotary frequencies too."""
    other = copy.deepcopy(model).requires_grad_(False)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return other


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch on the host."""
    return Batch(*(None if x is None else np.asarray(x)[rows] for x in batch))


def reference(model: Any, batch: Batch, job: Job) -> np.ndarray:
    """The model's log-probs [B, C], prompt by prompt, so that it fits."""
    dtype, rows = autocast_type(job), []
    for b in range(len(batch.prompts)):
        pool = Pool(part_of(batch, slice(b, b + 1)), job.device)
        count = pool.reference.numel()
        candidates = torch.arange(count, device=job.device)[None]
        inputs = pool.rows(candidates)
        with torch.no_grad(), torch.autocast(job.device, dtype, enabled=dtype is not None):
            found = logps(model, hidden_states(model, inputs), inputs, count)
        rows.append(found.float().cpu().numpy())
    return np.stack(rows)


def agree(job: Job) -> dict[str, float]:
    """Compares the peers on the job's device with ours on the CPU: float32, a tiny model.

    Raises:
      RuntimeError: somebody computes something else.
    """
    tiny = Llama(
        batch=2, prompt=19, response=5, pool=6, negatives=2, layout=job.workload.layout, layers=2,
        width=64, heads=4, kv_heads=2, mlp=96, vocabulary=256,
    )  # fmt: skip
    case = Case.make(tiny)
    used, shown = Ours(case, case.program("mass_dpo", "dots")).step(0)
    numbers, found = np.asarray(used[0]), {"picks": 0.0, "loss": 0.0, "gradient norm": 0.0}

    def same(letter: str, what: str, error: float, most: float) -> None:
        if not error <= most:  # Nor is a NaN.
            raise RuntimeError(
                f"{LETTERS[letter]}: {what}: off by {error:.2g}, expected at most {most}"
            )
        found[what] = max(found[what], error)

    def model(weights: Any) -> Any:
        return to_torch(case.model, weights, job.device)

    def peer(kind: Any, other: Any = None) -> Any:
        train = case.config.train
        policy = model(case.params)
        return kind(policy, case.config.beta, train.learning_rate, train.clip, other)

    pool, ridge = Pool(case.batches[0], job.device), case.config.selection.ridge
    peers = {"a": peer(Peer, model(case.reference)), "b": peer(Peer), "c": peer(MassDpo)}
    everyone = np.tile(np.arange(1, 1 + tiny.pool), (tiny.batch, 1))
    whole = peers["c"].collate(pool, everyone)[0]
    chosen = peers["c"].choose(pool, whole, tiny.negatives, ridge).cpu().numpy()
    same("c", "picks", float((chosen != numbers).sum()), 0.0)
    halves = [Pool(part_of(case.batches[0], slice(b, b + 1)), job.device) for b in range(2)]
    for letter, each in peers.items():
        inputs = each.collate(pool, numbers)
        loss = float(each.loss(*inputs).detach())
        same(letter, "loss", abs(loss - float(shown["loss"])), LOSS_ERROR)
        parts = [each.collate(half, numbers[b : b + 1]) for b, half in enumerate(halves)]
        norm = each.steps(parts)  # In two parts: accumulated gradients, too.
        same(letter, "gradient norm", abs(norm / float(shown["grad_norm"]) - 1), NORM_ERROR)
    return found
