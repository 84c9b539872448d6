"""Exports the policy of a run, or a model of the library, as a Hugging Face folder or adapters."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.render import make_renderer
from mass_dpo_jax.data.tokenizer import load_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.folder import GENERATION
from mass_dpo_jax.models.hf_folder import (
    ReadArray,
    check_dtype,
    check_free,
    check_whole,
    write_complete_folder,
    write_folder,
)
from mass_dpo_jax.models.lora import merge_adapters
from mass_dpo_jax.runs import origin, run_config, run_folder
from mass_dpo_jax.training.checkpoint_reading import Reader
from mass_dpo_jax.training.mesh import make_mesh
from mass_dpo_jax.training.model_paths import (
    find_description,
    load_model_settings,
    read_adapters,
    read_lora,
    uses_lora,
)
from mass_dpo_jax.training.open_policy import set_chat_template
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.utils import hub
from mass_dpo_jax.utils.files import read_json

# Returns the text of a model card: of the run folder, its configuration, the architecture, the
# checkpoint's step, the type of the stored weights, and what to call the base model.
DescribeModel = Callable[[Path, ConfigDict, DecoderConfig, int, str, str], str]
_log = logging.getLogger(__name__)


def export_run(
    workdir: Path,
    output: Path,
    describe_model: DescribeModel,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
    base_model: str = "",
    adapters: bool = False,
    base_path: str = "",
) -> None:
    """Exports a run as `mass_dpo_jax.export.export` says, with the model card it is given."""
    if not run_folder.has_description(workdir):
        raise UserError(
            f"{workdir}: not a run folder (it has no model/config.json); expected what was the "
            "--workdir of mass_dpo_jax.train"
        )
    config = run_config.load_config(workdir)
    if not 0 < max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb={max_shard_gb}: expected a finite number above 0")
    step = _find_step(workdir, step)
    if dtype is not None:
        check_dtype(dtype)
    check_free(output)
    folder = find_description(workdir)
    if adapters:
        peft_format.check_exportable(load_config(folder))
        if dtype not in (None, "float32"):
            raise UserError(f"--dtype={dtype}: adapters are written in float32; leave it out")
        base = base_model or hub.without_revision(config.model.path)
        _save_adapters(workdir, step, output, base, load_config(folder))
        return
    decoder, tokenizer = load_config(folder), load_tokenizer(folder)
    check_whole(decoder)
    dtype = dtype or config.model.dtype
    read = Reader(workdir, step)

    def write_card(temporary: Path) -> None:
        read.check()
        text = describe_model(workdir, config, decoder, step, dtype, base_model)
        (temporary / "README.md").write_text(text)

    write_folder(
        output,
        decoder,
        _merge_adapters(read, workdir, base_path, decoder, tokenizer),
        tokenizer,
        _make_generation(folder, decoder, tokenizer, config.data),
        dtype,
        max_shard_gb,
        write_card,
    )
    _log.info(f"step {step} of {workdir}, {dtype}, written to {output}")


def _find_step(workdir: Path, step: int | None) -> int:
    """Returns the step of the checkpoint to export; None: the newest."""
    steps = run_folder.list_steps(workdir)
    if not steps:
        raise UserError(f"{workdir}: {run_folder.NO_CHECKPOINT}")
    step = steps[-1] if step is None else step
    if step not in steps:
        listed = ", ".join(map(str, steps))
        raise UserError(f"--step={step}: {workdir} has checkpoints of steps {listed}")
    return step


def save_model(
    output: Path, policy: Policy, params: Any, path: str, data: ConfigDict, dtype: str
) -> None:
    """Writes a policy as a Hugging Face folder; with LoRA, its base with the adapters added.

    Args:
        output: the new folder.
        policy: decoder and tokenizer.
        params: the weights.
        path: the path that the model was read from.
        data: the section `config.data`, with the chat template.
        dtype: type of the stored weights.

    Raises:
        UserError: `output` is taken or cannot be written, or `dtype` is neither float32 nor
            bfloat16.
    """
    check_dtype(dtype)
    check_free(output)
    check_whole(policy.config)
    if policy.lora is not None:
        params = merge_adapters(params, policy.lora)
    tokenizer = set_chat_template(policy, data.chat_template)
    generation = _make_generation(find_description(Path(path)), policy.config, tokenizer, data)
    write_folder(output, policy.config, _read_from(params), tokenizer, generation, dtype)


def _save_adapters(
    workdir: Path, step: int, output: Path, base_model: str, decoder: DecoderConfig
) -> None:
    lora = read_lora(load_model_settings(workdir).lora)
    if lora is None:
        raise UserError(f"--adapters: {workdir} is a run without LoRA")
    read = Reader(workdir, step)
    adapters = read_adapters(read, lora)
    read.check()
    with write_complete_folder(output) as temporary:
        peft_format.save_peft(temporary, adapters, lora, base_model, decoder.part_of)
    _log.info(f"step {step} of {workdir}, adapters, written to {output}")


def _merge_adapters(
    read: Reader, workdir: Path, base_path: str, decoder: DecoderConfig, tokenizer: Any
) -> ReadArray:
    """Returns `read` or, for a run with LoRA, what reads its base with the adapters added."""
    model = load_model_settings(workdir)
    if not uses_lora(model.lora):
        return read
    base = base_path or model.path
    if not Path(base).exists():
        raise UserError(
            f"{workdir}: its base {base} is gone; where it has moved, say so by --base_path=FOLDER"
        )
    mesh = make_mesh(config_lib.default().mesh, devices=jax.local_devices()[:1])
    lora = read_lora(model.lora)
    assert lora is not None
    graphdef = nnx.graphdef(abstract_decoder(decoder))
    policy = Policy(decoder, tokenizer, graphdef, mesh, lora, model.lora.base)
    params, digest = policy.read(base, 0)
    advice = "name those of before by --base_path=PATH"
    origin.check_weights(workdir, {"model.path": digest}, advice)
    params["adapters"] = read_adapters(read, lora)
    return _read_from(merge_adapters(params, lora))


def _read_from(params: Any) -> ReadArray:
    """Returns what reads arrays of a tree of parameters."""

    def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        array = functools.reduce(lambda tree, name: tree[name], path, params)
        return np.asarray(array if layer is None else array[layer])

    return read


def _make_generation(
    folder: Path, decoder: DecoderConfig, tokenizer: Any, data: ConfigDict
) -> dict[str, Any]:
    """Returns the base model's settings of generation, which ends where a response of training did.

    Token ids that the base model sets to null stay null, except for the end.
    """
    path = folder / GENERATION
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object")

    def keep_tokens(ids: Any) -> list[int]:
        """Returns the ids of tokens: generate() fails on others, and on null in a list."""
        ids = ids if isinstance(ids, list) else [ids]
        return [x for x in ids if type(x) is int and 0 <= x < decoder.vocab_size]

    for field, default in (
        ("bos_token_id", decoder.bos_token_id),
        ("pad_token_id", tokenizer.pad_token_id),
    ):
        settings[field] = next(iter(keep_tokens(settings.get(field, default))), None)
    ends = keep_tokens(settings.get("eos_token_id", list(decoder.eos_token_ids)))
    end = _find_end_of_response(tokenizer, data)
    settings["eos_token_id"] = ends if end in ends else [*ends, end]
    return settings


def _find_end_of_response(tokenizer: Any, data: ConfigDict) -> int:
    """Returns the id of the token that ends a response."""
    data = data.copy_and_resolve_references()
    if data.chat_template != "none":
        data.chat_template = "tokenizer"  # The tokenizer has the template of a file by now.
    renderer = make_renderer(tokenizer, data)
    if renderer.end_id is not None:
        return renderer.end_id
    example = Example("", "question", "answer", ("other",), "chat template")
    prompt = renderer.render_prompt(example.prompt, example.place)
    text = renderer.render_responses(example, prompt)[0]
    return int(tokenizer(text, add_special_tokens=False).input_ids[-1])
