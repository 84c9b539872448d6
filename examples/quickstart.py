"""The quick start: a small model in a made-up world, warm start and MASS-DPO, table and picture.

    python -m examples.quickstart --config=tiny
    python -m examples.quickstart --config=tiny --config.train.steps=800 --workdir=runs/longer
    python -m examples.quickstart --config=tiny --config.seed=1 --workdir=runs/seed1

What `launch/quickstart.sh` runs: two ordinary runs of `mass_dpo_jax.train` with the settings of
configs/tiny.py, first a short supervised one from random weights, then MASS-DPO from its result.
Run again, it goes on where it was or shows the same table.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax.cli import commands
from mass_dpo_jax.utils.run_paths import check_new_run

WARM_STEPS = 40  # Enough to write names of items, too few to know much of tastes.
_log = logging.getLogger("examples.quickstart")


def quickstart(config: ConfigDict, workdir: Path) -> str:
    """Trains both stages below `workdir`, draws their curves and returns the table."""
    from mass_dpo_jax.reports import comparison, curves
    from mass_dpo_jax.train import train

    warm, final = workdir / "warm-start", workdir / "mass-dpo"
    first = config.copy_and_resolve_references()
    first.update(method="sft")
    first.train.update(steps=WARM_STEPS, learning_rate=3e-3, eval_every=10)
    _log.info("1 of 2: supervised warm start from random weights")
    train(first, warm)
    _log.info("2 of 2: MASS-DPO from the warm start")
    config.model.path = str(warm)
    train(config, final)
    known = comparison.reference_rankings(config, "validation")
    picture = workdir / "curves.png"
    curves.plot(
        {"warm start": warm / "metrics.jsonl", "MASS-DPO": final / "metrics.jsonl"},
        picture,
        in_sequence=True,
        accuracies={name: found["policy/accuracy"] for name, found in known.items()},
    )
    return f"{comparison.compare([warm, final])}\n\nruns: {workdir}\ncurves: {picture}"


def main() -> None:
    workdir = _WORKDIR.value
    assert workdir is not None  # It has a default.
    check_new_run(workdir)
    print("\n" + quickstart(commands.required(_CONFIG), workdir))


if __name__ == "__main__":
    _CONFIG = commands.define_config()
    _WORKDIR = commands.define_path("workdir", "Folder for both runs.", "runs/quickstart")
    commands.run(main, goes_on=True)
