"""Examples as token ids, prompt and responses tokenized apart.

Tokenizing them together could merge characters across the border, and a response's tokens would
depend on its prompt. The end-of-sequence token is a part of every response; masks come from
lengths, so it may equal the padding token.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.flat import Flat, encode_texts
from mass_dpo_jax.data.render import Renderer, make_renderer
from mass_dpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One tokenized split of M examples with at most C candidates each, the chosen one first."""

    ids: list[str]
    prompt_tokens: np.ndarray  # int32 [sum of prompt_lengths], example by example
    prompt_lengths: np.ndarray  # int32 [M]
    response_tokens: np.ndarray  # int32 [sum of response_lengths], by example, then candidate
    response_lengths: np.ndarray  # int32 [M, C], 0: there is no such candidate
    cut: dict[str, int]  # What the length limits changed, and repeated negatives: counts.
    numbers: np.ndarray  # int32 [M, C], which response of its example it is: 0 the chosen one.
    scores: np.ndarray | None = None  # float32 [M, C], the data's, 0 where there is no candidate.

    def __len__(self) -> int:
        return len(self.ids)

    def prompt(self, i: int) -> np.ndarray:
        """Token ids of prompt i: int32 [P_i]."""
        return self.prompt_tokens[self._prompt_ends[i] - self.prompt_lengths[i] :][
            : self.prompt_lengths[i]
        ]

    def response(self, i: int, c: int) -> np.ndarray:
        """Token ids of candidate c of example i: int32 [R_ic]."""
        start = int(self.response_lengths[i, :c].sum())
        return self.responses(i)[start : start + int(self.response_lengths[i, c])]

    def responses(self, i: int) -> np.ndarray:
        """Token ids of all candidates of example i, end to end: int32 [sum over c of R_ic]."""
        size = int(self.response_lengths[i].sum())
        return self.response_tokens[self._response_ends[i] - size :][:size]

    def by_number(self, values: np.ndarray, width: int) -> np.ndarray:
        """Values [M, C, ...] of the candidates in the columns that their responses have in the data
        [M, width, ...], 0 where there is none."""
        there = self.response_lengths > 0
        table = np.zeros((len(self), width, *values.shape[2:]), values.dtype)
        table[np.nonzero(there)[0], self.numbers[there]] = values[there]
        return table

    def digest(self) -> str:
        """SHA-256 of ids and tokens: equal where every number computed from them is."""
        sha = hashlib.sha256(json.dumps(self.ids).encode())
        for array in (
            self.prompt_lengths,
            self.prompt_tokens,
            self.response_lengths,
            self.response_tokens,
        ):
            sha.update(str(array.shape).encode())
            sha.update(np.ascontiguousarray(array, "<i4").tobytes())
        return sha.hexdigest()

    @functools.cached_property
    def _prompt_ends(self) -> np.ndarray:
        return np.cumsum(self.prompt_lengths, dtype=np.int64)

    @functools.cached_property
    def _response_ends(self) -> np.ndarray:
        return np.cumsum(self.response_lengths.sum(1, dtype=np.int64))


def tokenize(examples: Sequence[Example], tokenizer: Any, data: Any, *, progress: bool) -> Tokens:
    """Renders and tokenizes examples under the length limits of `data`.

    A prompt over `data.max_prompt_length` loses the oldest items of its history, all but the
    newest if need be, and then tokens from its left. A response over `data.max_response_length`
    is an error (`data.long_response` = "error") or leaves its pool ("drop"), with its example if
    it is the chosen one or no rejected one is left. `Tokens.cut` counts it all.

    Raises:
      UserError: names the row: a prompt without tokens, a response that is too long, a chosen
        response that has the tokens of a rejected one (templates trim).
    """
    renderer = make_renderer(tokenizer, data)
    show = progress and sys.stderr.isatty()

    def encode(texts: Sequence[str], special_tokens: bool, what: str) -> Flat:
        return encode_texts(tokenizer, texts, special_tokens, what if show else "")

    places = [e.place for e in examples]
    cut: dict[str, int] = {}
    responses, counts = _responses(examples, renderer, encode, cut, show)
    keep = _short_enough(responses.lengths, counts, places, data, cut)
    kept = keep.sum(1) > 0
    examples = [e for e, k in zip(examples, kept, strict=True) if k]
    if not examples:
        raise UserError(
            f"no example is left: every one has a response over config.data.max_response_length="
            f"{data.max_response_length}"
        )
    slots = np.arange(counts.max())[None, :] < counts[:, None]
    responses = responses.take(np.flatnonzero(keep[slots]))
    # Candidates that are left move up, so that a row's responses stay in one piece.
    keep = keep[kept]
    left = np.arange(keep.sum(1).max())[None, :] < keep.sum(1)[:, None]

    def moved_up(values: np.ndarray) -> np.ndarray:
        table = np.zeros(left.shape, values.dtype)
        table[left] = values
        return table

    prompts = _prompts(examples, renderer, encode, data.max_prompt_length, cut)
    return Tokens(
        [e.id for e in examples],
        prompts.tokens,
        prompts.lengths.astype(np.int32),
        responses.tokens,
        moved_up(responses.lengths.astype(np.int32)),
        cut,
        moved_up(np.argwhere(keep)[:, 1].astype(np.int32)),
        None if (scores := _scores(examples, keep.shape)) is None else moved_up(scores[keep]),
    )


