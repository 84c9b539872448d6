"""Settings that are texts or numbers with a meaning of their own: ranges, lists, names, patterns.

Each function raises a UserError that names the setting and what is expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mass_dpo_jax.errors import UserError

MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP_TARGETS)
PROBED_LAYERS = 128  # Numbers of layers that a pattern of targets is tried with.


def parse_refresh(refresh: str, steps_per_epoch: int) -> int:
    """Returns the refresh interval in steps; 0: the whole run (`once`)."""
    named = {"step": 1, "epoch": steps_per_epoch, "once": 0}
    if refresh in named:
        return named[refresh]
    if str(refresh).isdecimal() and len(str(refresh)) < 10 and int(refresh) > 0:
        return int(refresh)
    raise UserError(
        f"config.selection.refresh={refresh!r}: expected step, epoch, once or a number of steps"
    )


def parse_budget(budget: float, rows: int, name: str = "config.selection.prompt_budget") -> int:
    """Returns the number of prompts that `selection.prompt_budget` allows of so many rows.

    Raises:
        UserError: it is neither a share nor a whole number, or more than there are.
    """
    if not (0 < budget < 1 or (budget > 1 and budget == int(budget))):
        raise UserError(
            f"{name}={budget:g}: expected a share of the prompts below 1, or a number of them "
            "above 1"
        )
    if budget > rows:
        raise UserError(f"{name}={budget:.0f}: expected at most {rows}, all prompts that there are")
    return max(1, round(budget * rows)) if budget < 1 else int(budget)


def parse_ranks(ranks: str) -> tuple[int, int]:
    """Returns (first, last) of `mine.ranks`: ranks from 0, the last one not included.

    Raises:
        UserError: it is no such range.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", ranks)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"config.mine.ranks={ranks!r}: expected FIRST:LAST with FIRST < LAST, such as 10:100"
        )
    return int(match[1]), int(match[2])


def parse_margins(mine: Mapping[str, Any]) -> tuple[float | None, ...]:
    """Returns `margin`, `relative_margin` and `max_score` of a section `mine`; None where empty.

    Raises:
        UserError: one of them is no number.
    """
    margins = []
    for name in ("margin", "relative_margin", "max_score"):
        number, text = None, mine[name].strip()
        if text:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise UserError(
                    f"config.mine.{name}={text!r}: expected a number, or nothing for no limit"
                )
        margins.append(number)
    return tuple(margins)


def parse_cutoffs(cutoffs: str) -> tuple[int, ...]:
    """Returns the numbers in `eval.cutoffs`.

    Raises:
        UserError: they are not whole numbers, each larger than the one before it.
    """
    parts = [part.strip() for part in cutoffs.split(",")]
    if all(part.isdecimal() and len(part) < 6 for part in parts):
        numbers = tuple(map(int, parts))
        if numbers == tuple(sorted(set(numbers))) and numbers[0] > 0:
            return numbers
    raise UserError(
        f"config.eval.cutoffs={cutoffs!r}: expected whole numbers from 1 to 99999, each larger "
        "than the one before it, as in 1,3,5,10"
    )


def split_targets(targets: str) -> tuple[str, ...]:
    """Returns the matrices that `model.lora.targets` names, as PEFT calls them.

    Raises:
        UserError: it names something else.
    """
    if targets in ("all", "all-linear"):
        return LORA_TARGETS
    if set(targets) & set(r"\^$*+?()[]{}|"):
        return _match_targets(targets)
    named = tuple(map(str.strip, targets.split(",")))
    for name in named:
        if name not in LORA_TARGETS:
            raise UserError(
                f"config.model.lora.targets={targets!r}: found {name!r}, expected all or some of "
                + ",".join(LORA_TARGETS)
            )
    return named


def _match_targets(pattern: str) -> tuple[str, ...]:
    """Returns the matrices whose whole names a pattern matches, as PEFT matches them."""
    setting = f"config.model.lora.targets={pattern!r}"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{setting}: no pattern: {error}") from None
    matched = []
    for name in LORA_TARGETS:
        part = "mlp" if name in MLP_TARGETS else "self_attn"
        modules = [f"model.layers.{i}.{part}.{name}" for i in range(PROBED_LAYERS)]
        found = [compiled.fullmatch(module) is not None for module in modules]
        if all(found):
            matched.append(name)
        elif any(found):
            raise UserError(
                f"{setting}: matches {modules[found.index(True)]} and not "
                f"{modules[found.index(False)]}; expected a pattern of matrices in all layers"
            )
    if not matched:
        raise UserError(
            f"{setting}: matches none of model.layers.0.self_attn.q_proj and the like; the "
            "pattern has to match whole names, as in .*(q|v)_proj"
        )
    return tuple(matched)
