"""A made-up recommendation world with known tastes: who likes what is drawn, not collected.

Items and users are points on a sphere. A user's past follows taste alone: a history is drawn
without replacement from softmax(TASTE * <user, item>). The next choice also follows what is
popular now: it is drawn, among C candidates, from the softmax of the utility

    u = TASTE * <user, item> + log popularity(item)

where popularity falls off like Zipf's law; the other candidates are the negatives. So the best
possible ranking is known (by u), and learning which names occur together goes a long way.

The world is a fixed data set, the same for every seed: a seed shuffles the candidates and nothing
else. Names say nothing about tastes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError

NUM_ITEMS = 100
NUM_CANDIDATES = 20  # C: the chosen one and 19 negatives.
HISTORY = (4, 8)  # How many items a history has: least and most.
DIMENSIONS = 2  # K, of the space the sphere is in: a circle, which a small model learns soon.
TASTE = 10.0  # Weight of taste against popularity.
ZIPF = 1.2  # Popularity of the r-th most popular item is r ** -ZIPF.
ROWS = {"train": 8000, "validation": 1000, "test": 2000}


@dataclasses.dataclass(frozen=True)
class World:
    """The items: names, their points on the unit sphere [I, K], the log of their popularity [I]."""

    names: tuple[str, ...]
    items: np.ndarray
    log_popularity: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """The users of a split, items by their numbers.

    histories: M tuples, oldest first. candidates: int [M, C], the chosen one first.
    utilities: float64 [M, I], u of every item; ranking by them is the best possible.
    """

    histories: tuple[tuple[int, ...], ...]
    candidates: np.ndarray
    utilities: np.ndarray


@functools.cache
def world() -> World:
    """The one world that every seed shares."""
    rng = np.random.default_rng(0)
    items = _unit(rng.normal(size=(NUM_ITEMS, DIMENSIONS)))
    ranks = rng.permutation(NUM_ITEMS) + 1
    return World(_names(rng), items, -ZIPF * np.log(ranks))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _names(rng: np.random.Generator) -> tuple[str, ...]:
    """Distinct pronounceable names of two to four syllables, such as `Velumo`."""
    syllables = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < NUM_ITEMS:
        parts = rng.choice(syllables, size=rng.integers(2, 5))
        ending = rng.choice(["", "", "n", "r", "s", "x"])
        names["".join([*parts, ending]).capitalize()] = None
    return tuple(names)


@functools.cache
def _rows(split: str) -> Rows:
    place = world()
    rng = np.random.default_rng([1, list(ROWS).index(split)])
    num_rows = ROWS[split]
    users = _unit(rng.normal(size=(num_rows, DIMENSIONS)))
    liking = TASTE * users @ place.items.T
    utilities = liking + place.log_popularity

    # Gumbel noise makes the largest entries a draw from the softmax without replacement.
    order = np.argsort(-(liking + rng.gumbel(size=liking.shape)), axis=1)
    lengths = rng.integers(HISTORY[0], HISTORY[1] + 1, size=num_rows)
    histories = tuple(
        tuple(map(int, row[:length])) for row, length in zip(order, lengths, strict=True)
    )

    # Candidates are uniform among the items outside the history.
    lottery = rng.random(size=utilities.shape)
    for row, history in zip(lottery, histories, strict=True):
        row[list(history)] = np.inf
    candidates = np.argsort(lottery, axis=1)[:, :NUM_CANDIDATES]
    noisy = np.take_along_axis(utilities, candidates, axis=1)
    noisy += rng.gumbel(size=noisy.shape)
    choice = np.argmax(noisy, axis=1)[:, None]
    chosen = np.take_along_axis(candidates, choice, axis=1)
    np.put_along_axis(candidates, choice, candidates[:, :1], axis=1)
    candidates[:, :1] = chosen
    return Rows(histories, candidates, utilities)


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """All examples of a split: "train", "validation" or "test".

    The rejected responses and, with `data.list_candidates`, the list of all candidates in the
    prompt are in an order drawn by seed and row.

    Raises:
      UserError: there is no such split.
    """
    if split not in ROWS:
        raise UserError(f"synthetic: no split {split!r}; found {', '.join(ROWS)}")
    names, rows = world().names, _rows(split)
    examples = []
    for i, (history, candidates) in enumerate(zip(rows.histories, rows.candidates, strict=True)):
        order = np.random.default_rng([seed, i, 3]).permutation(candidates)
        after = ". Next:"
        if data.list_candidates:
            after = f". One of: {', '.join(names[item] for item in order)}{after}"
        examples.append(
            Example(
                id=f"{split}-{i}",
                prompt=History("Enjoyed: ", tuple(names[item] for item in history), after),
                # The space belongs to the name's first token, as it does in the history.
                chosen=f" {names[candidates[0]]}",
                rejected=tuple(f" {names[item]}" for item in order if item != candidates[0]),
                place=f"synthetic {split} row {i}",
            )
        )
    return examples


def oracle_scores(examples: Sequence[Example]) -> np.ndarray:
    """The true utilities of the candidates of `load`'s examples, the chosen one first: [M, C]."""
    number = {f" {name}": item for item, name in enumerate(world().names)}
    scores = np.empty((len(examples), NUM_CANDIDATES))
    for row, example in zip(scores, examples, strict=True):
        split, _, i = example.id.partition("-")
        items = [number[str(text)] for text in (example.chosen, *example.rejected)]
        row[:] = _rows(split).utilities[int(i), items]
    return scores
