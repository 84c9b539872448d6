"""The same weights in transformers (PyTorch) and here: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder
from mass_dpo_jax.models.rotary import compute_rope_frequencies
from mass_dpo_jax.models.weights import load_hf
from tests.support.models import Candidates, hf_config, random_candidates, scored


def load(folder: Path, dtype: str = "float32") -> Decoder:
    config = load_config(folder)
    graphdef, _ = nnx.split(abstract_decoder(config, dtype=dtype))
    return nnx.merge(graphdef, load_hf(folder, config))


def random_folder(torch: ModuleType, folder: Path, config: dict[str, Any]) -> Any:
    """A random model of transformers, saved in several shards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(config), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = "norm" in name and not config["model_type"].startswith("gemma")
            parameter.normal_(1.0 if ones else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def reference(torch: ModuleType, model: Any, pool: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [B, C] in float64 sums and features [2, B, C, D] ("response", "all"), one row a
    response."""
    batch, candidates = pool.response_lengths.shape
    logps = np.zeros((batch, candidates))
    features = np.zeros((2, batch, candidates, model.config.hidden_size))
    for row, candidate in np.argwhere(pool.response_lengths > 0):
        prompt, response = pool.prompt(row), pool.response(row, candidate)
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
        with torch.no_grad():
            out = model(ids[None], output_hidden_states=True)
        start = len(prompt)
        tokens = torch.log_softmax(out.logits[0, start - 1 : -1].double(), -1)
        logps[row, candidate] = tokens.gather(1, ids[start:, None]).sum().item()
        hidden = out.hidden_states[-1][0].double().numpy()
        features[:, row, candidate] = hidden[start:].mean(0), hidden.mean(0)
    return logps, features


def relative_error(found: Any, expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(found) - expected) / np.maximum(1.0, np.abs(expected))))


CASES = {
    "llama tied, llama3 scaling": ("llama", {"tie_word_embeddings": True}),
    "llama untied, llama3 scaling": ("llama", {}),
    "llama untied, one head each": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
    ),
    "qwen2 tied, linear scaling": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "qwen2 untied, its upper layers local": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2, a window that is not used": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0},
    ),
    "mistral, window longer than any text": ("mistral", {"sliding_window": 64}),
    "mistral, window shorter than prompts": (
        "mistral",
        {"sliding_window": 5, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi3 untied, window shorter than prompts": ("phi3", {"sliding_window": 5}),
    "phi3 tied, one head each": ("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "gemma2 tied": ("gemma2", {"tie_word_embeddings": True}),
    "gemma2 untied, one head each, other layers local": (
        "gemma2",
        {"num_key_value_heads": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "gemma2, scores and logits without bounds": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3 tied, linear scaling": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "rope_parameters": None,
            "rope_theta": 5e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma3 untied, capped logits": (
        "gemma3_text",
        {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7},
    ),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmo2 untied, one head each": ("olmo2", {"num_key_value_heads": 4}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 untied": ("qwen3", {}),
    "smollm3 tied": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3 untied": ("smollm3", {"no_rope_layers": [0, 1, 0, 1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_random_models(torch: ModuleType, tmp_path: Path, case: str) -> None:
    model_type, changes = CASES[case]
    theirs = random_folder(torch, tmp_path, hf_config(model_type, **changes))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load(tmp_path)
    assert (ours.head is None) == changes.get("tie_word_embeddings", False)
    pool = random_candidates(seed=1)
    logps, features = reference(torch, theirs, pool)
    found = scored(ours, pool, pooling="response")
    assert relative_error(found.logps, logps) < 1e-4
    assert relative_error(found.features, features[0]) < 1e-4


def test_a_head_that_a_tied_model_has_beside_its_embeddings(
    torch: ModuleType, tmp_path: Path
) -> None:
    """We refuse it: what the message says to set gives what transformers 5 computes with it."""
    random_folder(torch, tmp_path, hf_config("qwen3", tie_word_embeddings=False))
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r'set "tie_word_embeddings": false in config.json'):
        load(tmp_path)
    pool = random_candidates(seed=1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    logps, _ = reference(torch, theirs, pool)
    path.write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    assert relative_error(scored(load(tmp_path), pool, pooling=None).logps, logps) < 1e-4


def test_llama3_frequencies(torch: ModuleType, tmp_path: Path) -> None:
    theirs = random_folder(torch, tmp_path, hf_config("llama"))
    config = load_config(tmp_path)
    frequencies = np.asarray(
        compute_rope_frequencies(config.head_dim, config.rope.theta, config.rope.scaling)
    )
    expected = theirs.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    shrunk = plain / frequencies
    fast, slow = np.isclose(shrunk, 1.0), np.isclose(shrunk, 8.0)
    assert fast.any() and slow.any() and (~fast & ~slow).any()


def story_pool(folder: Path) -> Candidates:
    """Real text: two prompts, four responses of very different lengths to each."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = ["Once upon a time", "Lily and Tim went to the"]
    texts = [", there was a little girl named Lily.", " park. They", " zzz!", " was was was"]
    rows = [[1, *tokenizer.encode(text).ids] for text in prompts]
    # The normaliser puts a space in front of every text.
    responses = [[*tokenizer.encode(text.lstrip()).ids, 2] for text in texts]
    width = max(map(len, rows))
    packed = [token for response in responses for token in response]
    return Candidates(
        np.array([row + [0] * (width - len(row)) for row in rows], np.int32),
        np.array([len(row) for row in rows], np.int32),
        np.array([packed] * 2, np.int32),
        np.array([[len(response) for response in responses]] * 2, np.int32),
    )


def test_real_model(torch: ModuleType, real_data: Path) -> None:
    folder = real_data / "stories260K"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pool = story_pool(folder)
    logps, features = reference(torch, theirs, pool)
    for i, pooling in enumerate(("response", "all")):
        found = scored(load(folder), pool, pooling=pooling)
        assert relative_error(found.logps, logps) < 1e-4
        assert relative_error(found.features, features[i]) < 1e-4
    # bfloat16 has 8 significant bits. Measured: 0.33% of a log-prob, PyTorch's own 0.34%.
    rough = scored(load(folder, "bfloat16"), pool, pooling="response")
    assert rough.logps.dtype == rough.features.dtype == jnp.float32
    error = relative_error(rough.logps, logps)
    assert 0.0 < error < 1e-2
    assert relative_error(rough.features, features[0]) < 0.1


def test_bfloat16_files_are_read_exactly(torch: ModuleType, tmp_path: Path) -> None:
    theirs = random_folder(torch, tmp_path, hf_config("qwen3", tie_word_embeddings=True))
    theirs.bfloat16().save_pretrained(tmp_path)
    ours = load(tmp_path)
    kernel = ours.blocks.gate.kernel[...]
    assert kernel.dtype == jnp.float32
    for layer, block in enumerate(theirs.model.layers):
        expected = block.mlp.gate_proj.weight.detach().float().numpy().T
        np.testing.assert_array_equal(kernel[layer], expected)


def test_real_model_tells_its_story(real_data: Path) -> None:
    """Greedy decoding, a whole forward pass a token."""
    folder = real_data / "stories260K"
    model = load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [1, *tokenizer.encode("Once upon a time").ids]
    length = 64

    @jax.jit
    def next_token(tokens: jax.Array, count: jax.Array) -> jax.Array:
        hidden, _ = model(tokens[None], jnp.arange(length)[None], attention.attend_causally)
        return jnp.argmax(model.vocabulary_weights() @ hidden[0, count - 1])

    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball."
    )
    while len(ids) < length and len(tokenizer.decode(ids)) < len(story):
        tokens = np.array(ids + [0] * (length - len(ids)), np.int32)
        ids.append(int(next_token(tokens, len(ids))))
    assert tokenizer.decode(ids) == story
