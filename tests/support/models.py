"""Small random decoders and pools of candidates for the tests of the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder
from mass_dpo_jax.models.shared_prefix import CandidateScores, score
from mass_dpo_jax.models.weights import list_entries

VOCABULARY = 101
FAMILIES = (
    *("llama", "qwen2", "qwen3", "smollm3", "mistral", "phi3"),
    *("olmo2", "gemma2", "gemma3_text"),
)

# Frequencies of a 16-wide head fall into all three bands: fast, blended and slow.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def hf_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns a small `config.json`: grouped heads, and a head_dim other than hidden / heads."""
    config = {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,  # SmolLM3's fourth layer has no positions
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type == "llama":
        config["rope_parameters"] = {"rope_theta": 10000.0, **LLAMA3_SCALING}
    if model_type in ("mistral", "phi3", "gemma2", "gemma3_text"):
        config["sliding_window"] = 6  # Shorter than prompts.
    if model_type.startswith("gemma"):
        config["query_pre_attn_scalar"] = 24
    if model_type == "gemma2":  # Bounds that bind: random scores are near 1.
        config |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    if model_type == "gemma3_text":
        config["sliding_window_pattern"] = 3
        config["rope_parameters"] = {
            "full_attention": {"rope_theta": 1e5, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"},
        }
    return config | changes


def tiny_config(model_type: str = "llama", **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf(hf_config(model_type, **changes), "config.json")


def random_decoder(config: DecoderConfig, seed: int = 0, **settings: Any) -> Decoder:
    """Makes a decoder with random parameters, norms too, and logits that differ widely."""
    graphdef, shapes = nnx.split(abstract_decoder(config, **settings))
    rng = np.random.default_rng(seed)

    def draw(path: Any, value: Any) -> jax.Array:
        is_norm = "scale" in jax.tree_util.keystr(path)
        noise = rng.normal(0.0, 0.2, value.shape).astype(np.float32)
        return jnp.asarray(1.0 + noise if is_norm else noise)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, shapes))


class Candidates(NamedTuple):
    """Returns the arguments of `shared_prefix.score` after the model."""

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    responses: np.ndarray
    response_lengths: np.ndarray

    def prompt(self, row: int) -> np.ndarray:
        return self.prompts[row, : self.prompt_lengths[row]]

    def response(self, row: int, candidate: int) -> np.ndarray:
        end = self.response_lengths[row, : candidate + 1].sum()
        return self.responses[row, end - self.response_lengths[row, candidate] : end]


def random_candidates(
    seed: int = 0, batch: int = 3, prompt: int = 13, candidates: int = 5, response: int = 7
) -> Candidates:
    """Ragged rows; among them a candidate that is absent, and a row with nothing but a prompt of
    one token. What lies behind the real tokens is random too: nothing may depend on it."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(2, prompt + 1, batch)
    prompt_lengths[0] = prompt
    lengths = rng.integers(1, response + 1, (batch, candidates))
    lengths[0, 0] = response
    if batch > 1:
        lengths[1, 2] = 0
        prompt_lengths[-1], lengths[-1] = 1, 0
    size = int(lengths.sum(axis=1).max()) + 3
    return Candidates(
        rng.integers(3, VOCABULARY, (batch, prompt)).astype(np.int32),
        prompt_lengths.astype(np.int32),
        rng.integers(3, VOCABULARY, (batch, size)).astype(np.int32),
        lengths.astype(np.int32),
    )


def scored(model: Decoder, pool: Candidates, **settings: Any) -> CandidateScores:
    """Calls `shared_prefix.score`, compiled once for all models of an architecture."""
    graphdef, params = nnx.split(model)
    arrays = tuple(map(jnp.asarray, pool))
    return _scored(graphdef, params, arrays, tuple(sorted(settings.items())))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _scored(graphdef: Any, params: Any, pool: Any, settings: Any) -> CandidateScores:
    return score(nnx.merge(graphdef, params), *pool, **dict(settings))


def random_tensors(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 Hugging Face tensors that fit `config`."""
    rng = np.random.default_rng(seed)
    shapes = nnx.to_pure_dict(nnx.state(abstract_decoder(config), nnx.Param))
    tensors = {}
    for entry in list_entries(config):
        node: Any = shapes
        for key in entry.path:
            node = node[key]
        shape = node.shape[1:] if entry.is_stacked else node.shape
        shape = shape[::-1] if entry.transposed else shape
        for name in entry.list_names(config):
            part = rng.normal(size=shape).astype(np.float32)
            tensors[name] = np.concatenate([tensors[name], part]) if entry.first_row else part
    return tensors


def write_weights(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return path


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets jax trace and lower cuDNN's attention where there is no GPU; it cannot run."""
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda capability: False)
