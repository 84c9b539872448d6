"""Arrays of token ids: `Tokens` of a split, and the ragged chunks that they are joined from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mass_dpo_jax.data.examples import Example


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One tokenized split of M examples with at most C candidates each.

    The chosen response is the first candidate, then come those below it, then those as good as it.

    Attributes:
        ids: the examples' ids, M of them.
        prompt_tokens: int32 [sum of prompt_lengths], example by example.
        prompt_lengths: int32 [M].
        response_tokens: int32 [sum of response_lengths], by example, then candidate.
        response_lengths: int32 [M, C], 0 where there is no such candidate.
        cut: counts of what each length limit changed, and of repeated negatives.
        candidate_ids: int32 [M, C], which of its example's responses a candidate is: 0 the chosen
            one, 1 + k the k-th rejected one, and from there on those as good as the chosen one.
        scores: float32 [M, C], the data's scores, 0 where there is no candidate; None without any.
        ranks: int32 [M, C], the order of candidates: 0 for the best, larger for worse, -1 where
            there is none; None where all is 0 for the first and 1 for the others.
        log_weights: float32 [M, C], how many responses of what they were drawn from a rejected one
            stands for, as a logarithm: -log of `Example.probabilities`; 0 for all others. None
            where all are 0.
    """

    ids: list[str]
    prompt_tokens: np.ndarray
    prompt_lengths: np.ndarray
    response_tokens: np.ndarray
    response_lengths: np.ndarray
    cut: dict[str, int]
    candidate_ids: np.ndarray
    scores: np.ndarray | None = None
    ranks: np.ndarray | None = None
    log_weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def prompt(self, i: int) -> np.ndarray:
        """Returns the token ids of prompt i: int32 [P_i]."""
        end = self._prompt_ends[i]
        return self.prompt_tokens[end - self.prompt_lengths[i] : end]

    def response(self, i: int, c: int) -> np.ndarray:
        """Returns the token ids of candidate c of example i: int32 [R_ic]."""
        start = int(self.response_lengths[i, :c].sum())
        return self.responses(i)[start : start + int(self.response_lengths[i, c])]

    def responses(self, i: int) -> np.ndarray:
        """Returns the token ids of example i's candidates, end to end: int32 [sum of R_ic]."""
        end = self._response_ends[i]
        return self.response_tokens[end - self.response_lengths[i].sum() : end]

    def restore_columns(self, values: np.ndarray, width: int) -> np.ndarray:
        """Moves values to the columns that their responses have in the data.

        Args:
            values: [M, C, ...], one for each candidate.
            width: the number of columns, the most responses of an example.

        Returns:
            [M, width, ...], 0 where a response was left out.
        """
        exists = self.response_lengths > 0
        table = np.zeros((len(self), width, *values.shape[2:]), values.dtype)
        table[np.nonzero(exists)[0], self.candidate_ids[exists]] = values[exists]
        return table

    @property
    def compared(self) -> np.ndarray:
        """Which candidates are the first one or below it, bool [M, C]."""
        exists = self.response_lengths > 0
        if self.ranks is None:
            return exists
        return exists & ((self.ranks > 0) | (np.arange(exists.shape[1]) == 0))

    @property
    def relevant(self) -> np.ndarray | None:
        """Which candidates the data calls chosen, bool [M, C]; None: the first alone."""
        if self.ranks is None or not (self.ranks[:, 1:] == 0).any():
            return None
        return self.ranks == 0

    @functools.cached_property
    def items(self) -> np.ndarray | None:
        """A number that equal responses share, int64 [M, C]; 0 too where there is no candidate.

        None where responses are not items of a catalogue, which many rows have: where there are not
        at least twice as many responses as different ones.
        """
        exists = self.response_lengths > 0
        groups = RaggedTokens(
            self.response_tokens, self.response_lengths[exists].astype(np.int64)
        ).group_equal()
        if len(groups) < 2 * (1 + groups.max()):
            return None
        items = np.zeros(exists.shape, np.int64)
        items[exists] = groups
        return items

    @functools.cached_property
    def grades(self) -> np.ndarray | None:
        """How good each candidate is, float32 [M, C], larger for better, 0 where there is none.

        They are in the order of `ranks` in every row: the data's scores, if every row has some and
        none contradicts it, else how many ranks of the row are worse. None where nothing is known
        but which response is chosen.
        """
        if self.scores is not None and self._scores_agree.all():
            return self.scores
        if self.ranks is None:
            return None
        worse = self.ranks.max(1, keepdims=True) - self.ranks
        return np.where(self.ranks < 0, 0, worse).astype(np.float32)

    @functools.cached_property
    def _scores_agree(self) -> np.ndarray:
        """Whether the scores of an example are in the order of its ranks, bool [M]."""
        assert self.scores is not None
        exists = self.response_lengths > 0
        ranks: np.ndarray = np.minimum(np.arange(exists.shape[1]), 1) + np.zeros_like(exists, int)
        if self.ranks is not None:
            ranks = self.ranks
        ranks = np.where(exists, ranks, np.iinfo(np.int32).max)
        scores = np.where(exists, self.scores, -np.inf)
        order = np.lexsort((-scores, ranks), axis=1)
        ranks, scores = (np.take_along_axis(x, order, axis=1) for x in (ranks, scores))
        above = scores[:, :-1] > scores[:, 1:]
        return np.asarray((above | (ranks[:, :-1] == ranks[:, 1:])).all(1))

    def without_ties(self) -> Tokens:
        """Returns the split without candidates that are as good as the first, counted in `cut`."""
        if self.ranks is None:
            return self
        exists, keep = self.response_lengths > 0, self.compared
        count = int(np.count_nonzero(exists & ~keep))
        if not count:
            return self
        width = int(keep.sum(1).max())  # What is left out stands last.

        def narrow(table: np.ndarray | None) -> np.ndarray | None:
            return None if table is None else np.where(keep, table, 0)[:, :width]

        lengths = np.where(keep, self.response_lengths, 0)[:, :width]
        responses = RaggedTokens(self.response_tokens, self.response_lengths[exists].astype(int))
        return dataclasses.replace(
            self,
            response_tokens=responses.take(np.flatnonzero(keep[exists])).tokens,
            response_lengths=lengths,
            cut={**self.cut, "as_good_as_the_chosen_one_left_out": count},
            candidate_ids=np.where(keep, self.candidate_ids, 0)[:, :width],
            scores=narrow(self.scores),
            ranks=np.where(keep, self.ranks, -1)[:, :width],
            log_weights=narrow(self.log_weights),
        )

    def digest(self) -> str:
        """Returns the SHA-256 of ids and tokens: equal where all numbers computed from them are."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(json.dumps(self.ids).encode())
        for array in (
            self.prompt_lengths,
            self.prompt_tokens,
            self.response_lengths,
            self.response_tokens,
        ):
            sha.update(str(array.shape).encode())
            sha.update(np.ascontiguousarray(array, "<i4").reshape(-1).view(np.uint8).data)
        return sha.hexdigest()

    @functools.cached_property
    def _prompt_ends(self) -> np.ndarray:
        return np.cumsum(self.prompt_lengths, dtype=np.int64)

    @functools.cached_property
    def _response_ends(self) -> np.ndarray:
        return np.cumsum(self.response_lengths.sum(1, dtype=np.int64))


@dataclasses.dataclass
class RaggedTokens:
    """Lists of token ids, end to end in one array.

    Attributes:
        tokens: int32 [sum of lengths].
        lengths: int64 [number of lists].
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> RaggedTokens:
        """Joins lists of token ids."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        tokens = itertools.chain.from_iterable(lists)
        return cls(np.fromiter(tokens, np.int32, int(lengths.sum())), lengths)

    @property
    def starts(self) -> np.ndarray:
        """Where each list begins in `tokens`: int64 [number of lists]."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, indices: np.ndarray) -> RaggedTokens:
        """Returns the lists at these indices, in that order; an index may repeat."""
        lengths = self.lengths[indices]
        before = np.cumsum(lengths) - lengths
        positions = np.repeat(self.starts[indices] - before, lengths)
        positions += np.arange(len(positions))
        return RaggedTokens(self.tokens[positions], lengths)

    def group_equal(self) -> np.ndarray:
        """Returns a number for each list that equal lists share: int64 [number of lists]."""
        groups: dict[bytes, int] = {}
        ends = np.cumsum(self.lengths)
        return np.array(
            [
                groups.setdefault(self.tokens[end - length : end].tobytes(), len(groups))
                for end, length in zip(ends, self.lengths, strict=True)
            ],
            np.int64,
        )

    def add_prefix(self, prefix: Sequence[int]) -> RaggedTokens:
        """Puts these tokens before every list that does not begin with them already."""
        if not prefix:
            return self
        starts = self.starts
        missing = self.lengths < len(prefix)
        for offset, token in enumerate(prefix):
            missing[~missing] = self.tokens[starts[~missing] + offset] != token
        positions = np.repeat(starts[missing], len(prefix))
        added = np.tile(np.array(prefix, np.int32), missing.sum())
        tokens = np.insert(self.tokens, positions, added)
        return RaggedTokens(tokens, self.lengths + len(prefix) * missing)

    def add_suffix(self, token: int) -> RaggedTokens:
        """Puts a token after every list."""
        tokens = np.insert(self.tokens, np.cumsum(self.lengths), token)
        return RaggedTokens(tokens, self.lengths + 1)

    def cut_middle(self, limit: int, head: np.ndarray) -> RaggedTokens:
        """Keeps at most `limit` tokens of each list: its first `head` and the others from its end.

        Args:
            limit: the most tokens of a list.
            head: int [number of lists], each less than `limit`.
        """
        if not (self.lengths > limit).any():
            return self
        lengths = np.minimum(self.lengths, limit)
        position = np.arange(len(self.tokens)) - np.repeat(self.starts, self.lengths)
        keep = position < np.repeat(head, self.lengths)
        keep |= position >= np.repeat(head + self.lengths - lengths, self.lengths)
        return RaggedTokens(self.tokens[keep], lengths)


