"""Preference data in JSON lines, plain or gzip: a superset of TRL's format.

One object a line, `{"id"?, "prompt", "chosen", "rejected"}`; `examples.from_row` says what each may
be. Lines of white space are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

from mass_dpo_jax.data import examples, splits
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError

PATTERNS = ("{}.jsonl", "{}.jsonl.gz")


def load(path: Path, split: str, seed: int, held_out: float) -> list[Example]:
    """The examples of a split of a file or folder; see `splits` for a file and missing splits.

    An example without an id is called after its split (or file) and its row, counted from 0.

    Raises:
      UserError: names the file, the line and the field.
    """
    file, source = splits.find_file(path, split, PATTERNS)
    found: list[Example] = []
    for number, line in splits.read_lines(file):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place}: invalid JSON: {error.msg} at column {error.colno}, in "
                f"{examples.shorten(line.strip())}"
            ) from None
        found.append(examples.from_row(row, f"{source.name}-{len(found)}", place))
    taken = splits.take(found, source.part, held_out, seed, str(file))
    examples.check_ids(found)
    return taken
