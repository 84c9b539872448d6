"""Prompts as token ids under the length limit.

A prompt that is too long keeps what the template writes around its text. What goes is, in this
order: the oldest items of its history, or the oldest turns of its conversation; and then the
beginning of its text, or of its last message.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mass_dpo_jax.data.examples import Example, History, Message, Text
from mass_dpo_jax.data.ragged import Flat
from mass_dpo_jax.data.render import Renderer
from mass_dpo_jax.errors import UserError

Prompt = Text | History
GUESSES = 4  # Cuts that are guessed from lengths before halving begins.


@dataclasses.dataclass
class Prompts:
    """The prompts of some examples as the model sees them; lists are in the examples' order."""

    prompts: list[Prompt]  # What is left of them.
    texts: list[str]  # Rendered.
    tokens: Flat


class Encoder:
    """Turns prompts into token ids, with `first` before each and never twice."""

    def __init__(
        self,
        renderer: Renderer,
        encode: Callable[[Sequence[str]], Flat],
        first: Sequence[int],
        bos_id: int | None,
        data: Any,
    ):
        self._renderer = renderer
        self._encode = encode
        self._first = first
        self._bos_id = bos_id
        self._limit = data.max_prompt_length
        self._on_long = data.long_prompt

    def __call__(
        self,
        examples: Sequence[Example],
        bad: dict[int, UserError],
        dropped: set[int],
        cut: collections.Counter[str],
    ) -> Prompts:
        """The prompts of all examples; those of `bad` and `dropped` ones mean nothing.

        Adds to `bad` what cannot be used, to `dropped` what `data.long_prompt` leaves out, and to
        `cut` what was changed. Both are by the example's place in the list.
        """
        prompts: list[Prompt] = [example.prompt for example in examples]
        texts = [""] * len(examples)
        for i, example in enumerate(examples):
            try:
                texts[i] = self._renderer.prompt(example.prompt, example.place)
            except UserError as error:
                bad[i] = error
        found = Prompts(prompts, texts, self._tokens(texts))
        for i in np.flatnonzero(found.tokens.lengths == 0).tolist():
            bad.setdefault(i, UserError(f"{examples[i].place}: the prompt has no tokens"))
        long = [
            i for i in np.flatnonzero(found.tokens.lengths > self._limit).tolist() if i not in bad
        ]
        if not long:
            return found
        if self._on_long == "drop":
            cut["prompts_too_long"] += len(long)
            dropped.update(long)
        elif self._on_long == "error":
            for i in long:
                bad[i] = UserError(
                    f"{examples[i].place}: the prompt has {found.tokens.lengths[i]} tokens, "
                    f"config.data.max_prompt_length is {self._limit}: raise it, or set "
                    "config.data.long_prompt to cut or drop"
                )
        else:
            self._shorten(examples, long, found, bad, cut)
        return found

    def _tokens(self, texts: Sequence[str]) -> Flat:
        return self._encode(texts).starting_with(self._first)

    def _shorten(
        self,
        examples: Sequence[Example],
        long: Sequence[int],
        found: Prompts,
        bad: dict[int, UserError],
        cut: collections.Counter[str],
    ) -> None:
        """Puts shorter prompts in the place of long ones."""
        # With a template texts are cut, so that tokens are those of a shorter message. Where the
        # whole prompt is one text its tokens are cut, which costs nothing.
        inside = not self._renderer.special_tokens
        cuts = {i: _Cuts(examples[i].prompt, inside) for i in long}

        def render(i: int, amount: int) -> str:
            try:
                return self._renderer.prompt(cuts[i].prompt(amount), examples[i].place)
            except UserError as error:
                bad[i] = error
                return ""

        def lengths(rows: np.ndarray, amounts: np.ndarray) -> np.ndarray:
            texts = [render(*pair) for pair in zip(rows.tolist(), amounts.tolist(), strict=True)]
            return self._tokens(texts).lengths

        rows = np.array(long)
        amounts, fits = _fewest(rows, found.tokens.lengths[rows], cuts, lengths, self._limit)
        for i, amount, fit in zip(rows.tolist(), amounts.tolist(), fits.tolist(), strict=True):
            prompt = cuts[i].prompt(amount)
            items = min(amount, cuts[i].items)
            cut["prompts_with_shorter_history"] += items > 0
            cut["history_items_dropped"] += items
            cut["prompts_truncated"] += not fit or amount > items
            found.prompts[i] = prompt
            found.texts[i] = render(i, amount)
        found.tokens = self._tokens(found.texts)
        if inside:
            for i in rows[~fits].tolist():
                message = (
                    f"{examples[i].place}: without its text the prompt has "
                    f"{found.tokens.lengths[i]} tokens still, config.data.max_prompt_length is "
                    f"{self._limit}: raise it, or leave such prompts out with "
                    "config.data.long_prompt=drop"
                )
                bad.setdefault(i, UserError(message))
        else:
            found.tokens = found.tokens.cut_inside(self._limit, self._heads(found.tokens))

    def _heads(self, tokens: Flat) -> np.ndarray:
        """How many tokens at the start of each prompt stay."""
        if self._first or self._bos_id is None:
            return np.full(len(tokens.lengths), min(len(self._first), self._limit - 1))
        starts = np.cumsum(tokens.lengths) - tokens.lengths
        begins = np.zeros(len(starts), np.int64)
        some = tokens.lengths > 0
        begins[some] = tokens.tokens[starts[some]] == self._bos_id
        return np.minimum(begins, self._limit - 1)


