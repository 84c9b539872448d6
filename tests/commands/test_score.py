"""Scores say which response each belongs to, also where some are left out as too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import mass_dpo_jax as mdj
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from tests.support.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("one_device")

LONG = "delta " * 40
ROWS: list[dict[str, Any]] = [
    {"id": "first", "rejected": [LONG, "cedar", "fjord ember"]},
    {"id": "inside", "rejected": ["cedar", LONG, LONG + "ember", "fjord"]},
    {"id": "last", "rejected": ["cedar", "ember", LONG]},
    {"id": "none", "rejected": ["cedar", "ember fjord"]},
    {"id": "one left", "rejected": [LONG, LONG + "ember", LONG + "grove", LONG + "haven", "ember"]},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.runs import on_one_device

    folder = tmp_path_factory.mktemp("score")
    rows = [{"prompt": "after amber comes ", "chosen": "basil", **row} for row in ROWS]
    # A chosen response that is too long takes its example with it.
    rows.insert(2, {**rows[0], "id": "gone", "chosen": LONG + "basil"})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train.batch_size": 4, "train.micro_batch_size": 4, "num_negatives": 1}
    with on_one_device():
        train(config_of(data, **changes, **{"train.eval_every": 0}), folder / "run")
    return folder / "run"


def config_of(data: Path, **changes: Any) -> ConfigDict:
    drop = {"data.long_response": "drop", "data.max_response_length": 20}
    return tiny_config(data, **drop, **changes)


def alone(run: Path, row: dict[str, Any]) -> list[float | None]:
    """A response at a time, in a pool of its own."""
    model = mdj.load_model(run)
    rows = [
        {"prompt": "after amber comes ", "chosen": text, "rejected": ["knoll"]}
        for text in ["basil", *row["rejected"]]
        if not text.startswith(LONG)
    ]
    found = iter(model.score(rows).logps[:, 0].tolist())
    texts = ["basil", *row["rejected"]]
    return [None if text.startswith(LONG) else next(found) for text in texts]


def test_a_line_has_an_entry_for_every_response_of_the_row(run: Path) -> None:
    config = config_of(run.parent / "data.jsonl", **{"data.max_test": 7})
    lines = list(score(config, run, "all"))
    assert config.data.max_test == 7  # The caller's settings are left as they are.
    assert [line["id"] for line in lines] == [row["id"] for row in ROWS]
    for line, row in zip(lines, ROWS, strict=True):
        want = alone(run, row)
        for name in ("logps", "ref_logps", "rewards", "response_tokens"):
            assert [x is None for x in line[name]] == [x is None for x in want]
        found = [x for x in line["logps"] if x is not None]
        assert found == pytest.approx([x for x in want if x is not None], abs=1e-5)


def test_the_library_keeps_the_columns_of_the_row(run: Path) -> None:
    model = mdj.load_model(run)
    rows = [{"prompt": "after amber comes ", "chosen": "basil", **row} for row in ROWS]
    found = model.score(rows, features=True)
    assert found.logps.shape == found.lengths.shape == found.valid.shape == (5, 6)
    assert found.features is not None and found.features.shape == (5, 6, 32)
    for i, row in enumerate(ROWS):
        want = alone(run, row) + [None] * (5 - len(row["rejected"]))
        assert found.valid[i].tolist() == [x is not None for x in want]
        np.testing.assert_allclose(found.logps[i], [x or 0.0 for x in want], atol=1e-5)
        assert (found.features[i].any(-1) == found.valid[i]).all()


def test_the_training_rows_can_be_scored_whatever_the_method_needs(run: Path) -> None:
    """Pools smaller than n, no scores for odpo: those are for training to refuse."""
    config = config_of(run.parent / "data.jsonl", num_negatives=9, method="odpo")
    held_out = len(list(score(config, run, "test")))
    lines = list(score(config, run, "train"))
    assert len(lines) + held_out == len(ROWS) and held_out
    with pytest.raises(mdj.UserError, match="num_negatives=9: larger than every pool"):
        train(config, run.parent / "other")
