"""Lists of token ids end to end in one array, and texts turned into them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mass_dpo_jax.errors import UserError


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


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Whatever the tokenizers' libraries raise in here is a UserError that starts with `what`.

    For a broken file they raise bare Exception or panic in Rust, which is no Exception at all.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what}: {message}") from None


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Flat:
    """Tokenizes texts, without the special tokens that the tokenizer adds around a text."""
    unique = list(dict.fromkeys(texts))  # Titles and letters repeat a lot.
    numbers = {text: i for i, text in enumerate(unique)}
    flat = Flat.of(_ids(tokenizer, unique))
    if len(unique) == len(texts):
        return flat
    return flat.take(np.fromiter((numbers[text] for text in texts), np.int64, len(texts)))


def find_added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before a text, and what it adds after it.

    Raises:
      UserError: it adds something in another way.
    """
    text, bare = next(
        (text, ids)
        for text in ("question", "1", "")
        if (ids := _ids(tokenizer, [text])[0]) or not text
    )
    with refusals(f"{tokenizer.name_or_path}: the tokenizer fails"):
        whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise UserError(
        f"{tokenizer.name_or_path}: the tokenizer changes a text where it adds special tokens "
        f"({bare} becomes {whole}); expected tokens before and after it"
    )


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    with refusals(f"{tokenizer.name_or_path}: the tokenizer fails"):
        # Sets up the Rust tokenizer too: no padding, nothing cut.
        plain = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
        if not texts or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            return list(plain(list(texts))["input_ids"]) if texts else []
        plain("")
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]
