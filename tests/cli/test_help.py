"""What the commands say of themselves: --help, --config.print, and to who gives no arguments."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.__main__ import COMMANDS
from mass_dpo_jax.cli import help as help_lib
from tests.support import processes
from tests.support.processes import ROOT

EXAMPLES = {"quickstart": "examples.quickstart", "simulation": "benchmarks.simulation"}
MODULES = {name: f"mass_dpo_jax.{name}" for name in COMMANDS} | EXAMPLES
FIELDS = dict(config_lib.flatten(config_lib.default()))


def command(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options = {"env": processes.environment(**variables)} if variables else {}
    return processes.command(MODULES[name], *words, **options)


def docstring(name: str) -> str:
    spec = importlib.util.find_spec(MODULES[name])
    assert spec and spec.origin
    path = Path(spec.origin)
    path = path.with_name("__main__.py") if path.name == "__init__.py" else path
    return ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""


def entries(text: str) -> dict[str, str]:
    """By flag, its type, default and description, on one line."""
    found = re.findall(r"^  --(\S+)  (.*(?:\n {6}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", about) for name, about in found}


def test_every_command_is_listed() -> None:
    done = processes.command("mass_dpo_jax", check=True)
    listed = dict(re.findall(r"^  (\w+) +(.*)$", done.stdout, re.MULTILINE))
    sources = (ROOT / "mass_dpo_jax").rglob("*.py")
    runnable = {path for path in sources if "\nif __name__ ==" in path.read_text()}
    assert len(listed) == len(runnable - {ROOT / "mass_dpo_jax" / "__main__.py"})
    assert listed == {name: docstring(name).partition("\n")[0] for name in listed}


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_have_examples(name: str) -> None:
    doc = docstring(name)
    lines = help_lib.examples(doc).splitlines()
    assert sum(line.startswith(f"    python -m {MODULES[name]} ") for line in lines) == 3
    assert all(len(line) <= help_lib.WIDTH for line in doc.splitlines())


def test_every_setting_has_type_default_comment_and_choices() -> None:
    config = config_lib.default()
    shown = entries(help_lib.describe("A command.", [], config, "the defaults"))
    assert set(shown) == {f"config.{name}" for name in FIELDS}
    for name, value in FIELDS.items():
        start = f"{type(value).__name__}, {value!r}: "
        about = shown[f"config.{name}"]
        assert about.startswith(start) and len(about) > len(start) + 5, name
    for name, choices in config_lib.CHOICES.items():
        for choice in choices:
            assert re.search(rf"\b{choice}\b", shown[f"config.{name}"].partition(": ")[2])


def test_comments_are_those_beside_the_settings() -> None:
    said = help_lib.comments()
    assert said["seed"].startswith("Seed of all random draws: initial weights, data order, drawn")
    assert said["cache_dir"].startswith("Folder for the reference's log-probs, the tokens of")
    assert said["cache_dir"].endswith("programs. Empty: ~/.cache/mass_dpo_jax.")  # Two lines.
    assert said["mesh"] == "Devices along each axis of the mesh; -1 means all that remain."
    assert said["eval"] == "Passes without gradients."


def test_help_of_a_command_with_a_configuration() -> None:
    """On a machine whose devices jax cannot find; the values are those of the file."""
    done = command("train", "--config=configs/qwen3.py", "--help", JAX_PLATFORMS="nothing")
    assert (done.returncode, done.stderr) == (0, "")
    assert help_lib.examples(docstring("train")) in done.stdout
    assert all(len(line) <= help_lib.WIDTH for line in done.stdout.splitlines())
    shown = entries(done.stdout)
    assert {"config", "workdir", "distributed"} < set(shown)
    assert len(shown) == len(FIELDS) + 8  # Nothing of the libraries.
    assert shown["config.model.dtype"].startswith("str, 'bfloat16': ")
    assert "configs/qwen3.py" in done.stdout


@pytest.mark.parametrize(
    ("name", "default"),
    [("score", "test"), ("evaluate", "test"), ("select", "train"), ("mine", "train")],
)
def test_the_split_that_a_command_uses_by_itself(name: str, default: str) -> None:
    about = entries(command(name, "--help").stdout)["split"]
    assert f"Default: {default}, or all if the data is a single file" in about


def test_help_of_commands_without_one() -> None:
    done = command("export", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = entries(done.stdout)
    assert shown["dtype"].startswith("bfloat16 | float32: Type of the stored weights.")
    assert shown["max_shard_gb"].startswith("float, 5.0: ")
    assert len(shown) == 11
    done = command("report", "--help")
    assert done.returncode == 0
    assert help_lib.examples(docstring("report")) in done.stdout and "--output" in done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_without_arguments(name: str) -> None:
    done = command(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert help_lib.examples(docstring(name)) in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: (--\w+ is missing|the following arguments are required): ", last)
    assert "Traceback" not in done.stderr


def test_what_print_shows_can_be_given_back() -> None:
    words = ["--config=configs/tiny.py", "--config.train.steps=7", "--config.data.date=1 May 2024"]
    done = command("train", *words, "--config.print=True")
    assert (done.returncode, done.stderr) == (0, "")
    given = shlex.split(done.stdout, comments=True)
    assert {word.partition("=")[0] for word in given} == {f"--config.{name}" for name in FIELDS}
    changed = done.stdout.split("have their defaults")[0]
    assert "--config.train.steps=7\n" in changed and "--config.data.name=synthetic\n" in changed
    assert "--config.seed" not in changed
    again = command("train", "--config=mass_dpo_jax/config.py", *given, "--config.print")
    assert again.stdout == done.stdout


def test_print_shows_a_run_s_configuration_and_is_no_setting(tmp_path: Path) -> None:
    stored = config_lib.default()
    stored.train.steps = 11
    assert "print" not in stored
    (tmp_path / "config.json").write_text(json.dumps(stored.to_dict()))
    before = sorted(tmp_path.iterdir())
    done = command("train", f"--workdir={tmp_path}", "--config.print=True")
    assert "--config.train.steps=11\n" in done.stdout
    assert sorted(tmp_path.iterdir()) == before
    # A value that no run can use is shown, and then refused.
    done = command("data", "--config=qlora", "--config.print")
    assert done.returncode == 2 and "--config.model.lora.base=nf4\n" in done.stdout
    assert done.stderr == "error: config.model.lora adapts a model: config.model.path is missing\n"
