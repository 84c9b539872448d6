"""Tokenizers of Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mass_dpo_jax.data.flat import refusals
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import read_json


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder, without network access or code from the folder.

    A folder may have `tokenizer.json` alone; special tokens that the tokenizer's own files do not
    name are then those of `config.json`.

    Raises:
      UserError: the folder or its tokenizer files are missing or cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one with a tokenizer")
    with refusals(f"{folder}: the tokenizer cannot be read"):
        if (folder / "tokenizer_config.json").is_file():
            # Left out, the last one lets a folder with code of its own ask on the terminal.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        elif (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            template = folder / "chat_template.jinja"
            if template.is_file():
                tokenizer.chat_template = template.read_text(encoding="utf-8")
        else:
            raise UserError(f"{folder}: has neither tokenizer.json nor tokenizer_config.json")
        _name_special_tokens(tokenizer, folder / "config.json")
    tokenizer.name_or_path = str(folder)  # For messages.
    return tokenizer


def _name_special_tokens(tokenizer: Any, config_file: Path) -> None:
    config = read_json(config_file) if config_file.is_file() else {}
    for name in ("bos", "eos", "pad"):
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if getattr(tokenizer, f"{name}_token") is None and number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
