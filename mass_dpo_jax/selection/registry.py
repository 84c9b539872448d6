"""The register of criteria, and the settings by which one of them selects.

A criterion is one function, registered under its name: from a `Pool` to a `Selection`
(`@criterion`), or to a `Design` whose value is then searched (`@design`). The built-in ones are in
criteria.py; batch.py applies them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mass_dpo_jax import config
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection.gram import FEATURE_NORMS
from mass_dpo_jax.selection.search import empty_selection, search_greedily
from mass_dpo_jax.selection.types import Design, Pool, Selection
from mass_dpo_jax.utils.suggestions import suggest_choice

BUILT_IN = (*config.CRITERION_SUMMARIES, "sampled")
# The only modules that may register those.
BUILT_IN_MODULES = ("mass_dpo_jax.selection.criteria", "mass_dpo_jax.selection.baselines")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to select. Hashable: a static argument of `jit`. Fields as in the configuration.

    Attributes:
        definition: meaning of the criterion's name when the settings were made. It is part of
            their identity, so a name that is registered again has compiled programs of its own.

    Raises:
        UserError: an unknown name, or a ridge or beta that is not positive.
    """

    criterion: str = "pool_fisher"
    ridge: float = 0.1
    feature_norm: str = "none"
    fisher_scale: bool = False
    beta: float = 0.1
    draw: str = "pivotal"
    top: int = 10
    definition: Criterion = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_name("selection.criterion", self.criterion, tuple(CRITERIA))
        object.__setattr__(self, "definition", CRITERIA[self.criterion])
        check_name("selection.feature_norm", self.feature_norm, FEATURE_NORMS)
        check_name("selection.draw", self.draw, config.CHOICES["selection.draw"])
        for field in ("ridge", "beta"):
            object.__setattr__(self, field, _as_positive(field, getattr(self, field)))
        object.__setattr__(self, "top", _as_count("top", self.top))
        object.__setattr__(self, "fisher_scale", _as_bool("fisher_scale", self.fisher_scale))
        if self.criterion not in BUILT_IN and self.definition not in _tried:
            _try_criterion(self)
            _tried.add(self.definition)

    @property
    def needs_scoring(self) -> bool:
        """Whether the criterion reads scores, which cost a pass over the whole pool."""
        return self.definition.needs_scoring

    @property
    def needs_features(self) -> bool:
        """Whether the criterion reads features too."""
        draws_by_features = self.definition.weighted and self.draw in config.FEATURE_DRAWS
        return self.definition.needs_features or draws_by_features

    def check_current(self) -> None:
        """Raises UserError if the criterion was registered again since the settings were made."""
        if CRITERIA.get(self.criterion) is not self.definition:
            raise UserError(
                f"criterion {self.criterion!r} was registered again after these batches were made, "
                "which have its earlier definition: make them and their train step again"
            )


