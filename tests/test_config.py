"""A configuration knows its fields and refuses others, wherever they come from."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks, config_values
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import decoder
from mass_dpo_jax.models.config import FAMILIES, TARGETS
from mass_dpo_jax.models.families import PROJECTIONS
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.selection import gram
from mass_dpo_jax.train import train
from tests.support.helpers import tiny_config, write_jsonl


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        (lambda c: setattr(c, "learning_rate", 1), "train.learning_rate"),
        (lambda c: setattr(c.train, "lr", 1), "train.learning_rate"),
        (lambda c: c.__setitem__("batch_size", 4), "train.batch_size"),
        (lambda c: c.update(batch_size=4), "train.batch_size"),
        (lambda c: c.train.update(learning_rte=1), "train.learning_rate"),
        (lambda c: c.update({"data": {"colums": ""}}), "data.columns"),
        (lambda c: c.update_from_flattened_dict({"train.stepz": 1}), "train.steps"),
        (lambda c: setattr(c.model.lora, "r", 8), "model.lora.rank"),
    ],
)
def test_an_unknown_field_is_refused_when_it_is_set(
    change: Callable[[ConfigDict], None], meant: str
) -> None:
    made = config_lib.default()
    for config in (made, copy.deepcopy(made), config_checks.resolve(made), config_lib.paper()):
        with pytest.raises((AttributeError, KeyError), match=f"did you mean config.{meant}"):
            change(config)
        config_checks.check(config)


def test_known_fields_can_be_set_in_every_way() -> None:
    config = config_lib.default()
    config.data.update(path="a.jsonl", max_test=3)
    config.update({"train": {"steps": 7}}, beta=0.5)
    config.model.lora = config_lib.default().model.lora
    with config.unlocked():
        config.seed = 3
    config.unlock()
    config["num_negatives"] = 2
    config_checks.check(config)
    assert (config.data.path, config.train.steps, config.beta, config.seed) == (
        "a.jsonl",
        7,
        0.5,
        3,
    )


def test_a_field_for_which_it_was_unlocked_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl")).unlock()
    config.train.lr = 1e-3
    with pytest.raises(UserError, match=r"^config\.train\.lr: no such setting; did you mean"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^config\.train\.lr: no such setting"):
        config_checks.check(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train": {}}, "config: found a dict, expected what default_config"),
        (Path("a.py"), "config: found a PosixPath"),
        (None, "config: found a NoneType"),
        (ConfigDict({"train": {"steps": 3}}), "is missing: take default_config"),
    ],
)
def test_what_is_no_configuration(config: Any, message: str) -> None:
    for look in (config_checks.check, config_checks.resolve):
        with pytest.raises(UserError, match=message):
            look(config)


def test_a_copy_leaves_the_caller_s_alone_and_can_be_made_of_a_frozen_one() -> None:
    config = config_lib.default()
    frozen = FrozenConfigDict(config)
    for given in (config, frozen):
        found = config_checks.resolve(given)
        found.model.path = "elsewhere"
        assert given.model.path == ""
        assert found.to_dict() == {**config.to_dict(), "model": found.model.to_dict()}


def test_numbers_of_numpy_and_paths_are_python_s_own() -> None:
    config = config_lib.default()
    config.beta, config.num_negatives = np.logspace(-2, 0, 3)[1], np.arange(5)[2]
    config.train.learning_rate, config.data.path = np.float32(0.5), Path("rows.jsonl")
    config.update_from_flattened_dict({"train.clip": np.float64(0.25), "eval.batch_size": 8})
    found = config_checks.validate(config)
    values = found.beta, found.num_negatives, found.train.learning_rate, found.data.path
    assert values == (0.1, 2, 0.5, "rows.jsonl") and found.train.clip == 0.25
    assert [type(value) for value in values] == [float, int, float, str]
    with pytest.raises(TypeError, match="num_negatives"):
        config.num_negatives = np.float64(2)


def test_paths_are_expanded_as_a_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    config = config_lib.default()
    values = {
        "data.path": "~/p.jsonl", "model.path": "$DATA/m", "model.reference_path": "${DATA}/r",
        "model.lora.path": "~", "cache_dir": "~/cache/$USERNAME_X", "data.chat_template": "~/t",
        "mine.catalogue": "$DATA/i.txt",
    }  # fmt: skip
    monkeypatch.setenv("USERNAME_X", "me")
    config.update_from_flattened_dict(values)
    found = dict(config_lib.flatten(config_checks.validate(config)))
    assert {name: found[name] for name in values} == {
        "data.path": "/home/me/p.jsonl", "model.path": "/data/m",
        "model.reference_path": "/data/r", "model.lora.path": "/home/me",
        "cache_dir": "/home/me/cache/me", "data.chat_template": "/home/me/t",
        "mine.catalogue": "/data/i.txt",
    }  # fmt: skip
    assert set(values) == set(config_lib.PATHS)
    config = config_lib.default()
    config.data.update(name="hub", path="owner/name")
    assert config_checks.validate(config).data.path == "owner/name"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", float("nan"), "beta=nan: expected a number"),
        ("beta", -0.1, "expected a number above 0"),
        ("train.learning_rate", 0.0, "expected a number above 0"),
        ("train.learning_rate", float("nan"), "expected a number"),
        ("train.learning_rate", float("inf"), "expected a number below"),
        ("train.learning_rate", 5.0, "expected at most 1"),
        ("train.warmup_ratio", 100.0, "expected 0 to 1, a share"),
        ("data.validation_share", 10.0, "expected 0 to 1, a share: 0.1 is a tenth"),
        ("data.validation_share", -0.1, "expected 0 to 1"),
        ("train.batch_size", 8, r"no multiple of .*=16; set config.train.micro_batch_size=8, too"),
        ("train.batch_size", 24, "set config.train.micro_batch_size=12, too"),
        ("train.micro_batch_size", 256, "set config.train.micro_batch_size=128, too"),
        ("seed", 2**31, "expected a number below"),
        ("method", "DPO", "did you mean dpo"),
        ("model.dtype", "fp16", "expected one of float32, bfloat16; did you mean bfloat16"),
        ("data.path", " pairs.jsonl", "without quotes or blanks around it"),
    ],
)
def test_values_that_no_run_could_use(name: str, value: Any, message: str) -> None:
    config = config_lib.default()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        config_checks.validate(config)


def test_a_run_s_settings_are_locked_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_lib.default().to_dict()))
    for config in (run_config.load_config(tmp_path), run_config.get_config(str(tmp_path))):
        with pytest.raises(AttributeError, match="no such setting"):
            config.lr = 1


def test_choices_are_those_of_the_code_that_reads_them() -> None:
    """config.py lists them itself, so that --help imports nothing."""
    expected = {
        "model.scratch.model_type": FAMILIES,
        "model.remat": decoder.REMAT,
        "selection.feature_norm": gram.FEATURE_NORMS,
    }
    for name, choices in expected.items():
        assert set(config_lib.CHOICES[name]) == set(choices), name
    assert list(config_values.LORA_TARGETS) == list(TARGETS)
    for theirs, ours in TARGETS.items():
        part = "mlp" if theirs in config_values.MLP_TARGETS else "self_attn"
        assert PROJECTIONS[ours] == f"{part}.{theirs}"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", list(config_values.LORA_TARGETS)),
        (" v_proj, q_proj", ["v_proj", "q_proj"]),
        (r".*\.(q|v)_proj", ["q_proj", "v_proj"]),
        (r"model\.layers\.\d+\.mlp\..*", list(config_values.MLP_TARGETS)),
        ("^.*self_attn.*$", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_targets_of_adapters(targets: str, expected: list[str]) -> None:
    assert list(config_values.split_targets(targets)) == expected
    names = set(config_lib.CHOICES["data.name"]) - set(config_lib.PREFERENCES[1:])
    for name in names:
        assert callable(importlib.import_module(f"mass_dpo_jax.data.readers.{name}").load)
