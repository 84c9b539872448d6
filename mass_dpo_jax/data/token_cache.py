"""A disk cache of the token ids of large splits, which the next run maps into memory."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.split_cache import (
    MIN_RESPONSES,
    CachedExamples,
    Log,
    add_checksum,
    digest_code,
    record_log,
    remove_checksum,
    repeat_log,
)
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.utils.files import whole_folder

SETTINGS = (
    "chat_template", "date", "chat_template_kwargs", "on_bad_row",
    "max_prompt_length", "max_response_length", "long_prompt", "long_response",
)  # fmt: skip
_log = logging.getLogger(__name__)


def tokenize_once(
    folder: Path,
    examples: Sequence[Example],
    tokenizer: Any,
    data: ConfigDict,
    *,
    progress: bool,
    max_positions: int | None = None,
) -> Tokens:
    """Tokenizes examples, or reads the cache in `folder` of the same examples and settings.

    The tokenizer and the code must be the same too. Files that are not as they were written are
    reported and made again. Arguments other than `folder`, and errors, are those of `tokenize`.
    """
    make = functools.partial(
        tokenize, examples, tokenizer, data, progress=progress, max_positions=max_positions
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return make()
    # Cached examples are many; counting their responses would read them.
    if not isinstance(examples, CachedExamples):
        if sum(len(example.responses) for example in examples) < MIN_RESPONSES:
            return make()
    path = folder / f"tokens-{_make_key(examples, tokenizer, backend, data, max_positions)}"
    try:
        tokens, log = _read(path)
        _log.info(f"tokens: read from {path}")
        repeat_log(log)
        return tokens
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        _log.warning(f"{path}: unreadable ({error}); tokenizing again")
        shutil.rmtree(path, ignore_errors=True)
    with record_log() as log:
        tokens = make()
    _write(path, tokens, log)
    return tokens


def _make_key(
    examples: Sequence[Example],
    tokenizer: Any,
    backend: Any,
    data: ConfigDict,
    max_positions: int | None,
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
    sha.update(digest_code())
    if isinstance(examples, CachedExamples):
        sha.update(examples.key.encode())
        return sha.hexdigest()[:32]
    for example in examples:
        prompt: Any = example.prompt
        if isinstance(prompt, History):
            prompt = dataclasses.astuple(prompt)
        numbers = [example.scores, example.order, example.probabilities]
        row = [example.id, prompt, *example.responses, *numbers, example.tools]
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def _read(path: Path) -> tuple[Tokens, Log]:
    stored = json.loads(remove_checksum((path / "rest.json").read_text()))
    checksums, log = stored.pop("arrays"), stored.pop("said")
    arrays = {}
    for field in dataclasses.fields(Tokens):
        if field.name in checksums:
            file = path / f"{field.name}.npy"
            if _checksum(file) != checksums[field.name]:
                raise ValueError(f"{file.name} is not what was written")
            arrays[field.name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return Tokens(**stored, **arrays), log


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(path: Path, tokens: Tokens, log: Log) -> None:
    """Writes a folder beside `path` and renames it when complete, since another run may look."""
    fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    fields_as_json = {name: value for name, value in fields.items() if name not in arrays}
    try:
        with whole_folder(path, shared=True) as folder:
            for name, value in arrays.items():
                np.save(folder / f"{name}.npy", value)
            checksums = {name: _checksum(folder / f"{name}.npy") for name in arrays}
            text = json.dumps({**fields_as_json, "arrays": checksums, "said": log})
            (folder / "rest.json").write_text(add_checksum(text))
    except OSError as error:
        if not path.exists():  # Otherwise another run was faster.
            _log.warning(f"{path}: {error.strerror}; the tokens are not kept")
