"""A made-up recommendation world with known tastes: who likes what is drawn, not collected.

Items and users are points on a sphere. A user's past follows taste alone: a history is drawn
without replacement from softmax(taste * <user, item>). The next choice also follows what is
popular now: it is drawn, among C candidates, from the softmax of the utility

    u = taste * <user, item> + log popularity(item)

where popularity falls off like Zipf's law; the other candidates are the negatives. So the best
possible ranking is known (by u), and learning which names occur together goes a long way.

There are three such worlds, named by `data.path`: the plain one (also ""), `clusters`, where a
prompt's candidates are near copies of a few, and `long`, with pools of 59 negatives. Each is a
fixed data set, the same for every seed: a seed shuffles the candidates and nothing else. Names say
nothing about tastes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError

ROWS = {"train": 8000, "validation": 1000, "test": 2000}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a world is made of.

    Attributes:
      number: of the world; its draws are a function of it.
      items: how many there are.
      candidates: C, the chosen one and C - 1 negatives.
      dimensions: K, of the space the sphere is in. 2 is a circle, which a small model learns soon.
      taste: weight of taste against popularity.
      zipf: popularity of the r-th most popular item is r ** -zipf.
      history: how many items a history has, least and most.
      centres: points that the items lie around, the same number around each; 0: items lie anywhere.
      spread: standard deviation of an item around its centre, in each dimension.
      centres_per_prompt: so many centres a prompt's candidates come from.
    """

    number: int
    items: int = 100
    candidates: int = 20
    dimensions: int = 2
    taste: float = 10.0
    zipf: float = 1.2
    history: tuple[int, int] = (4, 8)
    centres: int = 0
    spread: float = 0.0
    centres_per_prompt: int = 0


RECIPES = {
    "plain": Recipe(0),
    # Some five candidates of a prompt are near copies of each other in taste, and so on: a set of
    # negatives drawn at random says the same thing twice.
    "clusters": Recipe(
        1, items=160, dimensions=3, centres=16, spread=0.03, centres_per_prompt=4, zipf=0.8
    ),
    "long": Recipe(2, items=200, candidates=60),
}


@dataclasses.dataclass(frozen=True)
class World:
    """The items: names, points on the unit sphere [I, K], log of their popularity, centres [I]."""

    names: tuple[str, ...]
    items: np.ndarray
    log_popularity: np.ndarray
    centres: np.ndarray


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
def world(name: str = "plain") -> World:
    """The items of a world, which every seed shares."""
    how = RECIPES[name]
    rng = np.random.default_rng(how.number)
    items = _unit(rng.normal(size=(how.items, how.dimensions)))
    ranks = rng.permutation(how.items) + 1
    names = _names(how.items, rng)
    centres = np.arange(how.items) % max(1, how.centres)
    if how.centres:  # The first item of each centre is the centre; the others move close to it.
        noise = how.spread * rng.normal(size=items.shape)
        items = _unit(items[centres] + noise)
    return World(names, items, -how.zipf * np.log(ranks), centres)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _names(count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Distinct pronounceable names of two to four syllables, such as `Velumo`."""
    syllables = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        parts = rng.choice(syllables, size=rng.integers(2, 5))
        ending = str(rng.choice(["", "", "n", "r", "s", "x"]))
        names["".join([*parts, ending]).capitalize()] = None
    return tuple(names)


@functools.cache
def _rows(name: str, split: str) -> Rows:
    how, place = RECIPES[name], world(name)
    rng = np.random.default_rng([1, list(ROWS).index(split), how.number])
    num_rows = ROWS[split]
    users = _unit(rng.normal(size=(num_rows, how.dimensions)))
    liking = how.taste * users @ place.items.T
    utilities = liking + place.log_popularity

    # Gumbel noise makes the largest entries a draw from the softmax without replacement.
    order = np.argsort(-(liking + rng.gumbel(size=liking.shape)), axis=1)
    lengths = rng.integers(how.history[0], how.history[1] + 1, size=num_rows)
    histories = tuple(
        tuple(map(int, row[:length])) for row, length in zip(order, lengths, strict=True)
    )

    # Candidates are uniform among the items outside the history, around the prompt's centres.
    lottery = rng.random(size=utilities.shape)
    if how.centres:
        rank = rng.random(size=(num_rows, how.centres)).argsort(axis=1).argsort(axis=1)
        lottery += rank[:, place.centres] >= how.centres_per_prompt  # The others come later.
    for row, history in zip(lottery, histories, strict=True):
        row[list(history)] = np.inf
    candidates = np.argsort(lottery, axis=1)[:, : how.candidates]
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
      UserError: there is no such world or split.
    """
    name = data.path or "plain"
    if name not in RECIPES:
        raise UserError(
            f"config.data.path={data.path!r}: no such world; expected {', '.join(RECIPES)}"
        )
    if split not in ROWS:
        raise UserError(f"synthetic: no split {split!r}; found {', '.join(ROWS)}")
    names, rows = world(name).names, _rows(name, split)
    # Ids say the world, for `oracle_scores`; those of the plain one never did.
    prefix = split if name == "plain" else f"{name}-{split}"
    examples = []
    for i, (history, candidates) in enumerate(zip(rows.histories, rows.candidates, strict=True)):
        order = np.random.default_rng([seed, i, 3]).permutation(candidates)
        after = ". Next:"
        if data.list_candidates:
            after = f". One of: {', '.join(names[item] for item in order)}{after}"
        examples.append(
            Example(
                id=f"{prefix}-{i}",
                prompt=History("Enjoyed: ", tuple(names[item] for item in history), after),
                # The space belongs to the name's first token, as it does in the history.
                chosen=f" {names[candidates[0]]}",
                rejected=tuple(f" {names[item]}" for item in order if item != candidates[0]),
                place=f"synthetic {split} row {i}",
            )
        )
    return examples


def oracle_scores(examples: Sequence[Example]) -> np.ndarray:
    """The true utilities of the candidates of `load`'s examples, the chosen one first: [M, C].

    The examples are of one world.
    """
    name = _place(examples[0])[0] if examples else "plain"
    number = {f" {name}": item for item, name in enumerate(world(name).names)}
    scores = np.empty((len(examples), RECIPES[name].candidates))
    for row, example in zip(scores, examples, strict=True):
        _, split, i = _place(example)
        items = [number[str(text)] for text in (example.chosen, *example.rejected)]
        row[:] = _rows(name, split).utilities[i, items]
    return scores


def _place(example: Example) -> tuple[str, str, int]:
    """World, split and row, from an example's id."""
    *name, split, i = example.id.split("-")
    return (name[0] if name else "plain"), split, int(i)
