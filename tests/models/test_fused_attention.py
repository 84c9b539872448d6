"""Attention by a fused kernel: its calls equal plain attention, and the kernel takes them.

On a CPU the same calls run in plain operations (`xla`), and programs for GPUs are lowered without
running. What only a GPU can show is marked `accelerator`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention as plain
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.fused_attention import (
    MAX_RELATIVE_ERROR,
    FusedAttention,
    choose_attention,
    measure_error,
)
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.scorer import Scorer
from mass_dpo_jax.training.step import Program, TrainState
from mass_dpo_jax.utils import mesh_axes
from tests.models.test_replay import gradients as recorded_gradients
from tests.models.test_shared_prefix import LAYOUTS, RESPONSE, gradients
from tests.support.helpers import slow, write_jsonl
from tests.support.helpers import tiny_config as tiny_run
from tests.support.models import (
    pretend_a_gpu,
    random_candidates,
    random_decoder,
    scored,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("strict_jax")

XLA = FusedAttention("xla")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    """Most of these tests' time would be compiling."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_plain_attention(layout: str) -> None:
    """Ragged prompts and responses, an absent candidate, a row without any."""
    model = random_decoder(tiny_config("mistral"))
    pool = random_candidates(response=RESPONSE)
    assert pool.prompts.shape[1] % 8 and pool.responses.shape[1] % 8 and RESPONSE % 8
    settings = {"pooling": "all", **LAYOUTS[layout]}
    expected = scored(model, pool, **settings)
    found = scored(model, pool, attention=XLA, **settings)
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)
    assert np.any(np.asarray(found.logps) != np.asarray(expected.logps))  # Other operations.


@pytest.mark.parametrize(
    ("layout", "size"),  # The prompt's: with and without padding for the kernel.
    [
        ("packed", 13),
        slow("packed", 16),
        slow("wide rectangle", 13),
        ("rectangle, 2 at a time", 16),
    ],
)
def test_gradients_equal_those_of_plain_attention(layout: str, size: int) -> None:
    model = random_decoder(tiny_config("mistral" if layout == "packed" else "smollm3"))
    pool = random_candidates(prompt=size, response=RESPONSE)
    expected = gradients(model, pool, **LAYOUTS[layout])
    found = gradients(model, pool, attention=XLA, **LAYOUTS[layout])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("layout", ["packed", "rectangle, 2 at a time"])
