"""Which examples a step sees, and the arrays they become.

Lengths fall into a few buckets with one static shape each, so few programs are compiled and little
of a batch is padding. The order of training is a function of (seed, step, table of lengths) without
a state, so a resumed run sees the same examples whatever happened before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mass_dpo_jax.data.tokens import Tokens

MULTIPLE = 8  # Sizes are rounded up to a multiple of it.
MAX_LEVELS = 32  # Sizes of prompts, and of responses, that are considered for a shape.
MIN_GAIN = 0.01  # The share of tokens that one more shape, hence one more compilation, must save.


class Shape(NamedTuple):
    """The static sizes of a batch, in tokens.

    Attributes:
        prompt: P, the longest prompt.
        responses: S, all candidates of a row, end to end.
        selected: S after selection: the chosen response and any n rejected ones.
    """

    prompt: int
    responses: int
    selected: int


class Batch(NamedTuple):
    """B rows, one prompt each, with C candidates. Arrays of NumPy or JAX; a pytree.

    Attributes:
        prompts: int32 [B, P], padded on the right with 0.
        prompt_lengths: int32 [B], at least 1.
        responses: int32 [B, S], candidates end to end, chosen first, padded with 0.
        response_lengths: int32 [B, C], 0 where there is no candidate.
        ref_logps: float32 [B, C], nats; 0 where there is no candidate or no reference.
        index: int32 [B], row of the split; -1 for a row of padding.
        grades: float32 [B, C], how good responses are, larger for better, equal where the data
            prefers neither (`Tokens.grades`); None where it says only which one is chosen.
        ref_gram: float32 [B, C, C], of the reference's features, where they are frozen.
        log_weights: float32 [B, C], see `Tokens.log_weights`; None where all are 0.
    """

    prompts: Any
    prompt_lengths: Any
    responses: Any
    response_lengths: Any
    ref_logps: Any
    index: Any
    grades: Any = None
    ref_gram: Any = None
    log_weights: Any = None


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The examples by shape: example i is in bucket `group[i]`, of shape `shapes[group[i]]`.

    Attributes:
        group: int32 [M].
        shapes: by growing P + S; the last one holds every example.
    """

    group: np.ndarray
    shapes: tuple[Shape, ...]


