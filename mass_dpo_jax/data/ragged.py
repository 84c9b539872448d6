"""Lists of token ids end to end in one array."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Flat:
    """Token lists end to end."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # int64 [number of lists]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Flat:
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        tokens = itertools.chain.from_iterable(lists)
        return cls(np.fromiter(tokens, np.int32, int(lengths.sum())), lengths)

    def take(self, which: np.ndarray) -> Flat:
        """The lists numbered `which`, in that order, with repeats."""
        lengths = self.lengths[which]
        before = np.cumsum(lengths) - lengths
        at = np.repeat((np.cumsum(self.lengths) - self.lengths)[which] - before, lengths)
        at += np.arange(len(at))
        return Flat(self.tokens[at], lengths)

    def number_equal(self) -> np.ndarray:
        """A number for each list that equal lists share: int64 [number of lists]."""
        numbers: dict[bytes, int] = {}
        ends = np.cumsum(self.lengths)
        return np.array(
            [
                numbers.setdefault(self.tokens[end - length : end].tobytes(), len(numbers))
                for end, length in zip(ends, self.lengths, strict=True)
            ],
            np.int64,
        )

    def starting_with(self, first: Sequence[int]) -> Flat:
        """The lists with these tokens before each that does not start with them already."""
        if not first:
            return self
        starts = np.cumsum(self.lengths) - self.lengths
        missing = self.lengths < len(first)
        for offset, token in enumerate(first):
            at = starts[~missing] + offset
            missing[~missing] = self.tokens[at] != token
        where = np.repeat(starts[missing], len(first))
        tokens = np.insert(self.tokens, where, np.tile(np.array(first, np.int32), missing.sum()))
        return Flat(tokens, self.lengths + len(first) * missing)

    def cut_inside(self, limit: int, head: np.ndarray) -> Flat:
        """At most `limit` tokens of each list: its first `head`, and the others from its end.

        Args:
          limit: tokens.
          head: int [number of lists], less than `limit`.
        """
        if not (self.lengths > limit).any():
            return self
        position = np.arange(len(self.tokens))
        position -= np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        keep = position < np.repeat(head, self.lengths)
        keep |= position >= np.repeat(
            head + self.lengths - np.minimum(self.lengths, limit), self.lengths
        )
        return Flat(self.tokens[keep], np.minimum(self.lengths, limit))
