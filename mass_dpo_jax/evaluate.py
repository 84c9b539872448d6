r"""Measures how a model ranks and rewards the full candidate lists of a split.

    python -m mass_dpo_jax.evaluate --workdir=runs/lastfm
    python -m mass_dpo_jax.evaluate --workdir=runs/lastfm --split=validation --output=metrics.json
    python -m mass_dpo_jax.evaluate --config=llama3 --config.model.path=DIR \
        --config.data.name=lastfm --config.data.path=DIR --split=test --output=metrics.json

--workdir evaluates the newest checkpoint of a run against the reference that it was trained with,
with the run's own settings unless --config is given. Without it, the Hugging Face folder or run at
--config.model.path is evaluated; `reward/*` then needs --config.model.reference_path.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, config_checks
from mass_dpo_jax.utils.files import write_whole
from mass_dpo_jax.utils.run_paths import resolve_run

FLAGS = flags.FLAGS


def evaluate(config: ConfigDict, workdir: Path | None, split: str | None) -> dict[str, float]:
    """Metrics of `metrics.evaluate_logps`, by name.

    Raises:
        UserError: something in the configuration, the data or the model folder is wrong.
    """
    from mass_dpo_jax import metrics
    from mass_dpo_jax.training import scoring
    from mass_dpo_jax.training.evaluator import log_long_cutoffs, make_lists
    from mass_dpo_jax.training.scored_model import prepare_scoring

    config = config_checks.resolve(config)
    workdir = None if workdir is None else resolve_run(workdir)
    if split is None and workdir is not None:
        split = "test"  # Rows that the run did not train on.
    setup, split, params, reference = prepare_scoring(config, workdir, split, ties=True)
    tokens, refs = setup.tokens[split], reference.logps.get(split)
    log_long_cutoffs(config.eval.cutoffs, {split: tokens})
    logps = setup.score(params, split, "evaluation")
    scoring.check_finite(logps, tokens, str(workdir or config.model.path))
    scoring.check_finite(refs, tokens, "the reference")
    rewards = setup.method.implicit_rewards(logps, refs, tokens.response_lengths)
    return metrics.evaluate_logps(logps, rewards, make_lists(tokens), setup.cutoffs)


def main() -> None:
    """Prints the metrics that the flags ask for."""
    config = cli.read_config()
    from mass_dpo_jax.utils import distributed

    output = None
    if FLAGS.output is not None:
        output = cli.check_output(FLAGS.output, "JSON", config.data.path)
    measured = evaluate(config, FLAGS.workdir, FLAGS.split)
    for name, value in measured.items():
        if not name.endswith("_se"):
            error = measured.get(f"{name}_se")
            print(f"{name:24} {value:9.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if output is not None and distributed.is_primary():
        write_whole(output, [json.dumps(measured, indent=2) + "\n"])


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    cli.define_path("workdir", "A run's folder.")
    cli.define_split()
    cli.define_path("output", "A JSON file for the metrics.")
    cli.run(main, unread=[*cli.TRAINING, *cli.CHOOSING, *cli.MINING])
