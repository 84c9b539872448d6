"""Token ids of a large split, kept on disk and mapped into memory by the next run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

import mass_dpo_jax
from mass_dpo_jax.data import (
    bad_rows,
    doubts,
    probe,
    prompts,
    ragged,
    render,
    row_checks,
    tokens,
)
from mass_dpo_jax.data import examples as examples_lib
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.split_cache import (
    WORTH,
    Examples,
    Said,
    listening,
    with_checksum,
    without_checksum,
)
from mass_dpo_jax.data.tokens import Tokens, tokenize

SETTINGS = (
    "chat_template", "date", "chat_template_kwargs", "on_bad_row",
    "max_prompt_length", "max_response_length", "long_prompt", "long_response",
)  # fmt: skip
# What the tokens depend on.
CODE = (bad_rows, doubts, examples_lib, ragged, probe, prompts, render, row_checks, tokens)
_log = logging.getLogger(__name__)


def tokenize_once(
    folder: Path,
    examples: Sequence[Example],
    tokenizer: Any,
    data: Any,
    *,
    progress: bool,
    max_positions: int | None = None,
) -> Tokens:
    """`tokenize`, or what an earlier run kept in `folder` of the same examples, tokenizer, limits
    and code. Files that are not as they were written are reported and made again.

    Raises:
      UserError: as `tokenize`.
    """
    make = functools.partial(
        tokenize, examples, tokenizer, data, progress=progress, max_positions=max_positions
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Of those that are kept there are enough; the sum would read them.
    kept = isinstance(examples, Examples)
    if backend is None or (not kept and sum(1 + len(e.rejected) for e in examples) < WORTH):
        return make()
    path = folder / f"tokens-{_digest(examples, tokenizer, backend, data, max_positions)}"
    try:
        found, said = _read(path)
        _log.info(f"tokens: read from {path}")
        for level, message in said:
            _log.log(level, "%s", message)
        return found
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        _log.warning(f"{path}: unreadable ({error}); tokenizing again")
        shutil.rmtree(path, ignore_errors=True)
    with listening() as heard:
        found = make()
    _write(path, found, heard)
    return found


def _digest(
    examples: Sequence[Example], tokenizer: Any, backend: Any, data: Any, max_positions: int | None
) -> str:
    sha = hashlib.sha256(backend.to_str().encode())
    template = Path(data.chat_template)
    settings = {
        "versions": (mass_dpo_jax.__version__, transformers.__version__),
        "data": {name: data[name] for name in SETTINGS},
        "file": template.read_text(errors="replace") if template.is_file() else "",
        "template": tokenizer.chat_template,
        "max_positions": max_positions,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    sha.update(json.dumps(settings, sort_keys=True).encode())
    for module in CODE:
        sha.update(Path(str(module.__file__)).read_bytes())
    if isinstance(examples, Examples):
        sha.update(examples.key.encode())
        return sha.hexdigest()[:32]
    for example in examples:
        prompt: Any = example.prompt
        if isinstance(prompt, History):
            prompt = dataclasses.astuple(prompt)
        row = [example.id, prompt, example.chosen, example.rejected, example.scores]
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def _read(path: Path) -> tuple[Tokens, Said]:
    """Tokens, and what was said when they were made."""
    stored = json.loads(without_checksum((path / "rest.json").read_text()))
    checksums, said = stored.pop("arrays"), stored.pop("said")
    arrays = {}
    for field in dataclasses.fields(Tokens):
        if field.name in checksums:
            file = path / f"{field.name}.npy"
            if _checksum(file) != checksums[field.name]:
                raise ValueError(f"{file.name} is not what was written")
            arrays[field.name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return Tokens(**stored, **arrays), said


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(path: Path, found: Tokens, said: Said) -> None:
    """Renamed when whole: another run may look for it meanwhile."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in fields.items() if name not in arrays}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, suffix=".tmp"))
        for name, value in arrays.items():
            np.save(temporary / f"{name}.npy", value)
        checksums = {name: _checksum(temporary / f"{name}.npy") for name in arrays}
        text = json.dumps({**rest, "arrays": checksums, "said": said})
        (temporary / "rest.json").write_text(with_checksum(text))
        temporary.rename(path)
    except OSError as error:
        if not path.exists():  # Else another run was faster.
            _log.warning(f"{path}: {error.strerror}; the tokens are not kept")
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
