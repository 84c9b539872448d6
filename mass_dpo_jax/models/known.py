"""Values that were computed before, in programs that are differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def known(function: Callable[..., jax.Array], value: jax.Array, *args: Any) -> jax.Array:
    """`value`, which is what `function(*args)` was found to be.

    Nothing is computed; the gradient with respect to `args` is that of `function(*args)`. What of
    `function` its gradient does not need, the compiler leaves out.

    Args:
      function: from arrays alone to an array; it closes over no array.
      value: of an earlier call with the same `args`; it is taken for a constant.
      args: arrays, or pytrees of them.
    """
    del function, args
    return value


def _forward(
    function: Callable[..., jax.Array], value: jax.Array, *args: Any
) -> tuple[jax.Array, Any]:
    del function
    return value, args


def _backward(
    function: Callable[..., jax.Array], args: Any, gradient: jax.Array
) -> tuple[Any, ...]:
    _, vjp = jax.vjp(function, *args)
    return (None, *vjp(gradient))


known.defvjp(_forward, _backward)