def test_training_from_a_record_equals_plain_attention(layout: str) -> None:
    """Scoring and the backward pass by the kernel's calls, against one plain pass on the sets."""
    model = random_decoder(tiny_config(), remat="full")
    pool = random_candidates(response=RESPONSE)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    logps, expected = recorded_gradients(graphdef, params, pool, LAYOUTS[layout], recorded=False)
    how = {**LAYOUTS[layout], "attention": XLA}
    others, found = recorded_gradients(graphdef, params, pool, how, recorded=True)
    np.testing.assert_allclose(others, logps, rtol=1e-5, atol=1e-4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_an_absent_row_does_not_spoil_gradients() -> None:
    model = random_decoder(tiny_config("smollm3"))
    pool = random_candidates(response=RESPONSE)
    empty = pool._replace(response_lengths=np.zeros_like(pool.response_lengths))
    for layout in ("packed", "rectangle, 2 at a time"):
        for grad in jax.tree.leaves(gradients(model, empty, attention=XLA, **LAYOUTS[layout])):
            assert np.all(grad == 0.0)


@pytest.mark.parametrize("sizes", [slow((2, 4, 1)), (2, 2, 2), slow((1, 8, 1))])
def test_devices_agree_with_plain_attention(sizes: tuple[int, int, int]) -> None:
    """Each on its own prompts and heads: outputs and gradients."""
    mesh = jax.make_mesh(sizes, mesh_axes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    config, many = tiny_config("mistral"), FusedAttention("xla", mesh)
    assert many.batch_shards == sizes[0] * sizes[1]
    assert measure_error(many, config, "float32") < 1e-6
    assert 0 < measure_error(many, config, "bfloat16") < MAX_RELATIVE_ERROR / 2


def test_the_measured_error_sees_one_device_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.make_mesh((8, 1, 1), mesh_axes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    right = fused_attention._compute_mask

    def wrong(*args: Any) -> jax.Array:
        visible = right(*args)
        last = len(visible) - 1  # Of the last device's two rows the one with padding.
        return visible.at[last, -1, 6].set(True) if last > 2 else visible

    monkeypatch.setattr(fused_attention, "_compute_mask", wrong)
    fused_attention._measure_error.clear_cache()
    assert (
        measure_error(FusedAttention("xla", mesh), tiny_config(), "bfloat16") > MAX_RELATIVE_ERROR
    )
    fused_attention._measure_error.clear_cache()


def test_the_measured_error_sees_one_key_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config()
    assert measure_error(XLA, config, "float32") < 1e-6
    assert 0 < measure_error(XLA, config, "bfloat16") < MAX_RELATIVE_ERROR / 2
    right = fused_attention._compute_mask

    def wrong(*args: Any) -> jax.Array:
        visible = right(*args)
        return visible.at[1, -1, 6].set(True)  # The prompt's first token of padding.

    monkeypatch.setattr(fused_attention, "_compute_mask", wrong)
    fused_attention._measure_error.clear_cache()
    assert measure_error(XLA, config, "bfloat16") > MAX_RELATIVE_ERROR


# ---------------------------------------------------------------- the train step, on a GPU's terms


def train_step(
    layout: str, dtype: str, remat: str, attention: Any
) -> tuple[Program, Any, tuple[Any, ...]]:
    """A MASS-DPO step: the program, its optimizer and shapes of the arguments."""
    config = config_lib.default()
    config.num_negatives = 2
    model = tiny_config()
    graphdef, state = nnx.split(abstract_decoder(model, dtype=dtype, remat=remat), nnx.Param)
    chunk = 3 if layout == "rectangle" else None
    scorer = Scorer(graphdef, layout, RESPONSE, chunk, "response", attention)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    params = nnx.to_pure_dict(state)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    program = Program(scorer, make_method(config, 4), jax.tree.map(lambda _: everywhere, params))
    optimizer = make_optimizer(config.train, 1)
    prompts, prompt_lengths, responses, lengths = (
        jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in random_candidates(response=RESPONSE)
    )
    batch = Batch(
        prompts, prompt_lengths, responses, lengths,
        ref_logps=jax.ShapeDtypeStruct(lengths.shape, jnp.float32),
        index=jax.ShapeDtypeStruct(prompt_lengths.shape, jnp.int32),
    )  # fmt: skip
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return program, optimizer, (state, batch, None, key)


@pytest.mark.parametrize(  # Every pair of values.
    ("layout", "remat", "reuse"),
    [
        ("packed", "dots", True),
        slow("packed", "full", False),
        slow("rectangle", "dots", False),
        ("rectangle", "full", True),
    ],
)
def test_the_step_lowers_to_the_kernels(
    layout: str, remat: str, reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU that is not here: jax takes our shapes, and forward and backward are kernels."""
    pretend_a_gpu(monkeypatch)
    program, optimizer, args = train_step(layout, "bfloat16", remat, FusedAttention())
    program = dataclasses.replace(program, reuse=reuse)
    traced = Program.train_step.trace(program, optimizer, *args, 17)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@(__cudnn\$fmha\w+)\(", text)
    # The layers' loop calls it for the prompt and for the responses, the last layer for the
    # prompt's last token and for the responses.
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"} < set(calls)
    assert calls.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert calls.count("__cudnn$fmhaScaleBiasSoftmaxBackward") == 3
    forward = [call for call in calls if not call.endswith("Backward")]
    # The loss has its forward pass if scoring was not that; the backward pass begins with another.
    assert len(forward) == 4 + 4 * (not reuse) + 4
    # What reads as scores: float32 over all pairs of some head.
    plain_program, *_ = train_step(layout, "bfloat16", remat, plain)
    plain_text = (
        Program.train_step.trace(plain_program, optimizer, *args, 17)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    scores = "tensor<3x2x1x2x13x13xf32>"  # Of the prompt: [B, KV, G, M, P, P].
    assert scores in plain_text and scores not in text


# ---------------------------------------------------------------- which one a run gets


def gpus(count: int = 1, platform: str = "gpu", tensor: int = 1) -> Any:
    """What `choose_attention` reads of a mesh."""
    device = SimpleNamespace(platform=platform)
    return SimpleNamespace(
        devices=np.array([device] * count, dtype=object), size=count, shape={"tensor": tensor}
    )


def test_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config, asked = tiny_config(), []

    def agrees(fused: FusedAttention, config: Any, dtype: Any) -> float:
        asked.append(fused)
        return 0.005

    monkeypatch.setattr(fused_attention, "measure_error", agrees)
    one, eight = gpus(), gpus(8, tensor=2)
    for setting in ("auto", "fused"):
        assert choose_attention(setting, config, "bfloat16", one) == FusedAttention()
        assert choose_attention(setting, config, "bfloat16", eight) == FusedAttention(mesh=eight)
    assert choose_attention("plain", config, "bfloat16", one) is plain
    assert asked == [FusedAttention(), FusedAttention(mesh=eight)] * 2
    for mesh, dtype, reason in (
        (gpus(platform="cpu"), "bfloat16", "the kernel is cuDNN's, and this run is on cpu"),
        (gpus(), "float32", "needs config.model.dtype=bfloat16, not float32"),
        (gpus(4, tensor=4), "bfloat16", "config.mesh.tensor=4 does not divide 2 key-value heads"),
    ):
        assert choose_attention("auto", config, dtype, mesh) is plain
        with pytest.raises(UserError, match=f"config.model.attention=fused: .*{reason}"):
            choose_attention("fused", config, dtype, mesh)
    assert len(asked) == 4

    for wrong in (0.5, float("nan")):
        monkeypatch.setattr(fused_attention, "measure_error", lambda *args, found=wrong: found)
        with caplog.at_level("INFO"):
            assert choose_attention("auto", config, "bfloat16", eight) is plain
        assert f"without a fused kernel: the kernel is off by {wrong}" in caplog.text
        with pytest.raises(UserError, match=r"off by (0\.5|nan) on a small example"):
            choose_attention("fused", config, "bfloat16", one)


def test_a_kernel_that_fails_is_not_used() -> None:
    """jax's own words where there is no cuDNN: here."""
    assert choose_attention("auto", tiny_config(), "bfloat16", gpus()) is plain
    with pytest.raises(UserError, match=r"the kernel failed: .+; expected auto or plain"):
        choose_attention("fused", tiny_config(), "bfloat16", gpus())


def test_configuration(tmp_path: Path) -> None:
    config = tiny_run(write_jsonl(tmp_path / "data.jsonl"))
    assert config.model.attention == "auto"
    assert prepare(config, tmp_path / "run", ("train",)).program.scorer.attention is plain
    config.model.attention = "fused"
    with pytest.raises(UserError, match=r"config.model.attention=fused: .* on cpu"):
        prepare(config, tmp_path / "run", ("train",))
    config.model.attention = "flash"
    with pytest.raises(UserError, match=r"attention='flash': expected one of auto, plain, fused"):
        prepare(config, tmp_path / "run", ("train",))


def test_programs_are_equal_by_value() -> None:
    """They are static arguments: an unequal one is compiled again."""
    program, *_ = train_step("packed", "bfloat16", "full", FusedAttention())
    other = dataclasses.replace(program.scorer, attention=FusedAttention())
    assert other == program.scorer and hash(other) == hash(program.scorer)
    assert dataclasses.replace(other, attention=plain) != other


# ---------------------------------------------------------------- on a GPU


def _gpu() -> None:
    if jax.devices()[0].platform != "gpu":
        pytest.skip("needs a GPU")


@pytest.mark.accelerator
@pytest.mark.parametrize("heads", [(24, 8, 128), (32, 8, 64), (16, 8, 128), (4, 2, 16)])
def test_the_kernel_agrees(heads: tuple[int, int, int]) -> None:
    """Heads of Llama 3.2 3B and 1B, Qwen3 0.6B, and of the tests."""
    _gpu()
    config = dataclasses.replace(
        tiny_config(), num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2]
    )
    assert measure_error(FusedAttention(), config, "bfloat16") < MAX_RELATIVE_ERROR


@pytest.mark.accelerator
@pytest.mark.parametrize("layout", ["packed", "wide rectangle", "rectangle, 2 at a time"])
def test_the_kernel_in_a_model(layout: str) -> None:
    """Log-probs and gradients, fused and plain, both in bfloat16, about as far from each other as
    plain attention in bfloat16 is from float32: with other operations on a CPU 0.7 to 1.2 times."""
    _gpu()
    pool = random_candidates(response=RESPONSE)
    exact, rough = (random_decoder(tiny_config(), dtype=d) for d in ("float32", "bfloat16"))
    settings = LAYOUTS[layout]

    def values(model: Any, attention: Any) -> list[np.ndarray]:
        logps = scored(model, pool, pooling=None, attention=attention, **settings).logps
        grads = gradients(model, pool, attention=attention, **settings)
        return [np.asarray(x) for x in (logps, *jax.tree.leaves(grads))]

    with jax.default_matmul_precision("highest"):
        right = values(exact, plain)
    for a, b, c in zip(values(rough, FusedAttention()), values(rough, plain), right, strict=True):
        assert np.linalg.norm(a - b) < 2.0 * np.linalg.norm(b - c)