def _scores(examples: Sequence[Example], shape: tuple[int, ...]) -> np.ndarray | None:
    """The examples' scores, float32 `shape`; None where one has none."""
    table = np.zeros(shape, np.float32)
    for row, example in zip(table, examples, strict=True):
        if example.scores is None:
            return None
        row[: len(example.scores)] = example.scores
    return table


Encode = Callable[[Sequence[str], bool, str], Flat]


def _prompts(
    examples: Sequence[Example], renderer: Renderer, encode: Encode, limit: int, cut: dict[str, int]
) -> Flat:
    special = renderer.special_tokens
    texts = [renderer.prompt(e.prompt, e.place) for e in examples]
    flat = encode(texts, special, "Prompts")
    for example, length in zip(examples, flat.lengths, strict=True):
        if not length:
            raise UserError(f"{example.place}: the prompt has no tokens")
    long = {
        i: e.prompt
        for i, e in enumerate(examples)
        if flat.lengths[i] > limit and isinstance(e.prompt, History) and len(e.prompt.items) > 1
    }

    def shorter(rows: np.ndarray, drop: np.ndarray) -> list[str]:
        pairs = zip(rows.tolist(), drop.tolist(), strict=True)
        return [renderer.prompt(long[i].without_oldest(k), examples[i].place) for i, k in pairs]

    # Bisection, all rows side by side: the fewest items to drop are in (too_few, enough].
    rows = np.array(list(long), int)
    too_few = np.zeros(len(long), int)
    enough = np.array([len(history.items) - 1 for history in long.values()], int)
    while len(at := np.flatnonzero(enough - too_few > 1)):
        middle = (too_few[at] + enough[at]) // 2
        fits = encode(shorter(rows[at], middle), special, "Histories").lengths <= limit
        enough[at] = np.where(fits, middle, enough[at])
        too_few[at] = np.where(fits, too_few[at], middle)
    cut["prompts_with_shorter_history"] = len(long)
    cut["history_items_dropped"] = int(enough.sum())
    if long:
        for i, text in zip(rows.tolist(), shorter(rows, enough), strict=True):
            texts[i] = text
        flat = encode(texts, special, "Prompts")
    cut["prompts_truncated"] = int((flat.lengths > limit).sum())
    return flat.keep_right(limit)


def _responses(
    examples: Sequence[Example],
    renderer: Renderer,
    encode: Encode,
    cut: dict[str, int],
    show: bool,
) -> tuple[Flat, np.ndarray]:
    """All responses, example by example, and how many each example has."""
    numbers: dict[str, int] = {}
    which: list[int] = []
    for example in tqdm(examples, "Rendering", leave=False, disable=not show):
        which += [numbers.setdefault(text, len(numbers)) for text in renderer.responses(example)]
    unique = encode(list(numbers), False, "Responses")
    if renderer.end_id is not None:
        ends = np.cumsum(unique.lengths)
        unique = Flat(np.insert(unique.tokens, ends, renderer.end_id), unique.lengths + 1)
    same = unique.number_equal()
    counts = np.array([1 + len(e.rejected) for e in examples])
    repeated, at = 0, 0
    for example, count in zip(examples, counts.tolist(), strict=True):
        chosen, *rejected = same[which[at : at + count]].tolist()
        if chosen in rejected:
            raise UserError(
                f"{example.place}: the chosen response has the same tokens as "
                f"rejected[{rejected.index(chosen)}]"
            )
        repeated += len(rejected) - len(set(rejected))
        at += count
    cut["repeated_negatives"] = repeated
    return unique.take(np.array(which)), counts


def _short_enough(
    lengths: np.ndarray,
    counts: np.ndarray,
    places: Sequence[str],
    data: Any,
    cut: dict[str, int],
) -> np.ndarray:
    """Which candidates stay: bool [M, C]; a row of an example that goes is all false."""
    slots = np.arange(counts.max())[None, :] < counts[:, None]
    table = np.zeros(slots.shape, np.int64)
    table[slots] = lengths
    long = table > data.max_response_length
    if long.any() and data.long_response != "drop":
        row, column = np.argwhere(long)[0]
        field = "chosen" if column == 0 else f"rejected[{column - 1}]"
        raise UserError(
            f"{places[row]}: field {field!r} has {table[row, column]} tokens, "
            f"config.data.max_response_length is {data.max_response_length} ({long.sum()} "
            "responses are longer): raise it, or leave them out with data.long_response=drop"
        )
    keep = slots & ~long
    keep &= (keep[:, 0] & keep[:, 1:].any(1))[:, None]
    cut["responses_too_long"] = int(long.sum())
    cut["examples_dropped"] = int((~keep.any(1)).sum())
    return keep
