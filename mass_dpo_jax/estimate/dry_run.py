"""`train --config.dry_run=True`: what a step of a configuration needs, and nothing is allocated.

Data and tokenizer are read, since they decide the shapes of batches; weights are not. The mesh may
be larger than the devices at hand.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax.config import parse_refresh
from mass_dpo_jax.data.batches import Shape
from mass_dpo_jax.estimate import flops as flops_lib
from mass_dpo_jax.estimate import memory as account_lib
from mass_dpo_jax.estimate.memory import Account
from mass_dpo_jax.estimate.sizes import Layout, Model, of_device
from mass_dpo_jax.models.fused_attention import Fused
from mass_dpo_jax.models.logprobs import max_logits_of
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.checkpoint import latest_step
from mass_dpo_jax.training.mesh import abstract_mesh
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.policy import uses_lora
from mass_dpo_jax.training.setup import Setup, prepare
from mass_dpo_jax.utils import mesh_axes


class Flops(NamedTuple):
    """Operations of a step on all devices together, for rows as they come.

    processed: of scoring, and of the loss with its backward pass and recomputation.
    useful: the same without padding, masked pairs and recomputation.
    """

    processed: tuple[float, float]
    useful: tuple[float, float]


def dry_run(config: ConfigDict, workdir: Path | None, splits: Sequence[str]) -> str:
    """The table to print. Writes nothing but caches.

    Args:
      workdir: a run's folder, which may hold a tokenizer; or None.
      splits: those that training reads.

    Raises:
      UserError: as training would.
    """
    mesh = abstract_mesh(config.mesh, jax.device_count())
    for name in ("train.micro_batch_size", "eval.batch_size"):
        group, field = name.split(".")
        mesh_lib.check_batch(mesh, name, config[group][field])
    here = config.copy_and_resolve_references()
    here.dry_run = True  # Also of a caller who has not set it: no weights are needed.
    here.mesh.update(data=1, fsdp=1, tensor=-1)  # Whatever devices there are: they hold nothing.
    if config.model.attention == "fused":  # And need not be able to.
        here.model.attention = "plain"
    with tempfile.TemporaryDirectory() as empty:
        begun = workdir is not None and latest_step(workdir) is not None
        folder = workdir if begun else Path(empty)
        setup = prepare(here, None if config.model.path else folder, splits)
    if config.model.attention == "fused":
        setup = _with_fused(setup)
    accounts = {shape: of_shape(setup, mesh, shape) for shape in setup.buckets["train"].shapes}
    shape = max(accounts, key=lambda shape: accounts[shape].peak)
    evaluation = accounts[shape].parameters + accounts[shape].batch + _evaluation(setup, mesh)
    if not config.train.offload_moments:
        evaluation += accounts[shape].optimizer
    lines = [
        _where(config, mesh, shape),
        *lines_of(accounts[shape], config, evaluation),
        *_flops_lines(flops(setup), mesh.size),
    ]
    need = max(accounts[shape].peak, evaluation)
    if config.device_memory_gb:
        lines.append(verdict(need, config.device_memory_gb))
    return "\n".join(lines)


def of_shape(setup: Setup, mesh: Mesh, shape: Shape) -> Account:
    """The account of a train step on batches of a shape."""
    config, method = setup.config, setup.method
    ways = math.prod(mesh.shape[axis] for axis in mesh_axes.BATCH_AXES)
    micro = config.train.micro_batch_size // ways
    in_step = parse_refresh(config.selection.refresh, 0) == 1
    pool, trained = layouts(setup, shape, micro)
    if not in_step:
        pool, _ = layouts(setup, shape, config.eval.batch_size // ways)
    scored = method.scores_pools
    optimizer = make_optimizer(config.train, 1)
    policy = setup.policy
    parameters, moments = account_lib.state_bytes(policy.config, mesh, optimizer, policy.lora)
    frozen = account_lib.frozen_bytes(policy.config, mesh, policy.lora, policy.stored)
    tokens = setup.tokens["train"]
    width = tokens.response_lengths.shape[1]
    more = width if tokens.scores is not None else 0
    more += width**2 if method.frozen_features else 0
    return account_lib.account(
        of_mesh(setup, mesh),
        parameters,
        moments,
        account_lib.batch_bytes(
            config.train.batch_size // ways, shape.prompt, shape.responses, width, more
        ),
        pool if scored else None,
        setup.program.scorer.chunk,
        trained,
        config.train.batch_size // config.train.micro_batch_size,
        config.train.offload_moments,
        reuse=scored and in_step and setup.program.reuse,
        frozen=frozen,
    )


def of_mesh(setup: Setup, mesh: Mesh | None) -> Model:
    """The model on one device; None: on one that holds everything."""
    itemsize = np.dtype(setup.config.model.dtype).itemsize
    sizes = {} if mesh is None else {axis: mesh.shape[axis] for axis in ("fsdp", "tensor")}
    scorer = setup.program.scorer
    return of_device(
        setup.policy.config,
        itemsize,
        setup.config.model.remat,
        fused=isinstance(scorer.attention, Fused),
        max_logits=scorer.max_logits,
        lora=setup.policy.lora,
        stored=setup.policy.stored,
        **sizes,
    )


def _with_fused(setup: Setup) -> Setup:
    """The same as on a GPU, which the devices at hand need not be."""
    scorer = dataclasses.replace(
        setup.program.scorer, attention=Fused(), max_logits=max_logits_of("gpu")
    )
    return dataclasses.replace(setup, program=dataclasses.replace(setup.program, scorer=scorer))


def layouts(setup: Setup, shape: Shape, batch: int) -> tuple[Layout, Layout]:
    """Of the pool, and of what is trained on."""
    scorer = setup.program.scorer
    if scorer.layout == "packed":
        pool, trained = (1, shape.responses), (1, shape.selected)
    else:
        width = setup.tokens["train"].response_lengths.shape[1]
        pool = width, scorer.max_response
        trained = 1 + setup.method.num_negatives, scorer.max_response
    whole = scorer.pooling == "all"
    return Layout(batch, shape.prompt, *pool, whole), Layout(batch, shape.prompt, *trained)


def flops(setup: Setup) -> Flops:
    """A mean row of the training split, times the rows of a step."""
    config, method, buckets = setup.config, setup.method, setup.buckets["train"]
    tokens, model = setup.tokens["train"], of_mesh(setup, None)
    scored = method.scores_pools
    scored = scored and parse_refresh(config.selection.refresh, 0) == 1
    chunk, steps = setup.program.scorer.chunk, config.train.batch_size
    micro = config.train.micro_batch_size
    shares = np.bincount(buckets.group, minlength=len(buckets.shapes)) / len(buckets.group)
    processed = np.zeros(2)
    for share, shape in zip(shares, buckets.shapes, strict=True):
        pool, trained = layouts(setup, shape, micro)
        recorded = scored and setup.program.reuse
        parts = [0, flops_lib.training_flops(model, trained, recorded)]
        if scored:
            parts[0] = flops_lib.scoring_flops(model, pool, chunk)
        processed += share * np.array(parts) / micro
    lengths = tokens.response_lengths
    prompts, responses = flops_lib.useful_flops(model, tokens.prompt_lengths, lengths)
    present = (lengths[:, 1:] > 0).sum(1)
    mean = responses[:, 1:].sum(1) / np.maximum(present, 1)  # As if negatives were drawn.
    negatives = np.minimum(method.num_negatives, present) * mean
    # Where pools are scored, that is also the forward pass on the sets.
    useful = (2 if scored else 3) * (prompts + responses[:, 0] + negatives).mean()
    score = (prompts + responses.sum(1)).mean() if scored else 0.0
    return Flops(
        (steps * float(processed[0]), steps * float(processed[1])),
        (steps * float(score), steps * float(useful)),
    )


def verdict(need: int, memory_gb: float) -> str:
    if need <= memory_gb * 1e9:
        return f"fits: needs {need / 1e9:.2f} GB of {memory_gb:g} GB"
    return f"does not fit: needs {need / 1e9:.2f} GB of {memory_gb:g} GB"


def lines_of(a: Account, config: ConfigDict, evaluation: int) -> list[str]:
    """The account, a line a term."""
    train, dtype = config.train, config.model.dtype
    weights = "weights, float32"
    if uses_lora(config.model.lora):
        weights = f"weights, {config.model.lora.base}, and adapters, float32"
    place = ", on the host between updates" if train.offload_moments else ""
    terms = [
        (weights, a.parameters),
        ("gradient, float32", a.gradients),
        (f"optimizer state, {train.moments_dtype} moments{place}", a.optimizer),
        ("batch", a.batch),
        ("gradient of earlier micro-batches", a.sums),
        (f"estimate: copies of weights to compute with, {dtype}", a.copies),
        (f"kept for the backward pass, remat={config.model.remat}", a.kept),
        ("of that, left by scoring the pool", a.scored),
        ("estimate: temporaries of scoring the pool", a.scoring),
        ("estimate: temporaries of the loss, vocabulary", a.vocabulary),
        ("estimate: temporaries of the loss, the last layer", a.last),
        ("estimate: temporaries of the loss, another layer", a.layers),
    ]
    parts = [(f"all at once: {name}", size) for name, size in a.phases.items()]
    parts.append((f"all at once: evaluation, eval.batch_size={config.eval.batch_size}", evaluation))
    peak = [("peak", max(a.peak, evaluation))]
    return [f"{name:<64}{size / 1e9:>12.3f} GB" for name, size in terms + parts + peak]


def _where(config: ConfigDict, mesh: Mesh, shape: Shape) -> str:
    sizes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes.AXES)
    return (
        f"one device of {mesh.size} ({sizes}), {config.train.micro_batch_size} prompts at a time "
        f"of {shape.prompt} tokens, responses of {shape.responses}, {shape.selected} once selected"
    )


def _evaluation(setup: Setup, mesh: Mesh) -> int:
    """Temporaries of scoring with eval.batch_size, the largest shape of any split."""
    ways = math.prod(mesh.shape[axis] for axis in mesh_axes.BATCH_AXES)
    batch, scorer = setup.config.eval.batch_size // ways, setup.program.scorer
    shapes = [shape for buckets in setup.buckets.values() for shape in buckets.shapes]
    model = of_mesh(setup, mesh)
    pools = [layouts(setup, shape, batch)[0] for shape in shapes]
    return max(account_lib.scoring_bytes(model, pool, scorer.chunk) for pool in pools)


def _flops_lines(found: Flops, devices: int) -> list[str]:
    def line(name: str, parts: tuple[float, float]) -> str:
        score, loss = parts
        return (
            f"{name}: {score + loss:.3e} FLOPs a step (scoring {score:.3e}, training {loss:.3e}), "
            f"{(score + loss) / devices:.3e} a device"
        )

    return [
        line("processed", found.processed),
        line("useful (no padding, nothing twice)", found.useful),
    ]
