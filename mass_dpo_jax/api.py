"""The library: a model, its scores, and a train step for your own training loop.

`import mass_dpo_jax as mdj` has these names; JAX is imported when the first of them is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers.preferences import read_preferences
from mass_dpo_jax.data.rows import Table
from mass_dpo_jax.data.splits import Source
from mass_dpo_jax.errors import UserError, check_type
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.runs.run_folder import find_run
from mass_dpo_jax.training.export import save_model
from mass_dpo_jax.training.open_policy import open_policy
from mass_dpo_jax.training.optimizer import make_optimizer, skip_if_not_finite
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.prepare import open_mesh, prepare_examples
from mass_dpo_jax.training.prompts import check_gaps
from mass_dpo_jax.training.scored_model import score_examples
from mass_dpo_jax.training.setup import Reference
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.training.updates import Batches, TrainStep
from mass_dpo_jax.utils import hub
from mass_dpo_jax.utils.files import expand_path

Rows = Iterable[Mapping[str, Any] | Example]
MODEL = "what load_model returns"


class Scores(NamedTuple):
    """The scores that a model gives M examples with at most C responses each.

    Column 0 is the chosen response, column 1 + k the example's k-th rejected response, counted from
    0; those as good as the chosen one stand last, as in `Example.responses`. A response that is
    left out as too long (`data.long_response`) keeps its column, empty.

    Attributes:
        ids: the examples' `id`s, or where they are in the data, as text.
        logps: float32 [M, C], in nats: the log-probability of a response given its prompt, summed
            over its tokens with the end of sequence; 0 where there is no response.
        lengths: int32 [M, C], tokens of a response with the end of sequence; 0 where there is none.
        features: float32 [M, C, D], the mean of the final hidden states over a response's tokens
            (with `selection.pooling=all`, over its prompt's too); None if they were not asked for.
    """

    ids: list[str]
    logps: np.ndarray
    lengths: np.ndarray
    features: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """Which responses exist, bool [M, C]."""
        return self.lengths > 0


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model with its tokenizer. Made by `load_model`.

    Attributes:
        policy: decoder and tokenizer, and how weights are sharded over the devices.
        params: the weights, nested dicts of arrays; with LoRA, the frozen ones and `adapters`.
        config: the configuration: how the model computes, how texts are rendered, and how `batches`
            trains unless it is given another.
    """

    policy: Policy
    params: Any
    config: ConfigDict

    @property
    def architecture(self) -> DecoderConfig:
        """The model family and its sizes."""
        return self.policy.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, of Hugging Face."""
        return self.policy.tokenizer

    def score(self, examples: Rows, *, features: bool = False) -> Scores:
        """Computes the log-probability of every response.

        A prompt is encoded once for all its responses. The configuration sets batch size and
        limits: `eval.batch_size`, `data.max_prompt_length`, `data.chat_template` and so on.

        Args:
            examples: M rows in TRL's preference format, `{"prompt", "chosen", "rejected"}`, where
                `rejected` is one response or a list, and texts are strings or chat messages; or
                what `load_examples` returns.
            features: also return the hidden states, as features.

        Raises:
            UserError: a row is malformed or too long, unless the configuration skips or cuts such
                rows (`data.on_bad_row`, `data.long_prompt`, `data.long_response`).
        """
        rows = _read_rows(examples, self.config.data)
        return Scores(*score_examples(self.config, self.policy, self.params, rows, features))

    def updated(self, state: TrainState) -> Model:
        """Returns this model with the weights of a training state.

        The weights are not copied: the next step on that state donates its arrays, and then this
        model can no longer be used.
        """
        check_type(state, TrainState, "state", "what a train step returns first")
        return dataclasses.replace(self, params={**self.params, **state.params})

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Writes a Hugging Face folder, for transformers, vLLM and `load_model`.

        With LoRA, it is the base with the adapters added.

        Args:
            folder: a new folder.
            dtype: type of the stored weights, float32 or bfloat16.

        Raises:
            UserError: the folder exists and is not empty, or cannot be written.
        """
        save_model(
            expand_path(folder, "folder"),
            self.policy,
            self.params,
            self.config.model.path,
            self.config.data,
            dtype,
        )


def load_model(path: str | Path, config: ConfigDict | None = None) -> Model:
    """Loads a model, with float32 weights on the devices.

    If `model.dtype` is float32, this process computes matrix products in full float32 from now on
    (`jax_default_matmul_precision`).

    Args:
        path: a Hugging Face folder of a Llama 3, Qwen3 or SmolLM3 model (`config.json`,
            `*.safetensors`, tokenizer); a model's name on the hub, OWNER/NAME or
            OWNER/NAME@REVISION, which is downloaded into its cache; or a run folder: its newest
            checkpoint, with LoRA added to its base.
        config: settings, see `default_config`; None: those of the run, or the defaults. With
            `model.lora.rank` the model gets new adapters, and these alone are trained.

    Raises:
        UserError: there is no model in the folder that this package can compute, or a setting is
            invalid.
    """
    if isinstance(path, str) and hub.is_name(path):
        path = hub.fetch_model(path, "model.path")
    path = expand_path(path, "path")
    if config is None:
        run = find_run(path)
        config = config_lib.default()
        if run is not None:
            config = run_config.use_own_files(run_config.load_config(run.folder), run.folder)
            config.model.lora = config_lib.default().model.lora
    config = config_checks.resolve(config)
    config.model.path = str(path)
    mesh = open_mesh(config)
    policy = open_policy(config.model, mesh, None)
    return Model(policy, policy.weights(str(path), config.seed, config.model.lora.path), config)


def batches(
    model: Model,
    examples: Rows,
    config: ConfigDict | None = None,
    reference: Model | None = None,
) -> Batches:
    """Makes the batches of a run: tokenized, with the reference's log-probabilities.

    They are those of `python -m mass_dpo_jax.train` on these examples, in the same order.

    Args:
        model: the policy, which gives the tokenizer.
        examples: rows as in `Model.score`.
        config: method, selection, batch sizes and number of updates; None: the model's. Its `model`
            section is not read, since the model is loaded already.
        reference: the reference policy; None: the model as it is now. Its log-probabilities are
            computed here, once, and kept in `cache_dir`.

    Prompts (`selection.prompts`) are chosen here too, by the model as it is now.

    Returns:
        A sequence of `StepBatch`, one for each update: it has a `len`, can be iterated over, and
        `batches[step]` is the batch of a step.

    Raises:
        UserError: a setting is invalid, as `selection.prompt_refresh=epoch` is here if the policy
            chooses the prompts: batches are known before the steps; or a row as in `Model.score`.
    """
    is_reference = reference is None or reference is model
    reference = model if reference is None else reference
    for name, given in (("model", model), ("reference", reference)):
        check_type(given, Model, name, MODEL)
    config = config_checks.resolve(model.config if config is None else config)
    config.model = model.config.model
    if config.mine.catalogue:
        raise UserError(
            f"config.mine.catalogue={config.mine.catalogue}: python -m mass_dpo_jax.train mines "
            "while it trains, batches do not; expected examples with the negatives to train on"
        )
    setup = prepare_examples(config, model.policy, {"train": _read_rows(examples, config.data)})
    model.policy.check_like(reference.architecture, "reference")
    if reference.policy.lora != model.policy.lora:
        raise UserError("reference: its adapters are of another form than the policy's")
    scores = Reference({})
    if setup.method.uses_reference:
        scores = setup.score_reference(reference.params)
    made = Batches(setup, scores)
    if setup.prompts.needs_policy:
        if setup.prompts.refresh != "once":
            raise UserError(
                "config.selection.prompt_refresh=epoch chooses prompts while a run trains, which "
                "python -m mass_dpo_jax.train does; expected once"
            )
        check_gaps(setup.prompts, has_other_reference=not is_reference)
        made.prompts.choose(0, model.params, setup.key(0), is_reference)
    return made


def make_train_step(
    model: Model, batches: Batches, optimizer: optax.GradientTransformation | None = None
) -> TrainStep:
    """Makes a jitted function `state, metrics = step(state, batch)`.

    `step.init(model.params)` returns the first state.

    Args:
        model: the policy; with LoRA, the step keeps its frozen weights.
        batches: the batches that the step will be called with, in order.
        optimizer: an optimizer of optax; None: AdamW with warm-up, cosine decay and gradient
            clipping, as the configuration's `train` section says.

    Raises:
        UserError: an argument has another type.
    """
    check_type(model, Model, "model", MODEL)
    check_type(batches, Batches, "batches", "what batches(model, rows) returns, all of them")
    if optimizer is None:
        transformation = make_optimizer(batches.setup.train, len(batches))
    elif callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update"):
        transformation = skip_if_not_finite(optimizer)
    else:
        raise UserError(
            f"optimizer: found a {type(optimizer).__name__}, expected one of optax, as optax.adam("
            "1e-5)"
        )
    _, frozen = model.policy.split(model.params)
    return TrainStep(batches, transformation, frozen)


def _check_container(rows: Any) -> None:
    """Raises UserError for a container that is not a sequence of rows, and says how to get them."""
    advice = ""
    if isinstance(rows, (str, Path)):
        advice = "a path: load_examples reads files, as config.data.path"
    elif type(rows).__name__ in ("DatasetDict", "IterableDatasetDict"):
        advice = f"all splits of a dataset: give one, as in dataset[{next(iter(rows), 'train')!r}]"
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        advice = "a table: give its rows, df.to_dict('records')"
    elif isinstance(rows, Mapping):
        if any(isinstance(value, (str, Mapping)) for value in rows.values()):
            advice = "one row: give a list of it, [row]"
        else:
            advice = "columns: give rows, [dict(zip(x, values)) for values in zip(*x.values())]"
    elif not isinstance(rows, Iterable):
        advice = f"{type(rows).__name__}"
    if advice:
        raise UserError(f"examples: expected rows, found {advice}")


def _read_rows(rows: Rows, data: ConfigDict) -> list[Example]:
    _check_container(rows)
    located = ((f"examples[{i}]", row) for i, row in enumerate(rows))
    table = Table("examples", Source("examples", "all"), located)
    return read_preferences(table, "", data)
