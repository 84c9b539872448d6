"""Writes models as Hugging Face folders: completely, or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import EXPORT_DTYPES, DecoderConfig
from mass_dpo_jax.models.folder import GENERATION
from mass_dpo_jax.models.weights import save_hf
from mass_dpo_jax.utils.files import whole_folder

# Reads an array by its path in the tree of parameters or, of a stacked one, a layer.
ReadArray = Callable[[tuple[str, ...], int | None], np.ndarray]


def write_folder(
    output: Path,
    decoder: DecoderConfig,
    read: ReadArray,
    tokenizer: Any,
    generation: dict[str, Any],
    dtype: str,
    max_shard_gb: float = 5.0,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a Hugging Face folder.

    Args:
        output: does not exist yet, or is an empty folder.
        decoder: the architecture.
        read: reads the weights.
        tokenizer: the tokenizer, with the chat template to use.
        generation: the content of generation_config.json.
        dtype: type of the stored weights.
        max_shard_gb: size of a file of weights, in 10^9 bytes.
        finish: a function called with the folder before it appears under its name.

    Raises:
        UserError: nothing can be written there.
    """
    with write_complete_folder(output) as temporary:
        save_hf(
            temporary,
            decoder,
            read,
            dtype=jnp.dtype(dtype),
            max_bytes=int(max_shard_gb * 1e9),
            progress=True,
        )
        _save_tokenizer(tokenizer, temporary)
        # Readers before transformers 5 look for the type under torch_dtype.
        fields = {"dtype": dtype, "torch_dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
        _write_json(temporary / "config.json", decoder.to_hf() | fields)
        _write_json(temporary / GENERATION, generation)
        finish(temporary)
        for path in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / GENERATION, path)  # safetensors lets only the owner read.


@contextlib.contextmanager
def write_complete_folder(output: Path) -> Iterator[Path]:
    """Yields a folder as `whole_folder`; raises UserError if it cannot be made."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(whole_folder(output))
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from None
        yield folder


def check_dtype(dtype: str) -> None:
    """Raises UserError if weights are not stored in this type."""
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"dtype={dtype!r}: expected {' or '.join(EXPORT_DTYPES)}")


def check_whole(decoder: DecoderConfig) -> None:
    """Raises UserError for the text model of a multimodal one, whose other parts would be lost."""
    if decoder.part_of:
        raise UserError(
            f"the model is the text model of a {decoder.part_of} model, and a folder of it would "
            "lack the other parts; export the adapters of a run with LoRA, which PEFT adds to the "
            "whole model, or train a folder that has the text model alone (docs/models.md says how "
            "to write it)"
        )


def check_free(output: Path) -> None:
    """Raises UserError if no new folder can be written at `output`."""
    if output.name in ("", ".."):
        raise UserError(f"{output}: expected the name of a new folder to write")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty: choose another folder or remove it")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer so that versions of transformers before 5 can read it, too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # transformers 5 notes where it read from.
    for name in ("is_local", "local_files_only", "backend"):
        settings.pop(name, None)
    # Earlier versions know a class and a field only by their old names, which 5 knows too.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    # They would also give a decoder token_type_ids.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    _write_json(path, settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
