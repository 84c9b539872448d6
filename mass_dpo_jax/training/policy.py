"""A policy: decoder, weights and tokenizer, from a Hugging Face folder, a run, or from scratch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import DecoderConfig, load_config, parse_targets
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder
from mass_dpo_jax.models.folder import GENERATION, check_folder
from mass_dpo_jax.models.lora import Adapters, Lora, merge_adapters
from mass_dpo_jax.models.quantize import quantize
from mass_dpo_jax.models.weights import check_hf, load_hf
from mass_dpo_jax.runs import origin, run_config, run_folder
from mass_dpo_jax.training import checkpoint_reading
from mass_dpo_jax.training.mesh import hidden_splits, key_names, param_shapes
from mass_dpo_jax.utils import distributed, fingerprint

TOKENIZER_EXAMPLES = 20_000  # A vocabulary does not change with more.


def is_run(path: Path) -> bool:
    """Is this the folder of one of our runs (rather than a Hugging Face folder)?"""
    return (path / origin.MODEL / "config.json").is_file()


def run_of(path: Path) -> tuple[Path, int | None] | None:
    """The run folder that a path names and, if it names one of its checkpoints, that one's step.

    None: it is no run (but a Hugging Face folder).
    """
    if is_run(path):
        return path, None
    if path.parent.name == run_folder.CHECKPOINTS and path.name.isdecimal():
        found = run_of(path.parent.parent)
        return found and (found[0], int(path.name))
    return None


def _check_step(folder: Path, step: int | None) -> None:
    """Raises UserError where a run has no checkpoint of that step, and says which it has."""
    there = run_folder.list_steps(folder)
    if step is not None and step not in there:
        shown = ", ".join(map(str, there)) or "none"
        raise UserError(f"{folder}: no checkpoint of step {step}; found {shown}")


def description_folder(path: Path, setting: str = "model.path") -> Path:
    """Where config.json and tokenizer lie, for a run, its checkpoint or a Hugging Face folder.

    Args:
      setting: what names it, for messages.
    """
    run = run_of(path)
    if run is not None:
        _check_step(*run)
        origin.check_files(run[0])
        path = run[0] / origin.MODEL
    check_folder(path, setting)
    return path


def check_model(path: Path, weights: bool = True, setting: str = "model.path") -> Path:
    """Returns `description_folder(path, setting)`.

    Args:
      weights: look at the headers of the weights' files too; a dry run needs none.

    Raises:
      UserError: what lies there is no model, or its weights are not those of its config.json.
    """
    folder = description_folder(path, setting)
    architecture = load_config(folder)
    if weights and run_of(path) is None:
        check_hf(folder, architecture)
    return folder


class Weights(NamedTuple):
    """Parameters on the devices, and a digest of what was read.

    params: nested dicts; with LoRA, the frozen ones and `adapters`.
    digest: of the model without new adapters as its files have it, in float32: the same whatever
      type frozen weights are kept in, and on every machine. Empty where they were drawn at random.
    """

    params: Any
    digest: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder without weights, and how to get them onto the devices.

    Attributes:
      config: the architecture.
      tokenizer: its tokenizer.
      graphdef: the decoder's structure (`nnx.split`).
      mesh: the devices that weights are split over.
      lora: how it is adapted; None: all weights are trained.
      stored: with LoRA, the type that the other weights are kept in (models/quantize.py).
    """

    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    graphdef: nnx.GraphDef
    mesh: Mesh
    lora: Lora | None = None
    stored: str = "float32"

    @functools.cached_property
    def abstract(self) -> Any:
        """Its parameters as shapes with shardings, nested dicts."""
        return param_shapes(self.config, self.mesh, self.lora, self.stored)

    @property
    def shardings(self) -> Any:
        return _places(self.abstract)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Weights, or what stands in their places, as those that are trained and the others."""
        if self.lora is None:
            return params, {}
        frozen = dict(params)
        return {"adapters": frozen.pop("adapters")}, frozen

    def weights(self, path: str, seed: int, adapters: str = "") -> Any:
        """Returns `read(...).params`."""
        return self.read(path, seed, adapters).params

    def read(self, path: str, seed: int, adapters: str = "") -> Weights:
        """Reads the model at `path`: float32 weights or, with LoRA, frozen ones and adapters.

        Args:
          path: a Hugging Face folder or a run's; if it is empty, weights are random. A run with
            LoRA is its base with the adapters added.
          seed: of all that is drawn.
          adapters: a folder in PEFT's format, or a run with LoRA; if it is empty, new adapters,
            which add nothing yet.
        """
        if path:
            self.check_like(load_config(description_folder(Path(path))), path)
        whole = param_shapes(self.config, self.mesh)
        if path and not run_of(Path(path)):
            params, digest = self._of_folder(path, whole)
        else:
            if run := run_of(Path(path)):
                params, digest = self._of_run(*run, whole)
            else:
                params, digest = _new(Decoder, whole, seed, self.config), ""
            if self.lora is not None:
                params = jax.tree.map_with_path(
                    lambda path, x: self._store(key_names(path), x), params
                )
        if self.lora is None:
            return Weights(params, digest)
        return Weights({**params, "adapters": self._adapters(adapters, seed)}, digest)

    def check_like(self, other: DecoderConfig, name: str) -> None:
        """Raises UserError if another model, of that name, does not compute as this one does."""
        ours, theirs = self.config.computed(), other.computed()
        differ = [name for name in ours if ours[name] != theirs[name]]
        if differ:
            shown = ", ".join(differ)
            raise UserError(f"{name}: its architecture differs from the policy's: {shown}")

    def _store(self, path: tuple[str, ...], array: jax.Array) -> Any:
        if self.lora is None:
            return array
        place = functools.reduce(lambda tree, name: tree[name], path, self.shardings)
        keep = jax.jit(quantize, static_argnums=(0, 2), out_shardings=place, donate_argnums=1)
        return keep(path, array, self.stored)

    def _of_folder(self, path: str, whole: Any) -> Weights:
        """Those of a Hugging Face folder. With LoRA, each is stored before the next is read."""
        sums: dict[tuple[str, ...], tuple[tuple[int, ...], Any]] = {}

        def keep(at: tuple[str, ...], array: jax.Array) -> Any:
            if self.lora is None:
                return array
            sums[at] = array.shape, fingerprint.checksum_array(array)
            return self._store(at, array)

        state = load_hf(path, self.config, shardings=_places(whole), convert=keep, progress=True)
        params = nnx.to_pure_dict(state)
        if self.lora is None:
            return Weights(params, fingerprint.fingerprint(params))
        return Weights(params, fingerprint.combine_checksums(sums))

    def _of_run(self, folder: Path, step: int | None, whole: Any) -> Weights:
        model = run_config.locate_files(run_config.load_config(folder), folder).model
        if not uses_lora(model.lora):
            params = checkpoint_reading.load_params(folder, whole, step)
            return Weights(params, fingerprint.fingerprint(params))
        lora = read_lora(model.lora)
        assert lora is not None
        run = dataclasses.replace(self, lora=lora, stored=model.lora.base)
        adapters = folder if step is None else folder / run_folder.CHECKPOINTS / str(step)
        # Not by --config.model.path, which names the run.
        if not Path(model.path).exists():
            raise UserError(
                f"{folder}: a run with LoRA whose base is gone; put it, or a link to it, at "
                f"{model.path}"
            )
        params, digest = run.read(model.path, 0, str(adapters))
        advice = f"put those of before, or a link to them, at {model.path}"
        origin.check_weights(folder, {"model.path": digest}, advice)
        # Of its parts: what merging makes of them is rounded, otherwise on another machine.
        digest = hashlib.sha256(
            f"{digest} {lora} {fingerprint.fingerprint(params['adapters'])}".encode()
        ).hexdigest()
        return Weights(merge_adapters(params, lora, _places(whole)), digest)

    def _adapters(self, path: str, seed: int) -> Any:
        like = self.abstract["adapters"]
        if not path:
            return _new(Adapters, like, seed, self.config, self.lora)
        if run := run_of(Path(path)):
            return checkpoint_reading.load_params(run[0], {"adapters": like}, run[1])["adapters"]
        return peft_format.load_peft(path, self.config, like)


def uses_lora(settings: ConfigDict) -> bool:
    """Does `config.model.lora` ask for adapters?"""
    return bool(settings.rank or settings.path)


def read_lora(settings: ConfigDict) -> Lora | None:
    """What `config.model.lora` says, or the adapters that it starts from; None: no LoRA.

    Raises:
      UserError: there are no adapters in that folder.
    """
    if not uses_lora(settings):
        return None
    if not settings.path:
        return Lora(settings.rank, settings.alpha, parse_targets(settings.targets))
    folder = Path(settings.path)
    run = run_of(folder)
    if run is None:
        return peft_format.load_peft_settings(folder)
    _check_step(*run)
    found = read_lora(run_config.locate_files(run_config.load_config(run[0]), run[0]).model.lora)
    if found is None:
        raise UserError(f"config.model.lora.path={folder}: a run without LoRA")
    return found


def _places(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _new(kind: Any, abstract: Any, seed: int, *settings: Any) -> Any:
    """Random parameters of a decoder or of adapters, like `abstract`, made by `seed`."""
    leaves, tree = jax.tree.flatten(_places(abstract))
    return _initializer(kind, settings, tree, tuple(leaves))(jax.random.key(seed))


@functools.cache
def _initializer(
    kind: Any, settings: tuple[Any, ...], tree: Any, leaves: tuple[Any, ...]
) -> Callable[[jax.Array], Any]:
    """From a key to random weights, made in place, shard by shard: nothing ever holds the whole."""

    def init(key: jax.Array) -> Any:
        module = kind(*settings, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    return jax.jit(init, out_shardings=jax.tree.unflatten(tree, leaves))


def open_policy(
    config: ConfigDict, mesh: Mesh, workdir: Path | None, examples: Sequence[Example]
) -> Policy:
    """The policy of `config.model`, still without weights.

    Args:
      workdir: a run; once it has saved something, its own description counts, whatever has become
        of `model.path`.
      examples: with `model.path` empty, the architecture is `model.scratch`'s and the tokenizer is
        trained on these and kept in `workdir`.
    """
    if workdir is not None and run_folder.latest_step(workdir) is not None:
        folder = description_folder(workdir)
        architecture, tokenizer = load_config(folder), load_tokenizer(folder)
    elif config.model.path:
        folder = check_model(Path(config.model.path), weights=not config.dry_run)
        _check_added_once(config)
        architecture, tokenizer = load_config(folder), load_tokenizer(folder)
    elif workdir is None:
        raise UserError("config.model.path is empty: expected a model folder or a run folder")
    else:
        folder = workdir / origin.MODEL
        # What there is may be of a run with other settings that saved nothing, which this one takes
        # over. The first process opens its policy before the others.
        if distributed.is_primary():
            train_tokenizer(_texts(examples), config.model.scratch.vocab_size, folder)
        tokenizer = load_tokenizer(folder)
        architecture = _scratch(config, tokenizer)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if vocabulary > architecture.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {vocabulary - 1}, the model's vocabulary "
            f"has {architecture.vocab_size} entries"
        )
    lora = read_lora(config.model.lora)
    model = abstract_decoder(
        architecture,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        hidden_shardings=hidden_splits(mesh, architecture.hidden_size),
        lora=lora,
    )
    graphdef, _ = nnx.split(model, nnx.Param)
    policy = Policy(architecture, tokenizer, graphdef, mesh, lora, config.model.lora.base)
    adapters = config.model.lora.path
    if adapters and run_of(Path(adapters)) is None:
        peft_format.check_peft(adapters, architecture, policy.abstract["adapters"])
    return policy


def _check_added_once(config: ConfigDict) -> None:
    """Raises UserError where the model of a run has the adapters that are to be added already."""
    path, adapters = config.model.path, config.model.lora.path
    run = run_of(Path(path))
    if not adapters or run is None:
        return
    began = run_config.locate_files(run_config.load_config(run[0]), run[0]).model.lora
    if not uses_lora(began):
        return
    other = run_of(Path(adapters))
    itself = other is not None and origin.is_same(other[0], run[0])
    first = bool(began.path) and origin.is_same(Path(adapters), Path(began.path))
    if itself or first or run_config.is_own_file(config, run[0], "model.lora.path"):
        raise UserError(
            f"config.model.lora.path={adapters}: the model at config.model.path={path} has these "
            "adapters in its weights already; leave them out, --config.model.lora.path= (and "
            "--config.model.lora.rank=16, say, to train new ones), or go on with them on their "
            f"base, --config.model.path=BASE --config.model.lora.path={run[0]}"
        )


def described_tokenizer(policy: Policy, config: ConfigDict) -> PreTrainedTokenizerBase:
    """A policy's tokenizer with the chat template that texts are rendered by."""
    if config.data.chat_template in ("tokenizer", "none"):
        return policy.tokenizer
    tokenizer = copy.copy(policy.tokenizer)
    tokenizer.chat_template = Path(config.data.chat_template).read_text(encoding="utf-8")
    return tokenizer


