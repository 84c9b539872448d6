"""What is meant by names that do not exist: other programs' ones, and typos."""

from __future__ import annotations

import pytest

from mass_dpo_jax.config import CHOICES, NAMES
from mass_dpo_jax.utils import suggestions

TRAIN = ("config", "workdir", "distributed", "process_id")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # As other programs call it.
        ("lr", "config.train.learning_rate"),
        ("config.lr", "config.train.learning_rate"),
        ("config.train.lr", "config.train.learning_rate"),
        ("config.optimizer.lr", "config.train.learning_rate"),
        ("batch", "config.train.batch_size"),
        ("config.batch_size", "config.train.batch_size"),
        ("per_device_train_batch_size", "config.train.micro_batch_size"),
        ("num_train_epochs", "config.train.epochs"),
        ("max_steps", "config.train.steps"),
        ("output_dir", "workdir"),
        ("bf16", "config.model.dtype"),
        ("model_name_or_path", "config.model.path"),
        ("dataset_name", "config.data.path"),
        ("config.lora_r", "config.model.lora.rank"),
        ("config.lora.r", "config.model.lora.rank"),
        ("max_grad_norm", "config.train.clip"),
        ("report_to", "config.log.wandb_project"),
        ("resume_from_checkpoint", "workdir"),
        # Without their group, or with another.
        ("learning_rate", "config.train.learning_rate"),
        ("train.steps", "config.train.steps"),
        ("seed", "config.seed"),
        ("config.training.steps", "config.train.steps"),
        ("config.trian.batch_size", "config.train.batch_size"),
        ("config.evaluation.batch_size", "config.eval.batch_size"),
        # Misspelt.
        ("workdri", "workdir"),
        ("Workdir", "workdir"),
        ("process-id", "process_id"),
        ("learnig_rate", "config.train.learning_rate"),
        ("config.train.learningrate", "config.train.learning_rate"),
        ("config.num_negative", "config.num_negatives"),
        ("ouput_dir", "workdir"),
    ],
)
def test_the_nearest_name(name: str, expected: str) -> None:
    assert suggestions.suggest_names(name, NAMES, TRAIN)[0] == expected


def test_several_settings_may_be_meant() -> None:
    found = suggestions.suggest_names("path", NAMES, TRAIN)
    assert set(found) == {"config.data.path", "config.model.path", "config.model.lora.path"}
    assert len(suggestions.suggest_names("max_length", NAMES)) == 2
    assert len(suggestions.suggest_names("gradient_accumulation_steps", NAMES)) == 2


def test_a_name_like_no_other_has_no_nearest() -> None:
    assert (
        suggestions.suggest_names("config.foo", NAMES)
        == suggestions.suggest_names("flub", NAMES, TRAIN)
        == []
    )
    assert (
        suggestions.suggest_names("step", NAMES, TRAIN) == []
    )  # Of a checkpoint: not train.steps.
    assert suggestions.suggest_names("config.lr", (), TRAIN) == []
    assert suggestions.did_you_mean([]) == ""


def test_every_name_of_the_table_leads_to_a_setting_or_a_flag() -> None:
    targets = {target for found in suggestions._read_names().values() for target in found} - {""}
    assert targets <= {*NAMES, "--output", "--workdir", "--config"}
    for name in suggestions._read_names():
        assert name == "step" or suggestions.suggest_names(
            name, NAMES, ("config", "workdir", "output")
        ), name


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("method", "mass-dpo", "mass_dpo"),
        ("method", "MassDPO", "mass_dpo"),
        ("method", " DPO", "dpo"),
        ("method", "mass_dop", "mass_dpo"),
        ("model.dtype", "bf16", "bfloat16"),
        ("model.dtype", "fp16", "bfloat16"),
        ("model.dtype", "fp32", "float32"),
        ("model.lora.base", "4bit", "nf4"),
        ("model.attention", "flash_attention_2", "fused"),
        ("data.name", "huggingface", "preferences"),
        ("data.on_bad_row", "ignore", "skip"),
    ],
)
def test_the_nearest_choice(setting: str, value: str, expected: str) -> None:
    assert suggestions.suggest_choice(value, CHOICES[setting]) == f"; did you mean {expected}?"


def test_another_method_s_name_is_no_misspelling() -> None:
    assert (
        suggestions.suggest_choice("simpo", CHOICES["method"])
        == suggestions.suggest_choice("", CHOICES["method"])
        == ""
    )
