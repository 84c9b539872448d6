"""Adapters: log-probs and gradients against merged weights, and whole runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from mass_dpo_jax.config import CHOICES
from mass_dpo_jax.models.config import parse_targets
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder
from mass_dpo_jax.models.lora import Lora, merge_adapters
from mass_dpo_jax.models.quantize import dequantize, quantize
from mass_dpo_jax.training.mesh import key_names
from tests.models.test_replay import LAYOUTS, RESPONSE, gradients
from tests.support.helpers import slow
from tests.support.models import FAMILIES, random_candidates, random_decoder, scored, tiny_config

pytestmark = pytest.mark.usefixtures("strict_jax")

ALL = Lora(rank=4, alpha=6.0, targets=parse_targets("all"))
SOME = Lora(rank=3, alpha=3.0, targets=parse_targets("q_proj, v_proj,down_proj"))


def weights_of(model: Decoder) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def stored(params: Any, kind: str) -> Any:
    """With frozen weights as they are stored."""
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    base = jax.tree.map_with_path(lambda path, x: quantize(key_names(path), x, kind), base)
    return {**base, "adapters": params["adapters"]}


@pytest.mark.parametrize("kind", CHOICES["model.lora.base"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_log_probs_are_those_of_merged_weights(model_type: str, kind: str) -> None:
    config = tiny_config(model_type, tie_word_embeddings=model_type == "smollm3")
    lora = SOME if model_type == "qwen3" else ALL
    model = random_decoder(config, lora=lora)
    params = stored(weights_of(model), kind)
    graphdef, plain = (nnx.graphdef(abstract_decoder(config, lora=x)) for x in (lora, None))
    pool = random_candidates(response=RESPONSE)

    def logps(graphdef: Any, params: Any) -> Any:
        return scored(nnx.merge(graphdef, params), pool, pooling=None).logps

    found = logps(graphdef, params)
    merged = merge_adapters(params, lora)
    assert "adapters" not in merged
    np.testing.assert_allclose(found, logps(plain, merged), rtol=2e-5, atol=2e-4)
    zeros = jax.tree.map(jnp.zeros_like, params["adapters"])
    base = merge_adapters({**params, "adapters": zeros}, lora)
    assert np.abs(found - logps(plain, base)).max() > 1


@pytest.mark.parametrize(
    ("model_type", "remat", "layout", "kind"),
    [
        ("llama", "full", "packed", "nf4"),
        ("qwen3", "dots", "rectangle, 2 at a time", "float32"),
        ("smollm3", "dots", "packed, few logits", "int8"),
        slow("smollm3", "dots", "packed", "nf4"),
        slow("qwen2", "dots", "packed", "int8"),
        ("gemma3_text", "dots", "packed", "nf4"),
        slow("gemma2", "full", "rectangle", "int8"),
        slow("olmo2", "dots", "rectangle, 2 at a time", "nf4"),
        slow("mistral", "full", "packed", "nf4"),
        slow("llama", "dots", "rectangle", "bfloat16"),
        slow("qwen3", "full", "rectangle", "int8"),
    ],
)
def test_gradients_follow_from_those_of_merged_weights(
    model_type: str, remat: str, layout: str, kind: str
) -> None:
    """W + s A B has the gradients s dW B^T and s A^T dW; by replay and without."""
    config = tiny_config(model_type, tie_word_embeddings=model_type == "smollm3")
    lora = SOME if model_type == "qwen3" else ALL
    model = random_decoder(config, lora=lora, remat=remat)
    graphdef, plain = (
        nnx.graphdef(abstract_decoder(config, lora=x, remat=remat)) for x in (lora, None)
    )
    frozen = stored(weights_of(model), kind)
    merged = merge_adapters(frozen, lora)
    adapters = frozen.pop("adapters")
    pool, how = random_candidates(response=RESPONSE), LAYOUTS[layout]
    expected_logps, full = gradients(plain, merged, pool, how, recorded=False)
    for recorded in (True, False):
        logps, found = gradients(graphdef, {"adapters": adapters}, pool, how, recorded, frozen)
        np.testing.assert_allclose(logps, expected_logps, rtol=1e-5, atol=2e-4)
        assert set(found["adapters"]) == set(lora.targets)
        for name, parts in found["adapters"].items():
            weights, of_kernel = adapters[name], full["blocks"][name]["kernel"]
            scale = lora.alpha / lora.rank
            expected = {
                "a": scale * np.einsum("lio,lro->lir", of_kernel, weights["b"]),
                "b": scale * np.einsum("lir,lio->lro", weights["a"], of_kernel),
            }
            for part, value in parts.items():
                error = np.linalg.norm(value - expected[part])
                assert error < 1e-4 * np.linalg.norm(expected[part]), (name, part, recorded)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_frozen_weights_get_no_gradients(remat: str, recorded: bool) -> None:
    """Nor is anything computed for them: no product has their shape."""
    config = tiny_config("qwen3", tie_word_embeddings=True)
    graphdef = nnx.graphdef(abstract_decoder(config, lora=ALL, remat=remat))
    params = stored(weights_of(Decoder(config, rngs=nnx.Rngs(0), lora=ALL)), "nf4")
    frozen = dict(params)
    params = {"adapters": frozen.pop("adapters")}
    pool = random_candidates(response=RESPONSE)
    jaxpr = jax.make_jaxpr(
        lambda params, frozen: gradients(
            graphdef, params, pool, LAYOUTS["packed, few logits"], recorded, frozen
        )
    )(params, frozen)
    made = {tuple(shape) for shape in shapes_of_products(jaxpr.jaxpr)}
    sizes = config.projections
    assert (sizes["gate"][0][0], ALL.rank) in made or (ALL.rank, sizes["gate"][0][0]) in made
    forbidden = [shape for shape, _ in sizes.values()] + [(config.vocab_size, config.hidden_size)]
    assert not {tuple(sorted(shape)) for shape in forbidden} & {
        tuple(sorted(shape)) for shape in made
    }


def shapes_of_products(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of_products(inner)


def test_quantized_weights_are_near_and_small() -> None:
    weights = jax.random.normal(jax.random.key(0), (2, 128, 96))
    for kind, bits, error in (("int8", 8 + 32 / 128, 0.01), ("nf4", 4 + 32 / 64, 0.1)):
        kept = quantize(("blocks", "gate", "kernel"), weights, kind)
        back = dequantize(kept, jnp.float32)
        assert float(jnp.sqrt(jnp.mean((back - weights) ** 2))) < error
        sizes = [
            x.size * jnp.iinfo(x.dtype).bits if x.dtype != jnp.float32 else 32 * x.size
            for x in jax.tree.leaves(kept)
        ]
        assert sum(sizes) == bits * weights.size
        # Layer by layer is what the whole is.
        one = quantize(("blocks", "gate", "kernel"), weights[1:], kind)
        np.testing.assert_array_equal(dequantize(one, jnp.float32), back[1:])
    for name in ("embed", "head"):
        assert quantize((name,), weights[0], "nf4").dtype == jnp.bfloat16
    assert quantize(("norm", "scale"), weights[0, 0], "nf4").dtype == jnp.float32
