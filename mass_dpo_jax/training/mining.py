"""Mines negatives for each prompt from a catalogue of texts, by a policy or by given numbers."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mass_dpo_jax.data import text_files
from mass_dpo_jax.data.examples import (
    Example,
    History,
    Prompt,
    Text,
    as_text,
    format_message,
    identify_answer,
)
from mass_dpo_jax.data.row_files import read_rows
from mass_dpo_jax.data.tokenizer import encode_texts, find_added_tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.selection import mining
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import read_array, shorten

PROMPTS_AT_A_TIME = 512
TEXTS_AT_A_TIME = 64
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The items that negatives are taken from.

    Attributes:
        ids: what the file calls them, or their index.
        texts: their texts.
        index: from what `normalize` makes of a text to its first index.
        valid: bool [N], False for a text that stands before it already.
    """

    ids: list[Any]
    texts: list[str]
    index: dict[str, int]
    valid: np.ndarray


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


def normalize(text: str) -> str:
    """Returns a text as it is compared: case and runs of white space do not count."""
    return " ".join(text.split()).casefold()


def read_catalogue(path: Path) -> Catalogue:
    """Reads one item per row: a text, or an object with `text` and perhaps `id`; or lines of .txt.

    Raises:
        UserError: the file cannot be read, has fewer than two texts, or a row is something else.
    """
    ids: list[Any] = []
    texts: list[str] = []
    for location, row in _read_items(path):
        if isinstance(row, UserError):
            raise row
        item = row if isinstance(row, dict) else {"text": row}
        text = item.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{location}: found {shorten(repr(row))}, expected a text, or an object with a "
                "'text' that is not empty"
            )
        ids.append(item.get("id", len(ids)))
        texts.append(text)
    index: dict[str, int] = {}
    valid = np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
        valid[i] = index.setdefault(normalize(text), i) == i
    if len(index) < 2:
        raise UserError(f"{path}: {len(index)} different texts, expected two or more")
    if not valid.all():
        _log.warning(
            f"{path}: {(~valid).sum()} of {len(texts)} texts are repeated; each is used once"
        )
    return Catalogue(ids, texts, index, valid)


def _read_items(path: Path) -> Iterator[tuple[str, Any]]:
    if ".txt" not in path.suffixes:
        yield from read_rows(path)
        return
    for number, line in text_files.read_lines(path):
        text = text_files.decode(line, f"{path} line {number}").strip()
        if text:
            yield f"{path} line {number}", text


def find_positives(examples: Sequence[Example]) -> list[set[str]]:
    """Returns, for each example, the texts that are never its negatives, normalized.

    They are the chosen responses of all rows that ask the same and the items of its history.
    """
    by_question: dict[Any, set[str]] = {}
    for example in examples:
        chosen = {normalize(identify_answer(t)) for t in (example.chosen, *example.also_chosen)}
        by_question.setdefault(example.question, set()).update(chosen)
    found = []
    for example in examples:
        history = example.prompt.items if isinstance(example.prompt, History) else ()
        found.append(by_question[example.question] | {normalize(item) for item in history})
    return found


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


def plain_text(text: Prompt) -> str:
    """Returns a prompt or response as one text: the contents of messages, one below the other."""
    text = as_text(text)
    return text if isinstance(text, str) else "\n".join(map(format_message, text))


def by_policy(
    policy: Policy,
    params: Any,
    examples: Sequence[Example],
    catalogue: Catalogue,
    limit: int,
    similarity: str,
) -> Source:
    """Scores items by the policy's features: those of a prompt against those of an item."""
    texts = [plain_text(example.prompt) for example in examples]
    chosen = [plain_text(example.chosen) for example in examples]
    unique = list(dict.fromkeys([*texts, *catalogue.texts, *chosen]))
    place = {text: i for i, text in enumerate(unique)}
    table = encode(policy, params, unique, limit)
    parts = [table[[place[t] for t in group]] for group in (texts, catalogue.texts, chosen)]
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

    def scale(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float32)
        norms = np.linalg.norm(x, axis=-1, keepdims=True)
        return x / np.maximum(norms, 1e-30) if similarity == "cosine" else x

    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("rows",))

    def score(rows: np.ndarray, part: slice) -> jax.Array:
        block = scale(prompts[rows])
        block = np.pad(block, ((0, -len(block) % mesh.size), (0, 0)))
        left = jax.device_put(block, NamedSharding(mesh, P("rows")))
        right = jax.device_put(scale(items[part]), NamedSharding(mesh, P()))
        return _multiply(left, right)[: len(rows)]

    def score_chosen(rows: np.ndarray) -> np.ndarray:
        left = scale(prompts[rows]).astype(np.float64)
        if chosen is not None:
            return (left * scale(chosen[rows])).sum(-1)
        assert index is not None
        found = (left * scale(items[np.maximum(index[rows], 0)])).sum(-1)
        return np.where(index[rows] >= 0, found, np.nan)

    return Source(score, score_chosen)


