r"""Shows what a data set looks like to a model: pools, lengths, cuts, first prompts.

    python -m mass_dpo_jax.data --config=llama3 --config.data.path=pairs.jsonl
    python -m mass_dpo_jax.data --config=llama3 --config.model.path=DIR \
        --config.data.name=qasc --config.data.path=DIR --show=3
    python -m mass_dpo_jax.data --config=tiny --show=1

The folder at config.model.path needs only a tokenizer, no weights. Without one, lengths are in
words of the text, and no chat template or length limit is applied.
"""

from __future__ import annotations

from absl import flags

from mass_dpo_jax.cli import commands
from mass_dpo_jax.errors import UserError


def main() -> None:
    """Prints the description of the data set that the flags name."""
    if _SHOW.value < 0:
        raise UserError(f"--show={_SHOW.value}: expected 0 or more")
    config = commands.required(_CONFIG)
    from mass_dpo_jax.reports.describe_data import describe

    for line in describe(config, _SHOW.value):
        print(line)


if __name__ == "__main__":
    _CONFIG = commands.define_config()
    _SHOW = flags.DEFINE_integer("show", 2, "How many rows of the first split to show in full.")
    commands.run(main, unread=commands.TRAINING)
