r"""Trains a policy on preferences with several negatives.

    python -m mass_dpo_jax.train --config=tiny --workdir=runs/tiny
    python -m mass_dpo_jax.train --config=llama3 --config.model.path=DIR \
        --config.data.path=pairs.jsonl --workdir=runs/mine
    python -m mass_dpo_jax.train --config=llama3 --config.model.path=DIR \
        --config.data.name=lastfm --config.data.path=DIR --config.dry_run=True

The same command again resumes from the newest checkpoint in --workdir; --config may then be left
out. --config.dry_run=True only prints the memory and arithmetic that a step needs. The run folder
gets config.json, metrics.jsonl, metrics.json, report.html (with figures/), tensorboard/,
checkpoints/ and model/ (architecture and tokenizer). The other commands take it as --workdir, and
this one as --config.model.path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, config_checks
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import expand_path
from mass_dpo_jax.utils.run_paths import check_new_run

if TYPE_CHECKING:
    from mass_dpo_jax.training.evaluator import EvaluatedSplit

FLAGS = flags.FLAGS


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, or resumes training.

    Returns:
        The content of metrics.json: `start` and `final`, metrics of the test split (without one,
        of the validation split), and `gain`, the difference with paired standard errors.

    Raises:
        UserError: something in the configuration, the data or the model folder is wrong, or another
            training is at work in `workdir`.
    """
    from mass_dpo_jax.training import loop

    workdir = expand_path(workdir, "workdir")
    check_new_run(workdir)
    return loop.train(config_checks.validate(config), workdir, _write_report)


def _write_report(
    workdir: Path, config: ConfigDict, metrics: Mapping[str, Any], split: EvaluatedSplit | None
) -> None:
    # Imported only here: matplotlib is slow to import, and looks for the system's fonts.
    from mass_dpo_jax.reports import run_page

    run_page.write(workdir, config, metrics, split)


def main() -> None:
    """Trains, or prints a dry run."""
    workdir = FLAGS.workdir
    if workdir is not None:
        check_new_run(workdir)
    config = cli.read_config()
    from mass_dpo_jax.estimate.dry_run import dry_run
    from mass_dpo_jax.runs import run_folder
    from mass_dpo_jax.training import advice, evaluator, interruption, loop, method_config
    from mass_dpo_jax.utils import distributed

    cli.log_unread("this training", method_config.find_unread(config))
    if config.dry_run:
        if distributed.is_multiprocess():
            raise UserError("config.dry_run: expected one process; it only needs the mesh's sizes")
        print(dry_run(config, workdir, loop.SPLITS))
        return
    if workdir is None:
        raise UserError(
            "--workdir is missing: a folder for all that a run writes, as in --workdir=runs/first"
        )
    try:
        with interruption.handle_signals():
            result = loop.train(config, workdir, _write_report)
    except interruption.Stopped as signal:
        step = run_folder.latest_step(workdir)
        progress = "before its first step" if step is None else f"and saved at step {step}"
        print(f"stopped by {signal} {progress}; run the same command again to go on")
        return
    for name in ("start", "final"):
        if result[name]:
            print(f"{result['split']}, {name}: {evaluator.format_headline(result[name])}")
    if advised := advice.advise(config, workdir):
        print(advised)
    print(f"written to {workdir}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    cli.define_path("workdir", "Folder for everything that the run writes.")
    cli.run(main, resumes=True)
