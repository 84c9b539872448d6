"""Reading and writing files: broken ones are refused with a location, none is half written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tokenize
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mass_dpo_jax.errors import UserError, check_type
from mass_dpo_jax.utils.file_kinds import HEAD_BYTES, describe_binary

if TYPE_CHECKING:
    import numpy as np

MAX_JSON_DEPTH = 100  # Python follows about 1000 levels, fewer in a deep call stack.

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # These errors do not name a file.


def expand(path: str, location: str) -> str:
    """Returns a path with `~` and variables replaced, as a shell does where it sees them.

    Args:
        path: may be empty.
        location: the flag or setting that has it.

    Raises:
        UserError: a variable is not set, there is no such user, or quotes or blanks surround it.
    """
    if path == "~" or path.startswith("~/"):
        path = str(Path(path).expanduser())
    if not path or os.path.lexists(path.partition("\0")[0]):
        return path
    if path.startswith("~"):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError:
            raise UserError(
                f"{location}={path}: no user of that name; a file is ./{path}"
            ) from None
    path = os.path.expandvars(path)
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise UserError(f"{location}={path}: the variable {unset[1].strip('{}')} is not set")
    if path != path.strip().strip("\"'“”"):
        raise UserError(f"{location}={path!r}: expected a path without quotes or blanks around it")
    if "\0" in path:
        raise UserError(f"{location}={path!r}: expected a path without NUL characters")
    return path


def expand_path(path: str | Path, location: str) -> Path:
    """Returns `expand(path)` as a `Path`.

    Raises:
        UserError: as `expand`, or it is empty or no path.
    """
    check_type(path, (str, os.PathLike), location, "a path")
    if not str(path):
        raise UserError(f"{location}: expected a path, found an empty string")
    return Path(expand(str(path), location))


def split_paths(paths: str) -> list[str]:
    """Returns the paths and patterns that commas separate in a text, unless it is one path."""
    if Path(paths).exists():
        return [paths]
    return [path for path in map(str.strip, paths.split(",")) if path]


def list_paths(paths: str) -> list[Path]:
    """Returns the files and folders that a text names, see `split_paths`; patterns in order."""
    listed = []
    for part in split_paths(paths):
        pattern = Path(part)
        if is_pattern(part):
            base = Path(pattern.anchor)
            listed += sorted(base.glob(str(pattern.relative_to(base))))
        else:
            listed.append(pattern)
    return listed


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern, as `pairs/*.jsonl`, and no file of that name."""
    return re.search(r"[*?[]", path) is not None and not Path(path).exists()


def make_absolute(paths: str) -> str:
    """Returns absolute paths for those in a text, see `split_paths`."""
    return ",".join(str(Path(part).absolute()) for part in split_paths(paths))


def write_whole(path: Path, parts: Iterable[str | bytes], *, shared: bool = False) -> None:
    """Writes a file from its parts, whole or not at all; a link's target, not the link.

    Args:
        path: the file's path, in a folder that exists.
        parts: text, which is written in UTF-8, or bytes.
        shared: other processes may write the same file at the same time.

    Raises:
        OSError: it cannot be written; names the file.
    """
    path = path.resolve()
    temporary = _name_temporary(path, shared)
    try:
        with temporary.open("wb") as file:
            file.writelines(x.encode() if isinstance(x, str) else x for x in parts)
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno in DISK_FULL:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a new folder that gets the name `path` when the body is done; an error removes it.

    Args:
        path: does not exist, or is an empty folder.
        shared: other processes may write the same folder at the same time.

    Raises:
        OSError: it cannot be written, or `path` is there by now.
    """
    temporary = _name_temporary(path, shared)
    shutil.rmtree(temporary, ignore_errors=True)  # Left by a process that was killed.
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _name_temporary(path: Path, shared: bool) -> Path:
    unique = f".{uuid.uuid4().hex}" if shared else ""
    return path.with_name(f"{path.name}{unique}.tmp")


def parse_json(text: str, file: Path, line: int = 1, unique_keys: bool = False) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: JSON.
        file: origin of the text, for messages.
        line: line of the file where the text starts.
        unique_keys: refuse an object that has a key twice; JSON itself takes the last one.

    Raises:
        UserError: the text is no JSON, is nested too deeply, or has a number with more digits than
            Python converts.
    """
    text = text.rstrip()  # A truncated file is then reported at its last line.
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicates if unique_keys else None)
        if is_deep(text, value):
            raise _DepthError
        return value
    except _JSON_ERRORS as error:
        raise _make_json_error(text, error, file, line) from None


