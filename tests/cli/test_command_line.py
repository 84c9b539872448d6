"""What the commands print for words that people type: one line, with what to type instead."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.training import method_config
from tests.support.processes import command, environment, refused

LR = "did you mean --config.train.learning_rate=...?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # A configuration that is not there is what is missing, not its settings.
        ("train --workdir=nowhere --config.data.path=x", "--config is missing, and --workdir=no"),
        ("evaluate --config.data.path=x", "--config is missing: expected a file or one of"),
        # Names that other programs have, or none.
        ("train --config=tiny --lr=1", f"--lr: no such flag; {LR} --help lists all"),
        ("train --config=tiny --learning_rate=1", f"--learning_rate: no such flag; {LR}"),
        ("train --config=tiny --config.lr=1", f"--config.lr: no such setting; {LR}"),
        ("train --config=tiny --config.learning_rate=1", f"no such setting; {LR}"),
        ("train --config=tiny --train.learning_rate=1", f"no such flag; {LR}"),
        ("train --config=tiny --config.train.learningrate=1", f"no such setting; {LR}"),
        ("train --config=tiny --config.batch=8", "did you mean --config.train.batch_size=...?"),
        ("train --config=tiny --epochs 3", "did you mean --config.train.epochs=...?"),
        ("train --config=tiny --bf16", "did you mean --config.model.dtype=...?"),
        ("train --config=tiny --output_dir=x", "did you mean --workdir=...?"),
        ("export --output_dir=x", "did you mean --output=...?"),
        ("export --max-shard-gb=5", "did you mean --max_shard_gb=...?"),
        ("export --config.model.dtype=float32", "has no settings of its own, it takes the run's"),
        ("evaluate --config=tiny --step=1", "--step: no such flag; --help lists all"),
        ("train --config=tiny --config.zzz=1", "--config.zzz: no such setting; --help lists all"),
        ("train --config=tiny --config.train=1", "--config.train: is a group of settings"),
        ("train --config=tiny --config.nolog.report", "did you mean --config.log.report=...?"),
        ("compare --workdir=x", "runs are given without one: python -m mass_dpo_jax.compare RUN"),
        ("compare x --config.beta=1", "this command has no settings"),
        ("report x --ouput=y", "--ouput: no such flag; did you mean --output?"),
        ("report x --out=y", "--out: no such flag; did you mean --output?"),
        # Values.
        ("train --config=tiny --config.train.steps=many", "steps=many: expected an integer"),
        ("train --config=tiny --config.train.steps=1.5", "steps=1.5: expected an integer"),
        ("train --config=tiny --config.train.steps=1,000", "steps=1,000: expected an integer"),
        ("train --config=tiny --config.train.steps=10k", "steps=10k: expected an integer"),
        ("train --config=tiny --config.train.steps=", "steps=: is empty; a variable that is not"),
        ("train --config=tiny --config.train.steps", "its value is missing, as in --config.train."),
        ("train --config=tiny --config.train.steps = 5", "expected --config.train.steps=VALUE"),
        ("train --config=tiny --config.beta=0,1", "beta=0,1: expected a number, as 0.1"),
        ("train --config=tiny --config.beta=10%", "beta=10%: expected a number, as 0.1"),
        ("train --config=tiny --config.log.report=nope", "report=nope: expected true or false"),
        ("train --config=tiny --config.train.steps=2 3", "unexpected argument '3'"),
        ("train --config=tiny --workdir=", "--workdir=: is empty; a variable that is not set?"),
        ("train --config=tiny --workdir --config.beta=1", "--workdir: its value is missing"),
        ("train --config=tiny --workdir=$UNSET_HERE/x", "the variable UNSET_HERE is not set"),
        ("evaluate --split=dev", "expected one of train, validation, test, all; did you mean vali"),
        ("export --dtype=bf16", "expected one of bfloat16, float32; did you mean bfloat16?"),
        ("export --step=last", "--step=last: expected an integer"),
        ("export --adapters=ja", "--adapters=ja: expected true or false"),
        ("export --max_shard_gb=5GB", "--max_shard_gb=5GB: expected a number"),
        # The configuration's file.
        (
            "train --config=lama3",
            "--config=lama3: no such file; a name alone can be llama3, paper, ",
        ),
        ("train --config=lama3", "did you mean llama3?"),
        ("train --config=configs/tiny", "did you mean configs/tiny.py?"),
        ("train --config=README.md", "--config=README.md: not a Python file"),
        ("train --config=setup.cfg", "not a Python file"),
        ("train --config=configs/tiny.py:x", "TypeError: get_config() takes 0 positional"),
        ("train --config=tests/support/processes.py", "has no function get_config()"),
        ("train tiny", "unexpected argument 'tiny'; did you mean --config=tiny?"),
        ("train config=tiny", "did you mean --config=tiny?"),
        ("train \u2014config=tiny", "it begins with a dash that is none on the keyboard"),
        ("train --flagfile=missing", "Unable to open flagfile"),
    ],
)
def test_a_mistake_is_one_line_with_what_to_type(line: str, message: str) -> None:
    name, *words = shlex.split(line)
    assert message in refused(f"mass_dpo_jax.{name}", *words)


@pytest.mark.parametrize("words", [["train", "--config=tiny"], ["trian"]])
def test_a_command_is_named_behind_a_dot(words: list[str]) -> None:
    assert "use a dot: python -m mass_dpo_jax.train" in refused("mass_dpo_jax", *words)


def printed(*words: str) -> str:
    done = command("mass_dpo_jax.train", "--config=tiny", *words, "--config.print")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("--config.train.steps=1e3", "train.steps=1000"),
        ("--config.train.steps=70.0", "train.steps=70"),
        ("--config.train.steps 70", "train.steps=70"),
        ("-config.train.steps=70", "train.steps=70"),
        ("--config.train.steps=1_000", "train.steps=1000"),
        ("--config.mesh.data -1", "mesh.data=-1"),
        ("--config.train.steps=1 --config.train.steps=2", "train.steps=2"),
        ("--config.beta=1e-2", "beta=0.01"),
        ("--config.beta=2", "beta=2.0"),
        ("--config.log.report=no", "log.report=False"),
        ("--config.log.report=Off", "log.report=False"),
        ("--config.log.report False", "log.report=False"),
        ("--noconfig.log.report", "log.report=False"),
        ("--config.dry_run=yes", "dry_run=True"),
        ("--config.dry_run", "dry_run=True"),
        ("--config.dry_run 1", "dry_run=True"),
        ("--config.data.path=", "data.path=''"),
        ("--config.data.columns=a=b,c=d", "data.columns=a=b,c=d"),
    ],
)
def test_values_as_people_write_them(words: str, setting: str) -> None:
    assert f"--config.{setting}\n" in printed(*words.split())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.train.lr = 3", "AttributeError: 'lr: no such setting; did you mean config.train.lear"),
        ("c.train.steps = 'four'", "TypeError: Could not override field 'steps'"),
        ("c.train.steps += None", "TypeError: "),
        ("c.trian.steps = 3", "AttributeError: "),
    ],
)
def test_a_mistake_in_a_configuration_of_ones_own_has_its_line(
    tmp_path: Path, body: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    lines = ("from mass_dpo_jax import config", "def get_config():", "    c = config.paper()")
    path.write_text("\n".join([*lines, f"    {body}", "    return c"]))
    assert f"--config={path}:4: {message}" in refused("mass_dpo_jax.train", f"--config={path}")


def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from mass_dpo_jax import config\n"
        "def get_config():\n"
        "    c = config.paper()\n"
        "    c.update(method='dpo', num_negatives=1)\n"
        "    c.data.update(path='p.jsonl')\n"
        "    c.unlock().train.steps = 3\n"
        "    return c\n"
    )
    done = command("mass_dpo_jax.train", f"--config={tmp_path / 'mine.py'}", "--config.print")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config.method=dpo\n" in done.stdout and "--config.train.steps=3\n" in done.stdout
    (tmp_path / "other.py").write_text("def get_config():\n    return {'train': {'steps': 3}}\n")
    line = refused("mass_dpo_jax.train", f"--config={tmp_path / 'other.py'}", "--workdir=x")
    assert "config: found a dict, expected what default_config() returns" in line
    (tmp_path / "none.py").write_text("def get_config():\n    pass\n")
    done = command("mass_dpo_jax.train", f"--config={tmp_path / 'none.py'}", "--workdir=x")
    message = "none.py: get_config() returns None; expected the settings"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(message)


def test_settings_without_an_effect_are_named(tmp_path: Path) -> None:
    words = ("--config=tiny", "--config.train.steps=3", "--config.log.report=no", "--show=0")
    done = command("mass_dpo_jax.data", *words, "--config.train.batch_size=8")
    first, *_ = done.stdout.splitlines()
    assert first == "no effect on this command: --config.train.steps, --config.log.report"
    done = command("mass_dpo_jax.data", "--config=tiny", "--show=0", "--config.data.max_test=3")
    assert "no effect" not in done.stdout
    words = (f"--output={tmp_path / 'a'}", "--config.data.max_test=3")
    done = command("mass_dpo_jax.score", "--config=tiny", *words)
    assert done.stdout.startswith("no effect on this command: --config.data.max_test\n")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "selection.draw odpo. pl_rank. model.lora. device_memory_gb"),
        ({"selection.criterion": "all"}, "selection.ridge selection.refresh num_negatives"),
        ({"selection.criterion": "hardest"}, "selection.ridge selection.pooling"),
        ({"method": "sdpo"}, "selection.criterion selection.features"),
        ({"method": "dpo"}, "num_negatives"),
        ({"method": "pl_sampled"}, "selection.criterion selection.fisher_scale"),
        ({"method": "sft"}, "beta num_negatives selection.refresh model.reference_path"),
        ({"method": "mppo"}, "beta model.reference_path"),
        ({"loss.type": "cpo"}, "model.reference_path"),
        ({"loss.link": "hinge"}, "loss.label_smoothing"),
        ({"train.steps": 3}, "train.epochs"),
        ({"model.path": "folder"}, "model.scratch."),
    ],
)
def test_settings_that_a_training_does_not_read(changes: dict[str, Any], expected: str) -> None:
    config = config_lib.default()
    usual = set(method_config.find_unread(config))
    config.update_from_flattened_dict(changes)
    found = set(method_config.find_unread(config))
    for name in expected.split():
        assert any(other.startswith(name) for other in found)
        assert not changes or not any(other.startswith(name) for other in usual)
    read = {
        "odpo": "odpo.alpha", "pl_sampled": "selection.draw", "dpo_k": "num_negatives",
        "pl_rank": "pl_rank.top",
    }  # fmt: skip
    for method, name in read.items():
        config.method = method
        assert name not in method_config.find_unread(config)
    config.model.lora.rank = 8
    assert not any(name.startswith("model.lora") for name in method_config.find_unread(config))


def test_a_run_without_its_flag(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    line = refused("mass_dpo_jax.evaluate", str(run))
    assert line == f"error: unexpected argument '{run}'; did you mean --workdir={run}?"


def test_a_training_names_the_settings_that_it_does_not_read(tmp_path: Path) -> None:
    words = ("--config=tiny", "--config.method=sdpo", "--config.selection.criterion=contrast")
    done = command("mass_dpo_jax.train", *words, "--config.data.path=none")
    assert done.stdout == "no effect on this training: --config.selection.criterion\n"


def test_home_and_variables_in_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell left them as they are; commands run elsewhere than here, with this home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config_lib.default().to_dict()))
    options = {"env": {**environment(), "RUN": "run"}, "cwd": tmp_path}
    words = ("--workdir", "${HOME}/$RUN", "--output=~/no/scores", "--config.log.report=no")
    done = command("mass_dpo_jax.evaluate", *words, **options)
    assert done.stderr == f"error: --output={tmp_path}/no/scores: its folder does not exist\n"
    done = command("mass_dpo_jax.compare", "~/missing", **options)
    assert done.stderr.startswith(f"error: {tmp_path}/missing: no such folder")
    assert not (tmp_path / "~").exists()
