"""Reads what library calls are given: arrays of any library, masks and whole numbers."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mass_dpo_jax.errors import UserError


def as_integer(x: Any, name: str) -> int:
    """Converts an integer of any library to Python's; raises UserError for anything else."""
    try:
        return operator.index(x)
    except TypeError:
        raise UserError(f"{name}={x!r}: expected a whole number") from None


def as_mask(x: Any) -> Array:
    """Converts to a bool array; raises UserError for more than 0 and 1, such as indices."""
    mask = as_array(x, "mask")
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("mask: expected bool, or 1 where there is a negative and 0 elsewhere")
    return mask.astype(bool)


def as_array(x: Any, name: str) -> Array:
    """Converts to a JAX array; without a copy where the other library allows it.

    Raises:
        UserError: it is no array of real numbers; `name` is what the message calls it.
    """
    is_foreign = hasattr(x, "__dlpack__") and not hasattr(x, "__array_interface__")
    read = jnp.from_dlpack if is_foreign else jnp.asarray
    given = x
    try:
        if is_foreign and hasattr(x, "detach"):
            # PyTorch hands over neither slices nor what has a gradient.
            given = x.detach().contiguous()
        try:
            array = read(given)
        except (BufferError, RuntimeError, TypeError, ValueError):
            if not hasattr(given, "cpu"):
                raise
            array = read(given.cpu())  # On a device that JAX does not see.
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError("complex numbers")
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{name}: {type(x).__name__}: not read as an array of real numbers ({reason}); "
            "expected one of NumPy or JAX, or a dense tensor of PyTorch"
        ) from None
    return array
