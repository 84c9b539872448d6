"""Which examples a step sees, and the arrays they become.

Lengths fall into a few buckets with one static shape each, so few programs compile and little of
a batch is padding. The order of training is a function of (seed, step, table of lengths) without
a state, so a resumed run sees the same examples whatever happened before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mass_dpo_jax.data.tokens import Tokens

MULTIPLE = 8  # Sizes are rounded up to it.
CUTS = 256  # At most so many places are considered for a border between buckets.


class Shape(NamedTuple):
    """The static sizes of a batch, in tokens."""

    prompt: int  # P
    responses: int  # S: all candidates of a row, end to end
    selected: int  # S after selection: the chosen response and any n of the others


class Batch(NamedTuple):
    """B rows, one prompt each, with C candidates. Arrays of numpy or JAX; a pytree."""

    prompts: Any  # int32 [B, P], padded on the right with 0
    prompt_lengths: Any  # int32 [B], at least 1
    responses: Any  # int32 [B, S], candidates end to end, chosen first, padded with 0
    response_lengths: Any  # int32 [B, C], 0: there is no such candidate
    ref_logps: Any  # float32 [B, C], 0 where there is no candidate or no reference
    index: Any  # int32 [B], row of the split; -1: a row of padding


@dataclasses.dataclass(frozen=True)
class Buckets:
    """`group[i]` is example i's bucket, `shapes[g]` holds every example of buckets 0..g."""

    group: np.ndarray  # int32 [M]
    shapes: tuple[Shape, ...]


def make_buckets(
    tokens: Tokens, num_negatives: int | None, max_buckets: int = 4, min_rows: int = 32
) -> Buckets:
    """Groups examples by length so that padded prompts and responses have the fewest tokens.

    Dynamic programming over the examples in order of length: bucket borders minimise the sum over
    buckets of rows * (P + S). Fewer buckets are taken where more would save under 2%, since each
    is one more compilation.

    Args:
      tokens: one split.
      num_negatives: n; `Shape.selected` has room for the chosen response and the n longest
        rejected ones of any row. None: for all of them.
      max_buckets: most shapes to make.
      min_rows: a bucket has at least so many rows (all of them together may be fewer).
    """
    lengths = tokens.response_lengths.astype(np.int64)
    rejected = -np.sort(-lengths[:, 1:], axis=1)[:, :num_negatives]
    sizes = np.stack(
        [
            tokens.prompt_lengths.astype(np.int64),
            lengths.sum(1),
            lengths[:, 0] + rejected.sum(1),
        ],
        axis=1,
    )
    candidates = []
    for key in (sizes[:, 0] + sizes[:, 1], sizes[:, 0], sizes[:, 1]):
        order = np.argsort(key, kind="stable")
        for borders, cost in _partitions(sizes[order], max_buckets, min_rows):
            candidates.append((cost, borders, order))
    best = min(cost for cost, _, _ in candidates)
    near = [c for c in candidates if c[0] <= 1.02 * best]
    _, borders, order = min(near, key=lambda c: (len(c[1]), c[0]))
    group = np.empty(len(tokens), np.int32)
    shapes = []
    for g, (start, stop) in enumerate(zip([0, *borders], borders, strict=False)):
        group[order[start:stop]] = g
        shapes.append(Shape(*_round_up(sizes[order[:stop]].max(0)).tolist()))
    return Buckets(group, tuple(shapes))


