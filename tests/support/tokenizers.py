"""Tokenizers that tests use: a small one made on the spot, and the real models'."""

from __future__ import annotations

import functools
import gzip
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mass_dpo_jax.config import default
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer

CONFIGS = {
    "llama3.2": "config.Llama-3.2-3B-Instruct.json",
    "qwen3": "config.Qwen3-0.6B.json",
    "smollm3": "config.SmolLM3-3B.json",
}
USER = {"role": "user", "content": "Hi!"}


@functools.cache
def small() -> Any:
    """Makes a tokenizer of bytes and a few merges; <bos> starts a text, <eos> has id 2."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["amber basil cedar delta ember fjord"] * 3, 300, Path(folder))
        return load_tokenizer(folder)


@functools.cache
def real(real_data: Path, name: str) -> Any:
    """Loads the tokenizer of a folder with tokenizer.json, config.json and chat_template.jinja."""
    source = real_data / "tokenizers" / name
    with tempfile.TemporaryDirectory() as folder:
        zipped = (source / "tokenizer.json.gz").read_bytes()
        Path(folder, "tokenizer.json").write_bytes(gzip.decompress(zipped))
        shutil.copy(source / "chat_template.jinja", folder)
        shutil.copy(source / CONFIGS[name], Path(folder, "config.json"))
        return load_tokenizer(folder)


def settings(template: str, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    data = default().data
    data.update({"chat_template": template, **(changes or {})})
    return data
