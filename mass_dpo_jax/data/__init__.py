"""Data: from a line of a file to the arrays of a batch.

In the order in which a row passes through them::

    readers/NAME.py       the reader of config.data.name=NAME, found by `load_examples` below
      sources.py          the files or the dataset that config.data.path names
      split_files.py      which files of a folder a split consists of
      splits.py           which rows of them
      row_files.py        rows of files of any kind
      text_files.py       lines of plain and compressed files
      hf_datasets.py      datasets that Hugging Face's library opens
      rows.py             tables of rows, and what happens to a bad one
      fields.py           checks of single fields
      readers/columns.py, messages.py, conversations.py, row_warnings.py    for preferences
      readers/tools.py      functions that may be called, and calls of them
      readers/literals.py   values that a table wrote as text
      formats/            preferences as other programs write them
      grouping.py         rows of one prompt as one pool: pairs, answers with labels
      readers/questions.py    for qasc, medmcqa
      readers/sequences.py    for movielens, lastfm
    examples.py           Example: a prompt with its chosen and its rejected responses
    split_cache.py        a disk cache of the examples of large splits
    render.py             text as it is, or
      chat_template.py    what a chat template writes
      template_probe.py   ... known without rendering each answer
      template_checks.py  ... with warnings of what looks wrong or is not written
    prompts.py            prompts as token ids, cut to the length limit
    tokenizer.py          loads, trains and runs tokenizers
    tokenization.py       examples as token ids: all of the above and the limits of responses
    tokens.py             Tokens: the arrays of a split
    token_cache.py        a disk cache of the tokens of large splits
    batches.py            Batch: shapes, the order of training, arrays of a step

A row that is wrong (a field is missing, the chosen response is also rejected, the template fails,
...) raises a UserError with file, row and field. With `data.on_bad_row` = "error" this ends the
program, with "skip" the row is left out and counted (`rows.BadRows`).

A prompt over `data.max_prompt_length` is cut, dropped with its example, or an error, by
`data.long_prompt`: history first, then the beginning of its text (`prompts`). A response over
`data.max_response_length` is an error or dropped, by `data.long_response`; its example goes too if
it was the chosen one or the last negative (`tokenization`). Responses are never cut. `Tokens.cut`
counts all of this.

Only `config.data` is read here, never another section; what a function reads of it, its docstring
says. `python -m mass_dpo_jax.data` shows what a dataset looks like.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from mass_dpo_jax.config import CHOICES, PREFERENCES
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError

_log = logging.getLogger(__name__)


def load_examples(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of the dataset that `data.name` and `data.path` name.

    Args:
        data: the configuration's `data`. Reads `name`, `path`, `columns`, `num_candidates`, and
            what the reader of that name reads. At most `data.max_train`, `data.max_validation` and
            `data.max_test` rows of the splits are used; the log says what that leaves out.
        split: "train", "validation", "test", or "all": every row of a single file (or dataset
            without splits), in order. If there are no validation rows, also in a single file, the
            share `data.validation_share` of the training rows, drawn by seed, is held out for them
            (0: no validation); rows that share a prompt stay together. If there are no test rows,
            validation's stand in. MovieLens and the original LastFM have no splits: see
            `sequences`.
        seed: determines what is held out, drawn and shuffled.

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
    if data.columns and data.name not in PREFERENCES:
        raise UserError(
            f"config.data.columns={data.columns!r}: config.data.name={data.name} has columns of "
            f"its own; expected {PREFERENCES[0]}"
        )
    for setting in ("format", "group"):
        if data[setting] not in CHOICES[f"data.{setting}"]:
            raise UserError(
                f"config.data.{setting}={data[setting]!r}: expected one of "
                f"{', '.join(CHOICES[f'data.{setting}'])}"
            )
    for setting, unset in (("format", "auto"), ("group", "none")):
        if data[setting] != unset and data.name not in PREFERENCES:
            raise UserError(
                f"config.data.{setting}={data[setting]!r}: config.data.name={data.name} has a "
                f"format of its own; expected {unset}"
            )
    for setting in ("splits", "subset"):
        if data[setting] and data.name in ("movielens", "synthetic"):
            raise UserError(
                f"config.data.{setting}={data[setting]!r}: config.data.name={data.name} has splits "
                "of its own"
            )
    if data.num_candidates < 2:
        raise UserError(f"config.data.num_candidates={data.num_candidates}: expected 2 or more")
    # A reader is the module of its name, imported when it is asked for.
    name = PREFERENCES[0] if data.name in PREFERENCES else data.name
    reader = importlib.import_module(f"{__name__}.readers.{name}")
    examples: list[Example] = reader.load(data, split, seed)
    return splits.limit(examples, data, split, seed)


def warn_of_shared_prompts(examples: Mapping[str, Sequence[Example]]) -> None:
    """Warns of validation and test rows, by split, whose prompts are trained on too."""
    trained = {example.question for example in examples.get("train", ())}
    for split, rows in examples.items():
        if split != "train" and (count := sum(row.question in trained for row in rows)):
            _log.warning(
                "%s: the prompts of %d of its %d rows are trained on too", split, count, len(rows)
            )
