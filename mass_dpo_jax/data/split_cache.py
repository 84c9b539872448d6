"""Examples of large files, which the next run need not read again.

What a split holds follows from the file's bytes, the settings, the seed and the code that reads
it. By a digest of these we keep how many examples there are and what was said about them, and the
examples themselves of small splits. Those of large ones are read where somebody looks at them: a
run whose tokens are kept too does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

import mass_dpo_jax
from mass_dpo_jax import data as data_lib
from mass_dpo_jax.data import load_examples, warn_of_shared_prompts
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.splits import split_of
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import write_whole

WORTH = 20_000  # Responses; fewer are read faster than they are looked up and explained.
SMALL = 5000  # Examples that are kept.
Said = list[tuple[int, str]]  # Levels and messages of a log.
_log = logging.getLogger(__name__)


class Examples(Sequence[Example]):
    """A split's examples, read when they are first looked at.

    key: equal for the same examples, across runs.
    """

    def __init__(self, key: str, count: int, read: Callable[[], list[Example]]):
        self.key = key
        self._count = count
        self._read = read

    @functools.cached_property
    def _all(self) -> list[Example]:
        return self._read()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._all[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._all)


def open_splits(
    folder: Path, data: Any, splits: Sequence[str], seed: int
) -> dict[str, Sequence[Example]]:
    """The examples of some splits by `load_examples`, or what an earlier run kept in `folder`.

    Says where they share prompts.

    Raises:
      UserError: as `load_examples`, here or when an example is looked at; or the file is another
        by then.
    """

    def load() -> dict[str, list[Example]]:
        found = {split: load_examples(data, split, seed) for split in splits}
        warn_of_shared_prompts(found)
        return found

    if not data.path or not Path(data.path).exists():  # Made by a program, or on the hub.
        return {**load()}
    key = _key(data, splits, seed)
    file = folder / f"examples-{key}.json"
    try:
        stored, said = json.loads(without_checksum(file.read_text(encoding="utf-8")))
        kept: dict[str, Sequence[Example]] = {
            split: _stored(stored[split], split, key, data, splits, seed) for split in splits
        }
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning(f"{file}: unreadable ({error}); reading the data again")
    else:
        for level, message in said:
            _log.log(level, "%s", message)
        return kept
    with listening() as heard:
        found = load()
    if _key(data, splits, seed) != key:
        raise UserError(f"{data.path}: has been changed while it was read; start again")
    if sum(1 + len(example.rejected) for rows in found.values() for example in rows) < WORTH:
        return {**found}
    content = {
        split: (len(rows), [_row(row) for row in rows] if len(rows) <= SMALL else None)
        for split, rows in found.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, [with_checksum(json.dumps([content, heard]))])
    except OSError as error:
        if not file.exists():  # Else another run was faster.
            _log.warning(f"{file}: {error.strerror}; the examples are not kept")
    return {split: _given(f"{key} {split}", rows) for split, rows in found.items()}


def with_checksum(text: str) -> str:
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}"


def without_checksum(text: str) -> str:
    """Raises ValueError where the text is not what `with_checksum` was given."""
    text, _, checksum = text.rpartition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise ValueError("it is not what was written")
    return text


def _given(key: str, rows: list[Example]) -> Examples:
    return Examples(key, len(rows), lambda: rows)


def _stored(
    stored: tuple[int, list[Any] | None],
    split: str,
    key: str,
    data: Any,
    splits: Sequence[str],
    seed: int,
) -> Examples:
    def read() -> list[Example]:
        if _key(data, splits, seed) != key:
            raise UserError(f"{data.path}: has been changed since this run began")
        return load_examples(data, split, seed)

    count, rows = stored
    if rows is not None:
        return _given(f"{key} {split}", [_example(row) for row in rows])
    return Examples(f"{key} {split}", count, read)


@contextlib.contextmanager
def listening() -> Iterator[Said]:
    """What is logged about the data in here, to be said again."""
    heard: Said = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((record.levelno, record.getMessage()))

    logger, listener = logging.getLogger(data_lib.__name__), Listener()
    logger.addHandler(listener)
    try:
        yield heard
    finally:
        logger.removeHandler(listener)


def _key(data: Any, splits: Sequence[str], seed: int) -> str:
    path = Path(data.path)
    versions = (mass_dpo_jax.__version__, importlib.metadata.version("datasets"), np.__version__)
    sha = hashlib.sha256(repr((versions, list(splits), seed, str(path.resolve()))).encode())
    sha.update(json.dumps(data.to_dict(), sort_keys=True).encode())
    for file in sorted(Path(data_lib.__file__).parent.rglob("*.py")):
        sha.update(file.read_bytes())
    if path.is_file():
        files = [path]
    elif data.name == "jsonl" and path.is_dir():  # Logs and runs may lie beside the splits.
        files = sorted(p for p in path.iterdir() if p.is_file() and split_of(p.name))
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        sha.update(f"{file.relative_to(path.parent)} {digest}\n".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()[:32]


def _row(example: Example) -> list[Any]:
    row = [getattr(example, field.name) for field in dataclasses.fields(Example)]
    return [dataclasses.asdict(v) if isinstance(v, History) else v for v in row]


def _example(row: list[Any]) -> Example:
    name, prompt, chosen, rejected, place, scores = row
    if isinstance(prompt, dict):
        prompt = History(**{**prompt, "items": tuple(prompt["items"])})
    scores = None if scores is None else tuple(scores)
    return Example(name, prompt, chosen, tuple(rejected), place, scores)
