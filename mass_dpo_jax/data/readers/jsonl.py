"""Preference data in JSON lines, plain or gzip: a superset of TRL's format.

One object a line, `{"id"?, "prompt", "chosen", "rejected", "score_chosen"?, "score_rejected"?}`;
`examples.from_row` says what each may be. Lines of white space are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mass_dpo_jax.data import tables
from mass_dpo_jax.data.examples import Example

PATTERNS = ("{}.jsonl", "{}.jsonl.gz")


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of the file or folder `data.path`; see `splits` for missing splits.

    Raises:
      UserError: names the file, the line and the field.
    """
    return tables.preferences(tables.open_files(Path(data.path), split, PATTERNS), data, seed)
