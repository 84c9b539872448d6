"""What a criterion sees, what it is asked, and the register of them.

A criterion is one function, registered under its name: from a `Pool` to a `Selection`
(`@criterion`), or to a `Design` whose value is then searched (`@design`, see designs.py). Those
that come with the package are in criteria.py; selection.py applies them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mass_dpo_jax import config
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import designs
from mass_dpo_jax.selection.designs import Design, Selection
from mass_dpo_jax.utils.suggestions import suggest_choice

FEATURE_NORMS = ("none", "l2")
BUILT_IN = (*config.CRITERION_SUMMARIES, "sampled")
HOME = "mass_dpo_jax.selection.criteria"  # The module that may register those.


class Pool(NamedTuple):
    """The negatives of one prompt (`select` takes a leading batch dimension on every field)."""

    gram: jax.Array | None
    """float32 [C, C]: `designs.gram_matrix` of the pooled hidden states, the chosen response first;
    None for criteria that need no scoring."""
    scores: jax.Array | None
    """float32 [N]: beta (log-ratio of the negative - that of the chosen); None likewise."""
    mask: jax.Array
    """bool [N]: which negatives exist; the others' features and scores may hold anything."""
    key: jax.Array
    """A PRNG key of this prompt and this draw."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to select. Hashable: a static argument of `jit`. Fields as in the configuration.

    Attributes:
        definition: what the criterion's name stands for when the settings are made. It is a part of
            their identity, so a name that is registered again has compiled programs of its own.

    Raises:
        UserError: an unknown name, or a ridge or beta that is not positive.
    """

    criterion: str = "pool_fisher"
    search: str = "greedy"
    ridge: float = 0.1
    feature_norm: str = "none"
    fisher_scale: bool = False
    beta: float = 0.1
    replacement: bool = False
    definition: Criterion = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_name("selection.criterion", self.criterion, tuple(CRITERIA))
        object.__setattr__(self, "definition", CRITERIA[self.criterion])
        check_name("selection.search", self.search, designs.SEARCHES)
        check_name("selection.feature_norm", self.feature_norm, FEATURE_NORMS)
        for field in ("ridge", "beta"):
            object.__setattr__(self, field, _positive(field, getattr(self, field)))
        for field in ("fisher_scale", "replacement"):
            object.__setattr__(self, field, _switch(field, getattr(self, field)))
        if self.criterion not in BUILT_IN and self.definition not in _tried:
            _try(self)
            _tried.add(self.definition)

    @property
    def needs_scoring(self) -> bool:
        """Whether the criterion reads scores, which cost a pass over the whole pool."""
        return self.definition.needs_scoring

    @property
    def needs_features(self) -> bool:
        """Whether the criterion reads features too."""
        return self.definition.design is not None

    def check_current(self) -> None:
        """Raises UserError if the criterion was registered again since the settings were made."""
        if CRITERIA.get(self.criterion) is not self.definition:
            raise UserError(
                f"criterion {self.criterion!r} was registered again after these batches were made, "
                "which have the one of before: make them and their train step again"
            )


