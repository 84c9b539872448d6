"""Passes over a whole split without gradients: log-probs, and the reference's, kept on disk."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
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
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.step import Program


def progress_bar(iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
    """A bar on standard error; silent when that is no terminal."""
    return tqdm(iterable, file=sys.stderr, disable=not sys.stderr.isatty(), **kwargs)


def batches(
    tokens: Tokens,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    label: str,
    ref_logps: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example (or each of `rows`) once, on the devices, behind a progress bar."""
    total = len(tokens) if rows is None else len(rows)
    with progress_bar(total=total, desc=label, unit="examples") as bar:
        for indices, shape in in_order(buckets, batch_size, rows):
            batch = make_batch(tokens, indices, shape, ref_logps)
            yield indices, jax.device_put(batch, mesh_lib.split_rows(mesh))
            bar.update(int((indices >= 0).sum()))


def score_split(
    program: Program,
    params: Any,
    tokens: Tokens,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    label: str,
) -> np.ndarray:
    """`logps` `[M, C]` of a split, float32, in its order; 0 where there is no candidate."""
    logps = np.zeros(tokens.response_lengths.shape, np.float32)
    for indices, batch in batches(tokens, buckets, batch_size, mesh, label):
        real = indices >= 0
        logps[indices[real]] = np.asarray(program.score_batch(params, batch))[real]
    return logps


def fingerprint(params: Any) -> str:
    """A digest of weights that does not depend on how they are split over devices.

    Integer sums modulo 2^32 are the same in any order, so no array leaves its devices.
    """

    @jax.jit
    def sums(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed = mixed ^ (mixed >> 15)
        return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed * bits).sum(dtype=jnp.uint32)])

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
        digest.update(np.asarray(sums(leaf)).tobytes())
    return digest.hexdigest()


def cache_folder(setting: str) -> Path:
    """`setting`, or mass_dpo_jax in the user's cache folder."""
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mass_dpo_jax"


def reference_logps(
    program: Program,
    params: Any,
    tokens: Tokens,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    *,
    identity: str,
    folder: Path,
    split: str,
) -> tuple[np.ndarray, bool]:
    """The reference's `logps` `[M, C]`, computed once and then read.

    The file's name is a digest of the weights, the architecture and compute type (`identity`),
    the token ids and the package's version: when any of them changes, the pass runs again.

    Returns:
      The log-probs, and whether they were read.
    """
    parts = (fingerprint(params), identity, tokens.digest(), mass_dpo_jax.__version__)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    path = folder / f"ref_logps-{key}.npy"
    try:
        logps = np.load(path, allow_pickle=False)
        if logps.shape == tokens.response_lengths.shape and logps.dtype == np.float32:
            return logps, True
        print(f"{path}: not what it should be; computing the reference again", file=sys.stderr)
    except FileNotFoundError:
        pass
    except (ValueError, EOFError, OSError):
        print(f"{path}: unreadable; computing the reference again", file=sys.stderr)
    logps = score_split(program, params, tokens, buckets, batch_size, mesh, f"reference, {split}")
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: another run may read the folder meanwhile.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False) as file:
        np.save(file, logps)
    Path(file.name).replace(path)
    return logps, False
