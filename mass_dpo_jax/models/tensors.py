"""Tensors in safetensors files: read, checked and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.folder import damage

DTYPES = ("F64", "F32", "F16", "BF16")
# How the names of tensors end that quantizers add or put in the place of weights.
QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    "_scale_inv",
    ".absmax",
    ".SCB",
)


def open_tensors(path: Path) -> Any:
    """An open file, a context, whose tensors are numpy arrays.

    Raises:
      UserError: it is no safetensors file, and what it seems to be.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        what = (path.is_file() and damage(path)) or str(error)
        raise UserError(f"{path}: not a readable safetensors file: {what}") from None


def check_type(file: Any, path: Path, name: str) -> None:
    """Raises UserError if a tensor of an open file does not consist of floating-point numbers."""
    if (kind := file.get_slice(name).get_dtype()) not in DTYPES:
        raise UserError(
            f"{path}: tensor {name}: found type {kind}, expected {', '.join(DTYPES)} (quantized "
            "weights are not read: take the unquantized original)"
        )


def check_finite(array: np.ndarray, path: Path, name: str) -> None:
    """Raises UserError if a tensor of a file, or the part of it that was read, has NaN in it."""
    if not np.isfinite(array).all():
        raise UserError(
            f"{path}: tensor {name} holds NaN or infinity, and so would all that is computed; "
            "take another copy, or a checkpoint from before its training diverged"
        )


def instead(name: str, there: Sequence[str]) -> str:
    """In brackets, which of its names a file without a tensor has in the place of that one's."""
    if not there:
        return " (the file has none)"
    if quantized := next((x for x in there if x.endswith(QUANTIZED)), None):
        return f" (found {quantized}: quantized weights; take the unquantized original)"
    module = name.removesuffix(".weight").rpartition("model.")[2]
    found = next((x for x in there if module in x), there[0])
    return f" (found {found}: written under other names?)"


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file.

    Raises:
      UserError: it cannot be written.
    """
    try:
        # transformers refuses a file that does not say which library's it is.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # A full disk too.
        raise UserError(f"{path}: cannot be written: {error}") from None
