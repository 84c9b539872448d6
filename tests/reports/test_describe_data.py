"""`python -m mass_dpo_jax.data`: what is said about a data set, with and without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.describe_data import describe
from tests.support.helpers import WORDS, tiny_config
from tests.support.processes import command, refused
from tests.support.tokenizers import write_with_spaces


def write(path: Path, count: int = 20) -> Path:
    """Rows with one to four rejected responses of one word each; the first prompt is long."""
    rows = [
        {"id": f"r{i}", "prompt": f"say {i}", "chosen": "amber", "rejected": WORDS[1 : 2 + i % 4]}
        for i in range(count)
    ]
    rows[0]["prompt"] = "say " * 40
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(data: Path, show: int = 2, **changes: Any) -> list[str]:
    config = tiny_config(data, **{"data.validation_share": 0.0, **changes})
    return "\n".join(describe(config, show)).split("\n")


def test_with_a_tokenizer(tmp_path: Path) -> None:
    train_tokenizer([" ".join(WORDS)] * 3, 400, tmp_path / "model")
    data = write(tmp_path / "data.jsonl")
    changes = {"model.path": str(tmp_path / "model"), "data.max_prompt_length": 10}
    found = lines(data, **changes)
    assert found[:2] == ["train: 20 rows", "  rejected responses: min 1, median 2.5, max 4"]
    # <bos>, then "say 1" or "say 10" in bytes: 6 or 7 tokens, and 10 of the long one.
    assert found[2] == "  prompt tokens: mean 6.7, median 7, 95% 7, max 10"
    assert found[4] == "  cut: 1 prompts truncated"
    assert found[5:7] == ["validation: no rows", "test: no rows"]
    assert found[8:12] == [
        "--- train r0", "<bos> say say ", "[chosen] amber<eos>", "[rejected] basil<eos>",
    ]  # fmt: skip
    assert found[13:] == [
        "--- train r1",
        "<bos>say 1",
        "[chosen] amber<eos>",
        "[rejected] basil<eos>",
        "[rejected] cedar<eos>",
    ]


def test_the_space_that_begins_a_response_is_shown(tmp_path: Path) -> None:
    write_with_spaces("prepend", tmp_path / "model")
    row = {"prompt": "Moons?", "chosen": " Phobos", "rejected": ["Deimos"]}
    (data := tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    found = lines(data, **{"model.path": str(tmp_path / "model")})
    assert found[-2:] == ["[chosen]  Phobos</s>", "[rejected] Deimos</s>"]


def test_without_a_tokenizer(tmp_path: Path) -> None:
    found = lines(write(tmp_path / "data.jsonl"), show=0)
    assert found == [
        "config.model.path is empty: lengths are in words, nothing is rendered or cut",
        "train: 20 rows",
        "  rejected responses: min 1, median 2.5, max 4",
        "  prompt words: mean 3.9, median 2, 95% 2, max 40",
        "  response words: mean 1.0, median 1, 95% 1, max 1",
        "validation: no rows",
        "test: no rows",
    ]


def test_the_command(tmp_path: Path) -> None:
    words = ("mass_dpo_jax.data", "--config=configs/tiny.py")
    done = command(*words, "--show=1")
    assert done.returncode == 0, done.stderr
    assert "train: 8000 rows" in done.stdout and "test: 2000 rows" in done.stdout
    assert done.stdout.count("--- train") == 1 and done.stdout.count("[rejected]") == 19
    assert refused(*words, "--show=-1") == "error: --show=-1: expected 0 or more"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="no/where: no such folder"):
        lines(data, **{"model.path": "no/where"})
    with pytest.raises(UserError, match=r"no tokenizer: expected tokenizer.json"):
        lines(data, **{"model.path": str(tmp_path)})
    with pytest.raises(UserError, match=r"config.data.path is empty"):
        lines(data, **{"data.path": ""})
