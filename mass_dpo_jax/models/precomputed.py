"""Values that were computed before, in programs that are differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def known(function: Callable[..., jax.Array], value: jax.Array, *args: Any) -> jax.Array:
    """`value`, which is what `function(*args)` was found to be.

    Nothing is computed; the gradient with respect to `args` is that of `function(*args)`, and only
    to those that anything is differentiated by. What of `function` its gradient does not need, the
    compiler leaves out.

    Args:
      function: from arrays alone to an array; it closes over no array.
      value: of an earlier call with the same `args`; it is taken for a constant.
      args: arrays, or pytrees of them.
    """
    del function, args
    return value


def _forward(
    function: Callable[..., jax.Array], value: CustomVJPPrimal, *args: Any
) -> tuple[jax.Array, Any]:
    del function

    def those(perturbed: bool) -> Any:
        return jax.tree.map(
            lambda x: x.value if x.perturbed == perturbed else None,
            args,
            is_leaf=lambda x: isinstance(x, CustomVJPPrimal),
        )

    return value.value, (those(True), those(False))


def _backward(function: Callable[..., jax.Array], kept: Any, gradient: Any) -> tuple[Any, ...]:
    varied, fixed = kept

    def compute(varied: Any) -> jax.Array:
        return function(
            *jax.tree.map(lambda v, f: f if v is None else v, varied, fixed, is_leaf=_is_none)
        )

    value, vjp = jax.vjp(compute, varied)
    if isinstance(gradient, SymbolicZero):
        gradient = jax.numpy.zeros_like(value)
    return (None, *vjp(gradient)[0])


def _is_none(x: Any) -> bool:
    return x is None


known.defvjp(_forward, _backward, symbolic_zeros=True)
