"""Weights in Hugging Face folders: a table of names, read into sharded arrays and written."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import abstract_decoder
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
        first_row: the row where the parameter begins in a tensor that holds several.
    """

    path: tuple[str, ...]
    name: str
    transposed: bool = False
    first_row: int = 0

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
    rows: collections.Counter[str] = collections.Counter()
    for ours, theirs in config.family.projections.items():
        name = f"{layer}{theirs}.weight"
        entries.append(Entry(("blocks", ours, "kernel"), name, True, rows[name]))
        (_, outputs), _ = config.projections[ours]
        rows[name] += outputs
        if ours in config.family.biases:
            entries.append(Entry(("blocks", ours, "bias"), f"{layer}{theirs}.bias"))
    entries.append(Entry(("norm", "scale"), "model.norm.weight"))
    if not config.tie_embeddings:
        entries.append(Entry(("head",), HEAD))
    return entries


def check_hf(folder: str | Path, config: DecoderConfig) -> WeightFiles:
    """Opens a folder's files; raises UserError where `load_hf` would, but for NaN."""
    files = WeightFiles(Path(folder), config)
    files.check({tensor.name: tensor.shape for tensor in _list_tensors(config)})
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
    files: list[list[_Tensor]] = [[]]
    size = total = parameters = 0
    for tensor in _list_tensors(config):
        count = math.prod(tensor.shape)
        if files[-1] and size + count * dtype.itemsize > max_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += count * dtype.itemsize
        total += count * dtype.itemsize
        parameters += count

    weight_map = {}
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=hidden) as bar:
        for number, tensors in enumerate(files, start=1):
            file = SINGLE if len(files) == 1 else SHARD.format(number, len(files))
            arrays = {}
            for tensor in tensors:
                parts = [
                    part.T if entry.transposed else part
                    for entry in tensor.entries
                    for part in [read(entry.path, tensor.layer).astype(dtype)]
                ]
                array = parts[0] if len(parts) == 1 else np.concatenate(parts)
                arrays[tensor.name] = np.ascontiguousarray(array)
                bar.update(arrays[tensor.name].nbytes)
                weight_map[tensor.name] = file
            write_tensors(arrays, folder / file)
    if len(files) > 1:
        sizes = {"total_parameters": parameters, "total_size": total}
        index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class _Tensor(NamedTuple):
    """A tensor of a folder: its name, shape and layer, and the parameters in it, in order."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    entries: list[Entry]


def _list_tensors(config: DecoderConfig) -> list[_Tensor]:
    """Lists every tensor in the order of the model."""
    shapes = _flatten(nnx.state(abstract_decoder(config), nnx.Param))
    groups: dict[str, list[Entry]] = {}
    for entry in list_entries(config):
        groups.setdefault(entry.name, []).append(entry)

    def make_tensor(entries: list[Entry], layer: int | None) -> _Tensor:
        parts = [shapes[entry.path].shape[layer is not None :] for entry in entries]
        parts = [part[::-1] if entries[0].transposed else part for part in parts]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        return _Tensor(entries[0].name.format(layer=layer), shape, layer, entries)

    embed, *rest = [entries for entries in groups.values() if not entries[0].is_stacked]
    stacked = [entries for entries in groups.values() if entries[0].is_stacked]
    layers = range(config.num_layers)
    return [
        make_tensor(embed, None),
        *(make_tensor(entries, layer) for layer in layers for entries in stacked),
        *(make_tensor(entries, None) for entries in rest),
    ]


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
            ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
            array = np.empty([len(r) for r in ranges], dtype)
            if entry.transposed:  # The tensor's rows are the last dimension here.
                last = ranges[-1]
                ranges[-1] = range(last.start + entry.first_row, last.stop + entry.first_row)
            layer_index = tuple(slice(r.start, r.stop) for r in ranges[entry.is_stacked :])
            for name, part in zip(layers, array if entry.is_stacked else [array], strict=True):
                with np.errstate(over="ignore"):  # What is too large for `dtype` is infinite.
                    part[...] = files.read(name, layer_index, entry.transposed)
                check_finite(part, *files.find(name))
            shards[key] = array
        return shards[key]

    return jax.make_array_from_callback(shape, sharding, read_shard, dtype=dtype)
