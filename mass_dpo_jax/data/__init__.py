"""Data: from files to the arrays of a batch.

`load_examples` reads a split, `tokens.tokenize` turns it into token ids, `batches` cuts those into
batches. `python -m mass_dpo_jax.data` shows what a data set looks like.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mass_dpo_jax.config import CHOICES
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError

_log = logging.getLogger(__name__)


def warn_of_shared_prompts(examples: Mapping[str, Sequence[Example]]) -> None:
    """Warns, by split, of rows of validation and test whose prompts are trained on too."""
    trained = {example.question for example in examples.get("train", ())}
    for split, rows in examples.items():
        if split != "train" and (count := sum(row.question in trained for row in rows)):
            _log.warning(
                "%s: the prompts of %d of its %d rows are trained on too", split, count, len(rows)
            )


def load_examples(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of the data set that `data.name` and `data.path` name.

    Args:
      data: the configuration's `data`. Of the splits "train", "validation" and "test" at most
        `data.max_train`, `data.max_validation` and `data.max_test` rows are used; the log says
        what that leaves out.
      split: one of those, or "all": every row of a single file (or dataset without splits), in
        order. Where there are no validation rows, also in a single file, the share
        `data.validation_share` of the training rows, drawn by seed, is held out for it (0: no
        validation); rows that share a prompt stay together. Where there are no test rows,
        validation's stand in. MovieLens and the original LastFM have no splits: see `sequences`.
      seed: what is held out, drawn and shuffled is a function of it.

    Returns:
      The examples; none where validation or test has no rows and none are held out.

    Raises:
      UserError: names the file, the row and the field, what was found and what is expected. With
        `data.on_bad_row` = "skip" a wrong row is left out instead, and counted in the log.
    """
    from mass_dpo_jax.data import splits

    names = CHOICES["data.name"]
    if data.name not in names:
        raise UserError(f"config.data.name={data.name!r}: expected one of {', '.join(names)}")
    if data.name != "synthetic" and not data.path:
        raise UserError(
            f"config.data.path is empty: expected the file, folder or name of the data of "
            f"config.data.name={data.name}, as in --config.data.path=pairs.jsonl"
        )
    if data.columns and data.name not in ("jsonl", "hub"):
        raise UserError(
            f"config.data.columns={data.columns!r}: config.data.name={data.name} has columns of "
            "its own; expected one of jsonl, hub"
        )
    if data.num_candidates < 2:
        raise UserError(f"config.data.num_candidates={data.num_candidates}: expected 2 or more")
    # A reader is the module of its name, imported when it is asked for.
    reader = importlib.import_module(f"{__name__}.readers.{data.name}")
    examples: list[Example] = reader.load(data, split, seed)
    return splits.limit(examples, data, split, seed)