def _round_up(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // MULTIPLE) * MULTIPLE


def _partitions(
    sizes: np.ndarray, max_buckets: int, min_rows: int
) -> Iterator[tuple[list[int], float]]:
    """For 1, 2, ... buckets the cheapest borders (ends of buckets) of sorted rows, and their cost.

    A bucket's shape is the largest of all rows up to its end: buckets are nested, so that left-over
    rows of one fit into the next.
    """
    num_rows = len(sizes)
    ends = np.unique(np.linspace(0, num_rows, min(num_rows, CUTS) + 1).round().astype(int))
    reach = _round_up(np.maximum.accumulate(sizes, axis=0))
    row_cost = np.concatenate([[0], (reach[:, 0] + reach[:, 1])])[ends]  # of a bucket ending here
    rows = ends[None, :] - ends[:, None]  # [start, end]
    step = np.where(rows >= min(min_rows, num_rows), rows * row_cost[None, :], np.inf)
    cost = np.where(ends == 0, 0.0, np.inf)
    came_from: list[np.ndarray] = []
    for _ in range(max_buckets):
        total = cost[:, None] + step
        came_from.append(total.argmin(0))
        cost = total.min(0)
        if not np.isfinite(cost[-1]):
            return
        borders, at = [], len(ends) - 1
        for back in reversed(came_from):
            borders.append(int(ends[at]))
            at = back[at]
        yield borders[::-1], float(cost[-1])


class Order:
    """`order(step)`: the rows that update `step` trains on, and their shape.

    Every epoch is a new permutation in which each example comes once; its batches are cut within
    one bucket, what is left over of a bucket moves on to the next larger one, and the batches come
    in random order. The last left-over batch is filled up with other examples of the split.
    """

    def __init__(self, buckets: Buckets, batch_size: int, seed: int):
        self._buckets = buckets
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = -(-len(buckets.group) // batch_size)
        self._last: tuple[int, list[tuple[np.ndarray, Shape]]] = (-1, [])

    def __call__(self, step: int) -> tuple[np.ndarray, Shape]:
        """Rows int32 [batch_size] and the shape that holds them all."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._last[0] != epoch:  # Computed again at each change of epoch: a cache, no state.
            self._last = (epoch, self._epoch(epoch))
        return self._last[1][position]

    def _epoch(self, epoch: int) -> list[tuple[np.ndarray, Shape]]:
        rng = np.random.default_rng([self._seed, epoch])
        rows = rng.permutation(len(self._buckets.group)).astype(np.int32)
        batches = list(_cut(self._buckets, rows, self._batch_size, rng))
        last, shape = batches[-1]
        missing = self._batch_size - len(last)
        if missing:
            others = np.setdiff1d(rows, last)
            # A split smaller than a batch has no others: its rows are repeated.
            fill = rng.permutation(others if len(others) >= missing else rows)
            batches[-1] = (np.concatenate([last, np.resize(fill, missing)]), shape)
        return [batches[i] for i in rng.permutation(len(batches))]


def in_order(
    buckets: Buckets, batch_size: int, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Shape]]:
    """Every example (or each of `rows`) exactly once, bucket by bucket.

    Yields rows int32 [batch_size] and their shape. Only the last batch is short; it is padded
    with -1.
    """
    chosen = np.arange(len(buckets.group)) if rows is None else np.asarray(rows)
    for batch, shape in _cut(buckets, chosen.astype(np.int32), batch_size, None):
        yield np.pad(batch, (0, batch_size - len(batch)), constant_values=-1), shape


def _cut(
    buckets: Buckets, rows: np.ndarray, batch_size: int, rng: np.random.Generator | None
) -> Iterator[tuple[np.ndarray, Shape]]:
    """Batches of one bucket each; what does not fill one goes to the next bucket."""
    left = rows[:0]
    for g, shape in enumerate(buckets.shapes):
        pool = np.concatenate([left, rows[buckets.group[rows] == g]])
        if rng is not None:  # So that the rows left over are not always in the first batch.
            pool = rng.permutation(pool)
        last = g == len(buckets.shapes) - 1
        full = len(pool) if last else len(pool) - len(pool) % batch_size
        for start in range(0, full, batch_size):
            yield pool[start : min(start + batch_size, full)], shape
        left = pool[full:]


def make_batch(
    tokens: Tokens, indices: np.ndarray, shape: Shape, ref_logps: np.ndarray | None
) -> Batch:
    """The arrays of some rows of a split.

    Args:
      tokens: the split.
      indices: int [B], rows of it; -1 makes a row of padding: one prompt token, no response.
      shape: sizes that hold every row.
      ref_logps: float [M, C] of the whole split, or None.

    Raises:
      ValueError: a row does not fit into the shape.
    """
    indices = np.asarray(indices, np.int32)
    real = indices >= 0
    num_rows, num_candidates = len(indices), tokens.response_lengths.shape[1]
    prompt_lengths = np.where(real, tokens.prompt_lengths[indices], 1).astype(np.int32)
    response_lengths = np.where(real[:, None], tokens.response_lengths[indices], 0).astype(np.int32)
    longest = prompt_lengths.max(), response_lengths.sum(1).max()
    if longest[0] > shape.prompt or longest[1] > shape.responses:
        raise ValueError(f"rows of {longest} prompt and response tokens do not fit {shape}")
    prompts = np.zeros((num_rows, shape.prompt), np.int32)
    responses = np.zeros((num_rows, shape.responses), np.int32)
    for b in np.flatnonzero(real):
        prompt, answer = tokens.prompt(indices[b]), tokens.responses(indices[b])
        prompts[b, : len(prompt)] = prompt
        responses[b, : len(answer)] = answer
    reference = np.zeros((num_rows, num_candidates), np.float32)
    if ref_logps is not None:
        reference[:] = np.where(response_lengths > 0, ref_logps[indices], 0)
    return Batch(prompts, prompt_lengths, responses, response_lengths, reference, indices)
