"""Synthetic recommendation worlds with known ground-truth preferences.

Items and users are points on a sphere. A user's past follows taste alone: a history is drawn
without replacement from softmax(taste * <user, item>). The next choice also depends on popularity:
it is drawn, among C candidates, from the softmax of the utility

    u = taste * <user, item> + log popularity(item)

where popularity follows Zipf's law; the other candidates are the negatives. So the best possible
ranking is known (by u), and learning which names occur together goes a long way.

There are three worlds, named by `data.path`: the plain one (also ""), `clusters`, where a prompt's
candidates are near copies of a few, and `long`, with pools of 59 negatives. Each is a fixed data
set, the same for every seed, which only shuffles the candidates. Names say nothing about tastes.
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
        number: the world's number, which determines its random draws.
        items: I, the number of items.
        candidates: C, the chosen one and C - 1 negatives.
        dimensions: dimensions of the space that the sphere is in. 2 is a circle, which a small
            model learns quickly.
        taste: the weight of taste against popularity.
        zipf: the popularity of the r-th most popular item is r ** -zipf.
        history: the least and the largest number of items in a history.
        centres: the number of points that items lie around, equally many around each; 0: items lie
            anywhere.
        spread: the standard deviation of an item around its centre, in each dimension.
        centres_per_prompt: the number of centres that a prompt's candidates come from.
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
    # About five candidates of a prompt are near copies of each other in taste, for each of its
    # centres: negatives drawn at random repeat each other.
    "clusters": Recipe(
        1, items=160, dimensions=3, centres=16, spread=0.03, centres_per_prompt=4, zipf=0.8
    ),
    "long": Recipe(2, items=200, candidates=60),
}


@dataclasses.dataclass(frozen=True)
class World:
    """The items of a world.

    Attributes:
        names: I names.
        items: float64 [I, dimensions], points on the unit sphere.
        log_popularity: float64 [I].
        centres: int [I], the centre that each item lies around.
    """

    names: tuple[str, ...]
    items: np.ndarray
    log_popularity: np.ndarray
    centres: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """The users of a split; items are indices.

    Attributes:
        histories: M tuples, oldest first.
        candidates: int [M, C], the chosen one first.
        utilities: float64 [M, I], u of every item; ranking by them is the best possible.
    """

    histories: tuple[tuple[int, ...], ...]
    candidates: np.ndarray
    utilities: np.ndarray


@functools.cache
def make_world(name: str = "plain") -> World:
    """Makes the items of a world, which every seed shares."""
    recipe = RECIPES[name]
    rng = np.random.default_rng(recipe.number)
    items = _normalize(rng.normal(size=(recipe.items, recipe.dimensions)))
    ranks = rng.permutation(recipe.items) + 1
    names = _make_names(recipe.items, rng)
    centres = np.arange(recipe.items) % max(1, recipe.centres)
    if recipe.centres:  # The first item of each centre is the centre; the others lie around it.
        noise = recipe.spread * rng.normal(size=items.shape)
        items = _normalize(items[centres] + noise)
    return World(names, items, -recipe.zipf * np.log(ranks), centres)


def _normalize(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _make_names(count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Makes distinct pronounceable names of two to four syllables, such as `Velumo`."""
    syllables = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        parts = rng.choice(syllables, size=rng.integers(2, 5))
        ending = str(rng.choice(["", "", "n", "r", "s", "x"]))
        names["".join([*parts, ending]).capitalize()] = None
    return tuple(names)


@functools.cache
def _make_rows(name: str, split: str) -> Rows:
    recipe, world = RECIPES[name], make_world(name)
    rng = np.random.default_rng([1, list(ROWS).index(split), recipe.number])
    num_rows = ROWS[split]
    users = _normalize(rng.normal(size=(num_rows, recipe.dimensions)))
    liking = recipe.taste * users @ world.items.T
    utilities = liking + world.log_popularity

    # Gumbel noise makes the largest entries a draw from the softmax without replacement.
    order = np.argsort(-(liking + rng.gumbel(size=liking.shape)), axis=1)
    lengths = rng.integers(recipe.history[0], recipe.history[1] + 1, size=num_rows)
    histories = tuple(
        tuple(map(int, row[:length])) for row, length in zip(order, lengths, strict=True)
    )

    # Candidates are uniform among the items outside the history, around the prompt's centres.
    lottery = rng.random(size=utilities.shape)
    if recipe.centres:
        rank = rng.random(size=(num_rows, recipe.centres)).argsort(axis=1).argsort(axis=1)
        lottery += rank[:, world.centres] >= recipe.centres_per_prompt  # Other centres come later.
    for row, history in zip(lottery, histories, strict=True):
        row[list(history)] = np.inf
    candidates = np.argsort(lottery, axis=1)[:, : recipe.candidates]
    noisy = np.take_along_axis(utilities, candidates, axis=1)
    noisy += rng.gumbel(size=noisy.shape)
    choice = np.argmax(noisy, axis=1)[:, None]
    chosen = np.take_along_axis(candidates, choice, axis=1)
    np.put_along_axis(candidates, choice, candidates[:, :1], axis=1)
    candidates[:, :1] = chosen
    return Rows(histories, candidates, utilities)


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads all examples of a split.

    The rejected responses and, with `data.list_candidates`, the list of all candidates in the
    prompt are in an order drawn by seed and row. Reads `path` and `list_candidates` of `data`.

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
    names, rows = make_world(name).names, _make_rows(name, split)
    # Ids name the world, for `compute_oracle_scores`, except for the plain one.
    prefix = split if name == "plain" else f"{name}-{split}"
    examples = []
    for i, (history, candidates) in enumerate(zip(rows.histories, rows.candidates, strict=True)):
        order = np.random.default_rng([seed, i, 3]).permutation(candidates)
        ending = ". Next:"
        if data.list_candidates:
            ending = f". One of: {', '.join(names[item] for item in order)}{ending}"
        examples.append(
            Example(
                f"{prefix}-{i}",
                History("Enjoyed: ", tuple(names[item] for item in history), ending),
                # The space belongs to the name's first token, as it does in the history.
                f" {names[candidates[0]]}",
                tuple(f" {names[item]}" for item in order if item != candidates[0]),
                f"synthetic {split} row {i}",
            )
        )
    return examples


def compute_oracle_scores(examples: Sequence[Example]) -> np.ndarray:
    """Returns the true utilities of the candidates of `load`'s examples: float64 [M, C].

    The chosen one comes first. All examples must be of one world.
    """
    name = _parse_id(examples[0])[0] if examples else "plain"
    index = {f" {name}": item for item, name in enumerate(make_world(name).names)}
    scores = np.empty((len(examples), RECIPES[name].candidates))
    for row, example in zip(scores, examples, strict=True):
        _, split, i = _parse_id(example)
        items = [index[str(text)] for text in example.responses]
        row[:] = _make_rows(name, split).utilities[i, items]
    return scores


def _parse_id(example: Example) -> tuple[str, str, int]:
    """Returns the world, split and row that an example's id names."""
    *name, split, i = example.id.split("-")
    return (name[0] if name else "plain"), split, int(i)
