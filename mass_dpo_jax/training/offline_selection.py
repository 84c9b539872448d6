"""Selects negatives without training: by a model's scores, or from features in a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import config_checks
from mass_dpo_jax.config_values import parse_budget
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.data.examples import Example, as_text
from mass_dpo_jax.data.formats.writing import to_decimals
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Pool, Selection
from mass_dpo_jax.selection import batch as batch_lib
from mass_dpo_jax.training import prompts, scoring
from mass_dpo_jax.training.data_checks import grade_split, log_small_pools
from mass_dpo_jax.training.feature_files import mask_of_examples, read_features, to_float32
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.methods import Method
from mass_dpo_jax.training.scored_model import ScoredModel, choose_split, prepare_scoring
from mass_dpo_jax.training.step import Program
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import expand_path
from mass_dpo_jax.utils.run_paths import resolve_run

ROWS_AT_A_TIME = 256  # Rows of features on the device.
Row = dict[str, Any]


def select_with_model(
    config: ConfigDict, workdir: Path | None, split: str | None, budget: float | None = None
) -> Iterator[Row]:
    """Yields the rows of a split with the negatives selected by a model.

    Args:
        config: the configuration; it is not changed.
        workdir: the run whose newest checkpoint selects; None: the model at `config.model.path`.
        split: its name; None: all of a single file, otherwise the training split.
        budget: prompts to choose, a share or a number, by `selection.prompts`; None: all of them.

    Yields:
        For each example within the length limits: id, prompt, chosen, rejected (the picks, in order
        of selection), selected and gains; in the order of the split or, with a budget, in the order
        in which prompts were chosen, with `prompt_gain` or `prompt_gap`.

    Raises:
        UserError: something in the configuration, the data or the model folder is wrong.
    """
    config = config_checks.resolve(config)
    workdir = None if workdir is None else resolve_run(workdir)
    config = _use_all_rows(config)
    split = split or choose_split(config.data, "train")
    model = prepare_scoring(config, workdir, split, selecting=True)
    if model.setup.method.is_supervised:
        raise UserError(f"config.method={config.method} has no negatives to select")
    how = _prompt_settings(config, budget, model.split in model.reference.logps)
    rows, table = _select_rows(model, f"{workdir or config.model.path}", how.by)
    order = _choose_rows(table, len(rows), how, config.seed)
    if not distributed.is_primary():  # The others have no texts, and write nothing.
        return
    tokens = model.setup.tokens[model.split]
    by_id = {example.id: example for example in model.setup.examples[model.split]}
    for index, value in order:
        # Tokens lack the candidates that are too long.
        selected = rows[index]["selected"]
        negatives = [int(tokens.candidate_ids[index, 1 + pick]) - 1 for pick in selected]
        example = by_id[tokens.ids[index]]
        yield _add_texts(example, {**rows[index], "selected": negatives, **value})


def _prompt_settings(
    config: ConfigDict, budget: float | None, has_scores: bool
) -> prompts.PromptSettings:
    """Returns how to choose prompts; `design` where the configuration does not say.

    Raises:
        UserError: it cannot be done with this method or without scores.
    """
    if budget is None:
        return prompts.PromptSettings()
    config = config.copy_and_resolve_references()
    by = "design" if config.selection.prompts == "all" else config.selection.prompts
    config.selection.update(prompts=by, prompt_budget=float(budget), prompt_refresh="once")
    if by == "uncertain" and not has_scores:
        raise UserError(
            "config.selection.prompts=uncertain compares rewards, which are all 0 without a "
            "reference (config.model.reference_path, or scores next to --features)"
        )
    return prompts.read_settings(config)


def _choose_rows(
    table: np.ndarray | None, total: int, settings: prompts.PromptSettings, seed: int
) -> list[tuple[int, Row]]:
    """Returns the rows to write, in order, and what they were chosen by, for each."""
    if settings.by == "all":
        return [(index, {}) for index in range(total)]
    k = parse_budget(settings.budget, total, "--prompts")
    chosen = prompts.choose_prompts(table, total, k, settings, seed)
    if chosen.values is None:
        return [(index, {}) for index in chosen.indices.tolist()]
    name = prompts.VALUES[settings.by]
    values = [{name: value} for value in to_decimals(chosen.values)]
    return list(zip(chosen.indices.tolist(), values, strict=True))


def _select_rows(
    model: ScoredModel, name: str, by: str
) -> tuple[dict[int, Row], np.ndarray | None]:
    """Selects from every pool of a split: selected, gains and weights by the row's index.

    Returns also what prompts are chosen by, see `prompts.measure_sets`, where anything is.
    """
    setup, program, method = model.setup, model.setup.program, model.setup.method
    if method.margin == "grade" and method.scores_pools:
        setup.tokens[model.split] = grade_split(method, setup.tokens[model.split])
    tokens, ref_logps = setup.tokens[model.split], model.reference.logps.get(model.split)
    if not method.uses_whole_pool:
        log_small_pools(method.num_negatives, (tokens.response_lengths[:, 1:] > 0).sum(1))
    at_reference = ref_logps is None and method.uses_reference
    if ref_logps is None:  # The model is its own reference, whose features are frozen.
        method = dataclasses.replace(method, frozen_features=False)
        program = dataclasses.replace(program, method=method)
    scoring.check_finite(ref_logps, tokens, "the reference")
    batches = setup.scoring_batches(
        model.split, "selecting", ref_logps=ref_logps, ref_grams=model.reference.grams
    )
    selected: dict[int, Row] = {}
    measures: dict[int, np.ndarray] = {}
    for indices, (picks, excess, measured) in scoring.compute_each(
        lambda batch: _select_batch(program, by, model.params, batch, setup.key(0), at_reference),
        batches,
    ):
        names = [f"{name}: example {tokens.ids[index]!r}" for index in indices]
        batch_lib.check_selection(picks, excess, method.selection, names)
        rows = _rows(picks, method.uses_draws)
        selected.update(zip(indices.tolist(), rows, strict=True))
        if measured is not None:
            measures.update(zip(indices.tolist(), measured, strict=True))
    table = np.stack([measures[row] for row in sorted(measures)]) if measures else None
    return selected, table


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _select_batch(
    program: Program, by: str, params: Any, batch: Batch, key: jax.Array, at_reference: bool
) -> tuple[Selection, jax.Array, jax.Array | None]:
    """Selects from the pools of a batch; also returns what two other functions need.

    These are `check_selection` and, where prompts are chosen by the model, `choose_prompts`.

    Args:
        program: the program that scores the pools.
        by: how prompts are chosen.
        params: the weights.
        batch: a batch on the devices.
        key: the key of random choices.
        at_reference: whether these weights are the reference, so that all log-ratios are 0.
    """
    pools, scored = program.score_pools(
        params, batch, key, always=by in prompts.VALUES, at_reference=at_reference
    )
    settings, measured = program.method.selection, None
    picks = batch_lib.select(pools, program.method.num_negatives, settings)
    if by in prompts.VALUES:
        assert scored is not None and scored.features is not None
        measured = prompts.measure_sets(
            by, pools, scored.features, _candidate_ids(picks), settings.feature_norm
        )
    return picks, batch_lib.float32_excess(pools, settings), measured


def _candidate_ids(picks: Selection) -> jax.Array:
    """Returns picks as in `Choice`."""
    return jnp.where(picks.valid, picks.indices + 1, 0)


def select_with_features(
    config: ConfigDict, path: Path, split: str | None, budget: float | None = None
) -> Iterator[Row]:
    """Yields rows as `select_with_model`, with negatives selected from features in a file.

    Without data the rows have only id, selected and gains.

    Args:
        config: the configuration; it is not changed.
        path: a .npy or .safetensors file.
        split: split of the data, if there is any, as in `select_with_model`.
        budget: likewise.

    Raises:
        UserError: the file is not what it should be, or does not fit the data.
    """
    config = config_checks.validate(config)
    arrays = read_features(expand_path(path, "features"))
    features = arrays["features"]
    total, negatives = features.shape[0], features.shape[1] - 1
    examples: Sequence[Example | None] = [None] * total
    mask = arrays.get("mask", np.ones((total, negatives), bool)).astype(bool)
    if config.data.path:
        config = _use_all_rows(config)
        examples = load_examples(
            config.data, split or choose_split(config.data, "train"), config.seed
        )
        if len(examples) != total:
            raise UserError(
                f"{path}: features of {total} rows; the data has {len(examples)} examples"
            )
        mask = mask & mask_of_examples(path, examples, negatives)
    scores = arrays.get("scores", np.zeros((total, negatives), np.float32))
    method = make_method(config, largest_pool=negatives)
    if method.num_negatives > negatives:
        raise UserError(
            f"config.num_negatives={method.num_negatives}: {path} has {negatives} per row; set "
            f"config.num_negatives={negatives} or fewer"
        )
    if not method.uses_whole_pool:
        log_small_pools(method.num_negatives, mask.sum(1))
    how = _prompt_settings(config, budget, "scores" in arrays)
    key = jax.random.key(config.seed)
    starts = range(0, total, ROWS_AT_A_TIME)
    rows: list[Row] = []
    tables = []
    for start in scoring.progress_bar(starts, desc="selecting", unit="batch"):
        part = slice(start, start + ROWS_AT_A_TIME)
        arguments = features[part], scores[part], mask[part], key, method
        part_rows, measured = _select_part(path, start, *arguments, how.by)
        rows += part_rows
        tables += [] if measured is None else [measured]
    table = np.concatenate(tables) if tables else None
    for index, value in _choose_rows(table, total, how, config.seed):
        example, row = examples[index], {**rows[index], **value}
        yield {"id": index, **row} if example is None else _add_texts(example, row)


def _select_part(
    path: Path,
    start: int,
    features: np.ndarray,
    scores: np.ndarray,
    mask: np.ndarray,
    key: jax.Array,
    method: Method,
    by: str,
) -> tuple[list[Row], np.ndarray | None]:
    """Selects from some rows of a file, the first of which has the index `start`.

    Returns also what prompts are chosen by, where anything is.
    """
    candidates = np.pad(mask, ((0, 0), (1, 0)), constant_values=True)[..., None]
    features = to_float32(path, start, "features", features, candidates)
    scores = to_float32(path, start, "scores", scores, mask)
    part_key = jax.random.fold_in(key, start)
    picks, excess = batch_lib.select_features(
        features, scores, mask, part_key, method.num_negatives, method.selection
    )
    names = [f"{path}: row {start + index}" for index in range(len(mask))]
    batch_lib.check_selection(picks, excess, method.selection, names)
    measured = None
    if by in prompts.VALUES:
        pools = Pool(None, jnp.asarray(scores), jnp.asarray(mask), part_key)
        ids = _candidate_ids(picks)
        measured = np.asarray(
            prompts.measure_sets(
                by, pools, jnp.asarray(features), ids, method.selection.feature_norm
            )
        )
    return _rows(picks, method.uses_draws), measured


def _rows(picks: Selection, has_weights: bool) -> list[Row]:
    """Returns what was selected for each prompt: indices, gains and, if drawn, weights."""
    rows = []
    for indices, valid, gains, weights in zip(*map(distributed.gather, picks), strict=True):
        row = {"selected": indices[valid].tolist(), "gains": to_decimals(gains[valid])}
        rows.append(row | ({"weights": to_decimals(weights[valid])} if has_weights else {}))
    return rows


def _add_texts(example: Example, row: Row) -> Row:
    return {
        "id": example.id,
        "prompt": as_text(example.prompt),
        "chosen": example.chosen,
        "rejected": [example.rejected[pick] for pick in row["selected"]],
        **({"tools": example.tools} if example.tools else {}),
        **row,
    }


def _use_all_rows(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the settings that reads every row."""
    config = config.copy_and_resolve_references()
    config.data.update(max_train=0, max_validation=0, max_test=0, validation_share=0.0)
    return config
