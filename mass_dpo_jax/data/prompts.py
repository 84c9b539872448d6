"""From prompts to token ids under the length limit `data.max_prompt_length`.

A prompt that is too long (with `data.long_prompt` = "cut") keeps what the template writes around
its text. What is removed is, in this order: the oldest items of its history, or the oldest turns of
its conversation; then the beginning of its text, or of its last message that is not the model's.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data.examples import Example, History, Message, Prompt, as_text
from mass_dpo_jax.data.render import Renderer
from mass_dpo_jax.data.tokens import RaggedTokens
from mass_dpo_jax.errors import UserError

MAX_GUESSES = 4  # Cuts guessed from lengths before the search halves the interval instead.


@dataclasses.dataclass
class Prompts:
    """The prompts of some examples as the model sees them, in the examples' order.

    Attributes:
        prompts: the shortened prompts.
        texts: the same, rendered.
        tokens: one list for each.
    """

    prompts: list[Prompt]
    texts: list[str]
    tokens: RaggedTokens


class PromptEncoder:
    """Turns prompts into token ids, with `prefix` once before each.

    Args:
        renderer: renders prompts as text.
        encode: tokenizes texts, without special tokens around them.
        prefix: token ids that the tokenizer adds before a text.
        bos_id: the token id that begins a sequence, if there is one.
        data: the configuration's `data`. Reads `max_prompt_length`, `long_prompt`.
    """

    def __init__(
        self,
        renderer: Renderer,
        encode: Callable[[Sequence[str]], RaggedTokens],
        prefix: Sequence[int],
        bos_id: int | None,
        data: ConfigDict,
    ):
        self._renderer = renderer
        self._encode = encode
        self._prefix = prefix
        self._bos_id = bos_id
        self._limit = data.max_prompt_length
        self._on_long = data.long_prompt

    def encode(
        self,
        examples: Sequence[Example],
        errors: dict[int, UserError],
        dropped: set[int],
        cut: collections.Counter[str],
    ) -> Prompts:
        """Returns the prompts of all examples; those of rows in `errors` or `dropped` are invalid.

        Args:
            examples: the examples.
            errors: gets an entry for each prompt that cannot be used, by its index.
            dropped: gets the index of each prompt that `data.long_prompt` leaves out.
            cut: counts what was shortened or dropped.
        """
        texts = [""] * len(examples)
        for i, example in enumerate(examples):
            try:
                texts[i] = self._render(example, example.prompt)
            except UserError as error:
                errors[i] = error
        result = Prompts([example.prompt for example in examples], texts, self._tokenize(texts))
        lengths = result.tokens.lengths
        for i in np.flatnonzero(lengths == 0).tolist():
            errors.setdefault(i, UserError(f"{examples[i].place}: the prompt has no tokens"))
        long = [i for i in np.flatnonzero(lengths > self._limit).tolist() if i not in errors]
        if not long:
            return result
        if self._on_long == "drop":
            cut["prompts_too_long"] += len(long)
            dropped.update(long)
        elif self._on_long == "error":
            for i in long:
                errors[i] = UserError(
                    f"{examples[i].place}: the prompt has {lengths[i]} tokens, "
                    f"config.data.max_prompt_length is {self._limit}: raise it, or set "
                    "config.data.long_prompt to cut or drop"
                )
        else:
            self._shorten(examples, long, result, errors, cut)
        return result

    def _render(self, example: Example, prompt: Prompt) -> str:
        return self._renderer.render_prompt(prompt, example.place, example.tools)

    def _tokenize(self, texts: Sequence[str]) -> RaggedTokens:
        return self._encode(texts).add_prefix(self._prefix)

    def _shorten(
        self,
        examples: Sequence[Example],
        long: Sequence[int],
        result: Prompts,
        errors: dict[int, UserError],
        cut: collections.Counter[str],
    ) -> None:
        """Replaces long prompts in `result` by shorter ones."""
        # With a template, text is cut so that the tokens are those of a shorter message. Where the
        # whole prompt is one text, its tokens are cut instead, which needs no search.
        cut_text = not self._renderer.special_tokens
        prompts = {i: _ShortenedPrompt(examples[i].prompt, cut_text) for i in long}

        def render(i: int, amount: int) -> str:
            try:
                return self._render(examples[i], prompts[i].shorten(amount))
            except UserError as error:
                errors[i] = error
                return ""

        def measure(rows: np.ndarray, amounts: np.ndarray) -> np.ndarray:
            texts = [render(*pair) for pair in zip(rows.tolist(), amounts.tolist(), strict=True)]
            return self._tokenize(texts).lengths

        rows = np.array(long)
        amounts, fits = _find_least_cuts(
            rows, result.tokens.lengths[rows], prompts, measure, self._limit
        )
        for i, amount, fit in zip(rows.tolist(), amounts.tolist(), fits.tolist(), strict=True):
            items = min(amount, prompts[i].items)
            cut["prompts_with_shorter_history"] += items > 0
            cut["history_items_dropped"] += items
            cut["prompts_truncated"] += not fit or amount > items
            result.prompts[i] = prompts[i].shorten(amount)
            result.texts[i] = render(i, amount)
        result.tokens = self._tokenize(result.texts)
        if not cut_text:
            heads = self._count_first_tokens(result.tokens)
            result.tokens = result.tokens.cut_middle(self._limit, heads)
            return
        for i in rows[~fits].tolist():
            message = (
                f"{examples[i].place}: without its text the prompt has "
                f"{result.tokens.lengths[i]} tokens still, config.data.max_prompt_length is "
                f"{self._limit}: raise it, or leave such prompts out with "
                "config.data.long_prompt=drop"
            )
            errors.setdefault(i, UserError(message))

    def _count_first_tokens(self, tokens: RaggedTokens) -> np.ndarray:
        """Returns how many tokens at the start of each prompt must stay."""
        if self._prefix or self._bos_id is None:
            return np.full(len(tokens.lengths), min(len(self._prefix), self._limit - 1))
        counts = np.zeros(len(tokens.lengths), np.int64)
        nonempty = tokens.lengths > 0
        counts[nonempty] = tokens.tokens[tokens.starts[nonempty]] == self._bos_id
        return np.minimum(counts, self._limit - 1)


class _ShortenedPrompt:
    """A prompt from which any amount can be removed: first whole items, then characters.

    Attributes:
        items: number of items, or turns, that can be removed: all but the newest.
        max_amount: the largest amount: the items and, with `cut_text`, all but one character.
    """

    def __init__(self, prompt: Prompt, cut_text: bool):
        self._prompt = prompt
        self._turns = _split_turns(prompt) if isinstance(prompt, list) else []
        units = prompt.items if isinstance(prompt, History) else self._turns
        self.items = max(0, len(units) - 1)
        shortest = as_text(self.shorten(self.items))
        text = shortest if isinstance(shortest, str) else shortest[_find_cut(shortest)]["content"]
        self.max_amount = self.items + (max(0, len(text) - 1) if cut_text else 0)

    def shorten(self, amount: int) -> Prompt:
        """Returns the prompt without its first `amount` items and characters."""
        items = min(amount, self.items)
        rest = self._drop_items(items)
        characters = amount - items
        if not characters:
            return rest
        text = as_text(rest)
        if isinstance(text, str):
            return text[characters:]
        i = _find_cut(text)
        shortened = {**text[i], "content": text[i]["content"][characters:]}
        return [*text[:i], shortened, *text[i + 1 :]]

    def _drop_items(self, items: int) -> Prompt:
        if not items:
            return self._prompt
        if isinstance(self._prompt, History):
            return self._prompt.without_oldest(items)
        assert isinstance(self._prompt, list)
        system = [message for message in self._prompt[:1] if message["role"] == "system"]
        return system + [message for turn in self._turns[items:] for message in turn]


def _find_cut(messages: Sequence[Message]) -> int:
    """Returns the index of the message whose text is cut: the last that is not the model's own."""
    return max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)


