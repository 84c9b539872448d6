"""Models as Hugging Face folders, and adapters as PEFT's: written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.render import make_renderer
from mass_dpo_jax.data.tokenizer import load_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import EXPORT_DTYPES, DecoderConfig, load_config
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.folder import GENERATION
from mass_dpo_jax.models.lora import merge_adapters
from mass_dpo_jax.models.weights import save_hf
from mass_dpo_jax.reports import model_card
from mass_dpo_jax.runs import origin, run_config, run_folder
from mass_dpo_jax.training import checkpoint_reading
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.policy import (
    Policy,
    adapters_of,
    described_tokenizer,
    description_folder,
    is_run,
    read_lora,
    uses_lora,
)
from mass_dpo_jax.utils.files import read_json

_log = logging.getLogger(__name__)


def export(
    workdir: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
    base_model: str = "",
    adapters: bool = False,
    base_path: str = "",
) -> None:
    """Does what `mass_dpo_jax.export.export` says."""
    if not is_run(workdir):
        raise UserError(
            f"{workdir}: not a run folder (it has no model/config.json); expected what was the "
            "--workdir of mass_dpo_jax.train"
        )
    config = run_config.load_config(workdir)
    if not 0 < max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb={max_shard_gb}: expected a finite number above 0")
    there = run_folder.list_steps(workdir)
    if not there:
        raise UserError(f"{workdir}: {run_folder.NO_CHECKPOINT}")
    step = there[-1] if step is None else step
    if step not in there:
        shown = ", ".join(map(str, there))
        raise UserError(f"--step={step}: {workdir} has checkpoints of steps {shown}")
    if dtype is not None:
        _check_dtype(dtype)
    _check_free(output)
    described = description_folder(workdir)
    if adapters:
        if dtype not in (None, "float32"):
            raise UserError(f"--dtype={dtype}: adapters are written in float32; leave it out")
        _save_adapters(config, workdir, step, output, base_model or config.model.path)
        return
    decoder = load_config(described)
    tokenizer = load_tokenizer(described)
    dtype = dtype or config.model.dtype
    read = checkpoint_reading.Reader(workdir, step)

    def card(folder: Path) -> None:
        read.check()
        text = model_card.write(workdir, config, decoder, step, dtype, base_model)
        (folder / "README.md").write_text(text)

    write_folder(
        output,
        decoder,
        _merging(read, workdir, base_path, decoder, tokenizer),
        tokenizer,
        _generation(described, decoder, tokenizer, config),
        dtype,
        max_shard_gb,
        card,
    )
    _log.info(f"step {step} of {workdir}, {dtype}, written to {output}")


def save_model(output: Path, policy: Policy, params: Any, config: ConfigDict, dtype: str) -> None:
    """Writes a policy with its weights to the new folder `output`; with LoRA its base with the
    adapters added.

    Raises:
      UserError: `output` is taken or cannot be written, or `dtype` is another than float32 and
        bfloat16.
    """
    _check_dtype(dtype)
    _check_free(output)
    if policy.lora is not None:
        params = merge_adapters(params, policy.lora)
    tokenizer = described_tokenizer(policy, config)
    described = description_folder(Path(config.model.path))

    def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        array = functools.reduce(lambda tree, name: tree[name], path, params)
        return np.asarray(array if layer is None else array[layer])

    generation = _generation(described, policy.config, tokenizer, config)
    write_folder(output, policy.config, read, tokenizer, generation, dtype)


def write_folder(
    output: Path,
    decoder: DecoderConfig,
    read: Callable[[tuple[str, ...], int | None], np.ndarray],
    tokenizer: Any,
    generation: dict[str, Any],
    dtype: str,
    max_shard_gb: float = 5.0,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a Hugging Face folder, whole or not at all.

    Args:
      output: does not exist yet, or is an empty folder.
      decoder: the architecture.
      read: an array, or one layer of a stacked one, by its path in the tree of parameters.
      tokenizer: with the chat template to use.
      generation: of generation_config.json.
      dtype: of the stored weights.
      max_shard_gb: of a file, in 10^9 bytes.
      finish: gets the folder before it appears under its name.
    """
    with _appearing(output) as temporary:
        save_hf(
            temporary,
            decoder,
            read,
            dtype=jnp.dtype(dtype),
            max_bytes=int(max_shard_gb * 1e9),
            progress=True,
        )
        _save_tokenizer(tokenizer, temporary)
        # Readers before transformers 5 know the type as torch_dtype.
        kind = {"dtype": dtype, "torch_dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
        _write(temporary / "config.json", decoder.to_hf() | kind)
        _write(temporary / GENERATION, generation)
        finish(temporary)
        for path in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / GENERATION, path)  # The library lets only the owner read.


