"""Preference data in JSON lines, plain or gzip; `preferences` says what a row may look like."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import preferences
from mass_dpo_jax.data.rows import open_files

PATTERNS = ("{}.jsonl", "{}.jsonl.gz")


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of the file or folder `data.path`; see `splits` for missing splits.

    Reads `path` of `data`, and what `preferences.read_split` reads.

    Raises:
        UserError: names the file, the line and the field.
    """
    return preferences.read_split(open_files(Path(data.path), split, PATTERNS), data, seed)
