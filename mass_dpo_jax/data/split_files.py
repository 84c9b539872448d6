"""Which files of a folder have the rows of which split: by their names, or as `data.splits` says.

A file is of the split that its name without endings is, or ends with: `train.jsonl.gz`,
`pairs-test.csv`; or of the one that its folder is called: `dev/part1.jsonl`. Numbered files are
parts of one: `train-00000-of-00002.parquet`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mass_dpo_jax.data import splits
from mass_dpo_jax.data.row_files import COMPRESSED, SUFFIXES
from mass_dpo_jax.errors import UserError

_NAME = re.compile(
    rf"(?P<stem>.+?)(?:[-_.](?P<number>\d+)(?:-of-(?P<total>\d+))?)?(?:-[0-9a-f]{{16}})?"
    rf"(?P<suffix>\.(?:{'|'.join(SUFFIXES)})(?:\.(?:{'|'.join(COMPRESSED)}))?)",
    re.I,
)
# Files of descriptions that Hugging Face and Git write beside data.
_NOTES = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|metadata\.json")


MAX_DEPTH = 3  # Folders inside of a folder that are looked into.


class SplitFile(NamedTuple):
    """A file of rows in a folder.

    Attributes:
        path: the file.
        stem: its name without number and endings: "train" of `train-00000-of-00002.parquet`.
        suffix: its endings, in lower case: ".jsonl.gz".
        number: its number; None for a whole file.
        total: how many files its name says there are; None where it does not.
    """

    path: Path
    stem: str
    suffix: str
    number: int | None
    total: int | None


def parse_name(path: Path) -> SplitFile | None:
    """Returns what a file's name says; None for a file that is not read."""
    match = _NAME.fullmatch(path.name)
    if match is None or path.name.startswith(".") or _NOTES.fullmatch(path.name):
        return None
    number, total = match["number"], match["total"]
    return SplitFile(
        path,
        match["stem"],
        match["suffix"].lower(),
        None if number is None else int(number),
        None if total is None else int(total),
    )


def find_split_files(
    folder: Path, names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[Path]]:
    """Returns the files of each split that a folder has.

    Args:
        folder: a folder.
        names: the names by which `data.splits` calls each split; none to know splits by `NAMES`.

    Raises:
        UserError: the folder has no split, or a split twice.
    """
    if names:
        found = {split: _find_named(folder, theirs) for split, theirs in names.items()}
    else:
        found = _find_by_name(folder)
    if not found:
        raise UserError(_describe_missing(folder))
    files = {split: _check_parts(folder, split, group) for split, group in found.items()}
    used = {path for group in files.values() for path in group}
    unread = tuple(
        p.name + "/" * p.is_dir()
        for p in sorted(folder.iterdir())
        if p.name[0] != "." and p not in used and not any(u.is_relative_to(p) for u in used)
    )
    splits.log_unread(str(folder), unread, tuple(files))
    return files


def has_splits(folder: Path) -> bool:
    """Whether files of a folder, or of folders in it, are named after splits."""
    try:
        return bool(_find_by_name(folder))
    except UserError:
        return True


def find_split(stem: str) -> str:
    """Returns the split that a file or folder is named like: "train" for `pairs-train`; or ""."""
    for word in (stem.lower(), re.split(r"[-_ ]", stem.lower())[-1]):
        for split, aliases in splits.NAMES.items():
            if word in aliases:
                return split
    return ""


