"""Trains a small model on synthetic preferences: a warm start, MASS-DPO, a table and a picture.

    python -m examples.quickstart --config=tiny
    python -m examples.quickstart --config=tiny --config.train.steps=800 --workdir=runs/longer
    python -m examples.quickstart --config=tiny --config.seed=1 --workdir=runs/seed1

`launch/quickstart.sh` runs this. It makes two ordinary runs of `mass_dpo_jax.train` with the
settings of configs/tiny.py: a short supervised one from random weights, then MASS-DPO from its
result. The same command again resumes, or shows the same table.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli
from mass_dpo_jax.utils.run_paths import check_new_run

WARM_STEPS = 40  # Enough to learn names of items, too few to learn much about preferences.
FLAGS = flags.FLAGS


def quickstart(config: ConfigDict, workdir: Path) -> str:
    """Trains both stages below `workdir`, draws their curves and returns the table."""
    from mass_dpo_jax.reports import comparison, curves
    from mass_dpo_jax.train import train

    warm, final = workdir / "warm-start", workdir / "mass-dpo"
    first = config.copy_and_resolve_references()
    first.update(method="sft")
    first.train.update(steps=WARM_STEPS, learning_rate=3e-3, eval_every=10)
    print("1 of 2: supervised warm start from random weights", flush=True)
    train(first, warm)
    print("2 of 2: MASS-DPO from the warm start", flush=True)
    config.model.path = str(warm)
    train(config, final)
    baselines = comparison.reference_rankings(config, "validation")
    picture = workdir / "curves.png"
    curves.plot(
        {"warm start": warm / "metrics.jsonl", "MASS-DPO": final / "metrics.jsonl"},
        picture,
        in_sequence=True,
        accuracies={name: found["policy/accuracy"] for name, found in baselines.items()},
    )
    return f"{comparison.compare([warm, final])}\n\nruns: {workdir}\ncurves: {picture}"


def main() -> None:
    check_new_run(FLAGS.workdir)
    print("\n" + quickstart(cli.read_config(), FLAGS.workdir))


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", "Folder for both runs.", "runs/quickstart")
    cli.run(main, resumes=True)
