r"""Mines negatives for each prompt from a whole catalogue of responses.

    python -m mass_dpo_jax.mine --workdir=runs/lastfm --catalogue=items.jsonl --output=mined.jsonl
    python -m mass_dpo_jax.mine --config=llama3 --config.model.path=DIR \
        --config.data.path=pairs.jsonl --catalogue=items.jsonl --ranks=10:100 --n=8 \
        --relative_margin=0.05 --output=mined.jsonl
    python -m mass_dpo_jax.mine --config=llama3 --config.data.path=pairs.jsonl \
        --catalogue=items.txt --scores=scores.npy --output=mined.jsonl

The catalogue has a text per row, or an object with `text` and perhaps `id`. Items are ranked for
each prompt by the model's features (--similarity), or by numbers in .npy files: --scores [prompts,
items], or --prompt_features and --item_features. With --shortlist=K the best K of these are ranked
by the model's log-probabilities instead. The chosen responses of all rows with the same prompt, in
any split, and the items of a history are never negatives; --margin, --relative_margin and
--max_score also leave out what scores too close to the chosen response. Of the rest, the items of
--ranks are the pool, from which --n are drawn (--draw).

--catalogue, --ranks, --n and the like are short for --config.mine.catalogue and so on, listed below
under mine. Training has the same settings: given a catalogue it mines by its own policy, before its
first epoch and between epochs.

Each line has `id`, `prompt`, `chosen` and `rejected`, which this program and TRL read, and for each
negative `mined_ids`, `mined_scores`, `mined_probabilities` (of being drawn) and `mined_weights`.
Training corrects for the draw by `mined_probabilities`; docs/mining.md says how. --format writes
the columns of other programs. config.data.max_train (or _validation, _test) limits the rows,
max_prompt_length the tokens of a text whose features are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, config_checks
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.run_paths import resolve_run

FLAGS = flags.FLAGS
UNREAD = (*cli.TRAINING, *cli.CHOOSING, *cli.RANKING, "mine.every")


def mine(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Returns the rows that the flags ask for: each prompt with its mined negatives.

    Raises:
        UserError: something in the flags, the configuration, the data or the model is wrong.
    """
    from mass_dpo_jax import api
    from mass_dpo_jax.training import mining, mining_sources
    from mass_dpo_jax.training.scored_model import choose_split

    tables = [FLAGS.scores, FLAGS.prompt_features, FLAGS.item_features]
    given = [path is not None for path in tables]
    if given not in ([False] * 3, [True, False, False], [False, True, True]):
        raise UserError("expected --scores, or --prompt_features with --item_features, or neither")
    if not config.mine.catalogue:
        raise UserError("--catalogue is missing: the file of texts to take negatives from")
    config = config_checks.resolve(config)
    catalogue = mining.read_catalogue(Path(config.mine.catalogue))
    split = FLAGS.split or choose_split(config.data, "train")
    rows = mining.load_rows(config, split)
    examples, model = rows.examples, None
    if config.mine.shortlist or not any(given):
        if FLAGS.workdir is not None:
            config.model.update(path=str(resolve_run(FLAGS.workdir)))
            config.model.lora = config_lib.default().model.lora
        if not config.model.path:
            raise UserError("no model: give --workdir=RUN, --config.model.path=FOLDER or --scores")
        model = api.load_model(config.model.path, config)
    m, n = len(examples), len(catalogue.texts)
    if FLAGS.scores is not None:
        table = mining_sources.read_table(FLAGS.scores, "scores", m, n)
        source = mining_sources.by_scores(table, mining.chosen_index(examples, catalogue))
    elif FLAGS.prompt_features is not None:
        prompts = mining_sources.read_table(FLAGS.prompt_features, "prompt_features", m, None)
        width = prompts.shape[1]
        source = mining_sources.by_features(
            prompts,
            mining_sources.read_table(FLAGS.item_features, "item_features", n, width),
            None,
            similarity=config.mine.similarity,
            index=mining.chosen_index(examples, catalogue),
        )
    else:
        assert model is not None
        source = mining_sources.by_policy(
            model.policy, model.params, examples, catalogue.texts, config.data.max_prompt_length,
            config.mine.similarity,
        )  # fmt: skip
    scored_by = None if model is None else (model.policy, model.params)
    return mining.mine_rows(config, rows, catalogue, source, scored_by)


def main() -> None:
    """Writes the negatives that the flags ask for."""
    config = cli.read_config()
    tables = (FLAGS.scores, FLAGS.prompt_features, FLAGS.item_features)
    inputs = [path for path in (config.data.path, config.mine.catalogue, *tables) if path]
    output = cli.check_output(FLAGS.output, "JSON-lines or Parquet", *inputs)
    from mass_dpo_jax.data.formats.writing import convert_rows

    chat = config.data.chat_template != "none"
    count = cli.write_rows(output, convert_rows(mine(config), FLAGS.format, chat))
    print(f"{count} {'pairs' if FLAGS.format == 'pairs' else 'rows'} written to {output}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", "A run's folder.")
    cli.define_split("train")
    cli.define_path("scores", "A .npy file [prompts, items] of scores, in place of a model.")
    cli.define_path("prompt_features", "A .npy file [prompts, D], in place of a model.")
    cli.define_path("item_features", "A .npy file [items, D], which goes with them.")
    cli.define_format()
    cli.define_path("output", "The file to write: JSON lines, or .parquet.")
    cli.run(main, group="mine", unread=UNREAD)
