"""Negatives chosen without training: by a model's scores, or from features in a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from mass_dpo_jax import config_checks
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.data.examples import Example, History, Message, Text
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Selection
from mass_dpo_jax.selection import batch as batch_lib
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.data_checks import log_small_pools
from mass_dpo_jax.training.methods import make_method
from mass_dpo_jax.training.scored_model import prepare_scoring
from mass_dpo_jax.training.step import Program
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import expand_path, read_array
from mass_dpo_jax.utils.run_paths import resolve_run

# What a prompt has several of -> what a pair calls its own.
PAIRED = {"rejected": "rejected", "selected": "selected", "gains": "gain", "weights": "weight"}
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
AT_A_TIME = 256  # Rows of features on the device.
Row = dict[str, Any]


def with_model(config: ConfigDict, workdir: Path | None, split: str | None) -> Iterator[Row]:
    """The rows of a split, in order, with the negatives chosen by a model.

    Args:
      split: None is all of a single file, or else the training split.

    Returns:
      For each example that the length limits leave: id, prompt, chosen, rejected (the selected
      ones, in order of choice), selected and gains.

    Raises:
      UserError: something in the configuration, the data or the model folder is wrong.
    """
    config = config_checks.resolve(config)
    workdir = None if workdir is None else resolve_run(workdir)
    config = _unlimited(config)
    split = split or _every_row(config)
    setup, split, params, reference = prepare_scoring(config, workdir, split, selecting=True)
    program, method = setup.program, setup.method
    if method.is_supervised:
        raise UserError(f"config.method={config.method} has no negatives to select")
    tokens, refs = setup.tokens[split], reference.logps.get(split)
    if not method.uses_whole_pool:
        log_small_pools(method.num_negatives, (tokens.response_lengths[:, 1:] > 0).sum(1))
    if refs is None:  # The model is its own reference, whose features are frozen.
        method = dataclasses.replace(method, frozen_features=False)
        program = dataclasses.replace(program, method=method)
    scoring.check_finite(refs, tokens, "the reference")
    chosen: dict[int, Row] = {}
    for rows, (picks, beyond) in scoring.compute_each(
        lambda batch: _choose(program, params, batch, setup.key(0), refs is None),
        scoring.device_batches(
            tokens,
            setup.buckets[split],
            setup.eval_batch_size,
            setup.mesh,
            "selecting",
            ref_logps=refs,
            ref_grams=reference.grams,
        ),
    ):
        names = [f"{workdir or config.model.path}: example {tokens.ids[row]!r}" for row in rows]
        batch_lib.check_selection(picks, beyond, method.selection, names)
        chosen |= zip(rows.tolist(), _rows(picks, method.uses_draws), strict=True)
    if not distributed.is_primary():  # It has no texts, and writes nothing.
        return
    by_id = {example.id: example for example in setup.examples[split]}
    for row, example_id in enumerate(tokens.ids):
        # Candidates that were too long are gone from the tokens.
        selected = chosen[row]["selected"]
        numbers = [int(tokens.candidate_ids[row, 1 + number]) - 1 for number in selected]
        yield _with_texts(by_id[example_id], {**chosen[row], "selected": numbers})


@functools.partial(jax.jit, static_argnums=(0, 4))
def _choose(
    program: Program, params: Any, batch: Batch, key: jax.Array, at_reference: bool
) -> tuple[Selection, jax.Array]:
    """A selection with its gains, and what `check_selection` needs.

    Args:
      at_reference: these weights are the reference, so that all scores are 0.
    """
    pools, _ = program.score_pools(params, batch, key)
    if at_reference and pools.scores is not None:
        # What is no number stays, so that it is found.
        pools = pools._replace(scores=jnp.where(jnp.isfinite(pools.scores), 0.0, pools.scores))
    how = program.method.selection
    chosen = batch_lib.select(pools, program.method.num_negatives, how)
    return chosen, batch_lib.float32_excess(pools, how)


def with_features(config: ConfigDict, path: Path, split: str | None) -> Iterator[Row]:
    """The same from features in a file; without data the rows have only id, selected and gains.

    Raises:
      UserError: the file is not what it should be, or does not fit the data.
    """
    config = config_checks.validate(config)
    arrays = _read(expand_path(path, "features"))
    features = arrays["features"]
    rows, negatives = features.shape[0], features.shape[1] - 1
    examples: Sequence[Example | None] = [None] * rows
    mask = arrays.get("mask", np.ones((rows, negatives), bool)).astype(bool)
    if config.data.path:
        config = _unlimited(config)
        examples = load_examples(config.data, split or _every_row(config), config.seed)
        if len(examples) != rows:
            raise UserError(
                f"{path}: features of {rows} rows; the data has {len(examples)} examples"
            )
        mask = mask & _present(path, examples, negatives)
    scores = arrays.get("scores", np.zeros((rows, negatives), np.float32))
    method = make_method(config, largest_pool=negatives)
    if method.num_negatives > negatives:
        raise UserError(
            f"config.num_negatives={method.num_negatives}: {path} has {negatives} per row; set "
            f"config.num_negatives={negatives} or fewer"
        )
    if not method.uses_whole_pool:
        log_small_pools(method.num_negatives, mask.sum(1))
    there = np.pad(mask, ((0, 0), (1, 0)), constant_values=True)[..., None]
    key = jax.random.key(config.seed)
    for start in scoring.progress_bar(range(0, rows, AT_A_TIME), desc="selecting", unit="batch"):
        part = slice(start, start + AT_A_TIME)
        found, beyond = batch_lib.select_features(
            _numbers(path, start, "features", features[part], there[part]),
            _numbers(path, start, "scores", scores[part], mask[part]),
            mask[part],
            jax.random.fold_in(key, start),
            method.num_negatives,
            method.selection,
        )
        names = [f"{path}: row {row}" for row in range(rows)[part]]
        batch_lib.check_selection(found, beyond, method.selection, names)
        selected = _rows(found, method.uses_draws)
        for row, (example, choice) in enumerate(zip(examples[part], selected, strict=True), start):
            yield {"id": row, **choice} if example is None else _with_texts(example, choice)


def as_pairs(rows: Iterator[Row], chat: bool) -> Iterator[Row]:
    """One row for each selected negative, in TRL's pairwise columns and with its gain.

    Args:
      chat: texts were scored inside a chat template, so strings become the messages they were
        rendered as. TRL applies a template to messages only, and takes no mixture of the two.
    """
    for row in rows:
        shared = {name: value for name, value in row.items() if name not in PAIRED}
        for k in range(len(row["selected"])):
            pair = shared | {one: row[many][k] for many, one in PAIRED.items() if many in row}
            pair["id"] = f"{row['id']}-{k}"
            texts = {name: pair[name] for name in ROLES if name in pair}
            if chat or any(isinstance(text, list) for text in texts.values()):
                texts = {name: _messages(text, ROLES[name]) for name, text in texts.items()}
            yield pair | texts


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _rows(chosen: Selection, weighted: bool) -> list[Row]:
    """What was selected of each prompt: places, gains and, where drawn, weights."""

    def floats(values: np.ndarray) -> list[float]:
        return [float(str(value)) for value in values]  # The shortest decimal that is this float32.

    found = []
    for indices, valid, gains, weights in zip(*map(distributed.gather, chosen), strict=True):
        row = {"selected": indices[valid].tolist(), "gains": floats(gains[valid])}
        found.append(row | ({"weights": floats(weights[valid])} if weighted else {}))
    return found


def _with_texts(example: Example, choice: Row) -> Row:
    prompt = example.prompt
    return {
        "id": example.id,
        "prompt": prompt.text if isinstance(prompt, History) else prompt,
        "chosen": example.chosen,
        "rejected": [example.rejected[number] for number in choice["selected"]],
        **choice,
    }


def _unlimited(config: ConfigDict) -> ConfigDict:
    """A copy of the settings that reads every row."""
    config = config.copy_and_resolve_references()
    config.data.update(max_train=0, max_validation=0, max_test=0, validation_share=0.0)
    return config


def _every_row(config: ConfigDict) -> str:
    return "all" if Path(config.data.path).is_file() else "train"


def _read(path: Path) -> Mapping[str, np.ndarray]:
    """`features` [M, C, D] and perhaps `scores` and `mask` [M, C - 1], with shapes checked."""
    if not path.is_file():
        raise UserError(f"--features={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            arrays = {"features": read_array(path)}
    except (UserError, OSError, SafetensorError, TypeError) as error:
        raise UserError(f"--features={path}: not a .npy or .safetensors file: {error}") from None
    if "features" not in arrays:
        raise UserError(f"{path}: no tensor 'features'; found {', '.join(arrays) or 'none'}")
    features = arrays["features"]
    sized = features.ndim == 3 and features.shape[1] >= 2 and 0 not in features.shape
    if not sized or features.dtype.kind not in "fiu":
        raise UserError(
            f"{path}: features {features.dtype}{list(features.shape)}, expected numbers [M, C, D] "
            "with M >= 1, C >= 2 and D >= 1, the chosen response first"
        )
    for name, kinds, words in (("scores", "fiu", "numbers"), ("mask", "bui", "true or false")):
        if name not in arrays:
            continue
        found, shape = arrays[name], (features.shape[0], features.shape[1] - 1)
        if found.shape != shape:
            raise UserError(
                f"{path}: {name} {list(found.shape)}, expected {list(shape)} for features "
                f"{list(features.shape)}"
            )
        if found.dtype.kind not in kinds or (name == "mask" and (found > 1).any()):
            raise UserError(f"{path}: {name} {found.dtype}, expected {words}")
    return arrays


def _numbers(path: Path, start: int, name: str, given: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Rows of an array in float32, checked where something is there; `start` is the first one's."""
    with np.errstate(over="ignore"):
        found = np.asarray(given, np.float32)
    bad = ~np.isfinite(found) & there
    if bad.any():
        row, *place = np.argwhere(bad)[0].tolist()
        raise UserError(
            f"{path}: row {start + row}: {name}{place} is {given[row, *place]}, expected a finite "
            "number that float32 can hold"
        )
    return found


def _present(path: Path, examples: Sequence[Example], negatives: int) -> np.ndarray:
    sizes = np.array([len(example.rejected) for example in examples])
    if sizes.max() > negatives:
        row = int(sizes.argmax())
        raise UserError(
            f"{examples[row].place}: {sizes[row]} rejected responses, but {path} has features of "
            f"{negatives}"
        )
    return np.arange(negatives)[None, :] < sizes[:, None]
