"""Hugging Face weights: one table of names, `safetensors` streamed into sharded arrays and out."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import PROJECTIONS, DecoderConfig
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.folder import CUT, INDEX, damage, no_weights
from mass_dpo_jax.models.folder import WEIGHTS as SINGLE
from mass_dpo_jax.models.tensors import (
    check_finite,
    check_type,
    instead,
    open_tensors,
    write_tensors,
)
from mass_dpo_jax.utils.files import read_json

SHARD = "model-{:05}-of-{:05}.safetensors"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors it is made of."""

    path: tuple[str, ...]  # in nnx.state(model, nnx.Param)
    name: str  # with "{layer}" where the parameter stacks one tensor a layer
    transposed: bool = False  # Hugging Face keeps [out, in], we keep [in, out]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def names(self, config: DecoderConfig) -> list[str]:
        """The tensors' names, in layer order."""
        layers = range(config.num_layers) if self.stacked else range(1)
        return [self.name.format(layer=layer) for layer in layers]


def table(config: DecoderConfig) -> list[Entry]:
    """Every parameter of the decoder, once: the names that import and export share."""
    layer = "model.layers.{layer}."
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.qk_norm:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    entries = [Entry(("embed",), EMBED)]
    for ours, theirs in norms.items():
        entries.append(Entry(("blocks", ours, "scale"), f"{layer}{theirs}.weight"))
    for ours, theirs in PROJECTIONS.items():
        entries.append(Entry(("blocks", ours, "kernel"), f"{layer}{theirs}.weight", True))
    entries.append(Entry(("norm", "scale"), "model.norm.weight"))
    if not config.tie_embeddings:
        entries.append(Entry(("head",), HEAD))
    return entries


def check_hf(folder: str | Path, config: DecoderConfig) -> _Files:
    """The open files of a folder; UserError where `load_hf` would, but for NaN: reads headers."""
    files = _Files(Path(folder))
    shapes = _by_path(nnx.state(abstract_decoder(config), nnx.Param))
    files.check({entry: shapes[entry.path].shape for entry in table(config)}, config)
    return files