def parse_json_values(text: str, file: Path) -> Iterator[Any]:
    """Yields the elements of a JSON array, or JSON values that stand one after another.

    Commas may stand between values. Objects must not have a key twice.

    Args:
        text: JSON.
        file: origin of the text, for messages.

    Raises:
        UserError: as `parse_json`, or the array has no end.
    """
    text = text.rstrip()
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)
    is_open, position = False, 0
    while (position := _skip_space(text, position)) < len(text):
        if text[position] == ("]" if is_open else "["):
            is_open = not is_open
            position += 1
            continue
        try:
            value, end = decoder.raw_decode(text, position)
            if is_deep(text[position:end], value):
                raise _DepthError
        except _JSON_ERRORS as error:
            raise _make_json_error(text, error, file, 1, position) from None
        yield value
        position = end
    if is_open:
        raise UserError(f"{file}: the JSON array has no end, ]: is the file whole?")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


_SPACE = re.compile(r"[\s,]*")
_JSON_ERRORS = (ValueError, RecursionError)  # Numbers can have too many digits.


def _make_json_error(
    text: str, error: Exception, file: Path, line: int, start: int = 0
) -> UserError:
    """Makes the error of a text, from line `line` of a file, whose value at `start` is no JSON."""
    position = error.pos if isinstance(error, json.JSONDecodeError) else start
    line += text.count("\n", 0, position)
    problem = "a number has too many digits"
    if isinstance(error, json.JSONDecodeError):
        begin = text.rfind("\n", 0, position) + 1
        broken = text[begin:].partition("\n")[0].strip()
        problem = f"{error.msg} at column {position - begin + 1}, in {shorten(broken)}"
    elif isinstance(error, _DuplicateKeyError):
        problem = f"the key {error.args[0]!r} is there twice in one object: leave one of them"
    elif isinstance(error, (RecursionError, _DepthError)):
        problem = "nested too deeply"
    return UserError(f"{file}:{line}: invalid JSON: {problem}")


class _DepthError(ValueError):
    """Values are nested too deeply."""


class _DuplicateKeyError(ValueError):
    """An object has a key twice."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return value


def is_deep(text: str, value: Any) -> bool:
    """Whether the value of a JSON text is nested more deeply than MAX_JSON_DEPTH."""
    may_be_deep = text.count("[") + text.count("{") > MAX_JSON_DEPTH
    return may_be_deep and _measure_depth(value) > MAX_JSON_DEPTH


def _measure_depth(value: Any) -> int:
    depth, level = 0, [v for v in (value,) if isinstance(v, (dict, list))]
    while level:
        depth += 1
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for part in parts for v in part if isinstance(v, (dict, list))]
    return depth


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
        UserError: there is no such file, or it is not what `parse_json` reads.
    """
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if what := describe_binary(content[:HEAD_BYTES], path):
        raise UserError(f"{path}: {what}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def read_array(path: Path) -> np.ndarray:
    """Returns the array in a `.npy` file, mapped into memory: a header can promise too much.

    Raises:
        UserError: there is no such file, or it holds no array of numbers.
    """
    import numpy as np  # Imported here: settings and flags need this module, and no arrays.

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    # NumPy reads the header as Python, and can fail in all these ways.
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError, OverflowError) as error:
        raise UserError(f"{path}: not a .npy file: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise UserError(f"{path}: expected a .npy file with an array of numbers")
    return array


def check_links(folder: Path) -> None:
    """Raises UserError where a downloaded folder has links that leave it.

    A download can hold links, as git clones do, and must not make us read files elsewhere. In the
    cache of the Hugging Face hub the files of a model are links to other files of that model.
    Weights may be links to another disk: only safetensors can be read as weights.
    """
    home = find_home(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" or not path.is_symlink():
            continue
        if not (target := path.resolve()).is_relative_to(home):
            raise UserError(
                f"{path}: a link to {target}, expected files of this folder only (weights, "
                "*.safetensors, may be links): put a copy of the file in its place"
            )


def find_home(folder: Path) -> Path:
    """Returns the folder that the links of a downloaded folder may lead into."""
    home = folder.resolve()
    return home.parent.parent if home.parent.name == "snapshots" else home


def shorten(text: str) -> str:
    """Returns a text, quoted and cut to 60 characters, for a one-line message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
