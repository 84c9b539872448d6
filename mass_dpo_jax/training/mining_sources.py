"""Scores of a catalogue's items for prompts: by a policy's features, or by numbers in files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mass_dpo_jax.data.examples import Example, format_text
from mass_dpo_jax.data.tokenizer import encode_texts, find_added_tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import read_array

ROWS_AT_A_TIME = 4096  # Rows of a file that are looked at together.
TEXTS_AT_A_TIME = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """The scores of items for prompts, of rows in the order of the examples.

    Attributes:
        score: from rows of prompts and a range of items to float32 [B, I].
        score_chosen: from rows of prompts to the scores float64 [B] of the chosen responses; NaN
            where one is not known.
    """

    score: Callable[[np.ndarray, slice], jax.Array]
    score_chosen: Callable[[np.ndarray], np.ndarray]


def encode(policy: Policy, params: Any, texts: Sequence[str], limit: int) -> np.ndarray:
    """Computes the mean final hidden state of each text, float32 [M, D], over all devices.

    A text is read alone, as it is, with the tokens that the tokenizer adds before any text; of a
    longer one than `limit` tokens the last ones are read.
    """
    before, _ = find_added_tokens(policy.tokenizer)
    encoded = encode_texts(policy.tokenizer, texts)
    lists = np.split(encoded.tokens, encoded.starts[1:])
    rows = [np.concatenate([before, tokens[-limit:]]).astype(np.int32) for tokens in lists]
    lengths = np.array([max(len(row), 1) for row in rows])
    batch = -(-TEXTS_AT_A_TIME // policy.mesh.size) * policy.mesh.size
    features = np.zeros((len(texts), policy.config.hidden_size), np.float32)
    order = np.argsort(lengths, kind="stable")
    starts = range(0, len(texts), batch)
    for start in scoring.progress_bar(starts, desc="features", unit="batch"):
        indices = order[start : start + batch]
        width = 1 << int(lengths[indices].max() - 1).bit_length()  # Few shapes to compile.

        def make(local: np.ndarray, width: int = width) -> tuple[np.ndarray, np.ndarray]:
            tokens = np.zeros((len(local), width), np.int32)
            for place, row in enumerate(local):
                if row >= 0:
                    tokens[place, : len(rows[row])] = rows[row]
            return tokens, np.where(local >= 0, lengths[local], 1)

        padded = np.pad(indices, (0, batch - len(indices)), constant_values=-1)
        arrays = mesh_lib.shard_rows(policy.mesh, padded, make)
        means = distributed.gather(_encode_batch(policy.graphdef, params, *arrays))
        features[indices] = means[: len(indices)]
    if not np.isfinite(features).all():
        raise UserError("the model's hidden states are not finite: did its run diverge?")
    return features


@functools.partial(jax.jit, static_argnums=0)
def _encode_batch(graphdef: Any, params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder = nnx.merge(graphdef, params)
    hidden, _ = decoder(tokens, positions, attention.attend_causally)
    real = positions < lengths[:, None]
    total = jnp.sum(hidden.astype(jnp.float32) * real[..., None], axis=1)
    return total / lengths[:, None]


def by_policy(
    policy: Policy,
    params: Any,
    examples: Sequence[Example],
    items: Sequence[str],
    limit: int,
    similarity: str,
) -> Source:
    """Scores items by the policy's features: those of a prompt against those of an item."""
    texts = [format_text(example.prompt) for example in examples]
    chosen = [format_text(example.chosen) for example in examples]
    unique = list(dict.fromkeys([*texts, *items, *chosen]))
    place = {text: i for i, text in enumerate(unique)}
    table = encode(policy, params, unique, limit)
    parts = [table[[place[t] for t in group]] for group in (texts, items, chosen)]
    return by_features(*parts, similarity=similarity, index=None)


