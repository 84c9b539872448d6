"""The worlds of benchmarks.evidence: their data, their settings, and the starts of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import tiny
from mass_dpo_jax import cli
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, as_text

# Models that begin from random weights. In `prompts` it is the prompts that are chosen.
SCRATCH = ("plain", "clusters", "long", "lastfm", "prompts")
PRETRAINED = {"qasc": "qasc", "lastfm-pretrained": "lastfm"}  # Worlds of --model; their data.
WORLDS = (*SCRATCH, *PRETRAINED)
# So few rows that a run sees each several times: else once and at every step would be the same.
SETTINGS: dict[str, Any] = {
    "beta": 1.0,
    "num_negatives": 3,
    "model.scratch.hidden_size": 64,
    "model.scratch.intermediate_size": 192,
    "model.scratch.num_layers": 2,
    "data.max_train": 2000,
    "data.max_validation": 32,  # Not used.
    "data.max_test": 0,
    "train.steps": 300,
    "train.learning_rate": 3e-3,
    "train.eval_every": 0,
    "train.keep_checkpoints": 1,
    "eval.batch_size": 128,
}
WORLD_SETTINGS: dict[str, dict[str, Any]] = {
    "lastfm": {"data.name": "lastfm", "model.scratch.vocab_size": 4096, "data.max_train": 4000},
    # The quick start's data, each row 2.4 times, or each of a quarter of them 9.6 times.
    "prompts": {"data.path": "plain", "data.max_train": 4000},
}
# Every row once, and few: on a CPU, a minute is some 60 prompts.
PRETRAINED_SETTINGS: dict[str, Any] = {
    "num_negatives": 3,
    "model.lora.rank": 16,
    "model.lora.base": "float32",
    "data.validation_share": 0.0,
    "data.max_train": 192,
    "data.max_test": 0,
    "data.max_shapes": 2,  # Compiling takes as long as some hundred prompts.
    "train.steps": 24,
    "train.batch_size": 8,
    "train.micro_batch_size": 8,
    "train.learning_rate": 1e-3,
    "train.clip": 1.0,
    "train.eval_every": 0,
    "train.keep_checkpoints": 1,
    "log.report": False,  # It selects negatives of test rows, which takes as long as to test.
}
TEST_ROWS = 300  # Of a pretrained world, drawn once: the same for all of its cells.
# `instruct` is the pretrained model as it is.
START_STEPS = {"cold": 300, "warm": 100}
PRETRAINED_STEPS = {"instruct": 0, "warm": 24}
START_RATE, PRETRAINED_RATE = 3e-3, 5e-4


def starts_of(world: str) -> dict[str, int]:
    """The starts that a world has, and the supervised steps of each."""
    return PRETRAINED_STEPS if world in PRETRAINED else START_STEPS


def base_config(world: str, data: str) -> ConfigDict:
    """What all cells of a world share, without the folder that `write_rows` makes.

    Args:
        data: the folder of the real data, if the world is of such.
    """
    if world in PRETRAINED:
        config = config_lib.default()
        config.update_from_flattened_dict(PRETRAINED_SETTINGS)
        return config
    config = tiny.get_config()
    path = data if world == "lastfm" else world
    own = WORLD_SETTINGS.get(world, {})
    config.update_from_flattened_dict({**SETTINGS, "data.path": path, **own})
    return config


def write_rows(folder: Path, world: str, data: str) -> None:
    """Writes a pretrained world's rows, prompts without the list of candidates, where missing."""
    reader = config_lib.default().data
    reader.update(name=PRETRAINED[world], path=data, list_candidates=False, max_test=TEST_ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if not (folder / f"{split}.jsonl").exists():
            rows = load_examples(reader, split, 0)
            cli.write_lines(folder / f"{split}.jsonl", map(as_row, rows))


def as_row(example: Example) -> dict[str, Any]:
    texts = {"chosen": example.chosen, "rejected": list(example.rejected)}
    return {"id": example.id, "prompt": as_text(example.prompt), **texts}


def cold_rows(examples: Sequence[Example], seed: int) -> list[dict[str, Any]]:
    """Preferences without a preference: of each example's candidates, any may be the chosen one."""
    rows = []
    for i, example in enumerate(examples):
        candidates = sorted(str(text) for text in (example.chosen, *example.rejected))
        chosen = candidates.pop(np.random.default_rng([seed, i, 5]).integers(len(candidates)))
        prompt = as_text(example.prompt)
        rows.append({"id": example.id, "prompt": prompt, "chosen": chosen, "rejected": candidates})
    return rows
