"""Examples as token ids, prompt and responses tokenized apart.

Tokenizing them together could merge characters across the border, and a response's tokens would
depend on its prompt. The end-of-sequence token is a part of every response; masks come from
lengths, so it may equal the padding token.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mass_dpo_jax.data.bad_rows import BadRows
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.prompts import Encoder
from mass_dpo_jax.data.ragged import Flat
from mass_dpo_jax.data.render import Renderer, make_renderer
from mass_dpo_jax.data.row_checks import Rows, check_rows
from mass_dpo_jax.data.tokenizer import encode_texts, find_added_tokens
from mass_dpo_jax.errors import UserError

ROWS = 4096  # Rendered and tokenized at a time: their texts and lists of tokens take memory.
COUNTED = (
    "prompts_with_shorter_history", "history_items_dropped", "prompts_truncated",
    "prompts_too_long", "responses_too_long", "examples_dropped", "repeated_negatives",
)  # fmt: skip
_log = logging.getLogger(__name__)


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


class Part(NamedTuple):
    """The tokens of some examples, those that are left of them.

    Attributes:
      rows: int [m], which examples.
      prompts: one list each.
      counts: int [m], how many responses each has.
      responses: of all of them, example by example.
      numbers: int [sum of counts], as in `Tokens`.
    """

    rows: np.ndarray
    prompts: Flat
    counts: np.ndarray
    responses: Flat
    numbers: np.ndarray


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    data: Any,
    *,
    progress: bool,
    max_positions: int | None = None,
) -> Tokens:
    """Renders and tokenizes examples under the length limits of `data`.

    What becomes of a prompt over `data.max_prompt_length` says `data.long_prompt`: see `prompts`
    for what is cut. A response over `data.max_response_length` is an error (`data.long_response` =
    "error") or leaves its pool ("drop"), with its example if it is the chosen one or no rejected
    one is left. `Tokens.cut` counts it all.

    Args:
      examples: of one split.
      tokenizer: of Hugging Face.
      data: the configuration's `data`.
      progress: shows a bar on a terminal.
      max_positions: most tokens of a prompt with a response that the model can tell apart.

    Raises:
      UserError: names the row that cannot be rendered, has no tokens or too many, a chosen response
        with the tokens of a rejected one (templates trim), and more. With `data.on_bad_row` =
        "skip" such rows are left out and counted in the log.
    """
    renderer = make_renderer(tokenizer, data)
    work = _Work(renderer, tokenizer, data, max_positions)
    show = progress and sys.stderr.isatty()
    with tqdm(total=len(examples), desc="Tokenizing", leave=False, disable=not show) as bar:
        for start in range(0, len(examples), ROWS):
            work.add(examples[start : start + ROWS], start)
            bar.update(min(ROWS, len(examples) - start))
            if work.bad and data.on_bad_row == "error":
                examples = examples[: start + ROWS]
                break
    if work.bad:
        rows = BadRows("tokenizing", data.on_bad_row)
        for i in range(len(examples)):
            with rows:
                if i in work.bad:
                    raise work.bad[i]
        rows.done()
    work.warn(len(examples))
    return _joined(examples, work)


class _Work:
    """Tokenizes examples part by part, and collects the parts and what is wrong with rows."""

    def __init__(
        self, renderer: Renderer, tokenizer: Any, data: Any, max_positions: int | None
    ) -> None:
        self.parts: list[Part] = []
        self.bad: dict[int, UserError] = {}  # By the example's place in the split.
        self.cut: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTED, 0))
        self._doubts: dict[str, list[str]] = {}  # What is odd about prompts -> their places.
        self._renderer = renderer
        self._data = data
        self._max_positions = max_positions
        self._encode = functools.partial(encode_texts, tokenizer)
        first, last = find_added_tokens(tokenizer) if renderer.special_tokens else ([], [])
        if last:
            _log.warning(
                "the tokenizer ends texts with %s: left out of the prompts, which go on",
                " ".join(map(str, tokenizer.convert_ids_to_tokens(last))),
            )
        self._prompts = Encoder(renderer, self._encode, first, tokenizer.bos_token_id, data)

    def add(self, examples: Sequence[Example], start: int) -> None:
        bad: dict[int, UserError] = {}
        dropped: set[int] = set()
        prompts = self._prompts(examples, bad, dropped, self.cut)
        texts: list[str] = []
        rows, counts = [], []
        for i, example in enumerate(examples):
            if i in bad or i in dropped:
                continue
            try:
                prompt = prompts.prompts[i]
                shorter = dataclasses.replace(example, prompt=prompt)
                found = self._renderer.responses(shorter, prompts.texts[i])
                for doubt in self._renderer.doubts(example, prompt):
                    self._doubts.setdefault(doubt, []).append(example.place)
            except UserError as error:
                bad[i] = error
                continue
            texts += found
            rows.append(i)
            counts.append(len(found))
        part = self._part(
            examples, np.array(rows, int), prompts.tokens, np.array(counts, int), texts, bad
        )
        self.cut["examples_dropped"] += len(dropped)
        self.parts.append(part._replace(rows=part.rows + start))
        self.bad |= {start + i: error for i, error in bad.items()}

    def _part(
        self,
        examples: Sequence[Example],
        rows: np.ndarray,
        prompts: Flat,
        counts: np.ndarray,
        texts: list[str],
        bad: dict[int, UserError],
    ) -> Part:
        responses, same = self._responses(texts)
        slots = np.arange(counts.max(initial=2))[None, :] < counts[:, None]
        lengths = np.zeros(slots.shape, np.int64)
        lengths[slots] = responses.lengths
        kinds = np.full(slots.shape, -1)
        kinds[slots] = same
        keep = slots.copy()
        prompts = prompts.take(rows)
        places = [examples[i].place for i in rows]
        checked = Rows(places, prompts.lengths, lengths, kinds)
        for k, error in check_rows(checked, self._data, self._max_positions):
            bad.setdefault(int(rows[k]), error)
            keep[k] = False
        good = np.asarray(keep.any(1))
        long = keep & (lengths > self._data.max_response_length)
        keep &= ~long
        keep &= (keep[:, 0] & keep[:, 1:].any(1))[:, None]
        left = np.asarray(keep.any(1))
        self.cut["responses_too_long"] += int(long.sum())
        self.cut["examples_dropped"] += int((good & ~left).sum())
        ordered: np.ndarray = np.sort(np.where(good[:, None], kinds, -1)[:, 1:], axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        self.cut["repeated_negatives"] += int(np.count_nonzero(repeated))
        return Part(
            rows[left],
            prompts if left.all() else prompts.take(np.flatnonzero(left)),
            keep[left].sum(1),
            responses if keep[slots].all() else responses.take(np.flatnonzero(keep[slots])),
            np.argwhere(keep)[:, 1].astype(np.int32),
        )

    def _responses(self, texts: list[str]) -> tuple[Flat, np.ndarray]:
        """The tokens of texts, and numbers that texts with the same tokens share."""
        numbers: dict[str, int] = {}
        which = np.array([numbers.setdefault(text, len(numbers)) for text in texts], int)
        unique = self._encode(list(numbers))
        if self._renderer.end_id is not None:
            ends = np.cumsum(unique.lengths)
            unique = Flat(np.insert(unique.tokens, ends, self._renderer.end_id), unique.lengths + 1)
        same = unique.number_equal()[which]
        return unique if len(unique.lengths) == len(texts) else unique.take(which), same

    def warn(self, count: int) -> None:
        for what, places in self._doubts.items():
            self.cut[f"prompts_{what.replace(' ', '_')}"] = len(places)
            _log.warning(
                "%d of %d prompts %s; first: %s%s", len(places), count, what, places[0],
                "" if self._renderer.special_tokens else f"; {_advice(what)}",
            )  # fmt: skip


def _advice(doubt: str) -> str:
    """What to do about a doubt of a chat template's."""
    if "does not write" in doubt:
        return "write its text into a message that the template writes, or use another template"
    if "responses" in doubt:
        return "leave them out of texts that mean something else by them"
    return "if they are rendered already, set --config.data.chat_template=none"


