"""Tokenizers of Hugging Face folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mass_dpo_jax.data.ragged import refusals
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import read_json

SETTINGS = "tokenizer_config.json"
# Files that the library makes a fast tokenizer of where there is no tokenizer.json.
SLOW = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
TOKENS = ("bos", "eos", "pad")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder, without network access or code from the folder.

    A folder may have `tokenizer.json` alone. Special tokens that no file of the tokenizer's names
    are those of `config.json`; one that is named null stays none.

    Raises:
      UserError: the folder or its tokenizer files are missing or cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one with a tokenizer")
    _check_files(folder)
    named = _object(folder / "special_tokens_map.json") | _object(folder / SETTINGS)
    config = _object(folder / "config.json")
    with refusals(f"{folder}: the tokenizer cannot be read"):
        if (folder / SETTINGS).is_file():
            tokenizer = _of_settings(folder)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            template = folder / "chat_template.jinja"
            if template.is_file():
                tokenizer.chat_template = template.read_text(encoding="utf-8")
        _name_special_tokens(tokenizer, named, config)
    tokenizer.name_or_path = str(folder)  # For messages.
    return tokenizer


def _of_settings(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        # Left out, the last one lets a folder with code of its own ask on the terminal.
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{folder}: the tokenizer is code of the folder's own (auto_map in {SETTINGS}), which "
            "is not run; expected a tokenizer.json of a class that transformers has"
        ) from None


def _check_files(folder: Path) -> None:
    """Raises UserError if there are no files to make a tokenizer of."""
    if (folder / "tokenizer.json").is_file():
        return
    found = [name for name in SLOW if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{folder}: no tokenizer: expected tokenizer.json; take it, and {SETTINGS}, from where "
            "the model is from, or from the model that it was tuned from"
        )
    has_settings = (folder / SETTINGS).is_file()
    libraries = "sentencepiece", "tiktoken"
    if found[0] == "tokenizer.model" and not (
        has_settings and any(importlib.util.find_spec(name) for name in libraries)
    ):
        raise UserError(
            f"{folder}: no tokenizer.json, only tokenizer.model; take tokenizer.json from a newer "
            "copy of the model, or make it: `pip install sentencepiece protobuf`, and then "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
        )
    if not has_settings:
        raise UserError(f"{folder}: no tokenizer.json and no {SETTINGS}, only {', '.join(found)}")


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def _name_special_tokens(
    tokenizer: Any, named: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    for name in TOKENS:
        field, ids = f"{name}_token", config.get(f"{name}_token_id")
        if getattr(tokenizer, field) is not None:
            continue
        if field in named:
            token = named[field]
            setattr(tokenizer, field, token["content"] if isinstance(token, dict) else token)
            continue
        for number in ids if isinstance(ids, list) else [ids]:
            # Converted models have -1 for none.
            if type(number) is int and 0 <= number < 2**32:
                setattr(tokenizer, field, tokenizer.convert_ids_to_tokens(number))
                break
