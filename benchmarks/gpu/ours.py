"""Our side of `benchmarks.gpu`: the package's train step, in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import cost, machine, memory
from benchmarks.gpu.job import (
    Job,
    check_first_loss,
    figures,
    out_of_memory,
    product_size,
    rate,
    timed,
    useful,
)
from benchmarks.workloads import Case
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.decoder import REMAT, Decoder
from mass_dpo_jax.models.fused_attention import FusedAttention
from mass_dpo_jax.models.interfaces import Attention
from mass_dpo_jax.models.logprobs import choose_max_logits
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.step import TrainState

# Of the memory that JAX may take; temporaries are only estimated.
MARGIN = 0.93
MOST = 512  # Prompts.
# Operations that a step's update and casts take the time of, a weight: they move some 40 bytes, and
# cards do some 200 operations in the time of a byte.
PER_WEIGHT = 8000


class Plan(NamedTuple):
    """A batch and a way to compute."""

    batch: int
    remat: str
    reuse: bool  # The pass that scores is training's forward pass.

    def __str__(self) -> str:
        return f"{self.batch} prompts, remat={self.remat}, reuse_scoring={self.reuse}"


def run(job: Job) -> dict[str, Any]:
    """Figures, or why there are none; saved as soon as there are some.

    Raises:
      UserError: JAX has no GPU for a job on one.
    """
    device, w = jax.devices()[0], job.workload
    if job.device == "cuda" and device.platform != "gpu":  # Else hours on the host.
        raise UserError(f"JAX sees no GPU, but {device.platform}: is its CUDA plugin installed?")
    case = case_of(job, 1, fused_attention.plain)
    attention = fused_attention.choose_attention(job.attention, w.model, job.dtype, case.mesh)
    found: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    size = product_size(device.platform)
    product = machine.jax_product(size, size, size, jnp.dtype(job.dtype))
    found["product_tflops_per_second"] = rate(product, size) / 1e12
    if isinstance(attention, FusedAttention):
        found["attention_difference"] = fused_attention.measure_error(attention, w.model, job.dtype)
    elif device.platform == "gpu":
        found["attention_obstacle"] = fused_attention.find_obstacle(
            w.model, jnp.dtype(job.dtype), case.mesh
        )
    job.save(found)
    some = plan(job, attention)
    failures: list[str] = []
    while True:
        how = {
            "attention": "fused" if isinstance(attention, FusedAttention) else "plain",
            "remat": some.remat,
            "reuse_scoring": some.reuse,
        }
        told = f"{some}, {how['attention']} attention"
        print(f"ours: {told}", flush=True)
        failure, too_large = None, False
        try:
            found |= attempt(job, some, attention) | how | {"failed_before": failures}
        except jax.errors.JaxRuntimeError as error:  # Nothing of the frames, which hold arrays.
            failure, too_large = str(error).splitlines()[0], out_of_memory(error)
        if failure is None:
            break
        gc.collect()
        failures.append(f"{told}: {failure}")
        print(f"ours: {failures[-1]}", flush=True)
        if too_large and some.batch > 1:
            job, some = smaller(job, some, attention)
        elif not too_large and isinstance(attention, FusedAttention):
            attention = fused_attention.plain
            some = plan(job, attention)
        else:
            found |= {"not_run": "; ".join(failures)}
            break
        if time.time() > job.until:
            found |= {"not_run": "out of time, after: " + "; ".join(failures)}
            break
    job.save(found)
    return found


def case_of(job: Job, batch: int, attention: Attention) -> Case:
    return Case.without_weights(
        dataclasses.replace(job.workload, batch=batch),
        dtype=job.dtype,
        attention=attention,
        max_logits=choose_max_logits(jax.devices()[0].platform),
    )


def plan(job: Job, attention: Attention) -> Plan:
    """Returns the fastest plan that fits, both by estimate: for every way to compute, the largest
    power of two of prompts.

    Raises:
      ValueError: neither a batch nor how much memory there is.
    """
    limit = job.memory
    if limit is None:
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and job.batch is None:
        raise ValueError("this device does not say how much memory it has: give memory")
    plans = []
    for remat in (job.remat,) if job.remat else REMAT:
        for reuse in (True, False) if job.reuse is None else (job.reuse,):
            some = Plan(job.batch or MOST, remat, reuse)
            while limit is not None and peak(job, some, attention) > MARGIN * limit:
                if job.batch is not None or some.batch == 1:
                    break
                some = some._replace(batch=some.batch // 2)
            else:
                plans.append(some)
    if not plans:  # What needs least, whether it fits or not.
        return Plan(job.batch or 1, job.remat or "full", bool(job.reuse))
    return min(plans, key=lambda some: effort(job, some))


def smaller(job: Job, some: Plan, attention: Attention) -> tuple[Job, Plan]:
    """After out of memory: half of a batch that was asked for, or the best plan that needs 5% less
    by the estimate, and the job with as much memory as that."""
    if job.batch is not None:
        return job, some._replace(batch=some.batch // 2)
    job = dataclasses.replace(job, memory=int(0.95 * peak(job, some, attention) / MARGIN))
    return job, plan(job, attention)


def peak(job: Job, some: Plan, attention: Attention) -> int:
    """Bytes, by the estimate."""
    case = case_of(job, some.batch, attention)
    return memory.estimate_case(case, some.remat, reuse=some.reuse).peak


def effort(job: Job, some: Plan) -> float:
    """Operations a prompt, and what reading and writing the weights once a step is worth."""
    case = case_of(job, some.batch, fused_attention.plain)
    whole, trained = case.passes(case.shapes[0])
    train = cost.train_ours(case.model, trained, some.remat, recorded=some.reuse)
    model = case.model
    weights = (cost.weights_cost(model) + cost.logits_cost(model)) / 2
    return (cost.forward(model, whole) + train + PER_WEIGHT * weights) / some.batch


def attempt(job: Job, some: Plan, attention: Attention) -> dict[str, Any]:
    """Figures of the train step on one batch.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit, or does not run.
    """
    began = time.perf_counter()
    case = case_of(job, some.batch, attention)
    program = case.program("mass_dpo", some.remat, reuse=some.reuse)
    everywhere = mesh_lib.replicated_sharding(case.mesh)
    params = jax.jit(lambda key: _weights(case, key), out_shardings=everywhere)(jax.random.key(0))
    placed = jax.device_put(case.batches[0], mesh_lib.batch_sharding(case.mesh))
    # The reference is the policy as it is now, so the first loss is known.
    placed = placed._replace(ref_logps=program.scorer.logps(params, placed))
    micro = jax.tree.map(lambda x: x[None], placed)
    optimizer = make_optimizer(case.config.train, total_steps=10**6)
    moments = jax.jit(optimizer.init, out_shardings=everywhere)(params)
    state = TrainState(jax.device_put(jnp.int32(0), everywhere), params, moments)
    key = jax.device_put(jax.random.key(0), everywhere)
    del params, moments  # The step takes them.
    losses: list[float] = []

    def step() -> None:
        nonlocal state
        state, _, shown = program.train_step(
            optimizer, state, micro, None, key, case.shapes[0].selected
        )
        losses.append(float(shown["loss"]))
        jax.block_until_ready(state)

    step()
    check_first_loss(losses[0], job)
    ready = time.perf_counter() - began
    seconds = timed(step, job.rounds, job.until)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        **figures(
            seconds,
            some.batch,
            *useful(case.workload, some.batch, scored=True, reference=False),
            stats.get("peak_bytes_in_use"),
        ),
        "account_gb": peak(job, some, attention) / 1e9,
        "losses": losses,
        "seconds_until_first_step": ready,
    }


def _weights(case: Case, key: jax.Array) -> Any:
    decoder = Decoder(case.model, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