def by_features(
    prompts: np.ndarray,
    items: np.ndarray,
    chosen: np.ndarray | None,
    *,
    similarity: str,
    index: np.ndarray | None,
) -> Source:
    """Scores items by inner products of features, or by cosines.

    Args:
        prompts: [M, D].
        items: [N, D].
        chosen: [M, D]; None: those of the item that `index` says.
        similarity: `cosine` or `dot`.
        index: int [M], the chosen response's item, -1 where it is none.
    """
    scale = functools.partial(_scale_rows, similarity=similarity)
    # Once: every block of prompts meets every item.
    item_scales, prompt_scales = scale(items), scale(prompts)
    chosen_scales = scale(items if chosen is None else chosen)
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("rows",))

    def read(table: np.ndarray, scales: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.asarray(table[rows], np.float32) * scales[rows]

    def score(rows: np.ndarray, part: slice) -> jax.Array:
        block = read(prompts, prompt_scales, rows)
        block = np.pad(block, ((0, -len(block) % mesh.size), (0, 0)))
        left = jax.device_put(block, NamedSharding(mesh, P("rows")))
        whole = NamedSharding(mesh, P())
        right, scales = np.asarray(items[part], np.float32), item_scales[part]
        return _multiply(left, *jax.device_put((right, scales), whole))[: len(rows)]

    def score_chosen(rows: np.ndarray) -> np.ndarray:
        left = read(prompts, prompt_scales, rows).astype(np.float64)
        if chosen is not None:
            return (left * read(chosen, chosen_scales, rows)).sum(-1)
        assert index is not None
        found = (left * read(items, item_scales, np.maximum(index[rows], 0))).sum(-1)
        return np.where(index[rows] >= 0, found, np.nan)

    return Source(score, score_chosen)


def _scale_rows(table: np.ndarray, similarity: str) -> np.ndarray:
    """Returns what rows are multiplied by to be compared, float32 [rows, 1]."""
    if similarity == "dot":
        return np.ones((len(table), 1), np.float32)
    starts = range(0, len(table), ROWS_AT_A_TIME)  # It may be a file that memory does not hold.
    blocks = (np.asarray(table[start : start + ROWS_AT_A_TIME], np.float32) for start in starts)
    norms = [np.linalg.norm(block, axis=-1, keepdims=True) for block in blocks]
    scales: np.ndarray = 1 / np.maximum(np.concatenate(norms), 1e-30)
    return scales


@jax.jit
def _multiply(left: jax.Array, right: jax.Array, scales: jax.Array) -> jax.Array:
    return jnp.matmul(left, (right * scales).T, precision="highest")


def by_scores(table: np.ndarray, index: np.ndarray) -> Source:
    """Reads scores [M, N] of a file, block by block; `index` as in `by_features`."""

    def score_chosen(rows: np.ndarray) -> np.ndarray:
        found = table[rows, np.maximum(index[rows], 0)].astype(np.float64)
        return np.where(index[rows] >= 0, found, np.nan)

    return Source(lambda rows, part: jnp.asarray(table[rows, part], jnp.float32), score_chosen)


def read_table(path: Path, flag: str, rows: int, columns: int | None) -> np.ndarray:
    """Reads a .npy file of finite numbers [rows, columns]; it stays on the disk.

    Raises:
        UserError: it is something else.
    """
    array = read_array(path)
    if array.ndim != 2 or len(array) != rows or columns not in (None, array.shape[1]):
        raise UserError(
            f"--{flag}={path}: shape {list(array.shape)}, expected [{rows}, {columns or 'D'}]"
        )
    for start in range(0, rows, ROWS_AT_A_TIME):
        bad = ~np.isfinite(np.asarray(array[start : start + ROWS_AT_A_TIME], np.float32))
        if bad.any():
            row, column = np.argwhere(bad)[0].tolist()
            raise UserError(
                f"--{flag}={path}: [{start + row}, {column}] is not a finite number of float32"
            )
    return array
