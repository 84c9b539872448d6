r"""Shows what a dataset looks like to a model: pools, lengths, cuts, first prompts.

    python -m mass_dpo_jax.data --config=llama3 --config.data.path=pairs.jsonl
    python -m mass_dpo_jax.data --config=llama3 --config.model.path=DIR \
        --config.data.name=qasc --config.data.path=DIR --show=3
    python -m mass_dpo_jax.data --config=tiny --show=1

The folder at config.model.path needs only a tokenizer, no weights. Without one, lengths are in
words of the text, and no chat template or length limit is applied.
"""

from __future__ import annotations

from absl import flags

from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError

FLAGS = flags.FLAGS


def main() -> None:
    """Prints the description of the dataset that the flags name."""
    if FLAGS.show < 0:
        raise UserError(f"--show={FLAGS.show}: expected 0 or more")
    config = cli.read_config()
    from mass_dpo_jax.reports.describe_data import describe

    for line in describe(config, FLAGS.show):
        print(line)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_integer("show", 2, "Number of rows of the first split to show in full.")
    cli.run(main, unread=[*cli.TRAINING, *cli.RANKING, *cli.MINING])
