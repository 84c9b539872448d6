"""Devices in a grid, and the one table that says which dimension is split over which axis."""

from __future__ import annotations

import collections
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import Splits, abstract_decoder, param_dims
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.quantize import store
from mass_dpo_jax.utils.mesh_axes import AXES, BATCH_AXES

_log = logging.getLogger(__name__)

# Named dimension of a parameter -> mesh axis. A name that is not here is never split.
RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over all devices, of all processes.

    Where they are in several groups with a fast network inside (see `islands`), `data` goes across
    groups as far as it can, then `fsdp`, and `tensor` last.

    Raises:
      UserError: more than one -1, sizes whose product is not the number of devices, or groups of
        different sizes.
    """
    devices = jax.devices() if devices is None else devices
    sizes, shown = resolve_sizes(config, len(devices)), _show_sizes(config)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"{shown}: does not fit the {len(devices)} device(s) of this run; the product of the "
            "sizes is to be that number, and one of them can be -1: all that are left"
        )
    groups = islands(devices)
    kinds = (AxisType.Auto,) * 3
    if len(groups) == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)
    if len({len(group) for group in groups}) > 1:
        raise UserError(
            f"devices of {len(groups)} hosts or slices, {', '.join(str(len(g)) for g in groups)}: "
            "expected as many on each"
        )
    across, inside = split_over(len(groups), sizes)
    if across["tensor"] > 1:
        _log.warning(
            f"{shown}: mesh.tensor goes over {across['tensor']} hosts or slices, so that every "
            "layer waits for their network"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()),
        tuple(across.values()),
        [device for group in groups for device in group],
        process_is_granule=_by_process(devices),
        allow_split_physical_axes=True,  # As `jax.make_mesh` does.
    )
    return Mesh(grid, AXES, axis_types=kinds)


def abstract_mesh(config: ConfigDict, devices: int) -> Mesh:
    """Returns the mesh of `config.mesh` without devices, for code that reads names and sizes only.

    Args:
        config: the sizes.
        devices: the number of devices that a -1 refers to.

    Raises:
        UserError: as `resolve_sizes`.
    """
    sizes = tuple(resolve_sizes(config, devices).values())
    return cast(Mesh, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3))


def resolve_sizes(config: ConfigDict, devices: int) -> dict[str, int]:
    """Returns the sizes of `config.mesh` by axis; a -1 becomes what `devices` leave over.

    Raises:
        UserError: more than one -1, or one where the other sizes do not divide the devices.
    """
    sizes, shown = {axis: int(config[axis]) for axis in AXES}, _show_sizes(config)
    unknown = [axis for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{shown}: expected sizes above 0 and at most one -1 (all that are left)")
    if unknown and devices % given:
        raise UserError(
            f"{shown}: -1 means what is left of the {devices} device(s) here, which are no "
            f"multiple of {given}; expected sizes whose product is the number of devices (a dry "
            "run for another machine needs all three)"
        )
    return {axis: devices // given if size == -1 else size for axis, size in sizes.items()}


def _show_sizes(config: ConfigDict) -> str:
    return " ".join(f"config.mesh.{axis}={int(config[axis])}" for axis in AXES)


def islands(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups of devices with a fast network inside: TPU slices, GPUs of one host (or of one NVLink
    domain), simulated devices of one process."""
    by_process, found = _by_process(devices), collections.defaultdict(list)
    for device in devices:
        found[device.process_index if by_process else device.slice_index].append(device)
    return [found[key] for key in sorted(found)]


def _by_process(devices: Sequence[jax.Device]) -> bool:
    # CPUs of all hosts say that they are of slice 0.
    return devices[0].platform == "cpu" or getattr(devices[0], "slice_index", None) is None


