"""The last words of a run: whether another method or n would pay."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.training import advice


@pytest.mark.parametrize(
    ("method", "spread", "expected"),
    [
        ("pl_sampled", 2.4, "spread over 2.4 candidates at the end: drawing n = 3 is nearly exact"),
        ("pl_sampled", 12.0, "with n = 3 of them the draw adds noise that pl_all has not"),
        ("pl_all", 4.2, "pl_sampled with n = 5 is nearly the same"),
        ("mass_dpo", 9.0, "spread over 9.0 candidates .*; pl_all and pl_sampled train on"),
        ("sdpo", None, "^pl_all and pl_sampled train on the loss of the whole pool"),
    ],
)
def test_advice(tmp_path: Path, method: str, spread: float | None, expected: str) -> None:
    rows: list[dict[str, float]] = [{"step": 1, "loss": 1.0}]
    if spread is not None:
        rows += [{"step": s, "selection/effective_pool": x} for s, x in ((2, 15.0), (3, spread))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = config_lib.default()
    config.update(method=method, num_negatives=3)
    said = advice.advise(config, tmp_path)
    assert re.search(expected, said)
    assert "docs/methods.md" in said


def test_no_advice_on_losses_of_another_kind(tmp_path: Path) -> None:
    config = config_lib.default()
    for method in ("sft", "odpo", "mppo", *config_lib.LIST_METHODS):
        config.method = method
        assert advice.advise(config, tmp_path) == ""
