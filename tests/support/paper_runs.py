"""Run folders written by hand, for the report: no model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import metrics

ROWS, CANDIDATES = 120, 6


def write_run(
    folder: Path,
    *,
    skill: float = 0.0,
    finished: bool = True,
    steps: int = 40,
    seed: int = 0,
    start: Path | str = "models/Tiny-Llama",
    **changes: Any,
) -> Path:
    """A run folder as training leaves it; `skill` is added to the chosen response's log-prob."""
    config = config_lib.default()
    config.seed = seed
    config.model.path = str(start)
    config.data.update(name="lastfm", path="data/lastfm")
    config.update_from_flattened_dict(changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    rng = np.random.default_rng([seed, 7])  # Every method starts from the same log-probs.
    before = -5 - rng.exponential(size=(ROWS, CANDIDATES)).astype(np.float32)
    before[::5, -1] = 0  # Some rows have a candidate less.
    exists = before < 0
    noise = np.random.default_rng([seed, 8, int(100 * skill)]).normal(size=before.shape)
    after = before - 0.3 * noise.astype(np.float32) ** 2
    after[:, 0] = np.minimum(after[:, 0] + np.float32(skill), -0.1)
    after[~exists] = 0
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 2.0 / step, "examples_per_second": 64.0})
        if step % 10 == 0:
            share = step / steps
            lines.append(
                {
                    "step": step,
                    "eval/policy/accuracy": 0.2 + 0.1 * share * skill + 0.01 * seed,
                    "eval/rewards/margins": share * skill + 0.05 * seed * share,
                    "eval/rewards/chosen": -0.2 * share * skill,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tested_on = {k: v for k, v in changes.items() if k.startswith("data.")}
    found = {"split": "test", "examples": ROWS, "finished": finished, "step": steps}
    found["digest"] = f"{seed} {tested_on}"
    found["start"] = metrics.evaluate_logps(before, None, metrics.Lists(exists), 1.0)
    np.save(folder / "logps-start.npy", before)
    np.save(folder / "logps-exist.npy", exists)
    if finished:
        refs = None if config.method == "sft" else before
        found["final"] = metrics.evaluate_logps(after, refs, metrics.Lists(exists), config.beta)
        np.save(folder / "logps-final.npy", after)
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder
