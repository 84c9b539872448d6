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

Each line has `id`, `prompt`, `chosen` and `rejected`, which this program and TRL read, and for each
negative `mined_ids`, `mined_scores`, `mined_probabilities` (of being drawn) and `mined_weights`.
Training corrects for the draw by `mined_probabilities`; docs/mining.md says how. --format writes
the columns of other programs. The limits config.data.max_* are applied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, config_checks
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.run_paths import resolve_run

if TYPE_CHECKING:
    import numpy as np

    from mass_dpo_jax.api import Model
    from mass_dpo_jax.data.examples import Example

FLAGS = flags.FLAGS


def parse_ranks(value: str) -> tuple[int, int]:
    """Returns (first, last) of "10:100": ranks from 0, the last one not included.

    Raises:
        UserError: it is no such range.
    """
    match = re.fullmatch(r"(\d+):(\d+)", value)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--ranks={value}: expected FIRST:LAST with FIRST < LAST, such as 10:100")
    return int(match[1]), int(match[2])


def mine(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Returns the rows that the flags ask for.

    Raises:
        UserError: something in the flags, the configuration, the data or the model is wrong.
    """
    from mass_dpo_jax import api
    from mass_dpo_jax.selection.mining import Limits
    from mass_dpo_jax.training import mining, mining_sources
    from mass_dpo_jax.training.scored_model import choose_split

    first, last = parse_ranks(FLAGS.ranks)
    limits = Limits(first, last, FLAGS.margin, FLAGS.relative_margin, FLAGS.max_score)
    if FLAGS.shortlist is not None and FLAGS.shortlist < last:
        raise UserError(
            f"--shortlist={FLAGS.shortlist}: --ranks={FLAGS.ranks} are ranks within it; expected "
            f"--shortlist={last} or more, or lower ranks"
        )
    tables = [FLAGS.scores, FLAGS.prompt_features, FLAGS.item_features]
    given = [path is not None for path in tables]
    if given not in ([False] * 3, [True, False, False], [False, True, True]):
        raise UserError("expected --scores, or --prompt_features with --item_features, or neither")
    if FLAGS.catalogue is None:
        raise UserError("--catalogue is missing: the file of texts to take negatives from")
    config = config_checks.resolve(config)
    catalogue = mining.read_catalogue(FLAGS.catalogue)
    split = FLAGS.split or choose_split(config.data, "train")
    examples, everything = mining.load_rows(config, split)
    model = None
    if FLAGS.shortlist is not None or not any(given):
        if FLAGS.workdir is not None:
            config.model.update(path=str(resolve_run(FLAGS.workdir)))
            config.model.lora = config_lib.default().model.lora
        if not config.model.path:
            raise UserError("no model: give --workdir=RUN, --config.model.path=FOLDER or --scores")
        model = api.load_model(config.model.path, config)
    rows, items = len(examples), len(catalogue.texts)
    if FLAGS.scores is not None:
        table = mining_sources.read_table(FLAGS.scores, "scores", rows, items)
        source = mining_sources.by_scores(table, mining.chosen_index(examples, catalogue))
    elif FLAGS.prompt_features is not None:
        prompts = mining_sources.read_table(FLAGS.prompt_features, "prompt_features", rows, None)
        width = prompts.shape[1]
        source = mining_sources.by_features(
            prompts,
            mining_sources.read_table(FLAGS.item_features, "item_features", items, width),
            None,
            similarity=FLAGS.similarity,
            index=mining.chosen_index(examples, catalogue),
        )
    else:
        assert model is not None
        arguments = model.policy, model.params, examples, catalogue.texts
        source = mining_sources.by_policy(
            *arguments, config.data.max_prompt_length, FLAGS.similarity
        )
    positives = mining.find_positives(examples, everything)
    ranked = mining.rank(source, catalogue, positives, FLAGS.shortlist or last)
    if FLAGS.shortlist is not None:
        assert model is not None
        ranked = mining.rescore(
            ranked, examples, catalogue, FLAGS.shortlist, functools.partial(_score, model)
        )
    how = FLAGS.n, FLAGS.draw, FLAGS.temperature, config.seed
    return mining.mine(ranked, examples, catalogue, limits, *how)


def _score(model: Model, examples: Sequence[Example]) -> tuple[list[str], np.ndarray, np.ndarray]:
    scores = model.score(examples)
    return scores.ids, scores.logps, scores.valid


def main() -> None:
    """Writes the negatives that the flags ask for."""
    config = cli.read_config()
    tables = (FLAGS.scores, FLAGS.prompt_features, FLAGS.item_features)
    inputs = [path for path in (config.data.path, FLAGS.catalogue, *tables) if path]
    output = cli.check_output(FLAGS.output, "JSON-lines or Parquet", *inputs)
    from mass_dpo_jax.data.formats.writing import convert_rows

    chat = config.data.chat_template != "none"
    count = cli.write_rows(output, convert_rows(mine(config), FLAGS.format, chat))
    print(f"{count} {'pairs' if FLAGS.format == 'pairs' else 'rows'} written to {output}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", "A run's folder.")
    cli.define_split()
    cli.define_path("catalogue", "The texts to take negatives from, a row each.")
    cli.define_path("scores", "A .npy file [prompts, items], no model.")
    cli.define_path("prompt_features", "A .npy file [prompts, D], no model.")
    cli.define_path("item_features", "A .npy file [items, D], no model.")
    flags.DEFINE_enum("similarity", "cosine", ("cosine", "dot"), "How features are compared.")
    flags.DEFINE_integer(
        "shortlist",
        None,
        "Order so many of the best items by the model's log-probabilities, and rank those.",
        lower_bound=1,
    )
    flags.DEFINE_string("ranks", "0:100", "FIRST:LAST, the ranks to draw from; from 0.")
    flags.DEFINE_float("margin", None, "Leave out what scores above the chosen one's - this.")
    flags.DEFINE_float(
        "relative_margin", None, "Leave out what scores above c - this |c|; c is the chosen one's."
    )
    flags.DEFINE_float("max_score", None, "Leave out what scores above this.")
    flags.DEFINE_integer("n", 8, "Negatives per prompt.", lower_bound=1)
    flags.DEFINE_enum("draw", "softmax", ("softmax", "uniform", "top"), "How to draw them.")
    flags.DEFINE_float(
        "temperature", 1.0, "Divides the scores of --draw=softmax.", lower_bound=1e-6
    )
    cli.define_format()
    cli.define_path("output", "The file to write: JSON lines, or .parquet.")
    cli.run(main, unread=[*cli.TRAINING, *cli.CHOOSING, *cli.RANKING])
