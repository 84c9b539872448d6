"""The mesh of devices, and how parameters and batches are split over its axes."""

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
from mass_dpo_jax.models.decoder import abstract_decoder, param_dims
from mass_dpo_jax.models.interfaces import HiddenShardings
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.quantize import quantize
from mass_dpo_jax.utils.mesh_axes import AXES, BATCH_AXES

_log = logging.getLogger(__name__)

# The mesh axis that a named dimension of a parameter is split over; others are never split.
RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of `config.mesh` over all devices of all processes.

    Where the devices form several groups with a fast network inside (see `group_devices`), `data`
    goes across groups as far as it can, then `fsdp`, and `tensor` last.

    Args:
        config: the sizes, the section `config.mesh`.
        devices: the devices to use; None for all.

    Raises:
        UserError: more than one -1, sizes whose product is not the number of devices, or groups of
            different sizes.
    """
    devices = jax.devices() if devices is None else devices
    sizes, settings = resolve_sizes(config, len(devices)), _show_sizes(config)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"{settings}: does not fit the {len(devices)} device(s) of this run; the product of "
            "the sizes is to be that number, and one of them can be -1: all that are left"
        )
    groups = group_devices(devices)
    kinds = (AxisType.Auto,) * 3
    if len(groups) == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)
    if len({len(group) for group in groups}) > 1:
        raise UserError(
            f"devices of {len(groups)} hosts or slices, {', '.join(str(len(g)) for g in groups)}: "
            "expected as many on each"
        )
    across, inside = split_sizes(len(groups), sizes)
    if across["tensor"] > 1:
        _log.warning(
            f"{settings}: mesh.tensor goes over {across['tensor']} hosts or slices, so that every "
            "layer waits for their network"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()),
        tuple(across.values()),
        [device for group in groups for device in group],
        process_is_granule=_has_no_slices(devices),
        allow_split_physical_axes=True,  # As `jax.make_mesh` does.
    )
    return Mesh(grid, AXES, axis_types=kinds)


def abstract_mesh(config: ConfigDict, devices: int) -> Mesh:
    """Returns the mesh of `config.mesh` without devices, for code that reads names and sizes only.

    Args:
        config: the sizes.
        devices: the number of devices that a -1 refers to.

    Raises:
        UserError: the same as for `resolve_sizes`.
    """
    sizes = tuple(resolve_sizes(config, devices).values())
    return cast(Mesh, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3))


def resolve_sizes(config: ConfigDict, devices: int) -> dict[str, int]:
    """Returns the sizes of `config.mesh` by axis; a -1 becomes what `devices` leave over.

    Raises:
        UserError: more than one -1, or one where the other sizes do not divide the devices.
    """
    sizes, settings = {axis: int(config[axis]) for axis in AXES}, _show_sizes(config)
    unknown = [axis for axis, size in sizes.items() if size == -1]
    fixed_product = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"{settings}: expected sizes above 0 and at most one -1 (all that are left)"
        )
    if unknown and devices % fixed_product:
        raise UserError(
            f"{settings}: -1 means what is left of the {devices} device(s) here, which are no "
            f"multiple of {fixed_product}; expected sizes whose product is the number of devices "
            "(a dry run for another machine needs all three)"
        )
    return {axis: devices // fixed_product if size == -1 else size for axis, size in sizes.items()}


def _show_sizes(config: ConfigDict) -> str:
    return " ".join(f"config.mesh.{axis}={int(config[axis])}" for axis in AXES)


def group_devices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups devices that share a fast network.

    A group is a TPU slice, the GPUs of a host or an NVLink domain, or the simulated devices of a
    process.
    """
    by_process, groups = _has_no_slices(devices), collections.defaultdict(list)
    for device in devices:
        groups[device.process_index if by_process else device.slice_index].append(device)
    return [groups[key] for key in sorted(groups)]


def _has_no_slices(devices: Sequence[jax.Device]) -> bool:
    # CPUs of all hosts claim to be in slice 0.
    return devices[0].platform == "cpu" or getattr(devices[0], "slice_index", None) is None


