"""Tensors in safetensors files: reads, checks and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.folder import describe_damage

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# Parts of the names of tensors that quantizers write beside weights or in place of them.
QUANTIZED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    "_scale_inv",
    ".absmax",
    ".SCB",
)


def open_tensors(path: Path) -> Any:
    """Opens a file, a context, whose tensors are NumPy arrays.

    Raises:
        UserError: it is no safetensors file; the message says what it seems to be.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        cause = (path.is_file() and describe_damage(path)) or str(error)
        raise UserError(f"{path}: not a readable safetensors file: {cause}") from None


def check_type(file: Any, path: Path, name: str) -> None:
    """Raises UserError unless a tensor of an open file holds floating-point numbers."""
    if (kind := file.get_slice(name).get_dtype()) not in FLOAT_DTYPES:
        raise UserError(
            f"{path}: tensor {name}: found type {kind}, expected {', '.join(FLOAT_DTYPES)} "
            "(quantized weights are not read: take the unquantized original)"
        )


def check_finite(array: np.ndarray, path: Path, name: str) -> None:
    """Raises UserError if a tensor, or the part of it that was read, holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise UserError(
            f"{path}: tensor {name} holds NaN or infinity, and so would all that is computed; "
            "take another copy, or a checkpoint from before its training diverged"
        )


def suggest_tensor(name: str, names: Sequence[str]) -> str:
    """Returns, in brackets, which of its `names` a file has in place of a missing one."""
    if not names:
        return " (the file has none)"
    if quantized := next((x for x in names if x.endswith(QUANTIZED_SUFFIXES)), None):
        return f" (found {quantized}: quantized weights; take the unquantized original)"
    module = name.removesuffix(".weight").rpartition("model.")[2]
    similar = next((x for x in names if module in x), names[0])
    return f" (found {similar}: written under other names?)"


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        # transformers refuses a file without the name of a framework.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # A full disk too.
        raise UserError(f"{path}: cannot be written: {error}") from None
