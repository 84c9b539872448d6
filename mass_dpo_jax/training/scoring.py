"""Passes over a whole split without gradients: log-probs, and the reference's, kept on disk."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

import mass_dpo_jax
from mass_dpo_jax.data.batches import Batch, Buckets, in_order, make_batch
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import interruption
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.utils import distributed

SHA_BYTES = 32
_log = logging.getLogger(__name__)


def progress_bar(iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
    """A bar on standard error; silent when that is no terminal, and on all processes but one."""
    hidden = not sys.stderr.isatty() or not distributed.is_primary()
    return tqdm(iterable, file=sys.stderr, disable=hidden, **kwargs)


def batches(
    tokens: Tokens,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    label: str,
    rows: np.ndarray | None = None,
    ref_logps: np.ndarray | None = None,
    ref_grams: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example (or each of `rows`) once, on the devices, behind a progress bar."""
    total = len(tokens) if rows is None else len(rows)
    with progress_bar(total=total, desc=label, unit="examples") as bar:
        for indices, shape in in_order(buckets, batch_size, rows):
            interruption.check()
            make = functools.partial(
                make_batch, tokens, shape=shape, ref_logps=ref_logps, ref_grams=ref_grams
            )
            yield indices, mesh_lib.place_rows(mesh, indices, make)
            bar.update(int((indices >= 0).sum()))


def computed(
    compute: Callable[[Batch], Any], batches: Iterable[tuple[np.ndarray, Batch]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """What `compute` gives for each batch: its rows, and arrays `[rows, ...]` on every process.

    Rows of padding are left out. Each batch is started before the one before it is waited for, so
    that the devices compute while the host makes the next.
    """
    waiting: tuple[np.ndarray, Any] | None = None
    for indices, batch in batches:
        started = indices, compute(batch)
        if waiting is not None:
            yield _real(*waiting)
        waiting = started
    if waiting is not None:
        yield _real(*waiting)


def _real(indices: np.ndarray, found: Any) -> tuple[np.ndarray, Any]:
    real = indices >= 0
    return indices[real], jax.tree.map(lambda x: distributed.gather(x)[real], found)


def over_split(
    compute: Callable[[Batch], Any],
    tokens: Tokens,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    label: str,
) -> Any:
    """What `compute` gives for each example of a split, in its order: float32 `[M, ...]` for each
    array `[B, ...]` of its pytree, all of it on every process."""
    tables: Any = None
    for rows, found in computed(compute, batches(tokens, buckets, batch_size, mesh, label)):
        if tables is None:
            tables = jax.tree.map(
                lambda x: np.zeros((len(tokens), *x.shape[1:]), np.float32), found
            )
        for table, part in zip(jax.tree.leaves(tables), jax.tree.leaves(found), strict=True):
            table[rows] = part
    return tables


def check_finite(logps: np.ndarray | None, tokens: Tokens, place: str) -> None:
    """Raises UserError where a model's log-probs `[M, C]` of a split, if any, are no numbers.

    Args:
      place: what to call the model.
    """
    if logps is None or np.isfinite(logps).all():
        return
    bad = ~np.isfinite(logps).all(1)
    row = int(bad.argmax())
    found = logps[row, tokens.response_lengths[row] > 0].tolist()
    raise UserError(
        f"{place}: example {tokens.ids[row]!r}: log-probabilities {found}, expected finite numbers "
        f"({bad.sum()} of {len(bad)} examples have such): are its weights of a run that diverged?"
    )


def fingerprint(params: Any) -> str:
    """A digest of arrays that does not depend on how they are split over devices."""
    sums = jax.tree.leaves(_sums(params))
    leaves = zip(jax.tree.leaves_with_path(params), sums, strict=True)
    return digest_of(
        (jax.tree_util.keystr(path), leaf.shape, distributed.gather(found))
        for (path, leaf), found in leaves
    )


def digest_of(arrays: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """`fingerprint`, of each array's name (`['blocks']['gate']['kernel']`), shape and sums, in the
    order of a tree's leaves."""
    digest = hashlib.sha256()
    for name, shape, sums in arrays:
        digest.update(f"{name}{shape}".encode())
        digest.update(sums.tobytes())
    return digest.hexdigest()


def sums_of_part(part: np.ndarray, start: int) -> np.ndarray:
    """What `_sums` adds up of a part of an array, uint32 [2], to be added to those of the others.

    Args:
      part: any shape, end to end in the array.
      start: how many values of the array are before it.
    """
    bits = part.astype(np.float32).reshape(-1).view(np.uint32)
    place = np.arange(start, start + bits.size, dtype=np.uint64).astype(np.uint32)
    mixed = (bits ^ (place * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> np.uint32(15))
    return np.stack([mixed.sum(dtype=np.uint32), (mixed * bits).sum(dtype=np.uint32)])


def sums_of(array: jax.Array) -> jax.Array:
    """What `digest_of` takes of an array, uint32 [2]; it stays on the array's devices."""
    found: jax.Array = _sums(array)
    return found


@jax.jit
def _sums(params: Any) -> Any:
    """Two integers [2] for each array. Sums modulo 2^32 are the same in any order, so no array
    leaves its devices."""

    def sums(x: jax.Array) -> jax.Array:
        x = jax.device_put(x, jax.memory.Space.Device)  # Moments may lie in the host's memory.
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed = mixed ^ (mixed >> 15)
        return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed * bits).sum(dtype=jnp.uint32)])

    return jax.tree.map(sums, params)


def cached(folder: Path, name: str, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """`compute()`, or what an earlier run with the same key kept in `folder`.

    The file is called by `name` and a digest of `key` and the package's version, so that a part of
    the key that changes finds no file. It ends with a checksum, behind what numpy reads; one that
    is not as it was written is reported and made again. Where none can be written, none is kept.

    Only the first process looks and keeps; whether all have its folder does not matter.
    """
    digest = hashlib.sha256(f"{key} {mass_dpo_jax.__version__}".encode()).hexdigest()[:32]
    path = folder / f"{name}-{digest}.npy"
    found = distributed.broadcast_array(_read(path) if distributed.is_primary() else None)
    if found is None:
        found = compute()
        if distributed.is_primary():
            _write(path, found)
    return found


def _read(path: Path) -> np.ndarray | None:
    try:
        written = path.read_bytes()
        content, checksum = written[:-SHA_BYTES], written[-SHA_BYTES:]
        if hashlib.sha256(content).digest() == checksum:
            _log.info(f"reference: read from {path}")
            found: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
            return found
        _log.warning(f"{path}: not what was written; computing it again")
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning(f"{path}: unreadable ({error.strerror}); computing it again")
    return None


def _write(path: Path, result: np.ndarray) -> None:
    """Renamed when whole: another run may read the folder meanwhile."""
    memory = io.BytesIO()
    np.save(memory, result)
    content = memory.getvalue()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(content + hashlib.sha256(content).digest())
        temporary.replace(path)
    except OSError as error:
        _log.warning(f"{path}: {error.strerror}; the reference is not kept")
        if temporary is not None:
            temporary.unlink(missing_ok=True)