Choose = Callable[[Pool, int, Settings], Selection]
MakeDesign = Callable[[Pool, Settings], Design]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to select n negatives of one prompt. Asked for n > N, it fills up with invalid ones."""

    choose: Choose
    needs_scoring: bool
    design: MakeDesign | None = None
    weighted: bool = False  # Its choice has weights, which only `pl_sampled`'s loss reads.
    summary: str = ""  # What it selects, after "the negatives are"; for help and model cards.


CRITERIA: dict[str, Criterion] = {}
_tried: set[Criterion] = set()  # Of somebody's own, those that chose what they may.


def names() -> tuple[str, ...]:
    """The criteria that `config.selection.criterion` can name, registered ones included."""
    return tuple(name for name, found in CRITERIA.items() if not found.weighted)


def criterion(
    name: str, *, needs_scoring: bool, weighted: bool = False, summary: str = ""
) -> Callable[[Choose], Choose]:
    """Decorator that registers a choice: from (pool, n, settings) to a `Selection`.

    Whatever takes a criterion's name then knows it: `select_negatives`, `config.selection`, the
    commands. The function is `vmap`ped over prompts inside of `jit`; n and settings are static.
    A name can be registered again, as in a notebook whose cell is run again: the last one counts.

    Examples:
        >>> from mass_dpo_jax import select_negatives
        >>> @criterion("first", needs_scoring=False)
        ... def first(pool, n, settings):
        ...     return in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)
        >>> print(select_negatives(jnp.eye(4), n=2, criterion="first").indices)
        [0 1]
        >>> del CRITERIA["first"]

    Args:
        name: of the criterion.
        needs_scoring: does it read the pool's scores? A pass over the whole pool is what that
            costs. Features are only there for designs, see `design`.
        weighted: its choice has weights, for the loss of `pl_sampled`.
        summary: what it selects, for help and model cards, as in "those of the largest reward".

    Raises:
        UserError: the name is that of a criterion that comes with the package.
    """

    def register(choose: Choose) -> Choose:
        _register(
            name, choose, Criterion(choose, needs_scoring, weighted=weighted, summary=summary)
        )
        return choose

    return register


def design(name: str, *, summary: str = "") -> Callable[[MakeDesign], MakeDesign]:
    """Decorator that registers a design: from (pool, settings) to a `Design`, of
    which `settings.search` then looks for a set of large value. As `criterion` otherwise.

    Args:
        name: of the criterion.
        summary: as for `criterion`.

    Raises:
        UserError: as `criterion`.
    """

    def register(make: MakeDesign) -> MakeDesign:
        def choose(pool: Pool, n: int, settings: Settings) -> Selection:
            return designs.search(make(pool, settings), pool.mask, n, settings.search)

        _register(name, make, Criterion(choose, True, design=make, summary=summary))
        return make

    return register


def _register(name: str, function: Callable[..., Any], found: Criterion) -> None:
    if name in BUILT_IN and function.__module__ != HOME:
        raise UserError(
            f"criterion {name!r} comes with the package, which draws and chooses by it elsewhere "
            "too; expected another name"
        )
    CRITERIA[name] = found
    if name not in BUILT_IN and not found.weighted:
        config.add_criterion(name, found.summary)


def in_order(order: jax.Array, mask: jax.Array, n: int) -> Selection:
    """The first n of an order, as a `Selection` without gains: for criteria that sort.

    Args:
        order: int [N], negatives, all valid ones before the others.
        mask: bool [N], which are valid.
        n: how many; static.
    """
    order = jnp.pad(order[:n], (0, max(0, n - order.shape[0])))
    valid = jnp.arange(n) < jnp.sum(mask)
    indices = jnp.where(valid, order, 0).astype(jnp.int32)
    return designs.nothing(n)._replace(indices=indices, valid=valid)


def _try(settings: Settings) -> None:
    """Raises UserError where a criterion chooses from a small pool what it must not: in a compiled
    step nobody would notice that it trains on what is masked, or on one negative twice.

    Errors of its own come where it is used, with their place.
    """
    definition, masked, size = settings.definition, (0, 3), 6
    mask = jnp.ones(size, bool).at[jnp.array(masked)].set(False)
    for sign, n in itertools.product((1.0, -1.0), (2, 5)):  # 5: more than there are.
        scores = sign * jnp.array([9.0, 0.5, -1.0, 7.0, 0.25, 2.0])
        pool = Pool(None, scores if definition.needs_scoring else None, mask, jax.random.key(0))
        try:
            found = definition.choose(pool, n, settings)
            indices, valid = np.asarray(found.indices), np.asarray(found.valid)
        except Exception:
            return
        place = f"criterion {settings.criterion!r}"
        if indices.shape != (n,) or valid.shape != (n,) or indices.dtype.kind not in "iu":
            raise UserError(
                f"{place}: asked for {n} of {size}, gives indices {indices.dtype}"
                f"{list(indices.shape)} and valid {list(valid.shape)}, expected integers and bool "
                f"[{n}]"
            )
        picks = indices[valid.astype(bool)].tolist()
        if len({*picks}) < len(picks) or not {*picks} <= {*range(size)} - {*masked}:
            raise UserError(
                f"{place}: of {size} negatives of which {masked[0]} and {masked[1]} are masked, "
                f"chose {picks} as valid; expected others, each once (registry.in_order takes an "
                "order with the masked ones at its end)"
            )


def check_name(field: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        meant = suggest_choice(str(name), known)
        raise UserError(f"{field}={name!r}: expected one of {', '.join(known)}{meant}")


def _positive(field: str, value: Any) -> float:
    """A number above 0 of any library as Python's own, by which programs are kept."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{field}={value!r}: expected a finite number above 0")
    return number


def _switch(field: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):  # "False" would count as true.
        raise UserError(f"{field}={value!r}: expected True or False")
    return bool(value)
