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
LEVELS = 32  # At most so many sizes of prompts, and of responses, are considered for a shape.
LEAST_GAIN = 0.01  # Share of the tokens that one more shape, so one more compilation, must save.


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
    grades: Any = None  # float32 [B, C], the data's scores of the responses, where it has any
    ref_gram: Any = None  # float32 [B, C, C], of the reference's features, where they are frozen


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Example i is in bucket `group[i]`, whose static sizes are `shapes[group[i]]`.

    Shapes grow in P + S, and the last one holds every example.
    """

    group: np.ndarray  # int32 [M]
    shapes: tuple[Shape, ...]


def make_buckets(
    tokens: Tokens, num_negatives: int | None, max_buckets: int = 4, min_rows: int = 64
) -> Buckets:
    """A few shapes that together leave little padding, and the shape of every example.

    Minimises the number of processed tokens, the sum over examples of P + S of the cheapest shape
    that holds the example. One shape holds everything; others are added one by one where they save
    most, and after each the ones before move to where they save most. P and S vary apart, which
    is why borders in one order of length would not do: 0.88 of the tokens are useful then in
    LastFM's test split with four shapes, and 0.94 so.

    Args:
      tokens: one split.
      num_negatives: n; `Shape.selected` has room for the chosen response and the n longest
        rejected ones of any row. None: for all of them.
      max_buckets: most shapes to make.
      min_rows: so many examples for every shape: each costs a compilation.
    """
    lengths = tokens.response_lengths.astype(np.int64)
    rejected = -np.sort(-lengths[:, 1:], axis=1)[:, :num_negatives]
    prompts, responses = tokens.prompt_lengths.astype(np.int64), lengths.sum(1)
    selected = lengths[:, 0] + rejected.sum(1)
    sizes = _shapes(prompts, responses, max(1, min(max_buckets, len(tokens) // min_rows)))
    holds = (prompts[:, None] <= sizes[:, 0]) & (responses[:, None] <= sizes[:, 1])
    group = holds.argmax(1)  # The first is the cheapest: they are sorted.
    used = np.isin(np.arange(len(sizes)), group)
    used[-1] = True  # Left-over rows of the others end up there.
    sizes, group = sizes[used], (np.cumsum(used) - 1)[group]
    most = np.zeros(len(sizes), np.int64)
    np.maximum.at(most, group, selected)
    for g in range(len(sizes) - 1):  # Room for the rows that are left over of a smaller bucket.
        most[_next(sizes, g)] = max(most[_next(sizes, g)], most[g])
    shapes = [
        Shape(int(p), int(s), int(_round_up(n))) for (p, s), n in zip(sizes, most, strict=True)
    ]
    return Buckets(group.astype(np.int32), tuple(shapes))


def _round_up(sizes: Any) -> Any:
    return -(-sizes // MULTIPLE) * MULTIPLE


def _levels(lengths: np.ndarray) -> np.ndarray:
    """Sizes to consider: all rounded lengths, or quantiles of them; the largest is one."""
    sizes = _round_up(lengths)
    levels = np.unique(sizes)
    if len(levels) > LEVELS:
        levels = np.unique(np.quantile(sizes, np.linspace(0, 1, LEVELS), method="higher"))
    return levels


def _shapes(prompts: np.ndarray, responses: np.ndarray, most: int) -> np.ndarray:
    """At most `most` pairs (P, S) by rising P + S; the last holds everything: int64 [k, 2]."""
    levels = _levels(prompts), _levels(responses)
    place = [
        np.searchsorted(level, x) for level, x in zip(levels, (prompts, responses), strict=True)
    ]
    cells, rows = np.unique(np.stack(place), axis=1, return_counts=True)
    need = np.stack([level[at] for level, at in zip(levels, cells, strict=True)], axis=1)
    options = np.stack(np.meshgrid(*levels, indexing="ij"), axis=-1).reshape(-1, 2)
    holds = (need[None] <= options[:, None]).all(-1)
    # What a row of each cell costs in each optional shape: [options, cells].
    cost = np.where(holds, options.sum(1)[:, None], np.inf)
    taken = [len(options) - 1]
    best = (cost[-1] * rows).sum()
    while len(taken) < most:
        trial = [*taken, _best_with(cost, rows, taken)]
        for _ in range(4):
            for j in range(1, len(trial)):
                trial[j] = _best_with(cost, rows, trial[:j] + trial[j + 1 :])
        total = (cost[trial].min(0) * rows).sum()
        if total > (1 - LEAST_GAIN) * best:
            break
        taken, best = trial, total
    sizes = options[taken]
    return sizes[np.lexsort((sizes[:, 0], sizes.sum(1)))]


def _best_with(cost: np.ndarray, rows: np.ndarray, others: list[int]) -> int:
    """The option that saves most beside the others."""
    return int((np.minimum(cost, cost[others].min(0)) * rows).sum(1).argmin())


def _next(sizes: Any, g: int) -> int:
    """The next larger bucket: the first after g that holds whatever g holds."""
    return next(
        h
        for h in range(g + 1, len(sizes))
        if sizes[h][0] >= sizes[g][0] and sizes[h][1] >= sizes[g][1]
    )


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

    def place(self, step: int) -> dict[str, int]:
        """Where in the data a run is that has made `step` updates."""
        epoch, batch = divmod(int(step), self.steps_per_epoch)
        return {"epoch": epoch, "batch_of_epoch": batch}

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
    pools = [rows[buckets.group[rows] == g] for g in range(len(buckets.shapes))]
    for g, (pool, shape) in enumerate(zip(pools, buckets.shapes, strict=True)):
        if rng is not None:  # So that it is not always the same rows that are left over.
            pool = rng.permutation(pool)
        last = g == len(pools) - 1
        full = len(pool) if last else len(pool) - len(pool) % batch_size
        for start in range(0, full, batch_size):
            yield pool[start : min(start + batch_size, full)], shape
        if not last:
            after = _next(buckets.shapes, g)
            pools[after] = np.concatenate([pools[after], pool[full:]])


def make_batch(
    tokens: Tokens,
    indices: np.ndarray,
    shape: Shape,
    ref_logps: np.ndarray | None,
    ref_grams: np.ndarray | None = None,
) -> Batch:
    """The arrays of some rows of a split.

    Args:
      tokens: the split.
      indices: int [B], rows of it; -1 makes a row of padding: one prompt token, no response.
      shape: sizes that hold every row.
      ref_logps: float [M, C] of the whole split, or None.
      ref_grams: float [M, C, C] of the whole split, or None.

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
    grades = None if tokens.scores is None else tokens.scores[indices]
    grams = None if ref_grams is None else ref_grams[indices]
    return Batch(
        prompts, prompt_lengths, responses, response_lengths, reference, indices, grades, grams
    )
