"""Weights in Hugging Face folders: a table of names, read into sharded arrays and written."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.families import PROJECTIONS
from mass_dpo_jax.models.folder import INDEX
from mass_dpo_jax.models.folder import WEIGHTS as SINGLE
from mass_dpo_jax.models.tensors import check_finite, write_tensors
from mass_dpo_jax.models.weight_files import EMBED, HEAD, WeightFiles

SHARD = "model-{:05}-of-{:05}.safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors it is made of.

    Attributes:
        path: the parameter's path in `nnx.state(model, nnx.Param)`.
        name: the tensor's name, with "{layer}" where the parameter stacks one tensor per layer.
        transposed: whether Hugging Face keeps [out, in] where we keep [in, out].
    """

    path: tuple[str, ...]
    name: str
    transposed: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter stacks one tensor per layer."""
        return "{layer}" in self.name

    def list_names(self, config: DecoderConfig) -> list[str]:
        """Lists the tensors' names, in layer order."""
        layers = range(config.num_layers) if self.is_stacked else range(1)
        return [self.name.format(layer=layer) for layer in layers]


def list_entries(config: DecoderConfig) -> list[Entry]:
    """Lists every parameter of the decoder once, for import and export."""
    layer = "model.layers.{layer}."
    entries = [Entry(("embed",), EMBED)]
    for ours, theirs in config.family.norms.items():
        entries.append(Entry(("blocks", ours, "scale"), f"{layer}{theirs}.weight"))
    for ours, theirs in PROJECTIONS.items():
        entries.append(Entry(("blocks", ours, "kernel"), f"{layer}{theirs}.weight", True))
        if ours in config.family.biases:
            entries.append(Entry(("blocks", ours, "bias"), f"{layer}{theirs}.bias"))
    entries.append(Entry(("norm", "scale"), "model.norm.weight"))
    if not config.tie_embeddings:
        entries.append(Entry(("head",), HEAD))
    return entries


def check_hf(folder: str | Path, config: DecoderConfig) -> WeightFiles:
    """Opens a folder's files; raises UserError where `load_hf` would, but for NaN."""
    files = WeightFiles(Path(folder), config)
    shapes = _flatten(nnx.state(abstract_decoder(config), nnx.Param))
    expected: dict[str, tuple[int, ...]] = {}
    for entry in list_entries(config):
        shape = shapes[entry.path].shape
        shape = shape[1:] if entry.is_stacked else shape
        shape = shape[::-1] if entry.transposed else shape
        expected |= dict.fromkeys(entry.list_names(config), shape)
    files.check(expected)
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
        folder: a folder with `model.safetensors`, or with several files and
            `model.safetensors.index.json`.
        config: the configuration in the folder's `config.json`.
        shardings: a `jax.sharding.Sharding` for each parameter, under the keys of
            `nnx.state(model, nnx.Param)`, as a State or as nested dicts; None puts everything on
            the first device.
        dtype: type of the arrays, whatever the files' own.
        convert: a function from a parameter's path and array to what is kept of it, called before
            the next is read.
        progress: whether to draw a progress bar if standard error is a terminal.

    Returns:
        The parameters: `nnx.update(model, state)` or `nnx.merge(graphdef, state)`.

    Raises:
        UserError: a tensor is missing, unknown, of a wrong shape or type, or holds NaN or infinity.
    """
    files = check_hf(folder, config)
    entries = {entry.path: entry for entry in list_entries(config)}
    shapes = nnx.state(abstract_decoder(config), nnx.Param)
    sizes = {path: leaf.shape for path, leaf in _flatten(shapes).items()}
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        by_path = dict.fromkeys(sizes, first)
    else:
        by_path = _flatten(shardings)

    arrays = []
    count = sum(len(entry.list_names(config)) for entry in entries.values())
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=count, desc="weights", unit="tensor", disable=hidden) as bar:
        for path, shape in sizes.items():
            entry = entries[path]
            array = _read(files, entry, config, shape, by_path[path], np.dtype(dtype))
            arrays.append(convert(path, array))
            bar.update(len(entry.list_names(config)))
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
    """Writes weights in one file or, over `max_bytes`, in several with an index.

    Tensors are read one at a time, and no more than one file's are held.

    Args:
        folder: an existing folder.
        config: the decoder's configuration.
        read: a function that returns the parameter at a path of `nnx.state(model, nnx.Param)`; for
            one that stacks layers, that layer's part.
        dtype: type of the files' tensors.
        max_bytes: maximum size of a file, unless a single tensor is larger.
        progress: whether to draw a progress bar if standard error is a terminal.

    Raises:
        UserError: a file of tensors cannot be written.
    """
    dtype = np.dtype(dtype)
    files: list[dict[str, tuple[Entry, int | None]]] = [{}]
    size = total = parameters = 0
    for name, entry, layer, count in _list_tensors(config):
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


def _list_tensors(config: DecoderConfig) -> Iterator[tuple[str, Entry, int | None, int]]:
    """Yields every tensor in the order of the model: name, entry, layer or None, elements."""
    shapes = _flatten(nnx.state(abstract_decoder(config), nnx.Param))
    entries = list_entries(config)
    stacked = [entry for entry in entries if entry.is_stacked]
    embed, *rest = [entry for entry in entries if not entry.is_stacked]
    yield embed.name, embed, None, math.prod(shapes[embed.path].shape)
    for layer in range(config.num_layers):
        for entry in stacked:
            count = math.prod(shapes[entry.path].shape[1:])
            yield entry.name.format(layer=layer), entry, layer, count
    for entry in rest:
        yield entry.name, entry, None, math.prod(shapes[entry.path].shape)


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """Maps keys to the leaves of a State or of nested dicts, in tree order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {tuple(str(key.key) for key in path if hasattr(key, "key")): x for path, x in leaves}


def _read(
    files: WeightFiles,
    entry: Entry,
    config: DecoderConfig,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """Reads a parameter as a sharded array: each shard its own slices of its own layers."""
    names = entry.list_names(config)
    shards: dict[str, np.ndarray] = {}  # Replicas of a shard are read once.

    def read_shard(index: Any) -> np.ndarray:  # A slice for each dimension.
        key = str(index)
        if key not in shards:
            layers = names[index[0]] if entry.is_stacked else names
            layer_index = index[1:] if entry.is_stacked else index
            lengths = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            array = np.empty(lengths, dtype)
            for name, part in zip(layers, array if entry.is_stacked else [array], strict=True):
                with np.errstate(over="ignore"):  # What is too large for `dtype` is infinite.
                    part[...] = files.read(name, layer_index, entry.transposed)
                check_finite(part, *files.find(name))
            shards[key] = array
        return shards[key]

    return jax.make_array_from_callback(shape, sharding, read_shard, dtype=dtype)
