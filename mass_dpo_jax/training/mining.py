"""Mines negatives for each prompt from a catalogue of texts, by the scores of `mining_sources`."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.config import PREFERENCES
from mass_dpo_jax.config_values import parse_margins, parse_ranks
from mass_dpo_jax.data import load_examples, splits, text_files
from mass_dpo_jax.data.examples import Example, History, Text, as_text, identify_answer
from mass_dpo_jax.data.fields import check_encodable
from mass_dpo_jax.data.formats.writing import to_decimals
from mass_dpo_jax.data.row_files import read_rows
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import mining
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.mining_sources import Source
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.scored_model import score_examples
from mass_dpo_jax.utils.files import shorten

PROMPTS_AT_A_TIME = 512
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The items that negatives are taken from.

    Attributes:
        ids: what the file calls them, or their index.
        texts: their texts.
        index: from what `normalize` makes of a text to its first index.
        valid: bool [N], False for a text that stands before it already.
    """

    ids: list[Any]
    texts: list[str]
    index: dict[str, int]
    valid: np.ndarray


class Ranked(NamedTuple):
    """The best items of some prompts, best first.

    Attributes:
        rows: int [B], which examples.
        indices: int32 [B, K], items.
        scores: float32 [B, K], -inf for an item that is a positive, and where there is none.
        chosen: float64 [B], the scores of the chosen responses; NaN where one is not known.
    """

    rows: np.ndarray
    indices: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray


# From examples to the ids of those that could be scored, log-probabilities [M, C] of the responses
# of each, and which of these exist.
ScoreResponses = Callable[[Sequence[Example]], tuple[list[str], np.ndarray, np.ndarray]]


class Rows(NamedTuple):
    """The rows to mine for. Made by `load_rows`.

    Attributes:
        examples: the rows of a split.
        everything: every row of the data, whose chosen responses are nobody's negatives.
    """

    examples: list[Example]
    everything: list[Example]


def normalize(text: str) -> str:
    """Returns a text as it is compared: case and runs of white space do not count."""
    return " ".join(text.split()).casefold()


