"""The estimate of LoRA's train step, and which models it says fit a card of 24 GB."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import cost
from benchmarks.memory import OPTIONS
from mass_dpo_jax.estimate import flops as flops_lib
from mass_dpo_jax.estimate import memory as memory_lib
from mass_dpo_jax.estimate.memory import MemoryEstimate, StepLayout
from mass_dpo_jax.estimate.sizes import BatchLayout, DeviceModel
from mass_dpo_jax.models.config import DecoderConfig, parse_targets
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.training.mesh import abstract_mesh, param_shapes
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.scorer import Scorer
from mass_dpo_jax.training.step import Program, TrainState
from tests.estimate.test_memory import (
    MODEL,
    WORKLOAD,
    Batch,
    arguments,
    layouts,
    loss,
    numbers,
    program,
)
from tests.support.helpers import slow
from tests.support.models import hf_config

SPEC = importlib.util.spec_from_file_location(
    "qlora", Path(__file__).parents[2] / "configs/qlora.py"
)
assert SPEC is not None and SPEC.loader is not None
QLORA = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(QLORA)

# Sizes of the released models.
LLAMA = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SMOLLM3 = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
MODELS = {"llama": LLAMA, "qwen3": QWEN3, "smollm3": SMOLLM3}


def estimate_lora(
    model: DecoderConfig, config: Any, prompt: int, response: int, pool: int
) -> MemoryEstimate:
    """Returns the estimate for one device, packed, with pools of `pool` negatives."""
    lora = Lora(config.model.lora.rank, config.model.lora.alpha, parse_targets("all"))
    stored, one = config.model.lora.base, abstract_mesh(config.mesh, 1)
    optimizer = make_optimizer(config.train, 1)
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    itemsize = np.dtype(config.model.dtype).itemsize
    of_pool, trained = (
        BatchLayout(micro, prompt, 1, n * response) for n in (1 + pool, 1 + config.num_negatives)
    )
    device = DeviceModel.from_decoder(
        model, itemsize, config.model.remat, lora=lora, base_dtype=stored
    )
    if config.model.dtype == "bfloat16":
        device = dataclasses.replace(device, max_logits=2**27)
    return memory_lib.estimate_step(
        device,
        memory_lib.state_bytes(model, one, optimizer, lora, stored),
        memory_lib.batch_bytes(batch, prompt, (1 + pool) * response, 1 + pool),
        StepLayout(of_pool, None, trained, batch // micro, reuse=True),
    )


@pytest.mark.parametrize(("base", "most"), [("nf4", 6), ("bfloat16", 11)])
@pytest.mark.parametrize("model_type", MODELS)
def test_models_of_billions_of_weights_fit_a_card_of_24_gb(
    model_type: str, base: str, most: float
) -> None:
    """With configs/qlora.py, prompts of 256 tokens and 20 candidates of 16."""
    model = DecoderConfig.from_hf(
        hf_config(model_type, **MODELS[model_type], tie_word_embeddings=True), "config.json"
    )
    config = QLORA.get_config()
    config.model.lora.base = base
    found = estimate_lora(model, config, prompt=256, response=16, pool=19)
    weights = sum(
        np.prod(x.shape)
        for x in jax.tree.leaves(param_shapes(model, abstract_mesh(config.mesh, 1)))
    )
    assert 3.0e9 < weights < 4.1e9
    assert found.gradients < 0.15e9
    assert found.peak < most * 1e9


@pytest.mark.parametrize(
    ("remat", "base"), [slow("full", "float32"), slow("dots", "bfloat16"), ("full", "nf4")]
)
def test_temporaries_are_near_those_of_xla(remat: str, base: str) -> None:
    """For the whole train step in float32, where activations are most of it."""
    w = WORKLOAD
    model = DecoderConfig.from_hf(
        hf_config(
            vocab_size=w.vocabulary, hidden_size=w.width, intermediate_size=w.mlp,
            num_hidden_layers=w.layers, num_attention_heads=w.heads, num_key_value_heads=w.heads,
            head_dim=w.width // w.heads, tie_word_embeddings=True,
        ),
        "config.json",
    )  # fmt: skip
    config = QLORA.get_config()
    config.model.update(dtype="float32", remat=remat)
    config.model.lora.base = base
    config.train.update(batch_size=w.batch, micro_batch_size=w.batch)
    found = estimate_lora(model, config, w.prompt, w.response, w.pool)

    lora = Lora(16, 32.0, parse_targets("all"))
    optimizer = make_optimizer(config.train, 1)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        param_shapes(model, abstract_mesh(config.mesh, 1), lora, base),
    )
    trained = {"adapters": params.pop("adapters")}
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32), trained, jax.eval_shape(optimizer.init, trained)
    )
    scorer = Scorer(
        graphdef=nnx.graphdef(abstract_decoder(model, remat=remat, lora=lora)),
        layout="packed",
        max_response=w.response,
        chunk=None,
        pooling="response",
    )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, trained)
    program = Program(scorer, make_method(config, w.pool), places)
    integers = [
        (w.prompt,), (), ((1 + w.pool) * w.response,), (1 + w.pool,)
    ]  # fmt: skip
    shaped = [jax.ShapeDtypeStruct((1, w.batch, *shape), np.int32) for shape in integers]
    reference = jax.ShapeDtypeStruct((1, w.batch, 1 + w.pool), np.float32)
    batch = Batch(*shaped, ref_logps=reference, index=shaped[1])
    size = (1 + config.num_negatives) * w.response
    compiled = (
        Program.train_step.lower(
            program,
            optimizer,
            state,
            batch,
            None,
            jax.eval_shape(lambda: jax.random.key(0)),
            size,
            params,
        )
        .compile(compiler_options=OPTIONS)
        .memory_analysis()
    )
    held = found.parameters + found.optimizer + found.batch
    assert held == pytest.approx(compiled.argument_size_in_bytes, rel=0.001, abs=200)
    assert found.temporaries == pytest.approx(compiled.temp_size_in_bytes, rel=0.2)


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("layout", ["packed", "rectangle"])
def test_flops_are_those_of_the_programs_products(remat: str, layout: str) -> None:
    """Without gradients of frozen weights."""
    rows, lora = 3, Lora(2, 4.0, parse_targets("all"))
    graphdef = nnx.graphdef(abstract_decoder(MODEL, remat=remat, lora=lora))
    made = program(remat, layout, "float32")
    made = dataclasses.replace(made, scorer=dataclasses.replace(made.scorer, graphdef=graphdef))
    model = DeviceModel.from_decoder(MODEL, 4, remat, lora=lora, base_dtype="nf4")
    _, _, trained = layouts(layout, rows)
    _, batch = arguments(rows)
    params = param_shapes(MODEL, abstract_mesh(QLORA.get_config().mesh, 1), lora, "nf4")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    adapters = {"adapters": params.pop("adapters")}

    def of_adapters(adapters: Any, params: Any, batch: Batch, numbers: Any) -> jax.Array:
        return loss(made)({**params, **adapters}, batch, numbers)

    jaxpr = jax.make_jaxpr(jax.grad(of_adapters))(adapters, params, batch, numbers(rows)).jaxpr
    counted = cost.counted(jaxpr)
    assert flops_lib.training_flops(model, trained) == pytest.approx(counted, rel=0.03)