def _joined(examples: Sequence[Example], work: _Work) -> Tokens:
    rows = np.concatenate([part.rows for part in work.parts])
    if not len(rows):
        raise UserError(
            f"no example is left: {work.cut['examples_dropped']} are left out for their length "
            "(config.data.long_prompt, config.data.long_response, which are drop); raise "
            "config.data.max_prompt_length or config.data.max_response_length"
        )
    counts = np.concatenate([part.counts for part in work.parts])
    # Candidates that are left move up, so that a row's responses stay in one piece.
    slots = np.arange(counts.max())[None, :] < counts[:, None]

    def table(values: np.ndarray) -> np.ndarray:
        made = np.zeros(slots.shape, values.dtype)
        made[slots] = values
        return made

    numbers = table(np.concatenate([part.numbers for part in work.parts]))
    left = [examples[i] for i in rows.tolist()]
    return Tokens(
        [example.id for example in left],
        np.concatenate([part.prompts.tokens for part in work.parts]),
        np.concatenate([part.prompts.lengths for part in work.parts]).astype(np.int32),
        np.concatenate([part.responses.tokens for part in work.parts]),
        table(np.concatenate([part.responses.lengths for part in work.parts]).astype(np.int32)),
        dict(work.cut),
        numbers,
        _scores(left, numbers, slots),
    )


def _scores(
    examples: Sequence[Example], numbers: np.ndarray, slots: np.ndarray
) -> np.ndarray | None:
    """The scores of the responses that are left, float32 [M, C]; None where a row has none."""
    table = np.zeros(slots.shape, np.float32)
    for row, number, slot, example in zip(table, numbers, slots, examples, strict=True):
        if example.scores is None:
            return None
        row[slot] = np.array(example.scores, np.float32)[number[slot]]
    return table