class Chunk(NamedTuple):
    """The tokens of some of a split's examples, without those that were left out.

    Attributes:
        rows: int [m], which examples of the split.
        prompts: one list for each.
        counts: int [m], how many responses each has.
        responses: their lists, example by example.
        candidate_ids: int32 [sum of counts], as in `Tokens`.
    """

    rows: np.ndarray
    prompts: RaggedTokens
    counts: np.ndarray
    responses: RaggedTokens
    candidate_ids: np.ndarray


def join_chunks(
    chunks: Sequence[Chunk], examples: Sequence[Example], cut: dict[str, int]
) -> Tokens:
    """Joins the chunks of a split, at least one of which has rows.

    Args:
        chunks: in the order of the split.
        examples: all examples of the split.
        cut: the counts of `Tokens.cut`.
    """
    counts = np.concatenate([chunk.counts for chunk in chunks])
    # The remaining candidates move up, so that a row's responses stay in one piece.
    exists = np.arange(counts.max())[None, :] < counts[:, None]

    def make_table(values: list[np.ndarray]) -> np.ndarray:
        table = np.zeros(exists.shape, np.int32)
        table[exists] = np.concatenate(values)
        return table

    candidate_ids = make_table([chunk.candidate_ids for chunk in chunks])
    kept = [examples[i] for chunk in chunks for i in chunk.rows.tolist()]
    return Tokens(
        [example.id for example in kept],
        np.concatenate([chunk.prompts.tokens for chunk in chunks]),
        np.concatenate([chunk.prompts.lengths for chunk in chunks]).astype(np.int32),
        np.concatenate([chunk.responses.tokens for chunk in chunks]),
        make_table([chunk.responses.lengths for chunk in chunks]),
        cut,
        candidate_ids,
        _make_scores(kept, candidate_ids, exists),
        _make_ranks(kept, candidate_ids, exists),
        _make_log_weights(kept, candidate_ids, exists),
    )