def split_over(groups: int, sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Of each axis, how many parts lie across groups of devices, and how many inside of one.

    The product of `sizes` is a multiple of `groups`, so what is left for the last axis divides it.
    """
    across = {}
    for axis in AXES:
        across[axis] = math.gcd(groups, sizes[axis])
        groups //= across[axis]
    return across, {axis: sizes[axis] // across[axis] for axis in AXES}


def check_batch(mesh: Mesh, name: str, size: int) -> None:
    """Raises UserError unless `size` prompts split evenly over the batch axes."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % ways:
        raise UserError(
            f"config.{name}={size}: expected a multiple of mesh.data * mesh.fsdp = {ways}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def split_rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Splits the axis after `leading` others over the batch axes."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def shard_rows(mesh: Mesh, rows: np.ndarray, make: Callable[[np.ndarray], Any]) -> Any:
    """Arrays of some rows on the devices, split over them along the last axis of `rows`.

    Each process makes only what its own devices hold.

    Args:
      mesh: the devices.
      rows: `[..., B]`, names of rows, the same on every process.
      make: from `[..., b]` of them to a pytree of NumPy arrays `[..., b, *any]`.

    Returns:
      The same pytree of `[..., B, *any]`.
    """
    axis = rows.ndim - 1
    sharding = split_rows(mesh, leading=axis)
    ours = np.zeros(rows.shape[-1], bool)
    for index in sharding.addressable_devices_indices_map(rows.shape).values():
        assert index is not None
        ours[index[axis]] = True
    here = np.cumsum(ours) - 1  # The place among our rows.

    def place(part: np.ndarray) -> jax.Array:
        def of_device(index: Any) -> np.ndarray:  # A slice for each dimension.
            places = here[index[axis]]
            return part[(*index[:axis], slice(places[0], places[-1] + 1), *index[axis + 1 :])]

        shape = (*rows.shape, *part.shape[rows.ndim :])
        return jax.make_array_from_callback(shape, sharding, of_device)

    return jax.tree.map(place, make(rows[..., ours]))


def hidden_splits(mesh: Mesh, hidden_size: int) -> Splits | None:
    """Hidden states lie as prompts do; `embedded` is where an exchange along `fsdp` leads there.

    None: there is one device.
    """
    if mesh.size == 1:
        return None
    columns = RULES["embed"] if hidden_size % mesh.shape[RULES["embed"]] == 0 else None
    return Splits(NamedSharding(mesh, P("data", columns)), NamedSharding(mesh, P(BATCH_AXES)))


def param_shapes(
    config: DecoderConfig, mesh: Mesh, lora: Lora | None = None, stored: str = "float32"
) -> Any:
    """Shape, type and place of each parameter of a decoder, nested dicts.

    Args:
      config: the decoder's.
      mesh: the devices, of which only names and sizes are read.
      lora: with it, the parameters that are no adapters are frozen.
      stored: the type that frozen parameters are kept in, see models/frozen.py.
    """
    state = nnx.state(abstract_decoder(config, lora=lora), nnx.Param)
    dims = nnx.to_pure_dict(param_dims(state))
    shapes = nnx.to_pure_dict(state)
    if lora is not None:
        adapters = shapes.pop("adapters")
        shapes = jax.tree.map_with_path(
            lambda path, x: jax.eval_shape(lambda x: store(names(path), x, stored), x), shapes
        )
        shapes["adapters"] = adapters
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        param_shardings(mesh, shapes, dims),
    )


def names(path: Any) -> tuple[str, ...]:
    """The keys of a path of `jax.tree.map_with_path` through nested dicts."""
    return tuple(key.key for key in path)


def param_shardings(mesh: Mesh, abstract: Any, dims: Any) -> Any:
    """A NamedSharding for each parameter.

    Args:
      mesh: the devices.
      abstract: a pytree of anything with a shape.
      dims: the same tree with a tuple of dimension names for each leaf, or for all leaves of a
        quantized array, which has as many dimensions as its parts.

    A dimension that its axis does not divide stays whole (a vocabulary of 32003, say).
    """

    def sharding(names: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        axes = [RULES.get(name) if name else None for name in names]
        return NamedSharding(
            mesh,
            P(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, leaf.shape, strict=True)
                )
            ),
        )

    return jax.tree.map(
        lambda names, weights: jax.tree.map(functools.partial(sharding, names), weights),
        dims,
        abstract,
        is_leaf=lambda x: isinstance(x, tuple),
    )