def make_buckets(
    tokens: Tokens, num_negatives: int | None, max_buckets: int = 4, min_rows: int = 64
) -> Buckets:
    """Finds a few shapes that together leave little padding, and each example's shape.

    Minimises the number of processed tokens, the sum over examples of P + S of the cheapest shape
    that holds the example. One shape holds everything. Others are added one by one where they save
    most, and after each one the earlier ones move to where they save most. P and S vary
    independently; buckets along one order of length would be worse: in LastFM's test split with
    four shapes, 0.88 of the tokens would be useful instead of 0.94.

    Args:
        tokens: one split.
        num_negatives: n; `Shape.selected` has room for the chosen response and the n longest
            rejected ones of any row. None: for all of them.
        max_buckets: the most shapes to make.
        min_rows: examples required for each shape, since each costs a compilation.
    """
    lengths = tokens.response_lengths.astype(np.int64)
    rejected = -np.sort(-lengths[:, 1:], axis=1)[:, :num_negatives]
    prompts, responses = tokens.prompt_lengths.astype(np.int64), lengths.sum(1)
    selected = lengths[:, 0] + rejected.sum(1)
    max_shapes = max(1, min(max_buckets, len(tokens) // min_rows))
    sizes = _find_sizes(prompts, responses, max_shapes)
    fits = (prompts[:, None] <= sizes[:, 0]) & (responses[:, None] <= sizes[:, 1])
    group = fits.argmax(1)  # The first that fits is the cheapest, since sizes are sorted.
    used = np.isin(np.arange(len(sizes)), group)
    used[-1] = True  # Left-over rows of the others end up there.
    sizes, group = sizes[used], (np.cumsum(used) - 1)[group]
    max_selected = np.zeros(len(sizes), np.int64)
    np.maximum.at(max_selected, group, selected)
    for g in range(len(sizes) - 1):  # Room for the left-over rows of a smaller bucket.
        larger = _next_larger(sizes, g)
        max_selected[larger] = max(max_selected[larger], max_selected[g])
    shapes = [
        Shape(int(p), int(s), int(_round_up(n)))
        for (p, s), n in zip(sizes, max_selected, strict=True)
    ]
    return Buckets(group.astype(np.int32), tuple(shapes))


def _round_up(sizes: Any) -> Any:
    return -(-sizes // MULTIPLE) * MULTIPLE


def _find_levels(lengths: np.ndarray) -> np.ndarray:
    """Returns the sizes to consider: all rounded lengths or quantiles, including the largest."""
    sizes = _round_up(lengths)
    levels = np.unique(sizes)
    if len(levels) > MAX_LEVELS:
        levels = np.unique(np.quantile(sizes, np.linspace(0, 1, MAX_LEVELS), method="higher"))
    return levels


def _find_sizes(prompts: np.ndarray, responses: np.ndarray, max_shapes: int) -> np.ndarray:
    """Returns pairs (P, S), int64 [shapes, 2], by growing P + S; the last one holds everything."""
    levels = _find_levels(prompts), _find_levels(responses)
    level_ids = [
        np.searchsorted(level, lengths)
        for level, lengths in zip(levels, (prompts, responses), strict=True)
    ]
    cells, rows = np.unique(np.stack(level_ids), axis=1, return_counts=True)
    need = np.stack([level[ids] for level, ids in zip(levels, cells, strict=True)], axis=1)
    options = np.stack(np.meshgrid(*levels, indexing="ij"), axis=-1).reshape(-1, 2)
    fits = (need[None] <= options[:, None]).all(-1)
    # The cost of a row of each cell in each optional shape: [options, cells].
    cost = np.where(fits, options.sum(1)[:, None], np.inf)
    taken = [len(options) - 1]
    best = (cost[-1] * rows).sum()
    while len(taken) < max_shapes:
        trial = [*taken, _find_best(cost, rows, taken)]
        for _ in range(4):
            for j in range(1, len(trial)):
                trial[j] = _find_best(cost, rows, trial[:j] + trial[j + 1 :])
        total = (cost[trial].min(0) * rows).sum()
        if total > (1 - MIN_GAIN) * best:
            break
        taken, best = trial, total
    sizes = options[taken]
    return sizes[np.lexsort((sizes[:, 0], sizes.sum(1)))]


def _find_best(cost: np.ndarray, rows: np.ndarray, taken: list[int]) -> int:
    """Returns the option that saves most in addition to the taken ones."""
    return int((np.minimum(cost, cost[taken].min(0)) * rows).sum(1).argmin())


def _next_larger(sizes: Any, g: int) -> int:
    """Returns the first bucket after g that is at least as large in both sizes."""
    return next(
        h
        for h in range(g + 1, len(sizes))
        if sizes[h][0] >= sizes[g][0] and sizes[h][1] >= sizes[g][1]
    )


class Order:
    """The order of training: `order(step)` returns the rows of an update, and their shape.

    Every epoch is a new permutation in which each of its examples occurs once. Its batches are cut
    within one bucket, the left-over rows of a bucket move on to the next larger one, and the
    batches come in random order. The last left-over batch is filled up with other examples of the
    epoch.

    Args:
        buckets: the split's examples by shape.
        batch_size: rows of an update.
        seed: seed of the permutations.
        rows: a function from an epoch to the rows it has, int [size]; None: the whole split.
        size: how many rows that are.

    Attributes:
        steps_per_epoch: the number of updates in an epoch.
    """

    def __init__(
        self,
        buckets: Buckets,
        batch_size: int,
        seed: int,
        rows: Callable[[int], np.ndarray] | None = None,
        size: int | None = None,
    ):
        self._buckets = buckets
        self._rows = rows or (lambda _: np.arange(len(buckets.group)))
        size = len(buckets.group) if size is None else size
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = -(-size // batch_size)
        self._last: tuple[int, list[tuple[np.ndarray, Shape]]] = (-1, [])

    def __call__(self, step: int) -> tuple[np.ndarray, Shape]:
        """Returns the rows, int32 [batch_size], and the shape that holds them all."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._last[0] != epoch:  # A cache of the last epoch, no state.
            self._last = (epoch, self._make_epoch(epoch))
        return self._last[1][position]

    def locate(self, step: int) -> dict[str, int]:
        """Returns where in the data a run is after `step` updates: epoch and batch."""
        epoch, batch = divmod(int(step), self.steps_per_epoch)
        return {"epoch": epoch, "batch_of_epoch": batch}

    def _make_epoch(self, epoch: int) -> list[tuple[np.ndarray, Shape]]:
        rng = np.random.default_rng([self._seed, epoch])
        rows = rng.permutation(self._rows(epoch)).astype(np.int32)
        batches = list(_cut_batches(self._buckets, rows, self._batch_size, rng))
        last, shape = batches[-1]
        missing = self._batch_size - len(last)
        if missing:
            other_rows = np.setdiff1d(rows, last)
            # A split smaller than a batch has no other rows: its own are repeated.
            fill = rng.permutation(other_rows if len(other_rows) >= missing else rows)
            batches[-1] = (np.concatenate([last, np.resize(fill, missing)]), shape)
        return [batches[i] for i in rng.permutation(len(batches))]


def iterate_batches(
    buckets: Buckets, batch_size: int, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Shape]]:
    """Yields every example (or each of `rows`) exactly once, bucket by bucket.

    Yields:
        Rows, int32 [batch_size], and their shape. Only the last batch can be short; it is padded
        with -1.
    """
    rows = np.arange(len(buckets.group)) if rows is None else np.asarray(rows)
    for batch, shape in _cut_batches(buckets, rows.astype(np.int32), batch_size, None):
        yield np.pad(batch, (0, batch_size - len(batch)), constant_values=-1), shape


def _cut_batches(
    buckets: Buckets, rows: np.ndarray, batch_size: int, rng: np.random.Generator | None
) -> Iterator[tuple[np.ndarray, Shape]]:
    """Yields batches of one bucket each; rows that do not fill one go to the next larger bucket."""
    groups = [rows[buckets.group[rows] == g] for g in range(len(buckets.shapes))]
    for g, (group, shape) in enumerate(zip(groups, buckets.shapes, strict=True)):
        if rng is not None:  # So that it is not always the same rows that are left over.
            group = rng.permutation(group)
        last = g == len(groups) - 1
        full = len(group) if last else len(group) - len(group) % batch_size
        for start in range(0, full, batch_size):
            yield group[start : min(start + batch_size, full)], shape
        if not last:
            larger = _next_larger(buckets.shapes, g)
            groups[larger] = np.concatenate([groups[larger], group[full:]])


def make_batch(
    tokens: Tokens,
    indices: np.ndarray,
    shape: Shape,
    ref_logps: np.ndarray | None,
    ref_grams: np.ndarray | None = None,
) -> Batch:
    """Assembles the arrays of some rows of a split.

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
        prompt, answers = tokens.prompt(indices[b]), tokens.responses(indices[b])
        prompts[b, : len(prompt)] = prompt
        responses[b, : len(answers)] = answers
    reference = np.zeros((num_rows, num_candidates), np.float32)
    if ref_logps is not None:
        reference[:] = np.where(response_lengths > 0, ref_logps[indices], 0)
    return Batch(
        prompts,
        prompt_lengths,
        responses,
        response_lengths,
        reference,
        indices,
        None if tokens.grades is None else tokens.grades[indices],
        None if ref_grams is None else ref_grams[indices],
        None if tokens.log_weights is None else tokens.log_weights[indices],
    )
