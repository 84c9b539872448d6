"""Lists of token ids end to end in one array, and texts turned into them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mass_dpo_jax.errors import UserError

CHUNK = 2048  # Texts handed to the tokenizer at a time.


@dataclasses.dataclass
class Flat:
    """Token lists end to end."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # int64 [number of lists]

    def take(self, which: np.ndarray) -> Flat:
        """The lists numbered `which`, in that order, with repeats."""
        starts = (np.cumsum(self.lengths) - self.lengths)[which]
        lengths = self.lengths[which]
        before = np.cumsum(lengths) - lengths
        at = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
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

    def keep_right(self, limit: int) -> Flat:
        """The last `limit` tokens of each list."""
        position = np.arange(len(self.tokens)) - np.repeat(
            np.cumsum(self.lengths) - self.lengths, self.lengths
        )
        keep = position >= np.repeat(self.lengths - limit, self.lengths)
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


def encode_texts(tokenizer: Any, texts: Sequence[str], special_tokens: bool, show: str) -> Flat:
    """Tokenizes texts; `show` titles a progress bar, "" shows none."""
    unique = list(dict.fromkeys(texts))  # Titles and letters repeat a lot.
    numbers = {text: i for i, text in enumerate(unique)}
    parts: list[np.ndarray] = []
    for start in tqdm(range(0, len(unique), CHUNK), show, leave=False, disable=not show):
        with refusals(f"{tokenizer.name_or_path}: the tokenizer fails"):
            encoded = tokenizer(
                unique[start : start + CHUNK],
                add_special_tokens=special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            parts += [np.array(tokens, np.int32) for tokens in encoded]
    lengths = [len(part) for part in parts]
    flat = Flat(np.concatenate([np.zeros(0, np.int32), *parts]), np.array(lengths, np.int64))
    return flat.take(np.array([numbers[text] for text in texts], np.int64))