class _Cuts:
    """A prompt with any amount taken away: first whole items, then characters of its text."""

    def __init__(self, prompt: Prompt, inside: bool):
        self._whole = prompt
        self._turns: list[list[Message]] = []
        if isinstance(prompt, History):
            self.items = len(prompt.items) - 1
        elif isinstance(prompt, list):
            self._turns = _turns(prompt)
            self.items = len(self._turns) - 1
        else:
            self.items = 0
        shortest = self.prompt(self.items)
        self.most = self.items + (len(_text(shortest)) - 1 if inside else 0)

    def prompt(self, amount: int) -> Prompt:
        items = min(amount, self.items)
        rest = self._without(items)
        characters = amount - items
        if not characters:
            return rest
        text = _text(rest)[characters:]
        if isinstance(rest, list):
            return [*rest[:-1], {**rest[-1], "content": text}]
        return text

    def _without(self, items: int) -> Prompt:
        if not items:
            return self._whole
        if isinstance(self._whole, History):
            return self._whole.without_oldest(items)
        assert isinstance(self._whole, list)
        system = [message for message in self._whole[:1] if message["role"] == "system"]
        return system + [message for turn in self._turns[items:] for message in turn]


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """A user's message and what follows it, each, without the system's message at the start."""
    turns: list[list[Message]] = []
    for i, message in enumerate(messages):
        if i == 0 and message["role"] == "system":
            continue
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, History):
        return prompt.text
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _fewest(
    rows: np.ndarray,
    whole: np.ndarray,
    cuts: Mapping[int, _Cuts],
    lengths: Callable[[np.ndarray, np.ndarray], np.ndarray],
    limit: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The least amounts to take away, int [N], and whether they are enough, bool [N].

    Searches all rows side by side. The least amount is in (too_few, enough]; characters need not
    be the fewest where the limit is met to the token.
    """
    items = np.array([cuts[i].items for i in rows.tolist()])
    most = np.array([cuts[i].most for i in rows.tolist()])
    too_few, long = np.zeros_like(items), whole.copy()
    enough, short = most.copy(), np.full_like(whole, -1)  # -1: not known to fit.
    # Items and characters differ in length, so guesses are made within one of them.
    for ends in (items, most):
        open_ = np.flatnonzero((ends > too_few) & (short < 0))
        if len(open_):
            found = lengths(rows[open_], ends[open_])
            fit = found <= limit
            enough[open_[fit]], short[open_[fit]] = ends[open_[fit]], found[fit]
            too_few[open_[~fit]], long[open_[~fit]] = ends[open_[~fit]], found[~fit]
    fits = short >= 0
    tries = 0
    while True:
        unsettled = fits & (enough - too_few > 1) & ((enough <= items) | (short < limit))
        at = np.flatnonzero(unsettled)
        if not len(at):
            return enough, fits
        gap = enough[at] - too_few[at]
        step = gap // 2
        if tries < GUESSES:
            per = (long[at] - limit) / (long[at] - short[at])
            step = np.clip(np.ceil(per * gap).astype(int), 1, gap - 1)
        tries += 1
        middle = too_few[at] + step
        found = lengths(rows[at], middle)
        fit = found <= limit
        enough[at[fit]], short[at[fit]] = middle[fit], found[fit]
        too_few[at[~fit]], long[at[~fit]] = middle[~fit], found[~fit]
