"""Describes a data set as a model sees it: pools, lengths, what was cut, and the first rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import config_checks
from mass_dpo_jax.data import splits
from mass_dpo_jax.data.examples import Example, History, Text
from mass_dpo_jax.data.split_cache import open_splits
from mass_dpo_jax.data.token_cache import tokenize_once
from mass_dpo_jax.data.tokenizer import load_tokenizer
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.training.model_paths import find_description
from mass_dpo_jax.utils.cache import cache_folder


class Row(NamedTuple):
    id: str
    prompt: str
    responses: list[str]  # The chosen one first.


class View(NamedTuple):
    """A split as a model sees it.

    Attributes:
      unit: what lengths count.
      prompts: int `[M]`, lengths.
      responses: int `[M, C]`, lengths; 0 where there is no candidate.
      cut: what the length limits changed, and repeated negatives: counts.
      shown: the first rows.
    """

    unit: str
    prompts: np.ndarray
    responses: np.ndarray
    cut: dict[str, int]
    shown: list[Row]


def describe(config: ConfigDict, show: int) -> Iterator[str]:
    """Lines of text about every split that has rows, with the first `show` rows of the first one.

    Raises:
      UserError: something in the configuration, the data or the tokenizer is wrong.
    """
    config = config_checks.validate(config)
    tokenizer = None
    cache = cache_folder(config.cache_dir)
    shown: list[str] = []
    if config.model.path:
        tokenizer = load_tokenizer(find_description(Path(config.model.path)))
    else:
        yield "config.model.path is empty: lengths are in words, nothing is rendered or cut"
    loaded = open_splits(cache, config.data, tuple(splits.NAMES), config.seed)
    for split, examples in loaded.items():
        if not examples:
            yield f"{split}: no rows"
            continue
        if tokenizer is None:
            view = _in_words(examples, show)
        else:
            tokens = tokenize_once(cache, examples, tokenizer, config.data, progress=True)
            view = _in_tokens(tokens, tokenizer, show)
        yield from _summary(split, view)
        shown += _rows(split, view)
        show = 0
    yield from shown


def _in_words(examples: Sequence[Example], show: int) -> View:
    responses = np.zeros((len(examples), 1 + max(len(e.rejected) for e in examples)), np.int64)
    for lengths, example in zip(responses, examples, strict=True):
        texts = (example.chosen, *example.rejected)
        lengths[: len(texts)] = [len(_text(text).split()) for text in texts]
    prompts = np.array([len(_text(e.prompt).split()) for e in examples])
    rows = [
        Row(e.id, _text(e.prompt), [_text(text) for text in (e.chosen, *e.rejected)])
        for e in examples[:show]
    ]
    return View("words", prompts, responses, {}, rows)


def _in_tokens(tokens: Tokens, tokenizer: Any, show: int) -> View:
    rows = []
    for i, name in enumerate(tokens.ids[:show]):
        there = np.flatnonzero(tokens.response_lengths[i])
        responses = [tokenizer.decode(tokens.response(i, c)) for c in there.tolist()]
        rows.append(Row(name, tokenizer.decode(tokens.prompt(i)), responses))
    return View("tokens", tokens.prompt_lengths, tokens.response_lengths, tokens.cut, rows)


def _summary(split: str, view: View) -> Iterator[str]:
    pools = (view.responses[:, 1:] > 0).sum(1)
    yield f"{split}: {len(view.prompts)} rows"
    yield (
        f"  rejected responses: min {pools.min()}, median {np.median(pools):g}, max {pools.max()}"
    )
    responses = view.responses[view.responses > 0]
    for what, lengths in (("prompt", view.prompts), ("response", responses)):
        yield (
            f"  {what} {view.unit}: mean {lengths.mean():.1f}, median {np.median(lengths):g}, "
            f"95% {np.quantile(lengths, 0.95, method='inverted_cdf')}, max {lengths.max()}"
        )
    counts = [f"{count} {name.replace('_', ' ')}" for name, count in view.cut.items() if count]
    if view.unit == "tokens":
        yield f"  cut: {', '.join(counts) or 'nothing'}"


def _rows(split: str, view: View) -> Iterator[str]:
    for row in view.shown:
        yield f"\n--- {split} {row.id}"
        yield row.prompt
        chosen, *rejected = row.responses
        yield f"[chosen] {chosen}"
        for text in rejected:
            yield f"[rejected] {text}"


def _text(text: Text | History) -> str:
    if isinstance(text, History):
        return text.text
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)
