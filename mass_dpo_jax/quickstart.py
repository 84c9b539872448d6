"""The quick start: a small model in a made-up world, warm start and MASS-DPO, table and picture.

    python -m mass_dpo_jax.quickstart --config=configs/tiny.py --workdir=runs/quickstart

What `launch/quickstart.sh` runs. Two ordinary runs of `mass_dpo_jax.train` with `configs/tiny.py`:
a short supervised one from random weights, then MASS-DPO from its result. Run again, it goes on
where it was or shows the same table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import baselines, cli, curves, metrics
from mass_dpo_jax.data import load_examples, synthetic
from mass_dpo_jax.train import train

METRICS = ("accuracy", "recall@3", "mrr", "ndcg@3")
_log = logging.getLogger("mass_dpo_jax.quickstart")


def quickstart(config: ConfigDict, workdir: Path) -> str:
    """Trains both stages below `workdir` and returns the table."""
    warm, final = workdir / "warm-start", workdir / "mass-dpo"
    _log.info("1 of 2: supervised warm start from random weights")
    first = config.copy_and_resolve_references()
    first.method = "sft"
    first.train.steps = 150
    started = train(first, warm)
    _log.info("2 of 2: MASS-DPO")
    config.model.path = str(warm)
    done = train(config, final)
    rows = {
        "random weights": started["start"],
        "after the warm start": done["start"],
        "after MASS-DPO": done["final"],
        **_baselines(config),
    }
    picture = workdir / "curves.png"
    curves.plot(
        {"warm start": warm / "metrics.jsonl", "MASS-DPO": final / "metrics.jsonl"},
        picture,
        in_sequence=True,
        accuracies={
            name: rows[name]["policy/accuracy"]
            for name in ("popularity in training", "the true tastes")
        },
    )
    gain, error = done["gain"]["policy/accuracy"], done["gain"]["policy/accuracy_se"]
    return (
        f"{_table(rows)}\n\n"
        f"MASS-DPO over the warm start, on the same {done['examples']} test examples: "
        f"{100 * gain:+.1f} ± {100 * error:.1f} points of accuracy\n"
        f"runs: {workdir}\ncurves: {picture}"
    )


def _baselines(config: ConfigDict) -> dict[str, Mapping[str, float]]:
    """Rankings without a language model, on the same test examples."""
    rows = load_examples(config.data, "train", config.seed)
    test = load_examples(config.data, "test", config.seed)
    scores = {
        "popularity in training": baselines.popularity(rows, test),
        "co-occurrence in training": baselines.cooccurrence(rows, test),
        "the true tastes": synthetic.oracle_scores(test),
    }
    return {
        name: metrics.ranking(found, np.isfinite(found), "policy")
        for name, found in scores.items()
    }


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'ranking of 20 candidates, %':28}" + "".join(f"{name:>14}" for name in METRICS)]
    for name, found in rows.items():
        cells = (
            f"{100 * found[f'policy/{m}']:.1f} ± {100 * found[f'policy/{m}_se']:.1f}"
            for m in METRICS
        )
        lines.append(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    print("\n" + quickstart(cli.required(_CONFIG), Path(_WORKDIR.value)))


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for both runs.")
    cli.run(main)
