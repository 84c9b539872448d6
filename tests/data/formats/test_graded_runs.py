"""Rows as UltraFeedback, Nectar and RewardBench 2 publish them: a list loss, and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax.compare import compare
from mass_dpo_jax.train import train
from tests.data.formats.cases import CASES
from tests.support.helpers import slow, tiny_config

# Case; several responses are chosen; the responses of a row.
PUBLISHED = [
    ("UltraFeedback", True, 4),
    slow("Nectar", False, 3),
    slow("RewardBench 2", True, 5),
]


@pytest.mark.parametrize(("name", "has_several", "responses"), PUBLISHED)
def test_published_rows_train_and_are_ranked(
    tmp_path: Path, name: str, has_several: bool, responses: int
) -> None:
    _, make_row, _ = CASES[name]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        lines = "".join(f"{json.dumps(make_row(i))}\n" for i in range(16))
        (data / f"{split}.jsonl").write_text(lines)
    steps = {"train.steps": 24, "train.eval_every": 0, "beta": 1.0}
    runs = {}
    for method in ("pl_rank", "pl_all"):
        config = tiny_config(data, method=method, **steps)
        runs[method] = train(config, tmp_path / method)["final"]
    lines = [json.loads(line) for line in (tmp_path / "pl_rank" / "metrics.jsonl").open()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(found[-3:]) < 0.8 * np.mean(found[:3])
    for final in runs.values():
        names = [name for name in final if name.startswith("policy/gain_ndcg@")]
        cutoffs = {int(name.rpartition("@")[2]) for name in names if not name.endswith("_se")}
        assert cutoffs == {k for k in (1, 3, 5, 10) if k <= responses}
        # Of two relevant responses only one can be the first.
        assert final["policy/recall@1"] <= (0.5 if has_several else 1.0)
        assert (final["policy/map"] == final["policy/mrr"]) or has_several
    assert runs["pl_rank"]["policy/gain_ndcg@3"] > 0.9
    grades = np.load(tmp_path / "pl_rank" / "logps-grades.npy")
    assert grades.shape == (16, responses)
    compared = compare([tmp_path / "pl_rank", tmp_path / "pl_all"])
    assert "gain_ndcg@3" in compared
