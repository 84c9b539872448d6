"""Small data, configurations and runs that several tests use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib

WORDS = "amber basil cedar delta ember fjord grove haven islet jetty knoll ledge maple".split()


def write_jsonl(path: Path, examples: int = 24, negatives: int = 6, seed: int = 0) -> Path:
    """Writes preferences over phrases of one to four words, with 2 to `negatives` rejected."""
    rng = np.random.default_rng(seed)

    def phrase(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = []
    for i in range(examples):
        size = negatives if i == 0 else int(rng.integers(2, negatives + 1))
        phrases: list[str] = []
        while len(phrases) < size + 1:
            new = phrase(1, 5)
            if new not in phrases:
                phrases.append(new)
        rows.append(
            {
                "id": f"row{i}",
                "prompt": f"after {phrase(2, 9)} comes ",
                "chosen": phrases[0],
                "rejected": phrases[1:],
                "score_chosen": 9,
                "score_rejected": [8 - len(text) % 7 for text in phrases[1:]],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(data: Path, **changes: Any) -> ConfigDict:
    """Returns the settings of a run of seconds: 32 hidden units, four updates on `data`."""
    config = config_lib.default()
    config.data.update(name="preferences", path=str(data), chat_template="none")
    config.model.scratch.update(
        hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
        vocab_size=300,
    )  # fmt: skip
    config.train.update(
        steps=4, batch_size=8, micro_batch_size=8, learning_rate=3e-3, eval_every=2,
        checkpoint_every=2,
    )  # fmt: skip
    config.eval.batch_size = 8
    config.log.report = False  # It selects in the test split too, which takes seconds to compile.
    config.update_from_flattened_dict(changes)
    return config


def slow(*values: Any) -> Any:
    """Marks parameters of a test that only --all runs; the quick tests run the others."""
    reason = "other values of what a quick one covers"
    return pytest.param(*values, marks=pytest.mark.slow(reason=reason))


def log_lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in log_lines(workdir) if "loss" in line]
