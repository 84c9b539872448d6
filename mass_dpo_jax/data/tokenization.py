"""From examples to token ids: renders, tokenizes, checks, and applies the length limits.

Prompt and responses are tokenized separately. Tokenizing them together could merge characters
across the border, and a response's tokens would depend on its prompt. Together they are the text of
both (continuation.py). The end-of-sequence token is part of every response; masks come from
lengths, so it may equal the padding token.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mass_dpo_jax.data.continuation import ResponseEncoder
from mass_dpo_jax.data.examples import Example, name_response
from mass_dpo_jax.data.prompts import PromptEncoder, Prompts
from mass_dpo_jax.data.render import Renderer, make_renderer
from mass_dpo_jax.data.rows import BadRows
from mass_dpo_jax.data.tokenizer import encode_texts, find_added_tokens
from mass_dpo_jax.data.tokens import Chunk, RaggedTokens, Tokens, join_chunks
from mass_dpo_jax.errors import UserError

CHUNK_ROWS = 4096  # Rows rendered and tokenized at a time: their texts and lists take memory.
COUNTS = (
    "prompts_with_shorter_history", "history_items_dropped", "prompts_truncated",
    "prompts_too_long", "responses_too_long", "examples_dropped", "repeated_negatives",
)  # fmt: skip
_log = logging.getLogger(__name__)


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    data: ConfigDict,
    *,
    progress: bool,
    max_positions: int | None = None,
) -> Tokens:
    """Renders and tokenizes examples under the length limits of `data`.

    What happens to a prompt over `data.max_prompt_length` is up to `data.long_prompt`; `prompts`
    says what is cut. A response over `data.max_response_length` is an error (`data.long_response` =
    "error") or is left out ("drop"), together with its example if it is the chosen one or no
    rejected one is left. `Tokens.cut` counts all of this.

    Args:
        examples: the examples of one split.
        tokenizer: a tokenizer of transformers.
        data: the configuration's `data`. Reads `chat_template`, `chat_template_kwargs`, `date`,
            `max_prompt_length`, `max_response_length`, `long_prompt`, `long_response`,
            `on_bad_row`.
        progress: whether to show a progress bar on a terminal.
        max_positions: the most tokens of a prompt with one response that the model can process.

    Raises:
        UserError: a row cannot be rendered, has no tokens or too many, or its chosen response has
            the tokens of a rejected one (templates trim). With `data.on_bad_row` = "skip" such rows
            are left out and counted in the log.
    """
    chunks = _Chunks(make_renderer(tokenizer, data), tokenizer, data, max_positions)
    show = progress and sys.stderr.isatty()
    with tqdm(total=len(examples), desc="Tokenizing", leave=False, disable=not show) as bar:
        for start in range(0, len(examples), CHUNK_ROWS):
            chunks.add(examples[start : start + CHUNK_ROWS], start)
            bar.update(min(CHUNK_ROWS, len(examples) - start))
            if chunks.errors and data.on_bad_row == "error":
                examples = examples[: start + CHUNK_ROWS]
                break
    if chunks.errors:
        rows = BadRows("tokenizing", data.on_bad_row)
        for i in range(len(examples)):
            with rows:
                if i in chunks.errors:
                    raise chunks.errors[i]
        rows.done()
    chunks.log_warnings(len(examples))
    if not sum(len(chunk.rows) for chunk in chunks.done):
        raise UserError(
            f"no example is left: {chunks.cut['examples_dropped']} are left out for their length "
            "(config.data.long_prompt, config.data.long_response, which are drop); raise "
            "config.data.max_prompt_length or config.data.max_response_length"
        )
    return join_chunks(chunks.done, examples, dict(chunks.cut))


class _Chunks:
    """Tokenizes examples chunk by chunk, and collects the chunks and what is wrong with rows.

    Attributes:
        done: the chunks so far.
        errors: why a row cannot be used, by its index in the split.
        cut: the counts of `Tokens.cut`.
    """

    def __init__(
        self, renderer: Renderer, tokenizer: Any, data: ConfigDict, max_positions: int | None
    ) -> None:
        self.done: list[Chunk] = []
        self.errors: dict[int, UserError] = {}
        self.cut: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTS, 0))
        self._warnings: dict[str, list[str]] = {}  # What looks wrong -> the prompts' locations.
        self._renderer = renderer
        self._data = data
        self._max_positions = max_positions
        prefix, suffix = find_added_tokens(tokenizer) if renderer.special_tokens else ([], [])
        if suffix:
            _log.warning(
                "the tokenizer ends texts with %s: left out of the prompts, which go on",
                " ".join(map(str, tokenizer.convert_ids_to_tokens(suffix))),
            )
        encode = functools.partial(encode_texts, tokenizer)
        self._prompts = PromptEncoder(renderer, encode, prefix, tokenizer.bos_token_id, data)
        self._responses = ResponseEncoder(tokenizer)

    def add(self, examples: Sequence[Example], start: int) -> None:
        """Tokenizes a chunk of examples; `start` is the split's index of the first.

        Raises:
            UserError: an example has no other response than the chosen one.
        """
        if alone := next((e for e in examples if len(e.responses) == 1), None):
            raise UserError(
                f"{alone.place}: has no rejected response (config.data.columns="
                f"{self._data.columns}); only python -m mass_dpo_jax.mine takes such rows, and "
                "writes them with negatives"
            )
        errors: dict[int, UserError] = {}
        dropped: set[int] = set()
        prompts = self._prompts.encode(examples, errors, dropped, self.cut)
        rows: list[int] = []
        texts: list[list[str]] = []
        for i, example in enumerate(examples):
            if i in errors or i in dropped:
                continue
            try:
                texts.append(self._render_responses(example, prompts, i))
                rows.append(i)
            except UserError as error:
                errors[i] = error
        chunk = self._make_chunk(np.array(rows, int), examples, prompts, texts, errors)
        self.cut["examples_dropped"] += len(dropped)
        self.done.append(chunk._replace(rows=chunk.rows + start))
        self.errors |= {start + i: error for i, error in errors.items()}

    def _render_responses(self, example: Example, prompts: Prompts, i: int) -> list[str]:
        prompt = prompts.prompts[i]
        shortened = dataclasses.replace(example, prompt=prompt)
        texts = self._renderer.render_responses(shortened, prompts.texts[i])
        for warning in self._renderer.find_warnings(example, prompt):
            self._warnings.setdefault(warning, []).append(example.place)
        return texts

    def _make_chunk(
        self,
        rows: np.ndarray,
        examples: Sequence[Example],
        all_prompts: Prompts,
        texts: Sequence[Sequence[str]],
        errors: dict[int, UserError],
    ) -> Chunk:
        """Tokenizes responses and removes those that are too long, and rows that cannot be used."""
        examples = [examples[i] for i in rows]
        prompts = all_prompts.tokens.take(rows)
        prompt_texts = [all_prompts.texts[i] for i in rows]
        begins = self._responses.find_beginnings(prompt_texts, prompts)
        responses, groups = self._encode_responses(texts, begins)
        counts = np.array([len(row) for row in texts], int)
        exists = np.arange(counts.max(initial=2))[None, :] < counts[:, None]  # [m, C]
        lengths = np.zeros(exists.shape, np.int64)
        lengths[exists] = responses.lengths
        group = np.full(exists.shape, -1)  # Equal within a row where the tokens are equal.
        group[exists] = groups
        num_rejected = np.array([len(example.rejected) for example in examples], int)
        is_rejected = exists & (np.arange(exists.shape[1])[None, :] <= num_rejected[:, None])
        is_rejected[:, 0] = False
        # A response that is there twice, and chosen twice, counts once.
        keep = exists & (is_rejected | (group != group[:, :1]))
        keep[:, 0] = exists[:, 0]
        for k, message in _find_errors(
            prompts.lengths, lengths, group, num_rejected, self._data, self._max_positions
        ):
            errors.setdefault(int(rows[k]), UserError(f"{examples[k].place}: {message}"))
            keep[k] = False
        usable = np.asarray(keep.any(1))
        long = keep & (lengths > self._data.max_response_length)
        keep &= ~long
        keep &= (keep[:, 0] & (keep & is_rejected).any(1))[:, None]
        kept = np.asarray(keep.any(1))
        self.cut["responses_too_long"] += int(long.sum())
        self.cut["examples_dropped"] += int((usable & ~kept).sum())
        negatives = np.where(usable[:, None] & is_rejected, group, -1)
        ordered: np.ndarray = np.sort(negatives[:, 1:], axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        self.cut["repeated_negatives"] += int(np.count_nonzero(repeated))
        return Chunk(
            rows[kept],
            prompts if kept.all() else prompts.take(np.flatnonzero(kept)),
            keep[kept].sum(1),
            responses if keep[exists].all() else responses.take(np.flatnonzero(keep[exists])),
            np.argwhere(keep)[:, 1].astype(np.int32),
        )

    def _encode_responses(
        self, texts: Sequence[Sequence[str]], begins: np.ndarray
    ) -> tuple[RaggedTokens, np.ndarray]:
        """Returns the tokens of all rows' texts, and numbers that texts with the same ones share.

        Args:
            texts: the texts of each row.
            begins: bool [m], as `ResponseEncoder.find_beginnings` returns it.
        """
        unique: dict[tuple[str, bool], int] = {}
        indices = np.array(
            [
                unique.setdefault((text, begin), len(unique))
                for row, begin in zip(texts, begins.tolist(), strict=True)
                for text in row
            ],
            int,
        )
        tokens = self._responses.encode(list(unique))
        if self._renderer.end_id is not None:
            tokens = tokens.add_suffix(self._renderer.end_id)
        groups = tokens.group_equal()[indices]
        return tokens if len(unique) == len(indices) else tokens.take(indices), groups

    def log_warnings(self, count: int) -> None:
        """Warns of what looks wrong in some of the split's `count` prompts, and counts it."""
        for warning, locations in self._warnings.items():
            self.cut[f"prompts_{warning.replace(' ', '_')}"] = len(locations)
            _log.warning(
                "%d of %d prompts %s; first: %s%s", len(locations), count, warning, locations[0],
                "" if self._renderer.special_tokens else f"; {_advise(warning)}",
            )  # fmt: skip


