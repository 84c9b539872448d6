"""The files of the paper's experiment, and its limit of training rows."""

from __future__ import annotations

import importlib
import json

import pytest
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.config import CHOICES, PAPER_DATA
from tests.support.processes import python


def read_config(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CHOICES["data.name"])
def test_only_the_papers_data_sets_are_cut_to_its_rows(name: str) -> None:
    want = 20_000 if name in PAPER_DATA else 0
    config = config_lib.paper()
    assert config.data.max_train == 0
    config.data.name = name
    assert config.data.max_train == want
    assert dict(config_lib.flatten(config))["data.max_train"] == want
    assert json.loads(config.to_json_best_effort())["data"]["max_train"] == want
    config_checks.check(config)
    kept = config.copy_and_resolve_references()
    kept.data.name = "jsonl"
    assert kept.data.max_train == want  # What a run began with stays.


@pytest.mark.parametrize("order", [1, -1])
def test_a_limit_that_is_given_holds(order: int) -> None:
    for limit in (0, 7):
        config = config_lib.paper()
        for name, value in (("data.name", "lastfm"), ("data.max_train", limit))[::order]:
            config.update_from_flattened_dict({name: value})
        assert (config.data.name, config.data.max_train) == ("lastfm", limit)


def test_the_command_prints_the_limit_that_holds() -> None:
    def printed(*flags: str) -> str:
        done = python(
            "-m", "mass_dpo_jax.train", "--config=llama3", "--config.print=True", *flags, check=True
        )
        [line] = [line for line in done.stdout.splitlines() if "max_train" in line] or [""]
        return line

    assert "20000" in printed("--config.data.name=qasc")
    assert "20000" not in printed("--config.data.name=jsonl")
    assert "=5" in printed("--config.data.max_train=5", "--config.data.name=qasc")


def test_the_papers_file_says_what_the_defaults_are() -> None:
    """Each of its lines but those of `paper()` cites a default."""
    made = [
        dict(config_lib.flatten(read_config(name)))
        for name in ("paper", "llama3", "qwen3", "smollm3")
    ]
    assert all(config == dict(config_lib.flatten(config_lib.paper())) for config in made)


def test_the_small_grid_is_the_papers_but_for_its_size() -> None:
    configs = read_config("smollm2"), read_config("paper")
    configs[0].model.path = "SmolLM2"
    config_checks.check(configs[0])
    small, paper = (dict(config_lib.flatten(config)) for config in configs)
    same = (
        "method",
        "beta",
        "num_negatives",
        "selection",
        "train.warmup_ratio",
        "data.chat_template",
    )
    for name in paper:
        if name.startswith(same):
            assert small[name] == paper[name], name