def split_sizes(groups: int, sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Splits the size of each axis into parts across groups of devices and parts inside of one.

    The product of `sizes` is a multiple of `groups`, so what is left for the last axis divides it.
    """
    across = {}
    for axis in AXES:
        across[axis] = math.gcd(groups, sizes[axis])
        groups //= across[axis]
    return across, {axis: sizes[axis] // across[axis] for axis in AXES}


def check_batch(mesh: Mesh, name: str, size: int) -> None:
    """Checks that a batch splits evenly over the batch axes.

    Args:
        mesh: the devices.
        name: the setting of the size, without `config.`.
        size: prompts of the batch.

    Raises:
        UserError: it does not.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % ways:
        raise UserError(
            f"config.{name}={size}: expected a multiple of mesh.data * mesh.fsdp = {ways}"
        )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding that splits the axis after `leading` others over the batch axes."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def shard_rows(mesh: Mesh, rows: np.ndarray, make: Callable[[np.ndarray], Any]) -> Any:
    """Puts the arrays of some rows on the devices, split along the last axis of `rows`.

    Each process makes only what its own devices hold.

    Args:
        mesh: the devices.
        rows: int [..., B], the same on every process.
        make: a function from int [..., b], some of the rows, to a pytree of NumPy arrays
            [..., b, *any].

    Returns:
        The same pytree of arrays [..., B, *any].
    """
    axis = rows.ndim - 1
    sharding = batch_sharding(mesh, leading=axis)
    is_local = np.zeros(rows.shape[-1], bool)
    for index in sharding.addressable_devices_indices_map(rows.shape).values():
        assert index is not None
        is_local[index[axis]] = True
    local_index = np.cumsum(is_local) - 1  # From an index of `rows` to one of the local rows.

    def shard(local: np.ndarray) -> jax.Array:
        def read(index: Any) -> np.ndarray:  # A slice for each dimension.
            indices = local_index[index[axis]]
            local_slice = slice(indices[0], indices[-1] + 1)
            return local[(*index[:axis], local_slice, *index[axis + 1 :])]

        shape = (*rows.shape, *local.shape[rows.ndim :])
        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree.map(shard, make(rows[..., is_local]))


def hidden_splits(mesh: Mesh, hidden_size: int) -> HiddenShardings | None:
    """Returns the shardings of hidden states; None where there is one device.

    They lie as prompts do; `embedded` is how they lie before an exchange along `fsdp`.
    """
    if mesh.size == 1:
        return None
    columns = RULES["embed"] if hidden_size % mesh.shape[RULES["embed"]] == 0 else None
    return HiddenShardings(
        NamedSharding(mesh, P("data", columns)), NamedSharding(mesh, P(BATCH_AXES))
    )


def param_shapes(
    config: DecoderConfig, mesh: Mesh, lora: Lora | None = None, stored: str = "float32"
) -> Any:
    """Returns shape, dtype and sharding of each parameter of a decoder, as nested dicts.

    Args:
        config: the decoder's configuration.
        mesh: the devices; only names and sizes of its axes are read.
        lora: the form of the adapters, if any; all other parameters are frozen then.
        stored: the type that frozen parameters are kept in, see models/quantize.py.
    """
    state = nnx.state(abstract_decoder(config, lora=lora), nnx.Param)
    dims = nnx.to_pure_dict(param_dims(state))
    shapes = nnx.to_pure_dict(state)
    if lora is not None:
        adapters = shapes.pop("adapters")
        shapes = jax.tree.map_with_path(
            lambda path, x: jax.eval_shape(lambda x: quantize(key_names(path), x, stored), x),
            shapes,
        )
        shapes["adapters"] = adapters
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        param_shardings(mesh, shapes, dims),
    )


def key_names(path: Any) -> tuple[str, ...]:
    """Returns the keys of a path of `jax.tree.map_with_path` through nested dicts."""
    return tuple(key.key for key in path)


def param_shardings(mesh: Mesh, abstract: Any, dims: Any) -> Any:
    """Returns a NamedSharding for each parameter.

    A dimension that its axis does not divide stays whole, a vocabulary of 32003 for instance.

    Args:
        mesh: the devices.
        abstract: a pytree of anything with a shape.
        dims: the same tree with a tuple of dimension names for each leaf, or for all leaves of a
            quantized array, which has as many dimensions as its parts.
    """

    def axis(name: str | None, size: int) -> str | None:
        rule = RULES.get(name) if name else None
        return rule if rule and size % mesh.shape[rule] == 0 else None

    def sharding(names: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        axes = (axis(name, size) for name, size in zip(names, leaf.shape, strict=True))
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(
        lambda names, weights: jax.tree.map(functools.partial(sharding, names), weights),
        dims,
        abstract,
        is_leaf=lambda x: isinstance(x, tuple),
    )
