"""LoRA's adapters: what is added to products with weights that stay as they are.

x W becomes x W + (alpha / rank) (x A) B with A [in, rank] and B [rank, out]; B starts at zero, so
an adapted model starts as its base.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mass_dpo_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which products are adapted, and how.

    Attributes:
      rank: the columns of A.
      alpha: see above.
      targets: names of `DecoderConfig.products`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def scaled(self, adapters: Any) -> dict[str, dict[str, jax.Array]]:
        """{"a": A, "b": B alpha / rank} of each product, from A and B."""
        factor = self.alpha / self.rank
        return {name: {"a": x["a"], "b": x["b"] * factor} for name, x in adapters.items()}


class Adapter(nnx.Module):
    """A and B of a product in all layers, float32."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int],
        dims: tuple[str, str],
        rank: int,
        key: jax.Array,
    ):
        # As PEFT draws it: He's uniform distribution with a = sqrt(5).
        bound = shape[0] ** -0.5
        a = jax.random.uniform(key, (layers, shape[0], rank), jnp.float32, -bound, bound)
        self.a = nnx.Param(a, dims=("layer", dims[0], "rank"))
        b = jnp.zeros((layers, rank, shape[1]), jnp.float32)
        self.b = nnx.Param(b, dims=("layer", "rank", dims[1]))


class Adapters(nnx.Module):
    """Those of all products, by their names; layers are stacked."""

    def __init__(self, config: DecoderConfig, lora: Lora, *, rngs: nnx.Rngs):
        for name in lora.targets:
            shape, dims = config.products[name]
            adapter = Adapter(config.num_layers, shape, dims, lora.rank, rngs.params())
            setattr(self, name, adapter)
