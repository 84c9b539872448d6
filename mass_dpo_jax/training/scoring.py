"""Passes over a whole split without gradients, behind a progress bar."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mass_dpo_jax.data.batches import Batch, Buckets, iterate_batches, make_batch
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import interruption
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.utils import distributed


def progress_bar(iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
    """Returns a bar on standard error; silent unless this is the primary process on a terminal."""
    hidden = not sys.stderr.isatty() or not distributed.is_primary()
    return tqdm(iterable, file=sys.stderr, disable=hidden, **kwargs)


def device_batches(
    tokens: Tokens,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    label: str,
    rows: np.ndarray | None = None,
    ref_logps: np.ndarray | None = None,
    ref_grams: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields every example, or each of `rows`, once: rows of a batch, and the batch on the devices.

    Args:
        tokens: the split's tokens.
        buckets: the split's buckets.
        batch_size: examples of a batch.
        mesh: the devices.
        label: label of the progress bar.
        rows: int, rows of the split; None for all.
        ref_logps: float32 [M, C], the reference's, to put into the batches.
        ref_grams: float32 [M, C, C], of the reference's features, likewise.
    """
    make = functools.partial(make_batch, tokens, ref_logps=ref_logps, ref_grams=ref_grams)
    total = len(tokens) if rows is None else len(rows)
    with progress_bar(total=total, desc=label, unit="examples") as bar:
        for indices, shape in iterate_batches(buckets, batch_size, rows):
            interruption.raise_if_requested()
            make_shaped = functools.partial(make, shape=shape)
            yield indices, mesh_lib.shard_rows(mesh, indices, make_shaped)
            bar.update(int((indices >= 0).sum()))


def compute_each(
    compute: Callable[[Batch], Any], batches: Iterable[tuple[np.ndarray, Batch]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields the rows of each batch and what `compute` returns for them.

    The results are arrays [rows, ...] on every process, without rows of padding. A batch is started
    before the one before it is waited for, so that the devices compute while the host makes the
    next.
    """
    started: tuple[np.ndarray, Any] | None = None
    for indices, batch in batches:
        previous, started = started, (indices, compute(batch))
        if previous is not None:
            yield _gather_rows(*previous)
    if started is not None:
        yield _gather_rows(*started)


def _gather_rows(indices: np.ndarray, result: Any) -> tuple[np.ndarray, Any]:
    is_row = indices >= 0
    return indices[is_row], jax.tree.map(lambda x: distributed.gather(x)[is_row], result)


def compute_table(
    compute: Callable[[Batch], Any], batches: Iterable[tuple[np.ndarray, Batch]], num_rows: int
) -> Any:
    """Returns what `compute` returns for every example of a split, in the order of its rows.

    Each array [B, ...] of its pytree becomes float32 [num_rows, ...], whole on every process.
    """
    tables: Any = None
    for rows, result in compute_each(compute, batches):
        if tables is None:
            tables = jax.tree.map(lambda x: np.zeros((num_rows, *x.shape[1:]), np.float32), result)
        for table, part in zip(jax.tree.leaves(tables), jax.tree.leaves(result), strict=True):
            table[rows] = part
    return tables


def check_finite(logps: np.ndarray | None, tokens: Tokens, model: str) -> None:
    """Checks the log-probabilities [M, C] of a split, if there are any.

    Args:
        logps: log-probabilities of the responses.
        tokens: the split's tokens.
        model: the model's name in messages.

    Raises:
        UserError: some are not finite.
    """
    if logps is None or np.isfinite(logps).all():
        return
    bad = ~np.isfinite(logps).all(1)
    row = int(bad.argmax())
    values = logps[row, tokens.response_lengths[row] > 0].tolist()
    raise UserError(
        f"{model}: example {tokens.ids[row]!r}: log-probabilities {values}, expected finite "
        f"numbers ({bad.sum()} of {len(bad)} examples have others): are its weights those of a run "
        "that diverged?"
    )
