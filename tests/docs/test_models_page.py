"""The table of docs/models.md has every family that loads, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from mass_dpo_jax.models.families import FAMILIES, MULTIMODAL

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_table_has_every_model_type() -> None:
    found = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found == ["model_type", *FAMILIES, *MULTIMODAL]
