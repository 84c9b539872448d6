"""LoRA's adapters: trained beside projections whose own weights stay as they are.

x W becomes x W + (alpha / rank) (x A) B with A [in, rank] and B [rank, out]; B starts at zero, so
an adapted model starts as its base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax import Array

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.quantize import dequantize


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of adapters.

    Attributes:
        rank: the columns of A.
        alpha: the scale of what adapters add, times `rank`.
        targets: the adapted projections, by the names of `DecoderConfig.projections`.
        dropout: the share of A's inputs that is zero while training, drawn by dropout.py. Not in
            the representation, which digests hold: it does not change what the weights compute.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = dataclasses.field(default=0.0, repr=False)

    def scale_adapters(self, adapters: Any) -> dict[str, dict[str, Array]]:
        """Returns A and alpha / rank B of each projection."""
        factor = self.alpha / self.rank
        return {name: {"a": x["a"], "b": x["b"] * factor} for name, x in adapters.items()}


class Adapter(nnx.Module):
    """A and B of a projection in all layers, float32."""

    def __init__(
        self, layers: int, shape: tuple[int, int], dims: tuple[str, str], rank: int, key: Array
    ):
        # As PEFT draws it: He's uniform distribution with a = sqrt(5).
        bound = shape[0] ** -0.5
        a = jax.random.uniform(key, (layers, shape[0], rank), jnp.float32, -bound, bound)
        self.a = nnx.Param(a, dims=("layer", dims[0], "rank"))
        b = jnp.zeros((layers, rank, shape[1]), jnp.float32)
        self.b = nnx.Param(b, dims=("layer", "rank", dims[1]))


class Adapters(nnx.Module):
    """An `Adapter` of each target, by its name."""

    def __init__(self, config: DecoderConfig, lora: Lora, *, rngs: nnx.Rngs):
        for name in lora.targets:
            shape, dims = config.projections[name]
            adapter = Adapter(config.num_layers, shape, dims, lora.rank, rngs.params())
            setattr(self, name, adapter)


def zero_idle_adapters(params: Any) -> Any:
    """Replaces adapters that add nothing (B = 0) by zeros: the same function of text.

    Two models that differ only in what was drawn for A get the same weights.
    """
    adapters = {
        name: {"a": jnp.where(jnp.any(x["b"] != 0), x["a"], 0.0), "b": x["b"]}
        for name, x in params["adapters"].items()
    }
    return {**params, "adapters": adapters}


def merge_adapters(params: Any, lora: Lora, shardings: Any = None) -> Any:
    """Adds adapters to their frozen weights: one decoder's float32 weights, without adapters.

    Args:
        params: the weights that `training.policy.Policy.weights` gives with LoRA.
        lora: the adapters' settings.
        shardings: shardings of the result, a tree like it; None leaves them to the compiler.
    """
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    adapters = lora.scale_adapters(params["adapters"])

    def merge(path: Any, weights: Any, sharding: Any = None) -> Array:
        name = path[-2].key if path[-1].key == "kernel" else ""
        return jax.jit(_merge, out_shardings=sharding)(weights, adapters.get(name))

    trees = () if shardings is None else (shardings,)
    return jax.tree.map_with_path(merge, base, *trees, is_leaf=lambda x: isinstance(x, qwix.QArray))


def _merge(weights: Any, adapter: Mapping[str, Array] | None) -> Array:
    dense = dequantize(weights, jnp.float32)
    if adapter is None:
        return dense
    exact = jax.lax.Precision.HIGHEST
    return dense + jnp.einsum("lir,lro->lio", adapter["a"], adapter["b"], precision=exact)