def read_catalogue(path: Path) -> Catalogue:
    """Reads one item per row: a text, or an object with `text` and perhaps `id`; or lines of .txt.

    Raises:
        UserError: the file cannot be read, has fewer than two texts, or a row is something else.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the catalogue, config.mine.catalogue, a text per row"
        )
    ids: list[Any] = []
    texts: list[str] = []
    for location, row in _read_items(path):
        if isinstance(row, UserError):
            raise row
        item = row if isinstance(row, dict) else {"text": row}
        text = item.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{location}: found {shorten(repr(row))}, expected a text, or an object with a "
                "'text' that is not empty"
            )
        name = item.get("id")
        ids.append(len(ids) if name is None else name)
        texts.append(check_encodable(text, "text", location))
    index: dict[str, int] = {}
    valid = np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
        valid[i] = index.setdefault(normalize(text), i) == i
    if len(index) < 2:
        raise UserError(f"{path}: {len(index)} different texts, expected two or more")
    if not valid.all():
        _log.warning(
            f"{path}: {(~valid).sum()} of {len(texts)} texts are repeated; each is used once"
        )
    return Catalogue(ids, texts, index, valid)


def _read_items(path: Path) -> Iterator[tuple[str, Any]]:
    if ".txt" not in path.suffixes:
        yield from read_rows(path)
        return
    for number, line in text_files.read_lines(path):
        text = text_files.decode(line, f"{path} line {number}").strip()
        if text:
            yield f"{path} line {number}", text


def load_rows(config: ConfigDict, split: str) -> Rows:
    """Loads the rows of a split to mine for, and every row of the data, whose positives count.

    A split that cannot be read beside the one asked for is left out with a warning.

    Raises:
        UserError: the split cannot be read, or its prompts list the candidates of the data.
    """
    if config.data.list_candidates and config.data.name not in PREFERENCES:
        raise UserError(
            f"config.data.list_candidates=True: the prompts of config.data.name={config.data.name} "
            "list the data's candidates, and mined negatives would not be among them; expected "
            "config.data.list_candidates=False"
        )
    data = config.data.copy_and_resolve_references()
    data.update(max_train=0, max_validation=0, max_test=0)
    rows = load_examples(data, split, config.seed)
    everything = list(rows)
    others = [] if split == "all" else [name for name in splits.NAMES if name != split]
    for other in others:
        try:
            everything += load_examples(data, other, config.seed)
        except UserError as error:
            _log.warning(f"split {other!r} is not read for chosen responses: {error}")
    return Rows(splits.limit(rows, config.data, split, config.seed), everything)


def find_positives(examples: Sequence[Example], everything: Sequence[Example]) -> list[set[str]]:
    """Returns, for each example, the texts that are never its negatives, normalized.

    They are the chosen responses of all rows of `everything` that ask the same, and the items of
    its history.
    """
    by_question: dict[Any, set[str]] = {}
    for example in everything:
        chosen = {normalize(identify_answer(t)) for t in (example.chosen, *example.also_chosen)}
        by_question.setdefault(example.question, set()).update(chosen)
    found = []
    for example in examples:
        history = example.prompt.items if isinstance(example.prompt, History) else ()
        found.append(by_question[example.question] | {normalize(item) for item in history})
    return found


def chosen_index(examples: Sequence[Example], catalogue: Catalogue) -> np.ndarray:
    """Returns the item that each chosen response is, -1 where the catalogue lacks it."""
    keys = (normalize(identify_answer(example.chosen)) for example in examples)
    return np.array([catalogue.index.get(key, -1) for key in keys])


def rank(
    source: Source, catalogue: Catalogue, positives: Sequence[set[str]], count: int
) -> Iterator[Ranked]:
    """Yields the best items of each prompt, block by block: `count` or more that are no positives.

    Args:
        source: the scores.
        catalogue: the items.
        positives: of each prompt, as `find_positives` returns them.
        count: how many are needed.
    """
    banned = [
        {catalogue.index[text] for text in texts if text in catalogue.index} for texts in positives
    ]
    k = count + max(map(len, banned))
    starts = range(0, len(banned), PROMPTS_AT_A_TIME)
    for start in scoring.progress_bar(starts, desc="mining", unit="block"):
        rows = np.arange(start, min(start + PROMPTS_AT_A_TIME, len(banned)))
        best = mining.rank_items(functools.partial(source.score, rows), catalogue.valid, k)
        scores, indices = np.array(best[0]), best[1]
        for place, row in enumerate(rows):
            scores[place, np.isin(indices[place], list(banned[row]))] = -np.inf
        yield Ranked(rows, indices, scores, source.score_chosen(rows))


def rescore(
    ranked: Iterable[Ranked],
    examples: Sequence[Example],
    catalogue: Catalogue,
    size: int,
    score: ScoreResponses,
) -> Iterator[Ranked]:
    """Yields the best `size` items of each prompt in the order of their log-probabilities.

    All shortlists are held in memory, so that few shapes of batches are compiled.

    Raises:
        UserError: the model cannot score a row, or its log-probabilities are not finite.
    """
    shortlists = [
        indices[np.isfinite(scores)][:size]
        for block in ranked
        for indices, scores in zip(block.indices, block.scores, strict=True)
    ]
    pools = [
        replace_negatives(
            example,
            as_responses(example, catalogue, indices),
            f"{example.place} with its shortlist from the catalogue",
        )
        for example, indices in zip(examples, shortlists, strict=True)
        if len(indices)
    ]
    ids, logps, valid = score(pools) if pools else ([], np.zeros((0, 1)), np.ones((0, 1), bool))
    if not np.isfinite(logps[valid]).all():
        raise UserError("the model's log-probabilities are not finite: did its run diverge?")
    scored = {name: row for row, name in enumerate(ids)}  # Those too long may be missing.
    for start in range(0, len(examples), PROMPTS_AT_A_TIME):
        rows = np.arange(start, min(start + PROMPTS_AT_A_TIME, len(examples)))
        scores = np.full((len(rows), size), -np.inf, np.float32)
        indices, chosen = np.zeros(scores.shape, np.int32), np.full(len(rows), np.nan)
        for place, row in enumerate(rows.tolist()):
            if (k := scored.get(examples[row].id)) is None:
                continue
            count = len(shortlists[row])
            values = np.where(valid[k], logps[k], -np.inf)
            order = np.argsort(-values[1 : 1 + count], kind="stable")
            chosen[place] = values[0]
            scores[place, :count] = values[1:][order]
            indices[place, :count] = shortlists[row][order]
        yield Ranked(rows, indices, scores, chosen)


def mine_rows(
    config: ConfigDict,
    rows: Rows,
    catalogue: Catalogue,
    source: Source,
    model: tuple[Policy, Any] | None,
    number: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yields each example with negatives as `config.mine` says; see `mine`.

    Args:
        config: the configuration; with a shortlist all that scoring reads, else `mine` and `seed`.
        rows: the examples, and those whose chosen responses are no negatives.
        catalogue: the items.
        source: the scores.
        model: policy and weights that order shortlists; None: there are no shortlists.
        number: number of the mining, where the same rows are mined for again.
    """
    settings = config.mine
    first, last = parse_ranks(settings.ranks)
    positives = find_positives(*rows)
    ranked = rank(source, catalogue, positives, settings.shortlist or last)
    if settings.shortlist:
        assert model is not None
        policy, params = model

        def score(examples: Sequence[Example]) -> tuple[list[str], np.ndarray, np.ndarray]:
            found = score_examples(config, policy, params, examples)
            return found.ids, found.logps, found.lengths > 0

        ranked = rescore(ranked, rows.examples, catalogue, settings.shortlist, score)
    limits = mining.Limits(first, last, *parse_margins(settings))
    return mine(
        ranked, rows.examples, catalogue, limits, settings.n, settings.draw, settings.temperature,
        config.seed, number,
    )  # fmt: skip