def save_description(policy: Policy, config: ConfigDict, workdir: Path) -> None:
    """Writes what a run needs of its start: config.json, the tokenizer with the chat template of
    training, what the model's folder says of generation, and the adapters it begins from."""
    if not distributed.is_primary():
        return
    folder = workdir / origin.MODEL
    folder.mkdir(parents=True, exist_ok=True)
    described_tokenizer(policy, config).save_pretrained(folder)
    text = json.dumps(policy.config.to_hf(), indent=2) + "\n"
    (folder / "config.json").write_text(text)
    if config.model.path:
        generation = description_folder(Path(config.model.path)) / GENERATION
        if generation.is_file():
            (folder / GENERATION).write_bytes(generation.read_bytes())
    adapters, own = config.model.lora.path, workdir / origin.ADAPTERS
    if adapters and origin.is_same(Path(adapters), own):
        return  # It was stopped before its first checkpoint, and is begun again by its own files.
    shutil.rmtree(own, ignore_errors=True)
    if adapters:
        _copy_adapters(config, Path(adapters), own)


def _copy_adapters(config: ConfigDict, path: Path, folder: Path) -> None:
    """Writes the adapters at `path`, PEFT's folder or a run, to `folder` in PEFT's format."""
    folder.mkdir()
    if run := run_of(path):
        lora = read_lora(config.model.lora)
        step = run_folder.latest_step(run[0]) if run[1] is None else run[1]
        assert lora is not None and step is not None
        reader = checkpoint_reading.Reader(run[0], step)
        peft_format.save_peft(folder, adapters_of(reader, lora), lora, config.model.path)
        reader.check()
        return
    for name in (peft_format.SETTINGS, peft_format.WEIGHTS):
        shutil.copyfile(path / name, folder / name)


def adapters_of(read: checkpoint_reading.Reader, lora: Lora) -> Any:
    """A and B of each product, from a checkpoint's reader."""
    return {
        name: {part: read(("adapters", name, part), None) for part in ("a", "b")}
        for name in lora.targets
    }


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
