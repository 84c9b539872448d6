"""Evaluations of data that calls several responses chosen, and of items that many prompts have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax.compare import compare
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.reports.comparison import reference_rankings
from mass_dpo_jax.train import train
from mass_dpo_jax.training.prepare import prepare
from tests.support.helpers import WORDS, log_lines, tiny_config


def write_several_chosen(folder: Path, examples: int = 40) -> Path:
    """Writes rows with one to three chosen and three rejected of thirteen items."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(examples):
        words = rng.permutation(WORDS).tolist()
        count = 1 + i % 3
        row = {"prompt": f"q {i} ", "chosen": words[:count], "rejected": words[count : count + 3]}
        rows.append({"id": str(i), **row})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("one_device")
def test_several_chosen_responses_are_all_to_be_ranked_first(tmp_path: Path) -> None:
    data, run = write_several_chosen(tmp_path), tmp_path / "run"
    changes = {"data.validation_share": 0.4, "train.keep_best": "policy/map", "log.report": True}
    config = tiny_config(data, **changes, **{"eval.cutoffs": "2,4", "data.max_shapes": 1})
    done = train(config, run)
    found = done["final"]

    # From what the run has kept, without the package.
    logps, grades = np.load(run / "logps-final.npy"), np.load(run / "logps-grades.npy")
    values: dict[str, list[float]] = {"accuracy": [], "recall@2": [], "map": []}
    for row, grade in zip(logps.tolist(), grades.tolist(), strict=True):
        best = max(g for g in grade if g == g)
        listed = [(-score, g == best) for score, g in zip(row, grade, strict=True) if g == g]
        hits = [hit for _, hit in sorted(listed)]
        places = [place for place, hit in enumerate(hits, 1) if hit]
        values["accuracy"].append(hits[0])
        values["recall@2"].append(sum(hits[:2]) / len(places))
        values["map"].append(np.mean([n / place for n, place in enumerate(places, 1)]))
    assert {np.isfinite(grade).sum() for grade in grades} == {4, 5, 6}
    for name, value in values.items():
        assert found[f"policy/{name}"] == pytest.approx(np.mean(value)), name
    assert {name.split("@")[1][:1] for name in found if "@" in name} == {"2", "4"}
    assert any(line.get("eval/policy/map") for line in log_lines(run))
    assert evaluate(config, run, None) == pytest.approx(found, abs=1e-5)

    # `compare` computes the same of the files, and ranks all chosen responses by popularity too.
    table, graded, _ = compare([run]).split("\n\n")
    for name, text in (("accuracy", table), ("map", graded)):
        percent = f"{100 * found[f'policy/{name}']:.1f} ± {100 * found[f'policy/{name}_se']:.1f}"
        assert any(x.startswith("run ") and f" {percent}" in x for x in text.splitlines())
    popular = reference_rankings(config, "test")["popularity in training"]
    assert 0 < popular["policy/recall@3"] < 1

    # Each of thirteen items is in many lists.
    assert 0 < found["policy/coverage"] <= 1 and found["policy/popularity_se"] > 0

    # What is trained on has the first chosen response only, and is not what is as good.
    tokens = prepare(config, tmp_path / "other", ("train", "test")).tokens
    assert tokens["train"].relevant is None and tokens["train"].response_lengths.shape[1] == 4
    assert tokens["test"].relevant.sum(1).max() == 3


def test_cutoffs_that_no_run_could_use(tmp_path: Path) -> None:
    data = write_several_chosen(tmp_path)
    for cutoffs in ("", "0", "3,1", "1,1", "1;3", "-1", "1.5", "all", "123456"):
        with pytest.raises(UserError, match=r"config.eval.cutoffs='.*': expected whole numbers"):
            train(tiny_config(data, **{"eval.cutoffs": cutoffs}), tmp_path / "run")


@pytest.mark.usefixtures("one_device")
def test_cutoffs_beyond_the_longest_list_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_several_chosen(tmp_path)
    changes = {
        "data.validation_share": 0.3,
        "eval.cutoffs": "2,9",
        "train.keep_best": "policy/recall@9",
    }
    with pytest.raises(UserError, match=r"keep_best='policy/recall@9': expected .*recall@2, .*"):
        train(tiny_config(data, **changes), tmp_path / "run")
    changes["train.keep_best"] = "policy/coverage"  # More is not better.
    with pytest.raises(UserError, match=r"keep_best='policy/coverage': expected .*recall@9, .*"):
        train(tiny_config(data, **changes), tmp_path / "run")
    changes["train.keep_best"] = ""
    train(tiny_config(data, method="sft", **changes, **{"train.steps": 1}), tmp_path / "run")
    assert "no list of the split test has more than 6 responses; it has no metrics at 9" in (
        caplog.text
    )