def _make_scores(
    examples: Sequence[Example], candidate_ids: np.ndarray, exists: np.ndarray
) -> np.ndarray | None:
    """Returns the data's scores of all candidates, float32 [M, C]; None if a row has none."""
    table = np.zeros(exists.shape, np.float32)
    for row, ids, present, example in zip(table, candidate_ids, exists, examples, strict=True):
        if example.scores is None:
            return None
        row[present] = np.array(example.scores, np.float32)[ids[present]]
    return table


def _make_ranks(
    examples: Sequence[Example], candidate_ids: np.ndarray, exists: np.ndarray
) -> np.ndarray | None:
    """Returns the ranks of all candidates, int32 [M, C]; None if no row says more than chosen."""
    if all(example.ranks is None and not example.also_chosen for example in examples):
        return None
    table = np.full(exists.shape, -1, np.int32)
    for row, ids, present, example in zip(table, candidate_ids, exists, examples, strict=True):
        row[present] = np.array(example.order, np.int32)[ids[present]]
    return table


def _make_log_weights(
    examples: Sequence[Example], candidate_ids: np.ndarray, exists: np.ndarray
) -> np.ndarray | None:
    """Returns `Tokens.log_weights`; a row without probabilities has all it could have."""
    if all(set(example.probabilities or ()) <= {1.0} for example in examples):
        return None
    table = np.zeros(exists.shape, np.float32)
    for row, ids, present, example in zip(table, candidate_ids, exists, examples, strict=True):
        if example.probabilities is not None:
            weights = np.zeros(len(example.responses))
            weights[1 : 1 + len(example.rejected)] = -np.log(example.probabilities)
            row[present] = weights[ids[present]]
    return table
