"""Token ids of a large split, kept on disk and mapped into memory by the next run."""

from __future__ import annotations

import dataclasses
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
from mass_dpo_jax.data import examples as examples_lib
from mass_dpo_jax.data import flat, render, tokens
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.tokens import Tokens, tokenize

WORTH = 20_000  # Responses; fewer are tokenized faster than they are looked up and explained.
SETTINGS = (
    "chat_template", "date", "chat_template_kwargs",
    "max_prompt_length", "max_response_length", "long_response",
)  # fmt: skip
CODE = (examples_lib, flat, render, tokens)  # What the tokens depend on.
_log = logging.getLogger(__name__)


def tokenize_once(
    folder: Path, examples: Sequence[Example], tokenizer: Any, data: Any, *, progress: bool
) -> Tokens:
    """`tokenize`, or what an earlier run kept in `folder` of the same examples, tokenizer, limits
    and code. Files that are not as they were written are reported and made again.

    Raises:
      UserError: as `tokenize`.
    """
    count = sum(1 + len(example.rejected) for example in examples)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if count < WORTH or backend is None:
        return tokenize(examples, tokenizer, data, progress=progress)
    path = folder / f"tokens-{_digest(examples, tokenizer, backend, data)}"
    try:
        found = _read(path)
        _log.info(f"tokens: read from {path}")
        return found
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        _log.warning(f"{path}: unreadable ({error}); tokenizing again")
        shutil.rmtree(path, ignore_errors=True)
    found = tokenize(examples, tokenizer, data, progress=progress)
    _write(path, found)
    return found


def _digest(examples: Sequence[Example], tokenizer: Any, backend: Any, data: Any) -> str:
    sha = hashlib.sha256(backend.to_str().encode())
    template = Path(data.chat_template)
    settings = {
        "versions": (mass_dpo_jax.__version__, transformers.__version__),
        "data": {name: data[name] for name in SETTINGS},
        "file": template.read_text(errors="replace") if template.is_file() else "",
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    sha.update(json.dumps(settings, sort_keys=True).encode())
    for module in CODE:
        sha.update(Path(str(module.__file__)).read_bytes())
    for example in examples:
        prompt: Any = example.prompt
        if isinstance(prompt, History):
            prompt = dataclasses.astuple(prompt)
        row = [example.id, prompt, example.chosen, example.rejected, example.scores]
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def _read(path: Path) -> Tokens:
    text, _, checksum = (path / "rest.json").read_text().rpartition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise ValueError("rest.json is not what was written")
    stored = json.loads(text)
    checksums = stored.pop("arrays")
    arrays = {}
    for field in dataclasses.fields(Tokens):
        if field.name in checksums:
            file = path / f"{field.name}.npy"
            if _checksum(file) != checksums[field.name]:
                raise ValueError(f"{file.name} is not what was written")
            arrays[field.name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return Tokens(**stored, **arrays)


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(path: Path, found: Tokens) -> None:
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
        text = json.dumps({**rest, "arrays": checksums})
        checksum = hashlib.sha256(text.encode()).hexdigest()
        (temporary / "rest.json").write_text(f"{text}\n{checksum}")
        temporary.rename(path)
    except OSError as error:
        if not path.exists():  # Else another run was faster.
            _log.warning(f"{path}: {error.strerror}; the tokens are not kept")
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
