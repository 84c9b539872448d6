"""`train --config.dry_run=True`: what a step needs; nothing is allocated.

Data and tokenizer are read, since they determine the shapes of batches; weights are not. The mesh
may be larger than the devices of this machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax.config_values import parse_refresh
from mass_dpo_jax.data.batches import Shape
from mass_dpo_jax.estimate import activations, memory
from mass_dpo_jax.estimate import flops as flops_lib
from mass_dpo_jax.estimate.memory import MemoryEstimate, StepLayout
from mass_dpo_jax.estimate.sizes import BatchLayout, Chunks, DeviceModel
from mass_dpo_jax.models.fused_attention import FusedAttention, check_supported
from mass_dpo_jax.models.logprobs import choose_max_logits
from mass_dpo_jax.runs.run_folder import latest_step
from mass_dpo_jax.training import mined_negatives
from mass_dpo_jax.training.mesh import abstract_mesh, check_batch
from mass_dpo_jax.training.model_paths import fetch_models, uses_lora
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Setup
from mass_dpo_jax.utils import mesh_axes


class RunEstimate(NamedTuple):
    """Bytes on one device during a run.

    Attributes:
        shape: the shape of batches whose steps take the most.
        step: a step on them.
        evaluation: all that an evaluation holds at once.
    """

    shape: Shape
    step: MemoryEstimate
    evaluation: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(self.step.peak, self.evaluation)


class StepFlops(NamedTuple):
    """Operations of a step, on all devices together, for average rows of the training split.

    Attributes:
        processed: operations of scoring, and of the loss with its gradient.
        useful: the same without padding, masked pairs and recomputation.
    """

    processed: tuple[float, float]
    useful: tuple[float, float]


def dry_run(config: ConfigDict, workdir: Path | None, splits: Sequence[str]) -> str:
    """Returns the table to print. Writes nothing but caches.

    Args:
        config: the run's configuration.
        workdir: a run's folder, which may hold a tokenizer; or None.
        splits: names of the splits that training reads.

    Raises:
        UserError: as training would.
    """
    mesh = abstract_mesh(config.mesh, jax.device_count())
    for name in ("train.micro_batch_size", "eval.batch_size"):
        group, field = name.split(".")
        check_batch(mesh, name, config[group][field])
    setup = prepare_dry_run(config, workdir, splits)
    run = estimate_run(setup, mesh)
    lines = [
        _header(config, mesh, run.shape),
        *_memory_lines(run, config),
        *_flops_lines(count_flops(setup), mesh.size),
    ]
    if config.device_memory_gb:
        need, available = run.peak, config.device_memory_gb
        verdict = "fits" if need <= available * 1e9 else "does not fit"
        lines.append(f"{verdict}: needs {need / 1e9:.2f} GB of {available:g} GB")
    return "\n".join(lines)


def prepare_dry_run(config: ConfigDict, workdir: Path | None, splits: Sequence[str]) -> Setup:
    """Prepares training on the devices of this machine, which need not fit the configuration.

    Logits are held as on an accelerator where attention is fused or the memory of a device is told.

    Raises:
        UserError: as training would.
    """
    mined_negatives.check_mining(config)
    config = fetch_models(config, weights=False)
    fused = config.model.attention == "fused"
    config.dry_run = True  # A caller may not have set it; it says that no weights are needed.
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    if fused:
        config.model.attention = "plain"
    with tempfile.TemporaryDirectory() as empty:
        started = workdir is not None and latest_step(workdir) is not None
        folder = workdir if started else Path(empty)
        model_folder = None if config.model.path else folder
        longest = functools.partial(mined_negatives.take_longest, config)
        replace = longest if config.mine.catalogue else None
        setup = prepare(config, model_folder, splits, replace_negatives=replace)
    program = setup.program
    scorer = program.scorer
    if fused or config.device_memory_gb:
        scorer = dataclasses.replace(scorer, max_logits=choose_max_logits("gpu"))
    if fused:
        check_supported(setup.policy.config)
        scorer = dataclasses.replace(scorer, attention=FusedAttention())
    return dataclasses.replace(setup, program=dataclasses.replace(program, scorer=scorer))


def estimate_run(setup: Setup, mesh: Mesh) -> RunEstimate:
    """Estimates the memory of a run on one device of a mesh."""
    estimates = {
        shape: estimate_shape(setup, mesh, shape) for shape in setup.buckets["train"].shapes
    }
    shape = max(estimates, key=lambda shape: estimates[shape].peak)
    step = estimates[shape]
    evaluation = step.parameters + step.batch + _evaluation_bytes(setup, mesh)
    if not setup.train.offload_moments:
        evaluation += step.optimizer
    return RunEstimate(shape, step, evaluation)


def estimate_shape(setup: Setup, mesh: Mesh, shape: Shape) -> MemoryEstimate:
    """Estimates the memory of a train step on batches of a shape."""
    train, method, policy = setup.train, setup.method, setup.policy
    parts = _batch_parts(mesh)
    pool, trained = layouts(setup, shape, train.micro_batch_size // parts)
    in_step = parse_refresh(setup.refresh, 0) == 1
    if not in_step:
        pool, _ = layouts(setup, shape, setup.eval_batch_size // parts)
    tokens = setup.tokens["train"]
    candidates = tokens.response_lengths.shape[1]
    extra_values = candidates if tokens.scores is not None else 0
    extra_values += candidates**2 if method.frozen_features else 0
    optimizer = make_optimizer(train, 1)
    chunks, trained_chunks = divide(setup, shape)
    return memory.estimate_step(
        device_model(setup, mesh),
        memory.state_bytes(policy.config, mesh, optimizer, policy.lora, policy.base_dtype),
        memory.batch_bytes(
            train.batch_size // parts, shape.prompt, shape.responses, candidates, extra_values
        ),
        StepLayout(
            pool if method.scores_pools else None,
            chunks,
            trained,
            train.batch_size // train.micro_batch_size,
            reuse=method.scores_pools and in_step and setup.program.reuses_scoring,
            trained_chunks=trained_chunks,
        ),
        train.offload_moments,
    )


def device_model(setup: Setup, mesh: Mesh | None) -> DeviceModel:
    """Returns the model on one device of a mesh; without one, the model as a whole."""
    scorer, policy = setup.program.scorer, setup.policy
    return DeviceModel.from_decoder(
        policy.config,
        np.dtype(setup.model.dtype).itemsize,
        setup.model.remat,
        fsdp=1 if mesh is None else mesh.shape["fsdp"],
        tensor=1 if mesh is None else mesh.shape["tensor"],
        fused=isinstance(scorer.attention, FusedAttention),
        max_logits=scorer.max_logits,
        lora=policy.lora,
        base_dtype=policy.base_dtype,
    )


def layouts(setup: Setup, shape: Shape, batch: int) -> tuple[BatchLayout, BatchLayout]:
    """Returns the layouts of the pool and of what is trained on, for `batch` prompts."""
    scorer = setup.program.scorer
    if scorer.layout == "packed":
        pool, trained = (1, shape.responses), (1, shape.selected)
    else:
        candidates = setup.tokens["train"].response_lengths.shape[1]
        pool = candidates, scorer.max_response
        trained = 1 + setup.method.num_negatives, scorer.max_response
    return (
        BatchLayout(batch, shape.prompt, *pool, whole_prompt=scorer.pooling == "all"),
        BatchLayout(batch, shape.prompt, *trained),
    )


def divide(setup: Setup, shape: Shape) -> tuple[Chunks | None, Chunks | None]:
    """Returns the chunks that the pool and what is trained on are computed in; None: at once."""
    program, scorer = setup.program, setup.program.scorer
    candidates = setup.tokens["train"].response_lengths.shape[1]
    trained = 1 + setup.method.num_negatives
    longest = scorer.max_response
    return (
        Chunks.divide(scorer.layout, candidates, scorer.chunk, longest, shape.responses),
        Chunks.divide(scorer.layout, trained, program.at_a_time, longest, shape.selected),
    )


def count_flops(setup: Setup) -> StepFlops:
    """Returns the operations of a step: of an average row, times the rows of a step."""
    train, buckets = setup.train, setup.buckets["train"]
    tokens, model = setup.tokens["train"], device_model(setup, None)
    scores_pools = setup.method.scores_pools and parse_refresh(setup.refresh, 0) == 1
    micro, rows = train.micro_batch_size, train.batch_size

    # As computed, with padding: shape by shape.
    shares = np.bincount(buckets.group, minlength=len(buckets.shapes)) / len(buckets.group)
    processed = np.zeros(2)
    for share, shape in zip(shares, buckets.shapes, strict=True):
        pool, trained = layouts(setup, shape, micro)
        chunks, trained_chunks = divide(setup, shape)
        if trained_chunks is None:
            recorded = scores_pools and setup.program.reuses_scoring
            training = flops_lib.training_flops(model, trained, recorded)
        else:
            training = flops_lib.chunked_training_flops(
                model, trained, trained_chunks, scores_pools
            )
        flops = [0, training]
        if scores_pools:
            flops[0] = flops_lib.scoring_flops(model, pool, chunks)
        processed += share * np.array(flops) / micro

    # Real tokens only: row by row, with the average negatives of a pool.
    lengths = tokens.response_lengths
    prompts, responses = flops_lib.useful_flops(model, tokens.prompt_lengths, lengths)
    pool_sizes = (lengths[:, 1:] > 0).sum(1)
    negative = responses[:, 1:].sum(1) / np.maximum(pool_sizes, 1)
    negatives = np.minimum(setup.method.num_negatives, pool_sizes) * negative
    # Where pools are scored, that is also the forward pass of training.
    passes = 2 if scores_pools else 3
    training = passes * (prompts + responses[:, 0] + negatives).mean()
    scoring = (prompts + responses.sum(1)).mean() if scores_pools else 0.0
    return StepFlops(
        (rows * float(processed[0]), rows * float(processed[1])),
        (rows * float(scoring), rows * float(training)),
    )


def _batch_parts(mesh: Mesh) -> int:
    """Returns the number of parts that prompts are split into."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes.BATCH_AXES)


