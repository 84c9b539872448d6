"""Opens the policy of a configuration, and writes what a run needs of it into the run folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from mass_dpo_jax.data.examples import Example, as_messages, format_message
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.families import FAMILIES
from mass_dpo_jax.models.folder import GENERATION
from mass_dpo_jax.runs import origin, run_config
from mass_dpo_jax.runs.run_folder import find_run, latest_step
from mass_dpo_jax.training.checkpoint_reading import Reader
from mass_dpo_jax.training.mesh import hidden_splits
from mass_dpo_jax.training.model_paths import (
    check_model,
    find_description,
    load_model_settings,
    read_adapters,
    read_lora,
    uses_lora,
)
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import write_whole

MAX_TOKENIZER_EXAMPLES = 20_000  # A vocabulary does not change with more.


def open_policy(
    model: ConfigDict,
    mesh: Mesh,
    workdir: Path | None,
    examples: Sequence[Example] = (),
    max_length: int = 0,
    weights: bool = True,
) -> Policy:
    """Opens the policy of `config.model`, without weights.

    Where its architecture and its tokenizer come from. The order is important:
    1. The description in `workdir`, if that run has a checkpoint: `model.path` may be gone by then.
    2. The model at `model.path`.
    3. `model.scratch`, with a tokenizer trained on `examples`.

    Args:
        model: the section `config.model`.
        mesh: the devices.
        workdir: a run; None: there is none.
        examples: examples of the training split: a tokenizer from scratch is trained on them, and
            written into `workdir`.
        max_length: tokens of a prompt with a response, for a model from scratch.
        weights: whether to check the headers of the weights' files too; a dry run needs none.

    Raises:
        UserError: `model` names no model, or adapters that do not fit it.
    """
    if workdir is not None and latest_step(workdir) is not None:
        folder = find_description(workdir)
        architecture, tokenizer = load_config(folder), load_tokenizer(folder)
    elif model.path:
        folder = check_model(Path(model.path), weights)
        _check_added_once(model.path, model.lora.path)
        architecture, tokenizer = load_config(folder), load_tokenizer(folder)
    elif workdir is None:
        raise UserError("config.model.path is empty: expected a model folder or a run folder")
    else:
        folder = workdir / origin.MODEL
        # An earlier run with other settings, without a checkpoint, may have left a tokenizer here.
        # The primary process opens its policy before the others.
        if distributed.is_primary():
            train_tokenizer(_texts(examples), model.scratch.vocab_size, folder)
        tokenizer = load_tokenizer(folder)
        architecture = _describe_scratch(model.scratch, tokenizer, max_length)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if vocabulary > architecture.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {vocabulary - 1}, the model's vocabulary "
            f"has {architecture.vocab_size} entries"
        )
    lora = read_lora(model.lora)
    decoder = abstract_decoder(
        architecture,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        hidden_shardings=hidden_splits(mesh, architecture.hidden_size),
        lora=lora,
    )
    graphdef, _ = nnx.split(decoder, nnx.Param)
    policy = Policy(architecture, tokenizer, graphdef, mesh, lora, model.lora.base)
    adapters = model.lora.path
    if adapters and find_run(Path(adapters)) is None:
        peft_format.check_peft(adapters, architecture, policy.abstract["adapters"])
    return policy


def _check_added_once(path: str, adapters: str) -> None:
    """Raises UserError if the model is a run's, whose weights have these adapters added already."""
    run = find_run(Path(path))
    if not adapters or run is None:
        return
    run_lora = load_model_settings(run.folder).lora
    if not uses_lora(run_lora):
        return
    adapters_run = find_run(Path(adapters))
    is_run = adapters_run is not None and origin.is_same(adapters_run.folder, run.folder)
    is_start = bool(run_lora.path) and origin.is_same(Path(adapters), Path(run_lora.path))
    if is_run or is_start or run_config.is_own_file(adapters, run.folder, "model.lora.path"):
        raise UserError(
            f"config.model.lora.path={adapters}: the model at config.model.path={path} has these "
            "adapters in its weights already; leave them out, --config.model.lora.path= (and "
            "--config.model.lora.rank=16, say, to train new ones), or go on with them on their "
            f"base, --config.model.path=BASE --config.model.lora.path={run.folder}"
        )


def _describe_scratch(
    scratch: ConfigDict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> DecoderConfig:
    description = {
        "model_type": scratch.model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": scratch.hidden_size,
        "intermediate_size": scratch.intermediate_size,
        "num_hidden_layers": scratch.num_layers,
        "num_attention_heads": scratch.num_heads,
        "num_key_value_heads": scratch.num_kv_heads,
        "head_dim": scratch.hidden_size // scratch.num_heads,
        "max_position_embeddings": max_length,
        "rms_norm_eps": 1e-5,
        # Large models' 0.02 leaves a narrow one on a plateau for its first hundreds of steps.
        "initializer_range": scratch.hidden_size**-0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if "query_pre_attn_scalar" in FAMILIES[scratch.model_type].defaults:
        description["query_pre_attn_scalar"] = description["head_dim"]
    return DecoderConfig.from_hf(description, "config.model.scratch")


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    """Yields the texts that a tokenizer is trained on."""
    for example in examples[:MAX_TOKENIZER_EXAMPLES]:
        for text in (example.prompt, *example.responses):
            yield from map(format_message, as_messages(text))


def set_chat_template(policy: Policy, chat_template: str) -> PreTrainedTokenizerBase:
    """Returns a policy's tokenizer with the chat template of `config.data.chat_template`."""
    if chat_template in ("tokenizer", "none"):
        return policy.tokenizer
    tokenizer = copy.copy(policy.tokenizer)
    tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def save_description(policy: Policy, model: ConfigDict, chat_template: str, workdir: Path) -> None:
    """Writes what a run needs of its start into `model/` and `adapters/`.

    That is config.json, the tokenizer with the chat template of training, generation_config.json of
    the model it starts from, and the adapters it starts from.

    Args:
        policy: the run's policy.
        model: the section `config.model`.
        chat_template: `config.data.chat_template`.
        workdir: the run folder.
    """
    if not distributed.is_primary():
        return
    folder = workdir / origin.MODEL
    folder.mkdir(parents=True, exist_ok=True)
    set_chat_template(policy, chat_template).save_pretrained(folder)
    text = json.dumps(policy.config.to_hf(), indent=2) + "\n"
    write_whole(folder / "config.json", [text])
    if model.path:
        generation = find_description(Path(model.path)) / GENERATION
        if generation.is_file():
            (folder / GENERATION).write_bytes(generation.read_bytes())
    adapters, kept_adapters = model.lora.path, workdir / origin.ADAPTERS
    if adapters and origin.is_same(Path(adapters), kept_adapters):
        return  # The run stopped before its first checkpoint, and starts again from its own files.
    shutil.rmtree(kept_adapters, ignore_errors=True)
    if adapters:
        _copy_adapters(model, kept_adapters)


def _copy_adapters(model: ConfigDict, folder: Path) -> None:
    """Copies the adapters at `model.lora.path` to `folder`, in PEFT's format."""
    folder.mkdir()
    path = Path(model.lora.path)
    run = find_run(path)
    if run is None:
        for name in (peft_format.SETTINGS, peft_format.WEIGHTS):
            shutil.copyfile(path / name, folder / name)
        return
    lora = read_lora(model.lora)
    step = latest_step(run.folder) if run.step is None else run.step
    assert lora is not None and step is not None
    read = Reader(run.folder, step)
    peft_format.save_peft(folder, read_adapters(read, lora), lora, model.path)
    read.check()
