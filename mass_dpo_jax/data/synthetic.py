"""A made-up recommendation world with known tastes: who likes what is drawn, not collected.

Items and users are points on a sphere. A user's past follows taste alone: a history is drawn without
replacement from softmax(TASTE * <user, item>). The next choice also follows what is popular now:
it is drawn, among C candidates, from the softmax of the utility

    u = TASTE * <user, item> + log popularity(item)

where popularity falls off like Zipf's law; the other candidates are the negatives. So the best
possible ranking is known (by u), and learning which names occur together goes a long way.

The world is a fixed data set, the same for every seed: a seed shuffles the candidates. Names say
nothing about tastes.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data.examples import Example, History

NUM_ITEMS = 200
NUM_CANDIDATES = 20  # C: the chosen one and 19 negatives.
HISTORY = (4, 8)  # How many items a history has: least and most.
DIMENSIONS = 3  # K, of the space the sphere is in.
TASTE = 12.0  # Weight of taste against popularity.
ZIPF = 1.5  # Popularity of the r-th most popular item is r ** -ZIPF.
ROWS = {"train": 8000, "validation": 1000, "test": 2000}


@dataclasses.dataclass(frozen=True)
class World:
    """The items: names, their points on the unit sphere [I, K], the log of their popularity [I]."""

    names: tuple[str, ...]
    items: np.ndarray
    log_popularity: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """M users: item numbers of histories and candidates, and what is true of the candidates.

    histories: M tuples, oldest first. candidates: [M, C], the chosen one first.
    utilities: float64 [M, C], u of the candidates; ranking by them is the best possible.
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
def rows(split: str, seed: int) -> Rows:
    """All rows of a split; `seed` decides the order of the negatives and nothing else."""
    place = world()
    rng = np.random.default_rng([1, list(ROWS).index(split)])
    num_rows = ROWS[split]
    tastes = _unit(rng.normal(size=(num_rows, DIMENSIONS)))
    liking = TASTE * tastes @ place.items.T
    utilities = liking + place.log_popularity

    # Gumbel noise makes the largest entries a draw from the softmax without replacement.
    order = np.argsort(-(liking + rng.gumbel(size=liking.shape)), axis=1)
    lengths = rng.integers(HISTORY[0], HISTORY[1] + 1, size=num_rows)
    histories = tuple(
        tuple(int(item) for item in row[:length]) for row, length in zip(order, lengths, strict=True)
    )

    # Candidates are uniform among the items outside the history.
    lottery = rng.random(size=utilities.shape)
    for row, history in zip(lottery, histories, strict=True):
        row[list(history)] = np.inf
    candidates = np.argsort(lottery, axis=1)[:, :NUM_CANDIDATES]
    taken = np.take_along_axis(utilities, candidates, axis=1)
    choice = np.argmax(taken + rng.gumbel(size=taken.shape), axis=1)

    # Negatives by a random key, the chosen one before all of them.
    keys = np.random.default_rng([2, seed]).random(size=candidates.shape)
    keys[np.arange(num_rows), choice] = -1.0
    shuffled = np.argsort(keys, axis=1)
    return Rows(
        histories,
        np.take_along_axis(candidates, shuffled, axis=1),
        np.take_along_axis(taken, shuffled, axis=1),
    )


def _size(data: ConfigDict, split: str) -> int:
    limit: int = data[f"max_{split}"]
    return min(limit, ROWS[split]) if limit else ROWS[split]


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """The first `data.max_<split>` rows (0: all) of a split, as examples.

    With `data.list_candidates` the prompt names the candidates, in an order drawn by `seed`.
    """
    drawn, names = rows(split, seed), world().names
    rng = np.random.default_rng([3, seed])
    examples = []
    for i in range(_size(data, split)):
        options = [names[item] for item in drawn.candidates[i]]
        after = ". Next:"
        if data.list_candidates:
            after = f". One of: {', '.join(rng.permutation(options))}{after}"
        history = tuple(names[item] for item in drawn.histories[i])
        examples.append(
            Example(
                id=f"{split}-{i}",
                prompt=History("Enjoyed: ", history, after),
                chosen=f" {options[0]}",
                rejected=tuple(f" {name}" for name in options[1:]),
                place=f"synthetic {split} row {i + 1}",
            )
        )
    return examples


def oracle_scores(data: ConfigDict, split: str, seed: int) -> np.ndarray:
    """The true utilities [M, C] of the candidates of `load`'s examples, the chosen one first."""
    return rows(split, seed).utilities[: _size(data, split)]
