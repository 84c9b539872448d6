"""docs/models.md: its table has every family that loads, and what it says is refused is so."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from mass_dpo_jax.models.config import ACTIVATIONS
from mass_dpo_jax.models.families import FAMILIES, FUSED, MULTIMODAL
from mass_dpo_jax.models.folder import OTHER_WEIGHTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_table_has_every_model_type() -> None:
    found = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found == ["model_type", *FAMILIES, *MULTIMODAL]


def list_code(row: str) -> list[str]:
    """What the row of the table of refusals with this text has in backquotes."""
    page = PAGE.read_text(encoding="utf-8").partition("## What is refused")[2]
    (line,) = [x for x in page.splitlines() if x.startswith("|") and row in x]
    return re.findall("`([^`]+)`", line.split("|")[1])


def test_what_is_refused_is_all_but_what_is_computed() -> None:
    kinds = list(dict.fromkeys(x for family in FAMILIES.values() for x in family.rope_types))
    assert list_code("`rope_type`") == ["rope_type", *kinds, "partial_rotary_factor"]
    assert list_code("`hidden_act`") == ["hidden_act", *ACTIVATIONS]
    fused = [name.rpartition(".")[2] for name in FUSED]
    models = [x for x, family in FAMILIES.items() if set(FUSED) & set(family.projections.values())]
    assert list_code("PEFT's adapters") == [*models, *fused]
    for name in list_code("pytorch_model"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in OTHER_WEIGHTS)
