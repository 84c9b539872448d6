r"""Chooses negatives without training, for people who train elsewhere.

    python -m mass_dpo_jax.select --config=llama3 --config.model.path=DIR \
        --config.data.path=preferences.jsonl --output=selected.jsonl
    python -m mass_dpo_jax.select --workdir=runs/mine --format=pairs --output=selected.jsonl
    python -m mass_dpo_jax.select --features=features.npy --config.num_negatives=3 \
        --config.selection.criterion=contrast --output=selected.jsonl

The first two forms score every response with a model and write the data again with only the picks
as negatives: --format=lists writes one object per prompt, which this program can read;
--format=pairs one per pair, in the columns of TRL's DPOTrainer (prompt, chosen, rejected);
ms-swift, flagembedding and sentence-transformers are for the programs of that name. Each object
also has `id`, `selected` (indices into the example's own list of rejected responses, from 0, in
order of choice) and `gains`; a pair has its own id and one value of each. Prompts are written in
full, even if they are cut to config.data.max_prompt_length for scoring. In pairs, strings that were
scored inside a chat template become chat messages, since TRL applies templates to those only.

The third form needs no model. --features is a .npy file [M, C, D], the chosen response first, or a
.safetensors file with `features` and optionally `scores` [M, C - 1] and `mask` [M, C - 1]. With
--config.data.path it also writes the texts of that data, whose rows must be in the same order.

--prompts=5000 or --prompts=0.25 writes only so many prompts, in the order in which they are chosen:
by the information of each prompt with its selected negatives, or as config.selection.prompts says.
Each object then has `prompt_gain`, the growth of the log-determinant, or `prompt_gap`.

Without a reference (--config.model.reference_path, or that of the run in --workdir; `scores` in the
third form) all scores are 0, as at the start of training. All rows are used: config.data.max_* is
not applied.
"""

from __future__ import annotations

from absl import flags

from mass_dpo_jax import cli, config_checks
from mass_dpo_jax import config as config_lib

UNREAD = ("selection.refresh", "selection.prompt_budget", "selection.prompt_refresh")

FLAGS = flags.FLAGS


def main() -> None:
    """Writes the negatives that the flags ask for."""
    config = config_checks.resolve(FLAGS.config or config_lib.default())
    inputs = (config.data.path, FLAGS.features or "")
    output = cli.check_output(FLAGS.output, "JSON-lines or Parquet", *inputs)
    from mass_dpo_jax.data.formats.writing import convert_rows
    from mass_dpo_jax.training.offline_selection import select_with_features, select_with_model

    if FLAGS.prompts is None:
        cli.log_unread("select without --prompts", ["selection.prompts"])
    if FLAGS.features:
        rows = select_with_features(config, FLAGS.features, FLAGS.split, FLAGS.prompts)
    else:
        rows = select_with_model(cli.read_config(), FLAGS.workdir, FLAGS.split, FLAGS.prompts)
    chat = not FLAGS.features and config.data.chat_template != "none"
    rows = convert_rows(rows, FLAGS.format, chat)
    count = cli.write_rows(output, rows)
    print(f"{count} {'pairs' if FLAGS.format == 'pairs' else 'rows'} written to {output}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    cli.define_path("workdir", "A run's folder.")
    cli.define_split("train")
    cli.define_path("features", "A .npy or .safetensors file, no model.")
    cli.define_format()
    flags.DEFINE_float("prompts", None, "Number or share of the prompts to choose; default: all.")
    cli.define_path("output", "The file to write: JSON lines, or .parquet.")
    cli.run(
        main,
        default=config_lib.__file__,
        unread=[*cli.TRAINING, *cli.LIMITS, *cli.RANKING, *cli.MINING, *UNREAD],
    )
