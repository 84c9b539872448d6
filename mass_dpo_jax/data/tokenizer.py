"""Tokenizers: loading one from a Hugging Face folder, training one, and encoding texts with one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mass_dpo_jax.data.tokens import RaggedTokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import read_json

SETTINGS = "tokenizer_config.json"
# Files from which transformers makes a fast tokenizer where there is no tokenizer.json.
SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # Of a trained tokenizer: ids 0, 1 and 2.
_SPECIAL = [PAD, BOS, EOS]
_log = logging.getLogger(__name__)
_SMALLEST = len(_SPECIAL) + 256  # One token for each byte, so that every text can be encoded.


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the tokenizer of a Hugging Face folder, without network access or the folder's code.

    A folder may have `tokenizer.json` alone. Special tokens that the tokenizer's files do not name
    are taken from `config.json`; one that they name as null stays unset.

    Raises:
        UserError: the folder or its tokenizer files are missing or cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one with a tokenizer")
    _check_files(folder)
    named = _read_object(folder / "special_tokens_map.json") | _read_object(folder / SETTINGS)
    config = _read_object(folder / "config.json")
    with raise_user_errors(f"{folder}: the tokenizer cannot be read"):
        if (folder / SETTINGS).is_file():
            tokenizer = _load_by_settings(folder)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            template = folder / "chat_template.jinja"
            if template.is_file():
                tokenizer.chat_template = template.read_text(encoding="utf-8")
        _set_special_tokens(tokenizer, named, config)
    if getattr(tokenizer, "legacy", False):  # Where spaces are put; else save_pretrained drops it.
        tokenizer.init_kwargs["legacy"] = True
    tokenizer.name_or_path = str(folder)  # For messages.
    _warn_of_beginning(folder, tokenizer)
    return tokenizer


def _load_by_settings(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        # Without trust_remote_code=False, a folder with its own code would prompt on the terminal.
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
    """Raises UserError if the folder lacks the files that a tokenizer is made from."""
    if (folder / "tokenizer.json").is_file():
        return
    present = [name for name in SLOW_FILES if (folder / name).is_file()]
    if not present:
        raise UserError(
            f"{folder}: no tokenizer: expected tokenizer.json; take it, and {SETTINGS}, from where "
            "the model is from, or from the model that it was tuned from"
        )
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder}: no tokenizer.json and no {SETTINGS}, only {', '.join(present)}; take both "
            "from where the model is from"
        )
    if present[0] == "tokenizer.model":
        library = _find_library(folder / present[0])
        if not importlib.util.find_spec(library):
            raise UserError(
                f"{folder}: no tokenizer.json, only tokenizer.model, which transformers converts "
                f"with {library}: `pip install {library}`, or take tokenizer.json from a newer "
                "copy of the model"
            )


def _find_library(path: Path) -> str:
    """Returns the library that reads a `tokenizer.model`, told by its first byte."""
    with path.open("rb") as file:  # The other format is lines of text.
        return "sentencepiece" if file.read(1) == b"\n" else "tiktoken"


def _warn_of_beginning(folder: Path, tokenizer: Any) -> None:
    """Warns if nothing says whether texts begin with a token that a converted tokenizer has."""
    if (folder / "tokenizer.json").is_file() or tokenizer.bos_token is None:
        return
    if "add_bos_token" not in _read_object(folder / SETTINGS):
        _log.warning(
            f"{folder / SETTINGS}: no add_bos_token, so texts begin "
            f"{'with' if find_added_tokens(tokenizer)[0] else 'without'} {tokenizer.bos_token}, as "
            "this version of transformers assumes; Llama 2, Mistral and Gemma were trained with "
            'it: set "add_bos_token" to true or false'
        )


def _read_object(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; returns an empty one where there is no file."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def _set_special_tokens(
    tokenizer: Any, named: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    for name in ("bos", "eos", "pad"):
        field, ids = f"{name}_token", config.get(f"{name}_token_id")
        if getattr(tokenizer, field) is not None:
            continue
        if field in named:
            token = named[field]
            setattr(tokenizer, field, token["content"] if isinstance(token, dict) else token)
            continue
        for token_id in ids if isinstance(ids, list) else [ids]:
            # Converted models write -1 for "none".
            if type(token_id) is int and 0 <= token_id < 2**32:
                setattr(tokenizer, field, tokenizer.convert_ids_to_tokens(token_id))
                break


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a tokenizer for a model with random weights and writes it to `folder`.

    Writes `tokenizer.json` and `tokenizer_config.json`: a byte-level BPE of at most `vocab_size`
    tokens (fewer when `texts` run out of pairs) that puts <bos> before a text and leaves <eos> to
    the caller. The same texts in the same order give the same files.

    Raises:
        UserError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    if vocab_size < _SMALLEST:
        raise UserError(
            f"vocab_size={vocab_size}: a byte-level tokenizer needs at least {_SMALLEST}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, _SPECIAL.index(BOS))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> RaggedTokens:
    """Tokenizes texts, without the special tokens that the tokenizer adds around a text."""
    unique = list(dict.fromkeys(texts))  # Titles and letters repeat often.
    rows = {text: i for i, text in enumerate(unique)}
    tokens = RaggedTokens.from_lists(_encode(tokenizer, unique))
    if len(unique) == len(texts):
        return tokens
    return tokens.take(np.fromiter((rows[text] for text in texts), np.int64, len(texts)))


def find_added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the token ids that the tokenizer adds before a text, and those after it.

    Raises:
        UserError: it adds tokens in another way.
    """
    text, bare = next(
        (text, ids)
        for text in ("question", "1", "")
        if (ids := _encode(tokenizer, [text])[0]) or not text
    )
    with raise_user_errors(f"{tokenizer.name_or_path}: the tokenizer fails"):
        framed = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise UserError(
        f"{tokenizer.name_or_path}: the tokenizer changes a text where it adds special tokens "
        f"({bare} becomes {framed}); expected tokens before and after it"
    )


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    with raise_user_errors(f"{tokenizer.name_or_path}: the tokenizer fails"):
        encode_slowly = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
        if not texts or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            return list(encode_slowly(list(texts))["input_ids"]) if texts else []
        encode_slowly("")  # Sets up the Rust tokenizer: no padding, no truncation.
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]


@contextlib.contextmanager
def raise_user_errors(prefix: str) -> Iterator[None]:
    """Turns everything that the tokenizers' libraries raise into a UserError.

    For a broken file they raise bare Exception, or panic in Rust, which is not even an Exception.

    Args:
        prefix: the start of the error's message.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{prefix}: {message}") from None