def load_hf(
    folder: str | Path,
    config: DecoderConfig,
    shardings: Any = None,
    *,
    dtype: DTypeLike = jnp.float32,
    convert: Callable[[tuple[str, ...], jax.Array], Any] = lambda path, array: array,
    progress: bool = False,
) -> nnx.State:
    """Reads the weights of a Hugging Face folder.

    Tensors are read one at a time, and of each only the slices that this process's devices hold.

    Args:
      folder: holds `model.safetensors`, or several files and `model.safetensors.index.json`.
      config: what the folder's `config.json` says.
      shardings: a `jax.sharding.Sharding` for each parameter, under the keys of
        `nnx.state(model, nnx.Param)`, as a State or as nested dicts; None puts everything on the
        first device.
      dtype: of the arrays, whatever the files' own.
      convert: from a parameter's path and array to what is kept of it, before the next is read.
      progress: draw a progress bar if standard error is a terminal.

    Returns:
      The parameters: `nnx.update(model, state)` or `nnx.merge(graphdef, state)`.

    Raises:
      UserError: names the file and the tensor that is missing, unknown, of a wrong shape or type,
        or that holds NaN or infinity.
    """
    files = check_hf(folder, config)
    entries = {entry.path: entry for entry in table(config)}
    shapes = nnx.state(abstract_decoder(config), nnx.Param)
    wanted = {path: leaf.shape for path, leaf in _by_path(shapes).items()}
    if shardings is None:
        places = dict.fromkeys(wanted, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    else:
        places = _by_path(shardings)

    arrays = []
    count = sum(len(entry.names(config)) for entry in entries.values())
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=count, desc="weights", unit="tensor", disable=hidden) as bar:
        for path, shape in wanted.items():
            entry = entries[path]
            array = _read(files, entry, config, shape, places[path], np.dtype(dtype))
            arrays.append(convert(path, array))
            bar.update(len(entry.names(config)))
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def save_hf(
    folder: Path,
    config: DecoderConfig,
    read: Callable[[tuple[str, ...], int | None], np.ndarray],
    *,
    dtype: DTypeLike,
    max_bytes: int,
    progress: bool = False,
) -> None:
    """Writes weights as `load_hf` and transformers read them: one file or, over `max_bytes`,
    several with an index.

    Tensors are asked for one at a time, and no more than one file's are held.

    Args:
      folder: exists.
      config: the decoder's.
      read: gives the parameter at a path of `nnx.state(model, nnx.Param)`; of one that stacks
        layers, that layer's part.
      dtype: of the files' tensors.
      max_bytes: a file's, unless a single tensor is larger.
      progress: draw a progress bar if standard error is a terminal.

    Raises:
      UserError: a file of tensors cannot be written.
    """
    dtype = np.dtype(dtype)
    files: list[dict[str, tuple[Entry, int | None]]] = [{}]
    size = total = parameters = 0
    for name, entry, layer, count in _in_order(config):
        if files[-1] and size + count * dtype.itemsize > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = entry, layer
        size += count * dtype.itemsize
        total += count * dtype.itemsize
        parameters += count

    weight_map = {}
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=hidden) as bar:
        for number, tensors in enumerate(files, start=1):
            file = SINGLE if len(files) == 1 else SHARD.format(number, len(files))
            arrays = {}
            for name, (entry, layer) in tensors.items():
                array = read(entry.path, layer)
                array = array.T if entry.transposed else array
                arrays[name] = np.ascontiguousarray(array.astype(dtype))
                bar.update(arrays[name].nbytes)
                weight_map[name] = file
            write_tensors(arrays, folder / file)
    if len(files) > 1:
        sizes = {"total_parameters": parameters, "total_size": total}
        index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _in_order(config: DecoderConfig) -> Iterator[tuple[str, Entry, int | None, int]]:
    """Every tensor in the order of the model: name, entry, layer (None: of none), elements."""
    shapes = _by_path(nnx.state(abstract_decoder(config), nnx.Param))
    entries = table(config)
    stacked = [entry for entry in entries if entry.stacked]
    embed, *rest = [entry for entry in entries if not entry.stacked]
    yield embed.name, embed, None, math.prod(shapes[embed.path].shape)
    for layer in range(config.num_layers):
        for entry in stacked:
            count = math.prod(shapes[entry.path].shape[1:])
            yield entry.name.format(layer=layer), entry, layer, count
    for entry in rest:
        yield entry.name, entry, None, math.prod(shapes[entry.path].shape)


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of a State or of nested dicts under their tuples of keys, in tree order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {tuple(str(key.key) for key in path if hasattr(key, "key")): x for path, x in leaves}