@jax.jit
def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right.T, precision="highest")


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
    for start in range(0, rows, PROMPTS_AT_A_TIME):
        bad = ~np.isfinite(np.asarray(array[start : start + PROMPTS_AT_A_TIME], np.float32))
        if bad.any():
            row, column = np.argwhere(bad)[0].tolist()
            raise UserError(
                f"--{flag}={path}: [{start + row}, {column}] is not a finite number of float32"
            )
    return array


def chosen_index(examples: Sequence[Example], catalogue: Catalogue) -> np.ndarray:
    """Returns the item that each chosen response is, -1 where the catalogue lacks it."""
    keys = (normalize(identify_answer(example.chosen)) for example in examples)
    return np.array([catalogue.index.get(key, -1) for key in keys])


def mine(
    examples: Sequence[Example],
    catalogue: Catalogue,
    source: Source,
    limits: mining.Limits,
    n: int,
    draw: str,
    temperature: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yields each example with n negatives from the catalogue, in the order of the examples.

    An example for which no item is left is not written, and one with fewer than n has those; both
    are counted in a warning.

    Raises:
        UserError: a chosen response has no score although margins need it, or nothing is left.
    """
    positives = find_positives(examples)
    banned = [
        {catalogue.index[text] for text in texts if text in catalogue.index} for texts in positives
    ]
    k = limits.last + max(map(len, banned))
    empty, few = 0, 0
    key = jax.random.key(seed)
    starts = range(0, len(examples), PROMPTS_AT_A_TIME)
    for start in scoring.progress_bar(starts, desc="mining", unit="block"):
        rows = np.arange(start, min(start + PROMPTS_AT_A_TIME, len(examples)))
        scores, indices = mining.rank_items(
            functools.partial(source.score, rows), catalogue.valid, k
        )
        chosen = source.score_chosen(rows)
        mask = np.isfinite(scores)
        for place, row in enumerate(rows):
            if limits.need_chosen and np.isnan(chosen[place]):
                raise UserError(
                    f"{examples[row].place}: its chosen response is not in the catalogue, so there "
                    "is no score that a margin could be measured from; add it, or use --max_score"
                )
            allowed = mask[place] & ~np.isin(indices[place], list(banned[row]))
            ranks = np.cumsum(allowed) - 1
            allowed &= (ranks >= limits.first) & (ranks < limits.last)
            value = None if np.isnan(chosen[place]) else float(chosen[place])
            mask[place] = allowed & limits.allow(scores[place], value)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(rows))
        drawn, pi, weights = map(
            np.asarray,
            mining.draw_items(
                jnp.asarray(scores), jnp.asarray(mask), n, draw, jnp.float32(temperature), keys
            ),
        )
        for place, row in enumerate(rows):
            picks = np.flatnonzero(drawn[place])
            empty, few = empty + (len(picks) == 0), few + (0 < len(picks) < n)
            if len(picks):
                yield _make_row(
                    examples[row], catalogue, indices[place, picks], scores[place, picks],
                    pi[place, picks], weights[place, picks],
                )  # fmt: skip
    if empty == len(examples):
        raise UserError(
            f"no item of the catalogue is left for any of {empty} prompts: widen --ranks or the "
            "margins"
        )
    if empty or few:
        _log.warning(
            f"of {len(examples)} prompts {empty} had no item left and are not written, and {few} "
            f"had fewer than {n}: widen --ranks or the margins"
        )


def _make_row(
    example: Example,
    catalogue: Catalogue,
    indices: np.ndarray,
    scores: np.ndarray,
    pi: np.ndarray,
    weights: np.ndarray,
) -> dict[str, Any]:
    texts: list[Text] = [catalogue.texts[i] for i in indices]
    if not isinstance(example.chosen, str):  # TRL takes no mixture of both.
        texts = [[{"role": "assistant", "content": str(text)}] for text in texts]
    return {
        "id": example.id,
        "prompt": as_text(example.prompt),
        "chosen": example.chosen,
        "rejected": texts,
        **({"tools": example.tools} if example.tools else {}),
        "mined_ids": [catalogue.ids[i] for i in indices],
        "mined_scores": _shortest(scores),
        "mined_probabilities": _shortest(pi),
        "mined_weights": _shortest(weights),
    }


def _shortest(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values]  # The shortest decimal that is this float32.
