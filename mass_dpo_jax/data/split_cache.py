"""A disk cache of large splits, so that the next run need not read their files again.

A split follows from the file's bytes, the settings, the seed and the code that reads it. Under a
digest of these we store how many examples there are, what was logged about them, and, for small
splits, the examples. Those of large ones are read when somebody first looks at them: a run whose
tokens are cached too (`token_cache`) never does.
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
from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax import data as data_lib
from mass_dpo_jax.config import PREFERENCES
from mass_dpo_jax.data import hf_datasets, load_examples, sources, warn_of_shared_prompts
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import write_whole

MIN_RESPONSES = 20_000  # With fewer responses, reading is as fast as the cache.
MAX_STORED_ROWS = 5000  # The examples of larger splits are not stored.
Log = list[tuple[int, str]]  # Levels and messages.
_log = logging.getLogger(__name__)


class CachedExamples(Sequence[Example]):
    """A split's examples, read when one of them is first looked at.

    Attributes:
        key: equal for the same examples, across runs.
    """

    def __init__(self, key: str, count: int, read: Callable[[], list[Example]]):
        self.key = key
        self._count = count
        self._read = read

    @functools.cached_property
    def _examples(self) -> list[Example]:
        return self._read()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)


def open_splits(
    folder: Path, data: ConfigDict, splits: Sequence[str], seed: int
) -> dict[str, Sequence[Example]]:
    """Returns the examples of some splits as `load_examples` does, or from the cache in `folder`.

    Warns of prompts that training shares with other splits.

    Raises:
        UserError: as `load_examples`, here or when an example is looked at; or the file was changed
            in between.
    """

    def load() -> dict[str, list[Example]]:
        examples = {split: load_examples(data, split, seed) for split in splits}
        warn_of_shared_prompts(examples)
        return examples

    is_folder = data.name in ("synthetic", "movielens")  # Or a name of ours.
    if not data.path or (is_folder and not Path(data.path).exists()):
        return {**load()}
    key = _make_key(data, splits, seed)
    file = folder / f"examples-{key}.json"
    try:
        cached, log = _read(file, key, data, splits, seed)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning(f"{file}: unreadable ({error}); reading the data again")
    else:
        repeat_log(log)
        return cached
    with record_log() as log:
        examples = load()
    if _make_key(data, splits, seed) != key:
        raise UserError(f"{data.path}: has been changed while it was read; start again")
    if sum(len(row.responses) for rows in examples.values() for row in rows) < MIN_RESPONSES:
        return {**examples}
    _write(file, examples, log)
    return {split: _wrap(f"{key} {split}", rows) for split, rows in examples.items()}


def _read(
    file: Path, key: str, data: ConfigDict, splits: Sequence[str], seed: int
) -> tuple[dict[str, Sequence[Example]], Log]:
    stored, log = json.loads(remove_checksum(file.read_text(encoding="utf-8")))

    def open_split(split: str, count: int, rows: list[Any] | None) -> CachedExamples:
        def read() -> list[Example]:
            if _make_key(data, splits, seed) != key:
                raise UserError(f"{data.path}: has been changed since this run began")
            return load_examples(data, split, seed)

        if rows is not None:
            return _wrap(f"{key} {split}", [_from_json(row) for row in rows])
        return CachedExamples(f"{key} {split}", count, read)

    return {split: open_split(split, *stored[split]) for split in splits}, log


def _write(file: Path, examples: dict[str, list[Example]], log: Log) -> None:
    content = {
        split: (
            len(rows),
            [_to_json(row) for row in rows] if len(rows) <= MAX_STORED_ROWS else None,
        )
        for split, rows in examples.items()
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, [add_checksum(json.dumps([content, log]))])
    except OSError as error:
        if not file.exists():  # Otherwise another run was faster.
            _log.warning(f"{file}: {error.strerror}; the examples are not kept")


def _wrap(key: str, rows: list[Example]) -> CachedExamples:
    return CachedExamples(key, len(rows), lambda: rows)


def _to_json(example: Example) -> list[Any]:
    row = [getattr(example, field.name) for field in dataclasses.fields(Example)]
    return [dataclasses.asdict(v) if isinstance(v, History) else v for v in row]


def _from_json(row: list[Any]) -> Example:
    fields = dict(zip((field.name for field in dataclasses.fields(Example)), row, strict=True))
    if isinstance(prompt := fields["prompt"], dict):
        fields["prompt"] = History(**{**prompt, "items": tuple(prompt["items"])})
    for name in ("rejected", "scores", "also_chosen", "ranks", "probabilities", "tools"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Example(**fields)


def _make_key(data: ConfigDict, splits: Sequence[str], seed: int) -> str:
    versions = (mass_dpo_jax.__version__, importlib.metadata.version("datasets"), np.__version__)
    place = str(Path(data.path).resolve())
    sha = hashlib.sha256(repr((versions, list(splits), seed, place)).encode())
    sha.update(json.dumps(data.to_dict(), sort_keys=True).encode())
    sha.update(digest_code())
    files = _list_files(data)
    for file in files:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        sha.update(f"{file.resolve()} {digest}\n".encode("utf-8", "surrogateescape"))
    if not files:  # On the hub.
        sha.update(hf_datasets.find_fingerprint(data.path, data.subset).encode())
    return sha.hexdigest()[:32]


def _list_files(data: ConfigDict) -> list[Path]:
    """Returns the files that the rows of all splits may be in; none for a dataset on the hub."""
    folder = Path(data.path)
    if folder.is_dir() and data.name not in PREFERENCES:
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return sources.list_files(data)


# Shared with `token_cache`.


@functools.cache
def digest_code() -> bytes:
    """Returns a digest of the code in data/: a change of it makes caches invalid."""
    sha = hashlib.sha256()
    for file in sorted(Path(data_lib.__file__).parent.rglob("*.py")):
        sha.update(file.read_bytes())
    return sha.digest()


def add_checksum(text: str) -> str:
    """Returns a text with its checksum in a last line."""
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}"


def remove_checksum(text: str) -> str:
    """Returns the text that `add_checksum` was given, or raises ValueError if it was changed."""
    text, _, checksum = text.rpartition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise ValueError("it is not what was written")
    return text


@contextlib.contextmanager
def record_log() -> Iterator[Log]:
    """Records what is logged about the data, for `repeat_log` when the cache is read."""
    log: Log = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append((record.levelno, record.getMessage()))

    logger, recorder = logging.getLogger(data_lib.__name__), Recorder()
    logger.addHandler(recorder)
    try:
        yield log
    finally:
        logger.removeHandler(recorder)


def repeat_log(log: Log) -> None:
    """Logs recorded messages again."""
    for level, message in log:
        _log.log(level, "%s", message)
