"""Our side of `benchmarks.gpu`: the package's train step, in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import machine, memory
from benchmarks.gpu.job import (
    Job,
    check_first_loss,
    figures,
    product_size,
    rate,
    timed,
    useful,
)
from benchmarks.workloads import Case
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.decoder import REMAT, Decoder
from mass_dpo_jax.models.fused_attention import Attention, Fused
from mass_dpo_jax.models.logprobs import max_logits_of
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.step import TrainState

# Of the memory that JAX may take; the account's temporaries are estimates.
MARGIN = 0.93
MOST = 512  # Prompts.
# Trained at a time, so that matrix products fill the card: with fewer, rather compute more again.
ENOUGH_TOKENS = 4096


def run(job: Job) -> dict[str, Any]:
    """Figures, or why there are none; saved as soon as there are some."""
    device, w = jax.devices()[0], job.workload
    case = case_of(job, 1, fused_attention.plain)
    attention = fused_attention.choose(job.attention, w.model, job.dtype, case.mesh)
    found: dict[str, Any] = {"device": device.device_kind, "platform": device.platform}
    size = product_size(device.platform)
    product = machine.jax_product(size, size, size, jnp.dtype(job.dtype))
    found["product_tflops_per_second"] = rate(product, size) / 1e12
    if isinstance(attention, Fused):
        found["attention_difference"] = fused_attention.difference(attention, w.model, job.dtype)
    elif device.platform == "gpu":
        found["attention_obstacle"] = fused_attention.obstacle(
            w.model, jnp.dtype(job.dtype), case.mesh
        )
    batch, remat = plan(job, attention)
    failures: list[str] = []
    while True:
        how = {"attention": "fused" if isinstance(attention, Fused) else "plain", "remat": remat}
        told = f"{batch} prompts, remat={remat}, {how['attention']} attention"
        print(f"ours: {told}", flush=True)
        failure = None
        try:
            found |= attempt(job, batch, remat, attention) | how | {"failed_before": failures}
        except jax.errors.JaxRuntimeError as error:
            failure = str(error).splitlines()[0]  # Nothing of the frames, which hold arrays.
        if failure is None:
            break
        gc.collect()
        failures.append(f"{told}: {failure}")
        print(f"ours: {failures[-1]}", flush=True)
        if "RESOURCE_EXHAUSTED" in failure and batch > 1:
            batch //= 2
        elif "RESOURCE_EXHAUSTED" not in failure and isinstance(attention, Fused):
            attention = fused_attention.plain
            batch, remat = plan(job, attention)
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
        max_logits=max_logits_of(jax.devices()[0].platform),
    )


def plan(job: Job, attention: Attention) -> tuple[int, str]:
    """Prompts in a step, and `model.remat`: by the account.

    Raises:
      ValueError: neither a batch nor how much memory there is.
    """
    limit = job.memory
    if limit is None:
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if job.batch is not None and job.remat is not None:
        return job.batch, job.remat
    if limit is None:
        raise ValueError("this device does not say how much memory it has: give memory")
    w, most = job.workload, (1, REMAT[-1])
    for remat in (job.remat,) if job.remat else REMAT:
        batch = job.batch or MOST
        while job.batch is None and batch > 1:
            if memory.account_of(case_of(job, batch, attention), remat).peak <= MARGIN * limit:
                break
            batch //= 2
        account = memory.account_of(case_of(job, batch, attention), remat)
        most = batch, remat
        trained = batch * (w.prompt + (1 + w.negatives) * w.response)
        if account.peak <= MARGIN * limit and (trained >= ENOUGH_TOKENS or job.batch):
            break
    return most


def attempt(job: Job, batch: int, remat: str, attention: Attention) -> dict[str, Any]:
    """Figures of the train step on one batch.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit, or does not run.
    """
    began = time.perf_counter()
    case = case_of(job, batch, attention)
    program = case.program("mass_dpo", remat)
    everywhere = mesh_lib.replicated(case.mesh)
    params = jax.jit(lambda key: _weights(case, key), out_shardings=everywhere)(jax.random.key(0))
    placed = jax.device_put(case.batches[0], mesh_lib.split_rows(case.mesh))
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
            batch,
            *useful(case.workload, batch, scored=True, reference=False),
            stats.get("peak_bytes_in_use"),
        ),
        "account_gb": memory.account_of(case, remat).peak / 1e9,
        "losses": losses,
        "seconds_until_first_step": ready,
    }


def _weights(case: Case, key: jax.Array) -> Any:
    decoder = Decoder(case.model, rngs=nnx.Rngs(key), remat="none")
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
