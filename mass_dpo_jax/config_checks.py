"""Checks of a configuration: refuses what no run could use, before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mass_dpo_jax.config import (
    CHOICES,
    NAMES,
    PATHS,
    default,
    flatten,
    set_field,
    suggest_setting,
)
from mass_dpo_jax.config_values import (
    parse_budget,
    parse_cutoffs,
    parse_margins,
    parse_ranks,
    parse_refresh,
    split_targets,
)
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import expand
from mass_dpo_jax.utils.suggestions import suggest_choice

POSITIVE = (
    "beta num_negatives model.scratch.hidden_size model.scratch.num_heads selection.ridge "
    "train.batch_size train.micro_batch_size train.learning_rate train.clip "
    "train.checkpoint_every train.keep_checkpoints train.max_skipped eval.batch_size "
    "data.max_prompt_length data.max_response_length data.max_shapes odpo.alpha model.lora.alpha "
    "selection.top mine.n mine.temperature"
).split()
NOT_NEGATIVE = (
    "seed train.steps train.epochs train.weight_decay train.eval_every log.draw_noise_every "
    "data.max_train data.max_validation data.max_test sft_weight device_memory_gb "
    "model.lora.rank train.responses_at_a_time pl_rank.top loss.gamma mine.every mine.shortlist"
).split()
SHARES = ("data.validation_share", "train.warmup_ratio", "model.lora.dropout")
LIMIT = 2**31  # XLA counts in 32 bits.
_TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def validate(config: ConfigDict) -> ConfigDict:
    """Returns `resolve(config)`; raises UserError also for what `check` refuses."""
    copy = resolve(config)
    check(copy)
    return copy


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy to change, whose paths have `~` and variables replaced.

    Raises:
        UserError: it is no configuration, lacks settings or has others, or a path is none.
    """
    _check_class(config)
    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    copy = config.copy_and_resolve_references()
    fields = dict(flatten(copy))
    check_types(fields)
    _check_names(fields)
    for name in PATHS:
        set_field(copy, name, expand(fields[name], f"config.{name}"))
    return copy


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that no run could use, naming field, value and choices."""
    _check_class(config)
    fields = dict(flatten(config))
    check_types(fields)
    _check_names(fields)
    _check_values(fields)
    _check_batch(fields["train.batch_size"], fields["train.micro_batch_size"])
    if not config.train.steps and not config.train.epochs:
        raise UserError("config.train.steps and config.train.epochs are both 0: nothing to train")
    parse_refresh(config.selection.refresh, steps_per_epoch=1)
    parse_budget(config.selection.prompt_budget, LIMIT)
    parse_cutoffs(config.eval.cutoffs)
    _check_mining(config.mine)
    split_targets(config.model.lora.targets)
    if (config.model.lora.rank or config.model.lora.path) and not config.model.path:
        raise UserError("config.model.lora adapts a model: config.model.path is missing")


def _check_mining(mine: ConfigDict) -> None:
    _, last = parse_ranks(mine.ranks)
    parse_margins(mine)
    if mine.temperature < 1e-6:  # Scores are divided by it in float32.
        raise UserError(f"config.mine.temperature={mine.temperature!r}: expected 1e-6 or more")
    if 0 < mine.shortlist < last:
        raise UserError(
            f"config.mine.shortlist={mine.shortlist}: config.mine.ranks={mine.ranks} are ranks "
            f"within it; expected config.mine.shortlist={last} or more, or lower ranks"
        )


def check_types(fields: Mapping[str, Any]) -> None:
    """Raises UserError where a setting is missing, of another type than its default, or too large.

    Args:
        fields: the settings by dotted name.
    """
    for name, default_value in flatten(default()):
        if name not in fields:
            raise UserError(
                f"config.{name} is missing: take default_config(), and change a group by its "
                "update(...), which keeps the other settings"
            )
        value, expected = fields[name], type(default_value)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(f"config.{name}={value!r}: expected {_TYPES[expected]}")
        if value != value:  # NaN.
            raise UserError(f"config.{name}={value!r}: expected a number")
        if isinstance(value, (int, float)) and not -LIMIT < value < LIMIT:
            raise UserError(f"config.{name}={value!r}: expected a number below {LIMIT}")


def _check_class(config: Any) -> None:
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config: found a {type(config).__name__}, expected what default_config() returns; its "
            "update() takes a dict"
        )


def _check_names(fields: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that does not exist, added to an unlocked configuration.

    It would change nothing, and the run could not be loaded again.
    """
    for name in fields:
        if name not in NAMES:
            raise UserError(f"config.{name}: no such setting{suggest_setting(name)}")


def _check_values(fields: Mapping[str, Any]) -> None:
    for name, choices in CHOICES.items():
        if (value := fields[name]) not in choices:
            raise UserError(
                f"config.{name}={value!r}: expected one of {', '.join(choices)}"
                + suggest_choice(value, choices)
            )
    for name in POSITIVE:
        if not fields[name] > 0:
            raise UserError(f"config.{name}={fields[name]!r}: expected a number above 0")
    for name in NOT_NEGATIVE:
        if not fields[name] >= 0:
            raise UserError(f"config.{name}={fields[name]!r}: expected 0 or more")
    for name in SHARES:
        if not 0 <= fields[name] < 1:
            raise UserError(
                f"config.{name}={fields[name]!r}: expected 0 to 1, a share: 0.1 is a tenth"
            )
    if not 0 <= fields["loss.label_smoothing"] < 0.5:
        raise UserError(
            f"config.loss.label_smoothing={fields['loss.label_smoothing']!r}: expected 0 to 0.5, "
            "the probability that a preference is the wrong way round"
        )
    if fields["train.learning_rate"] > 1:
        raise UserError(
            f"config.train.learning_rate={fields['train.learning_rate']!r}: expected at most 1: "
            "AdamW changes every weight by about as much at each step"
        )


def _check_batch(batch: int, micro: int) -> None:
    if batch % micro:
        divisor = max(size for size in range(1, micro + 1) if batch % size == 0)
        raise UserError(
            f"config.train.batch_size={batch} is no multiple of config.train.micro_batch_size="
            f"{micro}; set config.train.micro_batch_size={divisor}, too"
        )