def _evaluation_bytes(setup: Setup, mesh: Mesh) -> int:
    """Temporaries of scoring with eval.batch_size, for the largest shape of any split."""
    batch = setup.eval_batch_size // _batch_parts(mesh)
    shapes = [shape for buckets in setup.buckets.values() for shape in buckets.shapes]
    model = device_model(setup, mesh)
    return max(
        activations.scoring_bytes(model, layouts(setup, shape, batch)[0], divide(setup, shape)[0])
        for shape in shapes
    )


def _header(config: ConfigDict, mesh: Mesh, shape: Shape) -> str:
    sizes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes.AXES)
    return (
        f"one device of {mesh.size} ({sizes}), {config.train.micro_batch_size} prompts at a time "
        f"of {shape.prompt} tokens, responses of {shape.responses}, {shape.selected} once selected"
    )


def _memory_lines(run: RunEstimate, config: ConfigDict) -> list[str]:
    """Formats the estimate and what an evaluation needs, a line for each term."""
    train, dtype, estimate = config.train, config.model.dtype, run.step
    weights = "weights, float32"
    if uses_lora(config.model.lora):
        weights = f"weights, {config.model.lora.base}, and adapters, float32"
    host = ", on the host between updates" if train.offload_moments else ""
    terms = [
        (weights, estimate.parameters),
        ("gradient, float32", estimate.gradients),
        (f"optimizer state, {train.moments_dtype} moments{host}", estimate.optimizer),
        ("batch", estimate.batch),
        ("gradient of earlier micro-batches", estimate.gradient_sums),
        (f"estimate: copies of weights to compute with, {dtype}", estimate.weight_copies),
        (f"kept for the backward pass, remat={config.model.remat}", estimate.kept),
        ("of that, left by scoring the pool", estimate.pool_record),
        ("estimate: temporaries of scoring the pool", estimate.scoring),
        ("estimate: temporaries of the loss, vocabulary", estimate.logits),
        ("estimate: temporaries of the loss, the last layer", estimate.last_layer),
        ("estimate: temporaries of the loss, another layer", estimate.other_layer),
    ]
    terms += [(f"all at once: {name}", size) for name, size in estimate.phases.items()]
    terms += [
        (f"all at once: evaluation, eval.batch_size={config.eval.batch_size}", run.evaluation),
        ("peak", run.peak),
    ]
    return [f"{name:<64}{size / 1e9:>12.3f} GB" for name, size in terms]


def _flops_lines(flops: StepFlops, devices: int) -> list[str]:
    names = ("processed", "useful (no padding, nothing twice)")
    return [
        f"{name}: {scoring + training:.3e} FLOPs a step (scoring {scoring:.3e}, training "
        f"{training:.3e}), {(scoring + training) / devices:.3e} a device"
        for name, (scoring, training) in zip(names, flops, strict=True)
    ]