def _read(
    files: _Files,
    entry: Entry,
    config: DecoderConfig,
    shape: tuple[int, ...],
    place: jax.sharding.Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """One parameter as a sharded array: every shard reads its own slices of its own layers."""
    names = entry.names(config)
    shards: dict[str, np.ndarray] = {}  # replicas of a shard are read once

    def shard(index: Any) -> np.ndarray:  # a slice for each dimension
        key = str(index)
        if key not in shards:
            layers = names[index[0]] if entry.stacked else names
            inner = index[1:] if entry.stacked else index
            lengths = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            found = np.empty(lengths, dtype)
            for name, part in zip(layers, found if entry.stacked else [found], strict=True):
                with np.errstate(over="ignore"):  # What is too large for `dtype` is infinite.
                    part[...] = files.read(name, inner, entry.transposed)
                check_finite(part, files.paths[name], name)
            shards[key] = found
        return shards[key]

    return jax.make_array_from_callback(shape, place, shard, dtype=dtype)


class _Files:
    """The open safetensors files of one folder, and which tensor is in which."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a Hugging Face model")
        index = folder / INDEX
        if (folder / SINGLE).is_file():
            self.listing = folder / SINGLE  # what error messages about the whole point at
            weight_map = None
            names = [SINGLE]
        elif index.is_file():
            self.listing = index
            weight_map = _weight_map(index)
            names = sorted(set(weight_map.values()))
        else:
            raise UserError(f"{folder}: {no_weights(folder)}")
        present = {path.name for path in folder.iterdir() if path.is_file()}
        if missing := [name for name in names if name not in present]:
            raise UserError(
                f"{self.listing}: names {missing[0]}, which is not in the folder ({len(missing)} "
                f"of {len(names)} files are missing); {CUT}"
            )
        self.paths: dict[str, Path] = {}
        self.open: dict[Path, Any] = {}
        for name in names:
            path = folder / name
            self.open[path] = open_tensors(path)
            self.paths |= dict.fromkeys(self.open[path].keys(), path)
        for tensor, name in (weight_map or {}).items():
            if self.paths.get(tensor) != folder / name:
                raise UserError(f"{folder / name}: missing tensor {tensor}, which {INDEX} lists")

    def check(self, wanted: Mapping[Entry, tuple[int, ...]], config: DecoderConfig) -> None:
        """UserError unless the files hold the wanted tensors, with their shapes, and no others.

        `wanted` gives the shapes of our (stacked, transposed) parameters.
        """
        unknown = set(self.paths)
        for entry, shape in wanted.items():
            inner = shape[1:] if entry.stacked else shape
            expected = list(reversed(inner) if entry.transposed else inner)
            for name in entry.names(config):
                if name not in self.paths:
                    hint = instead(name, sorted(self.paths))
                    raise UserError(
                        f"{self.listing}: missing tensor {name}, shape {expected}{hint}"
                    )
                tensor = self.open[self.paths[name]].get_slice(name)
                if (found := list(tensor.get_shape())) != expected:
                    place = f"{self.paths[name]}: tensor {name}"
                    raise UserError(f"{place}: found shape {found}, expected {expected}")
                check_type(self.open[self.paths[name]], self.paths[name], name)
                unknown.discard(name)
        # Some writers store these although the config already determines them.
        for name in sorted(unknown):
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == HEAD and config.tie_embeddings:
                self._check_tied(config)
                continue
            raise UserError(f"{self.paths[name]}: unexpected tensor {name} for this config.json")

    def _check_tied(self, config: DecoderConfig) -> None:
        """UserError if the head of a file is not the embeddings that `config` says it is."""
        rows = np.array_split(np.arange(config.vocab_size), -(-config.vocab_size // 4096))
        head, embed = (self.open[self.paths[n]].get_slice(n) for n in (HEAD, EMBED))
        same = head.get_shape() == embed.get_shape() and all(
            np.array_equal(*(x[r[0] : r[-1] + 1].astype(np.float32) for x in (head, embed)))
            for r in rows
        )
        if not same:
            raise UserError(
                f"{self.paths[HEAD]}: {HEAD} differs from {EMBED}, but config.json has "
                "tie_word_embeddings true (or leaves it out), where transformers before version 5 "
                f"ignores {HEAD} and later ones use it; to train the model with it, set "
                '"tie_word_embeddings": false in config.json'
            )

    def read(self, name: str, index: tuple[slice, ...], transposed: bool) -> np.ndarray:
        """A slice of a tensor; with `transposed`, `index` and result are those of its transpose."""
        tensor = self.open[self.paths[name]].get_slice(name)
        part = tensor[tuple(reversed(index)) if transposed else index]
        return part.T if transposed else part


def _weight_map(index: Path) -> dict[str, str]:
    if what := damage(index):
        raise UserError(f"{index}: {what}")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: expected a JSON object with a 'weight_map' object")
    for name in weight_map.values():
        # The index comes with the download: it must not make us open files elsewhere.
        if not isinstance(name, str) or Path(name).name != name or name == ".." or "\\" in name:
            raise UserError(f"{index}: weight_map: found {name!r}, expected a plain file name")
    return weight_map