def _find_errors(
    prompts: np.ndarray,
    responses: np.ndarray,
    group: np.ndarray,
    num_rejected: np.ndarray,
    data: ConfigDict,
    max_positions: int | None,
) -> Iterator[tuple[int, str]]:
    """Yields the index of each row that its tokens show to be unusable, and why.

    Args:
        prompts: int [m], lengths, under the limit of prompts already.
        responses: int [m, C], lengths, the chosen one's first; 0 where there is no response.
        group: int [m, C], equal within a row where tokens are; -1 where there is no response.
        num_rejected: int [m], see `Example.responses`.
        data: the configuration's `data`.
        max_positions: the same as in `tokenize`.
    """

    def name_field(k: int, candidate: int) -> str:
        return name_response(candidate, int(num_rejected[k]))

    column = np.arange(group.shape[1])
    is_rejected = (column > 0) & (column <= num_rejected[:, None]) & (group >= 0)
    for chosen in range(group.shape[1]):
        is_chosen = (group[:, chosen] >= 0) & ((chosen == 0) | (chosen > num_rejected))
        if not is_chosen.any():
            continue
        same = (group == group[:, chosen, None]) & is_rejected & is_chosen[:, None]
        for k in np.flatnonzero(same.any(1)).tolist():
            field = name_field(k, int(same[k].argmax()))
            response = f"field {name_field(k, chosen)!r}" if chosen else "the chosen response"
            yield k, f"{response} has the same tokens as {field}"
    limit = data.max_response_length
    long = responses > limit
    if data.long_response != "drop":
        for k in np.flatnonzero(long.any(1)).tolist():
            c = int(long[k].argmax())
            yield (
                k,
                f"field {name_field(k, c)!r} has {responses[k, c]} tokens, "
                f"config.data.max_response_length is {limit}: raise it, or leave such "
                "responses out with config.data.long_response=drop",
            )
    if max_positions is not None:
        lengths = np.where(long, 0, responses)  # Long responses are dropped.
        longest = lengths.max(1, initial=0)
        for k in np.flatnonzero(prompts + longest > max_positions).tolist():
            yield (
                k,
                f"the prompt and field {name_field(k, int(lengths[k].argmax()))!r} "
                f"have {prompts[k]} + {longest[k]} tokens, more than the model's "
                f"{max_positions} positions (max_position_embeddings of its config.json): "
                "lower config.data.max_prompt_length to cut the prompt, or "
                "config.data.max_response_length",
            )


def _advise(warning: str) -> str:
    """Returns what to do about a warning that comes from a chat template's renderer."""
    if any(part in warning for part in ("earlier turns", "a name of", "a tool_call_id of")):
        return "the model does not see it"
    if "does not write" in warning:
        return "write its text into a message that the template writes, or use another template"
    if "responses" in warning:
        return "leave them out of texts that mean something else by them"
    return "if they are rendered already, set --config.data.chat_template=none"
