"""Data: from files to the arrays of a batch.

`load_examples` reads a split, `tokens.tokenize` turns it into token ids, `batches` cuts those into
batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mass_dpo_jax.data import hub, jsonl, lastfm, splits
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError


def load_examples(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of the data set that `data.name` and `data.path` name.

    Args:
      data: the configuration's `data`. Of the splits "train", "validation" and "test" at most
        `data.max_train`, `data.max_validation` and `data.max_test` rows are used.
      split: one of those, or "all": every row of a single file (or dataset without splits), in
        order. Where there are no validation rows, also in a single file, the share
        `data.validation_share` of the training rows, drawn by seed, is held out for it (0: no
        validation). Where there are no test rows, validation's stand in.
      seed: what is held out, drawn and shuffled is a function of it.

    Returns:
      The examples; none where validation or test has no rows and none are held out.

    Raises:
      UserError: names the file, the row and the field, what was found and what is expected.
    """
    if data.name == "synthetic":
        from mass_dpo_jax.data import synthetic

        if split == "all":
            raise UserError("config.data.name='synthetic' has the splits train, validation, test")
        examples = synthetic.load(data, split, seed)
    else:
        held_out = data.validation_share
        if not data.path:
            raise UserError(
                f"config.data.path is empty: expected the data of config.data.name={data.name}"
            )
        if data.name == "jsonl":
            examples = jsonl.load(Path(data.path), split, seed, held_out)
        elif data.name == "hub":
            examples = hub.load(data.path, split, seed, held_out)
        elif data.name == "lastfm":
            examples = lastfm.load(Path(data.path), split, seed, held_out, data.list_candidates)
        else:
            raise UserError(
                f"config.data.name={data.name!r}: expected jsonl, hub, lastfm or synthetic"
            )
    most = 0 if split == "all" else data[f"max_{split}"]
    return splits.limit(examples, most, seed)
