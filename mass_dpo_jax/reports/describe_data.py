"""Describes a dataset as a model sees it: pools, lengths, what was cut, and the first rows.

The text that `python -m mass_dpo_jax.data` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import config_checks
from mass_dpo_jax.data import splits
from mass_dpo_jax.data.examples import Example, format_text
from mass_dpo_jax.data.split_cache import open_splits
from mass_dpo_jax.data.token_cache import tokenize_once
from mass_dpo_jax.data.tokenizer import load_tokenizer
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.training.model_paths import fetch_models, find_description
from mass_dpo_jax.utils.cache import cache_folder


class Row(NamedTuple):
    """A row as text.

    Attributes:
        id: the example's id.
        prompt: its prompt.
        responses: its responses, the chosen one first.
    """

    id: str
    prompt: str
    responses: list[str]


class SplitView(NamedTuple):
    """A split as a model sees it.

    Attributes:
        unit: unit of the lengths: "tokens" or "words".
        prompts: int [M], lengths.
        responses: int [M, C], lengths; 0 where there is no candidate.
        cut: counts of applied length limits and of repeated negatives, by name.
        rows: the first rows.
    """

    unit: str
    prompts: np.ndarray
    responses: np.ndarray
    cut: dict[str, int]
    rows: list[Row]


def describe(config: ConfigDict, show: int) -> Iterator[str]:
    """Yields lines of text about every split that has rows, then the first rows.

    Args:
        config: names the data and, for lengths in tokens, the model.
        show: rows of the first split to show in full.

    Raises:
        UserError: something in the configuration, the data or the tokenizer is wrong.
    """
    config = config_checks.validate(config)
    tokenizer = None
    cache = cache_folder(config.cache_dir)
    row_lines: list[str] = []
    if config.model.path:
        config = fetch_models(config, weights=False)
        tokenizer = load_tokenizer(find_description(Path(config.model.path)))
    else:
        yield "config.model.path is empty: lengths are in words, nothing is rendered or cut"
    loaded = open_splits(cache, config.data, tuple(splits.NAMES), config.seed)
    for split, examples in loaded.items():
        if not examples:
            yield f"{split}: no rows"
            continue
        if tokenizer is None:
            view = _view_words(examples, show)
        else:
            tokens = tokenize_once(cache, examples, tokenizer, config.data, progress=True)
            view = _view_tokens(tokens, tokenizer, show)
        yield from _summarize(split, view)
        row_lines += _row_lines(split, view)
        show = 0
    yield from row_lines


def _view_words(examples: Sequence[Example], show: int) -> SplitView:
    prompts = [format_text(example.prompt) for example in examples]
    candidates = [[format_text(text) for text in (e.chosen, *e.rejected)] for e in examples]
    responses = np.zeros((len(examples), max(map(len, candidates))), np.int64)
    for lengths, texts in zip(responses, candidates, strict=True):
        lengths[: len(texts)] = [len(text.split()) for text in texts]
    rows = [Row(examples[i].id, prompts[i], candidates[i]) for i in range(min(show, len(prompts)))]
    return SplitView(
        "words", np.array([len(prompt.split()) for prompt in prompts]), responses, {}, rows
    )


def _view_tokens(tokens: Tokens, tokenizer: Any, show: int) -> SplitView:
    rows = []
    for i, example_id in enumerate(tokens.ids[:show]):
        candidates = np.flatnonzero(tokens.response_lengths[i]).tolist()
        prompt = tokens.prompt(i)
        responses = [_decode_after(prompt, tokens.response(i, c), tokenizer) for c in candidates]
        rows.append(Row(example_id, tokenizer.decode(prompt), responses))
    return SplitView("tokens", tokens.prompt_lengths, tokens.response_lengths, tokens.cut, rows)


def _decode_after(prompt: np.ndarray, response: np.ndarray, tokenizer: Any) -> str:
    """Returns a response's text; of one alone, some tokenizers leave out the first space."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt, response]))
    if not whole.startswith(before):  # Characters lie across the border.
        return str(tokenizer.decode(response))
    return str(whole.removeprefix(before))


def _summarize(split: str, view: SplitView) -> Iterator[str]:
    pools = (view.responses[:, 1:] > 0).sum(1)
    yield f"{split}: {len(view.prompts)} rows"
    yield (
        f"  rejected responses: min {pools.min()}, median {np.median(pools):g}, max {pools.max()}"
    )
    responses = view.responses[view.responses > 0]
    for name, lengths in (("prompt", view.prompts), ("response", responses)):
        yield (
            f"  {name} {view.unit}: mean {lengths.mean():.1f}, median {np.median(lengths):g}, "
            f"95% {np.quantile(lengths, 0.95, method='inverted_cdf')}, max {lengths.max()}"
        )
    if view.unit == "tokens":
        counts = [f"{n} {name.replace('_', ' ')}" for name, n in view.cut.items() if n]
        yield f"  cut: {', '.join(counts) or 'nothing'}"


def _row_lines(split: str, view: SplitView) -> Iterator[str]:
    for row in view.rows:
        chosen, *rejected = row.responses
        yield from (f"\n--- {split} {row.id}", row.prompt, f"[chosen] {chosen}")
        yield from (f"[rejected] {text}" for text in rejected)