def _find_by_name(folder: Path) -> dict[str, list[SplitFile]]:
    """Returns the files of splits by their names, or by those of their folders.

    Looks into folders only as far as needed: runs and logs may lie beside data.
    """
    for depth in range(MAX_DEPTH + 1):
        by_base: dict[Path, dict[str, list[SplitFile]]] = {}
        for path in sorted(folder.glob("*/" * depth + "*")):
            parsed = None if _is_hidden(path, folder) else parse_name(path)
            if parsed is None or not path.is_file():
                continue
            base, split, outer = path.parent, find_split(parsed.stem), ""
            if path.parent != folder:
                outer = find_split(path.parent.name)
            if outer and split in ("", outer):
                base, split = path.parent.parent, outer
            if split:
                by_base.setdefault(base, {}).setdefault(split, []).append(parsed)
        if by_base:
            break
    else:
        return {}
    base = min(by_base, key=lambda base: len(base.parts))
    bases = [other for other in by_base if len(other.parts) == len(base.parts)]
    if len(bases) > 1:
        subsets = [str(other.relative_to(folder)) for other in bases]
        raise UserError(
            f"{folder}: several folders have splits: {', '.join(subsets)}; name one, as in "
            f"--config.data.subset={subsets[0]}"
        )
    for split, files in by_base[base].items():
        _check_alike(folder, split, files)
    return by_base[base]


def _find_named(folder: Path, names: Iterable[str]) -> list[SplitFile]:
    """Returns the files that names of `data.splits` stand for.

    A name is that of a file, a pattern, a folder, or a file's name without number and endings.
    """
    found: list[SplitFile] = []
    for name in names:
        paths = [folder / name]
        if not paths[0].is_file():
            inside = folder / name if paths[0].is_dir() else folder
            pattern = "*" if paths[0].is_dir() else name
            paths = sorted(p for p in inside.glob(pattern) if p.is_file())
        if not paths:
            paths = [file.path for file in _list_files(folder) if file.stem == name]
        files = [parse_name(path) or SplitFile(path, name, "", None, None) for path in paths]
        if not files:
            raise UserError(
                f"config.data.splits: {name!r} is no file in {folder}; found {_list_stems(folder)}"
            )
        found += files
    return found


def _check_parts(folder: Path, split: str, files: Sequence[SplitFile]) -> list[Path]:
    """Returns the paths of a split's files, which are the parts of one or were named one by one."""
    for name in {(file.path.parent, file.stem, file.suffix) for file in files}:
        parts = [file for file in files if (file.path.parent, file.stem, file.suffix) == name]
        for total in {file.total for file in parts} - {None}:
            have = {file.number for file in parts if file.total == total}
            if missing := sorted(set(range(total or 0)) - have):
                raise UserError(
                    f"{folder}: {split}: of {total} files {parts[0].stem}-*{parts[0].suffix} "
                    f"number {missing[0]:05} is missing"
                )
    return [file.path for file in files]


def _check_alike(folder: Path, split: str, files: Sequence[SplitFile]) -> None:
    """Raises UserError where files of different names are of one split."""
    kinds = {(file.stem, file.suffix, file.number is None): file.path.name for file in files}
    if len(kinds) > 1 and any(find_split(file.stem) for file in files):
        first, second, *_ = kinds.values()
        raise UserError(
            f"{folder}: {first} and {second} could both be the {split} split; expected one of "
            f"them, or --config.data.splits={split}:{first}"
        )


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _list_stems(folder: Path) -> str:
    return splits.list_names(list(dict.fromkeys(file.stem for file in _list_files(folder))))


def _list_files(folder: Path) -> list[SplitFile]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [file for path in paths if (file := parse_name(path)) is not None]


def _describe_missing(folder: Path) -> str:
    """Describes a folder that has no file for any split, with advice."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name[0] != ".")
    text = (
        f"{folder}: expected files called train, validation or test, as train.jsonl; found "
        f"{splits.list_names(names)}"
    )
    files = [file for file in _list_files(folder) if file.path.parent == folder]
    if not files:
        return text
    advice = splits.suggest_splits([file.stem for file in files])
    if not advice:
        suffixes = {file.suffix for file in files}
        several = len(files) > 1 and len(suffixes) == 1
        path = folder / (f"*{files[0].suffix}" if several else files[0].path.name)
        return f"{text}; --config.data.path={shlex.quote(str(path))} reads rows without splits"
    return f"{text}; {advice}"
