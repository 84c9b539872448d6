"""The library: a model, its scores, and a train step for a loop of one's own.

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
from mass_dpo_jax.training.setup import Reference, open_mesh, prepare_examples
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.training.updates import Batches, TrainStep
from mass_dpo_jax.utils.files import expand_path

Rows = Iterable[Mapping[str, Any] | Example]
MODEL = "what load_model returns"


class Scores(NamedTuple):
    """What a model says of M examples with at most C responses each.

    Column 0 is the chosen response, column 1 + k the example's k-th rejected one, counted from 0. A
    response that is left out as too long (`data.long_response`) keeps its column, without a number.
    """

    ids: list[str]
    """Of the examples: their `id`, or their place as text."""
    logps: np.ndarray
    """float32 [M, C], nats: log-probability of a response given its prompt, summed over its tokens,
    end of sequence included; 0 where there is no response."""
    lengths: np.ndarray
    """int32 [M, C], tokens of each response, end of sequence included; 0 where there is none."""
    features: np.ndarray | None = None
    """float32 [M, C, D], the mean of the final hidden states over a response's tokens (or its
    prompt's too, with `selection.pooling=all`); None where they were not asked for."""

    @property
    def valid(self) -> np.ndarray:
        """bool [M, C]: which responses there are."""
        return self.lengths > 0


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model with its tokenizer. Made by `load_model`.

    Attributes:
        policy: decoder and tokenizer, and where weights lie on the devices.
        params: the weights, nested dicts of arrays; with LoRA, the frozen ones and `adapters`.
        config: how it computes and how texts are rendered; what `batches` trains by if it is not
            given another.
    """

    policy: Policy
    params: Any
    config: ConfigDict

    @property
    def architecture(self) -> DecoderConfig:
        """Sizes and family."""
        return self.policy.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of Hugging Face."""
        return self.policy.tokenizer

    def score(self, examples: Rows, *, features: bool = False) -> Scores:
        """Log-probabilities and, if asked for, features of every response.

        A prompt is encoded once for all its responses. Sizes and limits are the configuration's:
        `eval.batch_size` prompts at a time, `data.max_prompt_length`, `data.chat_template`.

        Args:
            examples: M rows in TRL's preference format, `{"prompt", "chosen", "rejected"}`, where
                `rejected` is one response or a list, and texts are strings or chat messages; or
                what `load_examples` gives.
            features: hidden states too.

        Raises:
            UserError: a row is not what it should be (unless `data.on_bad_row` is "skip"), or too
                long.
        """
        rows = _examples(examples, self.config.data)
        setup = prepare_examples(self.config, self.policy, {"all": rows})
        tokens, scorer = setup.tokens["all"], setup.program.scorer
        compute = scorer.logps_and_features if features else scorer.logps
        found = setup.map_split(lambda batch: compute(self.params, batch), "all", "scoring")
        logps, hidden = found if features else (found, None)
        by_id = {example.id: len(example.rejected) for example in rows}
        width = 1 + max(by_id[name] for name in tokens.ids)
        logps, lengths = (
            tokens.restore_columns(x, width) for x in (logps, tokens.response_lengths)
        )
        hidden = None if hidden is None else tokens.restore_columns(hidden, width)
        return Scores(tokens.ids, logps, lengths, hidden)

    def updated(self, state: TrainState) -> Model:
        """This model with a state's weights: no copy, so the next step on that state, which takes
        its arrays, takes them from this model too."""
        check_type(state, TrainState, "state", "what a train step returns first")
        return dataclasses.replace(self, params={**self.params, **state.params})

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Writes a Hugging Face folder, for transformers, vLLM and `load_model`; with LoRA the base
        with the adapters added.

        Args:
            folder: a new one.
            dtype: of the stored weights, float32 or bfloat16.

        Raises:
            UserError: the folder exists and is not empty.
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
    """A model with its weights on the devices, float32.

    Args:
        path: a Hugging Face folder of a Llama 3, Qwen3 or SmolLM3 model (`config.json`,
            `*.safetensors`, tokenizer), or a run folder of ours: its newest checkpoint, with LoRA
            added to its base.
        config: settings, see `default_config`; None: a run's own, or the defaults. With
            `model.lora.rank` the model gets new adapters, which are then what trains. Where
            `model.dtype` is float32, matrix products are computed in full float32 from now on in
            this process (`jax_default_matmul_precision`).

    Raises:
        UserError: the folder or a setting is not what it should be.
    """
    path = expand_path(path, "path")
    if config is None:
        run = find_run(path)
        config = config_lib.default()
        if run is not None:
            config = run_config.use_own_files(run_config.load_config(run[0]), run[0])
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
    """The batches of a run on some examples, tokenized, with the reference's log-probabilities.

    The same ones, in the same order, as those of `python -m mass_dpo_jax.train` on these examples.

    Args:
        model: whose tokenizer is used.
        examples: rows as in `Model.score`.
        config: method, selection, sizes of batches, number of updates; None: the model's. Its
            `model` section is not read: the model is there already.
        reference: the reference policy; None: the model as it is. Its log-probabilities are
            computed here, once, and kept in `cache_dir`.

    Returns:
        A sequence of `StepBatch`: `len(...)` updates, `for batch in ...`, `...[step]`.

    Raises:
        UserError: a setting is not what it should be, or a row, unless `data.on_bad_row` is "skip".
    """
    reference = model if reference is None else reference
    for name, given in (("model", model), ("reference", reference)):
        check_type(given, Model, name, MODEL)
    config = config_checks.resolve(model.config if config is None else config)
    config.model = model.config.model
    setup = prepare_examples(config, model.policy, {"train": _examples(examples, config.data)})
    model.policy.check_like(reference.architecture, "reference")
    if reference.policy.lora != model.policy.lora:
        raise UserError("reference: its adapters are of another form than the policy's")
    known = (
        setup.score_reference(reference.params) if setup.method.uses_reference else Reference({})
    )
    return Batches(setup, known)


def make_train_step(
    model: Model, batches: Batches, optimizer: optax.GradientTransformation | None = None
) -> TrainStep:
    """A jitted function `state, metrics = step(state, batch)`; `step.init(model.params)` is the
    first state.

    Args:
        model: with LoRA, whose frozen weights the step keeps.
        batches: what it will be called with, in order.
        optimizer: any of optax; None: that of the configuration's `train`, AdamW with warm-up,
            cosine decay and a clipped gradient.

    Raises:
        UserError: an argument is something else.
    """
    check_type(model, Model, "model", MODEL)
    check_type(batches, Batches, "batches", "what batches(model, rows) returns, all of them")
    if optimizer is None:
        chosen = make_optimizer(batches.setup.train, len(batches))
    elif callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update"):
        chosen = skip_if_not_finite(optimizer)
    else:
        raise UserError(
            f"optimizer: found a {type(optimizer).__name__}, expected one of optax, as optax.adam("
            "1e-5)"
        )
    _, frozen = model.policy.split(model.params)
    return TrainStep(batches, chosen, frozen)


def _check_container(rows: Any) -> None:
    """Raises UserError for what holds rows and is no sequence of them, and says how to get them."""
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


def _examples(rows: Rows, data: Any) -> list[Example]:
    _check_container(rows)
    places = ((f"examples[{i}]", row) for i, row in enumerate(rows))
    table = Table("examples", Source("examples", "all"), places)
    return read_preferences(table, "", data)
