"""Values of an earlier computation, used in a program that is differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def use_precomputed(function: Callable[..., Array], value: Array, *args: Any) -> Array:
    """Returns `value` in place of `function(*args)`, with the gradient of `function(*args)`.

    Nothing is computed forward. Backward, gradients go only to those `args` that the program is
    differentiated by, and the compiler leaves out what of `function` they do not need.

    Args:
        function: a function from arrays alone to an array; it closes over no array.
        value: result of an earlier call with the same `args`; treated as a constant.
        args: arrays, or pytrees of them.
    """
    del function, args
    return value


def _forward(
    function: Callable[..., Array], value: CustomVJPPrimal, *args: Any
) -> tuple[Array, Any]:
    del function

    def select(perturbed: bool) -> Any:
        return jax.tree.map(
            lambda x: x.value if x.perturbed == perturbed else None,
            args,
            is_leaf=lambda x: isinstance(x, CustomVJPPrimal),
        )

    return value.value, (select(True), select(False))


def _backward(function: Callable[..., Array], residuals: Any, gradient: Any) -> tuple[Any, ...]:
    perturbed, constant = residuals

    def compute(perturbed: Any) -> Array:
        args = jax.tree.map(
            lambda p, c: c if p is None else p, perturbed, constant, is_leaf=lambda x: x is None
        )
        return function(*args)

    value, vjp = jax.vjp(compute, perturbed)
    if isinstance(gradient, SymbolicZero):
        gradient = jax.numpy.zeros_like(value)
    return (None, *vjp(gradient)[0])


use_precomputed.defvjp(_forward, _backward, symbolic_zeros=True)