@contextlib.contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `output` at the end, or is gone."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # Of an export that was killed.
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_dtype(dtype: str) -> None:
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"dtype={dtype!r}: expected {' or '.join(EXPORT_DTYPES)}")


def _check_free(output: Path) -> None:
    if output.name in ("", ".."):
        raise UserError(f"{output}: expected the name of a new folder to write")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty: choose another folder or remove it")


def _save_adapters(
    config: ConfigDict, workdir: Path, step: int, output: Path, base_model: str
) -> None:
    lora = read_lora(run_config.locate_files(config, workdir).model.lora)
    if lora is None:
        raise UserError(f"--adapters: {workdir} is a run without LoRA")
    read = checkpoint_reading.Reader(workdir, step)
    found = adapters_of(read, lora)
    read.check()
    with _appearing(output) as temporary:
        peft_format.save_peft(temporary, found, lora, base_model)
    _log.info(f"step {step} of {workdir}, adapters, written to {output}")


def _merging(
    read: checkpoint_reading.Reader,
    workdir: Path,
    base_path: str,
    decoder: DecoderConfig,
    tokenizer: Any,
) -> Callable[[tuple[str, ...], int | None], np.ndarray]:
    """As `read`; of a run with LoRA, its base with the adapters added."""
    config = run_config.locate_files(run_config.load_config(workdir), workdir)
    if not uses_lora(config.model.lora):
        return read
    base = base_path or config.model.path
    if not Path(base).exists():
        raise UserError(
            f"{workdir}: its base {base} is gone; where it has moved, say so by --base_path=FOLDER"
        )
    mesh = mesh_lib.make_mesh(config_lib.default().mesh, devices=jax.local_devices()[:1])
    lora = read_lora(config.model.lora)
    assert lora is not None
    graphdef = nnx.graphdef(abstract_decoder(decoder))
    policy = Policy(decoder, tokenizer, graphdef, mesh, lora, config.model.lora.base)
    params, digest = policy.read(base, 0)
    origin.check_weights(
        workdir, {"model.path": digest}, "name those of before by --base_path=PATH"
    )
    params["adapters"] = adapters_of(read, lora)
    merged = merge_adapters(params, lora)

    def read_merged(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        array = functools.reduce(lambda tree, name: tree[name], path, merged)
        return np.asarray(array if layer is None else array[layer])

    return read_merged


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # What transformers 5 writes of where it read from; its names for a class and a field that
    # readers before it know by others, which it knows too; and what those would hand to a decoder
    # besides.
    for name in ("is_local", "local_files_only", "backend"):
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    _write(path, settings)


def _generation(
    folder: Path, decoder: DecoderConfig, tokenizer: Any, config: ConfigDict
) -> dict[str, Any]:
    """The base model's settings of generation, which ends where a response of training did.

    What they name null stays so, but for the end.
    """
    path = folder / GENERATION
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object")

    def known(ids: Any) -> list[int]:
        """Those that name a token: generate() fails on others, and on null in a list."""
        ids = ids if isinstance(ids, list) else [ids]
        return [x for x in ids if type(x) is int and 0 <= x < decoder.vocab_size]

    for field, own in (
        ("bos_token_id", decoder.bos_token_id),
        ("pad_token_id", tokenizer.pad_token_id),
    ):
        settings[field] = next(iter(known(settings.get(field, own))), None)
    ends = known(settings.get("eos_token_id", list(decoder.eos_token_ids)))
    end = _end_of_response(tokenizer, config)
    settings["eos_token_id"] = ends if end in ends else [*ends, end]
    return settings


def _end_of_response(tokenizer: Any, config: ConfigDict) -> int:
    data = config.data.copy_and_resolve_references()
    if data.chat_template != "none":
        data.chat_template = "tokenizer"  # A template from a file is in the run's tokenizer.
    renderer = make_renderer(tokenizer, data)
    if renderer.end_id is not None:
        return renderer.end_id
    example = Example("", "question", "answer", ("other",), "chat template")
    prompt = renderer.render_prompt(example.prompt, example.place)
    text = renderer.render_responses(example, prompt)[0]
    return int(tokenizer(text, add_special_tokens=False).input_ids[-1])


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