def _split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Splits messages before each user message; leaves out a system message at the start."""
    turns: list[list[Message]] = []
    for i, message in enumerate(messages):
        if i == 0 and message["role"] == "system":
            continue
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _find_least_cuts(
    rows: np.ndarray,
    lengths: np.ndarray,
    prompts: Mapping[int, _ShortenedPrompt],
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    limit: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the least amount to remove from each prompt, searching all of them side by side.

    The least amount is in (too_few, enough]. It need not be the least number of characters where
    the limit is met exactly.

    Args:
        rows: int [m], which prompts.
        lengths: int [m], the lengths in tokens of the whole prompts.
        prompts: the prompts, by row.
        measure: returns the lengths in tokens of some rows without some amounts.
        limit: the most tokens of a prompt.

    Returns:
        The amounts, int [m], and whether they suffice, bool [m].
    """
    items = np.array([prompts[i].items for i in rows.tolist()])
    max_amounts = np.array([prompts[i].max_amount for i in rows.tolist()])
    too_few, long = np.zeros_like(items), lengths.copy()
    enough, short = max_amounts.copy(), np.full_like(lengths, -1)  # -1: not known to fit.

    def try_amounts(indices: np.ndarray, amounts: np.ndarray) -> None:
        lengths = measure(rows[indices], amounts)
        fit, unfit = lengths <= limit, lengths > limit
        enough[indices[fit]], short[indices[fit]] = amounts[fit], lengths[fit]
        too_few[indices[unfit]], long[indices[unfit]] = amounts[unfit], lengths[unfit]

    # Items and characters differ in length, so guesses are made within one kind.
    for ends in (items, max_amounts):
        unmeasured = np.flatnonzero((ends > too_few) & (short < 0))
        if len(unmeasured):
            try_amounts(unmeasured, ends[unmeasured])
    fits = short >= 0
    tries = 0
    while True:
        is_open = fits & (enough - too_few > 1) & ((enough <= items) | (short < limit))
        indices = np.flatnonzero(is_open)
        if not len(indices):
            return enough, fits
        gap = enough[indices] - too_few[indices]
        step = gap // 2
        if tries < MAX_GUESSES:
            share = (long[indices] - limit) / (long[indices] - short[indices])
            step = np.clip(np.ceil(share * gap).astype(int), 1, gap - 1)
        tries += 1
        try_amounts(indices, too_few[indices] + step)
