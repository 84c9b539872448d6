"""A policy: a decoder and its tokenizer, and how its weights get onto the devices."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.models.decoder import Decoder
from mass_dpo_jax.models.lora import Adapters, Lora, merge_adapters
from mass_dpo_jax.models.quantize import quantize
from mass_dpo_jax.models.weights import load_hf
from mass_dpo_jax.runs import origin, run_folder
from mass_dpo_jax.runs.run_folder import RunPath, find_run
from mass_dpo_jax.training import checkpoint_reading
from mass_dpo_jax.training.mesh import key_names, param_shapes
from mass_dpo_jax.training.model_paths import (
    find_description,
    load_model_settings,
    read_lora,
    uses_lora,
)
from mass_dpo_jax.utils import fingerprint


class Weights(NamedTuple):
    """Parameters on the devices, and a digest of what was read.

    Attributes:
        params: nested dicts; with LoRA, the frozen ones and `adapters`.
        digest: digest of the model as its files store it, without new adapters, in float32: the
            same for every type that frozen weights are kept in, and on every machine. Empty for
            random weights.
    """

    params: Any
    digest: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder without weights, which it reads onto the devices. Made by `open_policy`.

    Attributes:
        config: the architecture.
        tokenizer: its tokenizer.
        graphdef: the decoder's structure (`nnx.split`).
        mesh: the devices that weights are split over.
        lora: the form of its adapters; None: all weights are trained.
        base_dtype: type that the other weights are kept in with LoRA (models/quantize.py).
    """

    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    graphdef: nnx.GraphDef
    mesh: Mesh
    lora: Lora | None = None
    base_dtype: str = "float32"

    @functools.cached_property
    def abstract(self) -> Any:
        """Its parameters as shapes with shardings, nested dicts."""
        return param_shapes(self.config, self.mesh, self.lora, self.base_dtype)

    @property
    def shardings(self) -> Any:
        """The shardings of its parameters, nested dicts."""
        return _shardings(self.abstract)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Splits weights, or a tree like them, into those that are trained and the frozen ones."""
        if self.lora is None:
            return params, {}
        frozen = dict(params)
        return {"adapters": frozen.pop("adapters")}, frozen

    def weights(self, path: str, seed: int, adapters: str = "") -> Any:
        """Returns `read(...).params`."""
        return self.read(path, seed, adapters).params

    def read(self, path: str, seed: int, adapters: str = "") -> Weights:
        """Reads the model at `path`: float32 weights or, with LoRA, frozen weights and adapters.

        Args:
            path: a Hugging Face folder, or a run or checkpoint; a run with LoRA is its base with
                the adapters added. If it is empty, weights are random.
            seed: seed of random weights and adapters.
            adapters: a folder in PEFT's format, or a run with LoRA; if it is empty, adapters are
                new, and add nothing yet.

        Raises:
            UserError: its architecture differs from this policy's, or its files are not what they
                should be.
        """
        if path:
            self.check_like(load_config(find_description(Path(path))), path)
        abstract = param_shapes(self.config, self.mesh)
        run = find_run(Path(path)) if path else None
        if path and run is None:
            params, digest = self._read_folder(path, abstract)
        else:
            if run is not None:
                params, digest = self._read_run(run, abstract)
            else:
                params, digest = _make_random(Decoder, abstract, seed, self.config), ""
            if self.lora is not None:
                params = jax.tree.map_with_path(
                    lambda path, x: self._store(key_names(path), x), params
                )
        if self.lora is None:
            return Weights(params, digest)
        return Weights({**params, "adapters": self._read_adapters(adapters, seed)}, digest)

    def check_like(self, other: DecoderConfig, name: str) -> None:
        """Raises UserError, calling it `name`, if another model does not compute as this one."""
        ours, theirs = self.config.computed(), other.computed()
        differ = [field for field in ours if ours[field] != theirs[field]]
        if differ:
            raise UserError(
                f"{name}: its architecture differs from the policy's: {', '.join(differ)}"
            )

    def _store(self, path: tuple[str, ...], array: jax.Array) -> Any:
        """Converts a frozen weight, in place, to the type it is kept in."""
        if self.lora is None:
            return array
        sharding = functools.reduce(lambda tree, name: tree[name], path, self.shardings)
        convert = jax.jit(quantize, static_argnums=(0, 2), out_shardings=sharding, donate_argnums=1)
        return convert(path, array, self.base_dtype)

    def _read_folder(self, path: str, abstract: Any) -> Weights:
        """Reads a Hugging Face folder; with LoRA, stores each weight before it reads the next."""
        sums: dict[tuple[str, ...], tuple[tuple[int, ...], Any]] = {}

        def keep(path_in_tree: tuple[str, ...], array: jax.Array) -> Any:
            if self.lora is None:
                return array
            sums[path_in_tree] = array.shape, fingerprint.checksum_array(array)
            return self._store(path_in_tree, array)

        shardings = _shardings(abstract)
        # Its own configuration: tensors have other names in a multimodal model.
        config = load_config(find_description(Path(path)))
        state = load_hf(path, config, shardings=shardings, convert=keep, progress=True)
        params = nnx.to_pure_dict(state)
        if self.lora is None:
            return Weights(params, fingerprint.fingerprint(params))
        return Weights(params, fingerprint.combine_checksums(sums))

    def _read_run(self, run: RunPath, abstract: Any) -> Weights:
        """Reads a run or checkpoint; one with LoRA is its base with the adapters added."""
        model = load_model_settings(run.folder)
        if not uses_lora(model.lora):
            params = checkpoint_reading.load_params(run.folder, abstract, run.step)
            return Weights(params, fingerprint.fingerprint(params))
        lora = read_lora(model.lora)
        assert lora is not None
        # Not by --config.model.path, which names the run.
        if not Path(model.path).exists():
            raise UserError(
                f"{run.folder}: a run with LoRA whose base is gone; put it, or a link to it, at "
                f"{model.path}"
            )
        adapters = run.folder
        if run.step is not None:
            adapters = adapters / run_folder.CHECKPOINTS / str(run.step)
        policy = dataclasses.replace(self, lora=lora, base_dtype=model.lora.base)
        params, digest = policy.read(model.path, 0, str(adapters))
        advice = f"put those of before, or a link to them, at {model.path}"
        origin.check_weights(run.folder, {"model.path": digest}, advice)
        # A digest of the parts: merging rounds differently on different machines.
        digest = hashlib.sha256(
            f"{digest} {lora} {fingerprint.fingerprint(params['adapters'])}".encode()
        ).hexdigest()
        return Weights(merge_adapters(params, lora, _shardings(abstract)), digest)

    def _read_adapters(self, path: str, seed: int) -> Any:
        """Reads adapters from PEFT's format or from a run, or makes new ones."""
        abstract = self.abstract["adapters"]
        if not path:
            return _make_random(Adapters, abstract, seed, self.config, self.lora)
        if run := find_run(Path(path)):
            tree = {"adapters": abstract}
            return checkpoint_reading.load_params(run.folder, tree, run.step)["adapters"]
        return peft_format.load_peft(path, self.config, abstract)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _make_random(module_type: Any, abstract: Any, seed: int, *settings: Any) -> Any:
    """Makes random parameters of a decoder or of adapters, with `abstract`'s shardings."""
    leaves, tree = jax.tree.flatten(_shardings(abstract))
    return _initializer(module_type, settings, tree, tuple(leaves))(jax.random.key(seed))


@functools.cache
def _initializer(
    module_type: Any, settings: tuple[Any, ...], tree: Any, leaves: tuple[Any, ...]
) -> Callable[[jax.Array], Any]:
    """Returns a function from a key to random weights.

    They are made in place, shard by shard: no device ever holds all of them.
    """

    def init(key: jax.Array) -> Any:
        module = module_type(*settings, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    return jax.jit(init, out_shardings=jax.tree.unflatten(tree, leaves))
