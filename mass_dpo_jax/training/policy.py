"""A policy: decoder, weights and tokenizer, from a Hugging Face folder, a run, or from scratch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.tokens import load_tokenizer
from mass_dpo_jax.data.vocabulary import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import check_links
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder, param_dims
from mass_dpo_jax.models.weights import load_hf
from mass_dpo_jax.training import checkpoint
from mass_dpo_jax.training.mesh import hidden_splits, param_shardings

MODEL_FOLDER = "model"  # Inside a run folder: config.json and the tokenizer.
GENERATION = "generation_config.json"
TOKENIZER_EXAMPLES = 20_000  # A vocabulary does not change with more.


def is_run(path: Path) -> bool:
    """Is this the folder of one of our runs (rather than a Hugging Face folder)?"""
    return (path / MODEL_FOLDER / "config.json").is_file()


def description_folder(path: Path) -> Path:
    """Where config.json and tokenizer lie, for a run folder or a Hugging Face folder."""
    if not path.is_dir():
        raise UserError(f"model folder {path}: no such folder")
    folder = path / MODEL_FOLDER if is_run(path) else path
    check_links(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder without weights, and how to get them onto the devices.

    Attributes:
      config: the architecture.
      tokenizer: its tokenizer.
      graphdef: the decoder's structure (`nnx.split`).
      abstract: its parameters as shapes with shardings, nested dicts.
    """

    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    graphdef: nnx.GraphDef
    abstract: Any

    @property
    def shardings(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    def weights(self, path: str, seed: int) -> Any:
        """float32 weights of the model at `path`; if it is empty, random ones drawn by `seed`."""
        if not path:
            return self._random(seed)
        folder = Path(path)
        found = load_config(description_folder(folder))
        if found != self.config:
            raise UserError(f"{path}: its architecture differs from the policy's")
        if is_run(folder):
            return checkpoint.load_params(folder, self.abstract)
        state = load_hf(folder, self.config, shardings=self.shardings, progress=True)
        return nnx.to_pure_dict(state)

    def _random(self, seed: int) -> Any:
        leaves, tree = jax.tree.flatten(self.shardings)
        return _initializer(self.config, tree, tuple(leaves))(jax.random.key(seed))


@functools.cache
def _initializer(config: DecoderConfig, tree: Any, leaves: tuple[Any, ...]) -> Any:
    """From a key to random weights, made in place, shard by shard: nothing ever holds the whole."""

    def init(key: jax.Array) -> Any:
        decoder = Decoder(config, rngs=nnx.Rngs(key), dtype=jnp.float32, remat="none")
        return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))

    return jax.jit(init, out_shardings=jax.tree.unflatten(tree, leaves))


def open_policy(
    config: ConfigDict, mesh: Mesh, workdir: Path | None, examples: Sequence[Example]
) -> Policy:
    """The policy of `config.model`, still without weights.

    With `model.path` empty, the architecture is `model.scratch`'s and the tokenizer is trained on
    `examples` and kept in `workdir`, where a run that goes on finds it again.
    """
    if config.model.path:
        folder = description_folder(Path(config.model.path))
        architecture, tokenizer = load_config(folder), load_tokenizer(folder)
    elif workdir is None:
        raise UserError("config.model.path is empty: expected a model folder or a run folder")
    else:
        folder = workdir / MODEL_FOLDER
        if not (workdir / "config.json").exists():  # The run has not begun.
            train_tokenizer(_texts(examples), config.model.scratch.vocab_size, folder)
        tokenizer = load_tokenizer(folder)
        architecture = _scratch(config, tokenizer)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if vocabulary > architecture.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {vocabulary - 1}, the model's vocabulary "
            f"has {architecture.vocab_size} entries"
        )
    dtype = jnp.dtype(config.model.dtype)
    model = abstract_decoder(
        architecture,
        dtype=dtype,
        remat=config.model.remat,
        splits=hidden_splits(mesh, architecture.hidden_size),
    )
    graphdef, state = nnx.split(model, nnx.Param)
    shapes = nnx.to_pure_dict(state)
    shardings = param_shardings(mesh, shapes, nnx.to_pure_dict(param_dims(state)))
    return Policy(architecture, tokenizer, graphdef, checkpoint.abstract(shapes, shardings))


def save_description(policy: Policy, config: ConfigDict, workdir: Path) -> None:
    """Writes what a run folder needs to be opened as a model: config.json, the tokenizer with the
    chat template of training, and what the model's folder says of generation."""
    folder = workdir / MODEL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = policy.tokenizer
    if config.data.chat_template not in ("tokenizer", "none"):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = Path(config.data.chat_template).read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    text = json.dumps(policy.config.to_hf(), indent=2) + "\n"
    (folder / "config.json").write_text(text)
    if config.model.path:
        generation = description_folder(Path(config.model.path)) / GENERATION
        if generation.is_file():
            (folder / GENERATION).write_bytes(generation.read_bytes())


def _scratch(config: ConfigDict, tokenizer: PreTrainedTokenizerBase) -> DecoderConfig:
    s = config.model.scratch
    description = {
        "model_type": s.model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": s.hidden_size,
        "intermediate_size": s.intermediate_size,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_kv_heads,
        "head_dim": s.hidden_size // s.num_heads,
        "max_position_embeddings": config.data.max_prompt_length + config.data.max_response_length,
        "rms_norm_eps": 1e-5,
        # Large models' 0.02 leaves a narrow one on a plateau for its first hundreds of steps.
        "initializer_range": s.hidden_size**-0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return DecoderConfig.from_hf(description, "config.model.scratch")


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    for example in examples[:TOKENIZER_EXAMPLES]:
        for text in (example.prompt, example.chosen, *example.rejected):
            if isinstance(text, History):
                yield text.text
            elif isinstance(text, str):
                yield text
            else:
                yield from (message["content"] for message in text)