Choose = Callable[[Pool, int, Settings], Selection]
MakeDesign = Callable[[Pool, Settings], Design]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to select n negatives of one example. Asked for n > N, it fills up with invalid ones.

    Attributes:
        choose: function from (pool, n, settings) to a `Selection`.
        needs_scoring: True if it reads the pool's scores.
        needs_features: True if it reads the pool's Gram matrix, too.
        design: function from (pool, settings) to the `Design` that `choose` searches, or None.
        weighted: True if its choice has weights, which only the loss of `pl_sampled` reads.
        summary: description of the picks, after "the negatives are"; for help and model cards.
    """

    choose: Choose
    needs_scoring: bool
    needs_features: bool = False
    design: MakeDesign | None = None
    weighted: bool = False
    summary: str = ""


CRITERIA: dict[str, Criterion] = {}
_tried: set[Criterion] = set()  # Registered elsewhere, and found to choose as they should.


def names() -> tuple[str, ...]:
    """Lists the criteria that `config.selection.criterion` can name, registered ones included."""
    return tuple(name for name, entry in CRITERIA.items() if not entry.weighted)


def criterion(
    name: str,
    *,
    needs_scoring: bool,
    needs_features: bool = False,
    weighted: bool = False,
    summary: str = "",
) -> Callable[[Choose], Choose]:
    """Registers the decorated function as a choice: from (pool, n, settings) to a `Selection`.

    Everything that takes a criterion's name then knows it: `select_negatives`, `config.selection`,
    the commands. The function is `vmap`ped over examples inside `jit`; n and settings are static.
    A name can be registered again, as by a notebook cell that is run twice: the last one counts.

    Examples:
        >>> from mass_dpo_jax import select_negatives
        >>> @criterion("first", needs_scoring=False)
        ... def first(pool, n, settings):
        ...     return in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)
        >>> print(select_negatives(jnp.eye(4), n=2, criterion="first").indices)
        [0 1]
        >>> del CRITERIA["first"]

    Args:
        name: the criterion's name.
        needs_scoring: True if it reads the pool's scores, which cost a pass over the whole pool.
        needs_features: True if it reads the Gram matrix of the features as well.
        weighted: True if its choice has weights, for the loss of `pl_sampled`.
        summary: description of the picks for help and model cards, as in "those of the largest
            reward".

    Raises:
        UserError: the name is that of a built-in criterion.
    """

    def register(choose: Choose) -> Choose:
        # Features come from the pass that scores.
        entry = Criterion(
            choose,
            needs_scoring or needs_features,
            needs_features,
            weighted=weighted,
            summary=summary,
        )
        _register(name, choose, entry)
        return choose

    return register


def design(name: str, *, summary: str = "") -> Callable[[MakeDesign], MakeDesign]:
    """Registers the decorated function as a design: from (pool, settings) to a `Design`.

    The criterion selects the set that greedy search finds to have a large value. Otherwise as
    `criterion`, whose arguments and errors it has.
    """

    def register(make: MakeDesign) -> MakeDesign:
        def choose(pool: Pool, n: int, settings: Settings) -> Selection:
            return search_greedily(make(pool, settings), pool.mask, n)

        _register(name, make, Criterion(choose, True, True, design=make, summary=summary))
        return make

    return register


def _register(name: str, function: Callable[..., Any], entry: Criterion) -> None:
    if name in BUILT_IN and function.__module__ not in BUILT_IN_MODULES:
        raise UserError(
            f"criterion {name!r} comes with the package, which draws and chooses by it elsewhere "
            "too; expected another name"
        )
    CRITERIA[name] = entry
    if name not in BUILT_IN and not entry.weighted:
        config.add_criterion(name, entry.summary)


def in_order(order: Int[Array, " N"], mask: Bool[Array, " N"], n: int) -> Selection:
    """Selects the first n of an order, without gains: for criteria that sort.

    Args:
        order: indices of negatives, all valid ones before the others.
        mask: True for the valid negatives.
        n: number of negatives to select; static.
    """
    order = jnp.pad(order[:n], (0, max(0, n - order.shape[0])))
    valid = jnp.arange(n) < jnp.sum(mask)
    indices = jnp.where(valid, order, 0).astype(jnp.int32)
    return empty_selection(n)._replace(indices=indices, valid=valid)


def _try_criterion(settings: Settings) -> None:
    """Raises UserError where a criterion chooses from a small pool what it must not.

    In a compiled step nobody would notice that it trains on what is masked, or on one negative
    twice. The criterion's own errors are left to where it is used, with their location.
    """
    definition, masked, size = settings.definition, (0, 3), 6
    mask = jnp.ones(size, bool).at[jnp.array(masked)].set(False)
    for sign, n in itertools.product((1.0, -1.0), (2, 5)):  # 5: more than there are.
        scores = sign * jnp.array([9.0, 0.5, -1.0, 7.0, 0.25, 2.0])
        gram = jnp.diag(jnp.arange(1.0, size + 2)) if definition.needs_features else None
        pool = Pool(gram, scores if definition.needs_scoring else None, mask, jax.random.key(0))
        try:
            selection = definition.choose(pool, n, settings)
            indices, valid = np.asarray(selection.indices), np.asarray(selection.valid)
        except Exception:
            return
        location = f"criterion {settings.criterion!r}"
        if indices.shape != (n,) or valid.shape != (n,) or indices.dtype.kind not in "iu":
            raise UserError(
                f"{location}: asked for {n} of {size}, gives indices {indices.dtype}"
                f"{list(indices.shape)} and valid {list(valid.shape)}, expected integers and bool "
                f"[{n}]"
            )
        picks = indices[valid.astype(bool)].tolist()
        if len({*picks}) < len(picks) or not {*picks} <= {*range(size)} - {*masked}:
            raise UserError(
                f"{location}: of {size} negatives of which {masked[0]} and {masked[1]} are masked, "
                f"chose {picks} as valid; expected others, each once (selection.in_order takes an "
                "order with the masked ones at its end)"
            )


def check_name(field: str, name: str, choices: tuple[str, ...]) -> None:
    """Raises UserError for a name that is not among the choices, with the one that was meant."""
    if name not in choices:
        meant = suggest_choice(str(name), choices)
        raise UserError(f"{field}={name!r}: expected one of {', '.join(choices)}{meant}")


def _as_positive(field: str, value: Any) -> float:
    """Converts a number above 0, from any library, to the float that identifies a program."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{field}={value!r}: expected a finite number above 0")
    return number


def _as_count(field: str, value: Any) -> int:
    """Converts a whole number above 0, from any library."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{field}={value!r}: expected a whole number above 0")
    return int(value)


def _as_bool(field: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):  # "False" would count as true.
        raise UserError(f"{field}={value!r}: expected True or False")
    return bool(value)