def mine(
    ranked: Iterable[Ranked],
    examples: Sequence[Example],
    catalogue: Catalogue,
    limits: mining.Limits,
    n: int,
    draw: str,
    temperature: float,
    seed: int,
    number: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yields each example with n negatives from the catalogue, in the order of the examples.

    An example for which no item is left is left out, and one with fewer than n has those; both are
    counted in a warning.

    Args:
        ranked: the best items of the examples, in blocks, in the order of the examples.
        examples: the examples.
        catalogue: the items.
        limits: the ranks and scores from which negatives are drawn.
        n: how many are drawn for an example.
        draw: one of `selection.mining.DRAWS`.
        temperature: divides the scores of the draw `softmax`.
        seed: of the draws; an example's draw depends on it, on `number` and on its row alone.
        number: draws with other numbers are independent.

    Raises:
        UserError: a chosen response has no score although margins need it, or nothing is left.
    """
    empty, few = 0, 0
    key = jax.random.key(seed)
    if number:  # The draws of the first are those of docs/results/mined_negatives.
        key = jax.random.fold_in(key, number)
    for rows, indices, scores, chosen in ranked:
        exists = np.isfinite(scores)
        ranks = np.cumsum(exists, axis=1) - 1
        mask = exists & (ranks >= limits.first) & (ranks < limits.last)
        for place, row in enumerate(rows):
            if limits.need_chosen and np.isnan(chosen[place]) and exists[place].any():
                raise UserError(
                    f"{examples[row].place}: its chosen response is not in the catalogue, so there "
                    "is no score that a margin could be measured from; add it, or use --max_score"
                )
            value = None if np.isnan(chosen[place]) else float(chosen[place])
            mask[place] &= limits.allow(scores[place], value)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(rows))
        drawn, pi, weights = map(
            np.asarray,
            mining.draw_items(
                jnp.asarray(scores), jnp.asarray(mask), n, draw, jnp.float32(temperature), keys
            ),
        )
        for place, row in enumerate(rows):
            picks = np.flatnonzero(drawn[place])
            empty, few = empty + (len(picks) == 0), few + (0 < len(picks) < n)
            if len(picks):
                yield _make_row(
                    examples[row], catalogue, indices[place, picks], scores[place, picks],
                    pi[place, picks], weights[place, picks],
                )  # fmt: skip
    if empty == len(examples):
        raise UserError(
            f"no item of the catalogue is left for any of {empty} prompts: widen "
            "config.mine.ranks or the margins"
        )
    if empty or few:
        _log.warning(
            f"no item of the catalogue is left for {empty} of {len(examples)} prompts, and fewer "
            f"than {n} for {few}: widen config.mine.ranks or the margins"
        )


def _make_row(
    example: Example,
    catalogue: Catalogue,
    indices: np.ndarray,
    scores: np.ndarray,
    pi: np.ndarray,
    weights: np.ndarray,
) -> dict[str, Any]:
    return {
        "id": example.id,
        "prompt": as_text(example.prompt),
        "chosen": example.chosen,
        "rejected": as_responses(example, catalogue, indices),
        **({"tools": example.tools} if example.tools else {}),
        "mined_ids": [catalogue.ids[i] for i in indices],
        "mined_scores": to_decimals(scores),
        "mined_probabilities": to_decimals(pi),
        "mined_weights": to_decimals(weights),
    }


def as_responses(example: Example, catalogue: Catalogue, indices: np.ndarray) -> list[Text]:
    """Returns items in the form of the chosen response: TRL takes no mixture of both."""
    texts = [catalogue.texts[i] for i in indices]
    if isinstance(example.chosen, str):
        return [*texts]
    return [[{"role": "assistant", "content": text}] for text in texts]


def replace_negatives(
    example: Example,
    rejected: Sequence[Text],
    place: str,
    probabilities: Sequence[float] | None = None,
) -> Example:
    """Returns an example with other negatives, of which no grades are known."""
    return dataclasses.replace(
        example, rejected=tuple(rejected), place=place, scores=None, also_chosen=(), ranks=None,
        probabilities=None if probabilities is None else tuple(probabilities),
    )  # fmt: skip
