"""Which packages are imported for what: help and refusals are quick because they import few."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CONFIGURED = [*(f"mass_dpo_jax.{name}" for name in "train evaluate score select mine data".split())]
CONFIGURED += ["examples.quickstart"]
COMMANDS = [*CONFIGURED, *(f"mass_dpo_jax.{name}" for name in "export compare report".split())]
COMMANDS += ["benchmarks.simulation"]
# What the flags are made of; yaml comes with ml_collections. Without JAX, NumPy and all the rest.
FLAGS = {"absl", "ml_collections", "yaml"}
OURS = {
    "mass_dpo_jax",
    "examples",
    "benchmarks",
    "config_config",
}  # ml_collections' name for the file of --config.
# Of the packages that setup.cfg requires, those that a model needs.
MODEL = FLAGS | set(
    "flax huggingface_hub jax jaxtyping jinja2 numpy optax orbax qwix safetensors tensorstore "
    "tokenizers tqdm transformers".split()
)
# By kind: the exit status, and words after `python -m mass_dpo_jax.COMMAND`.
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "help": (0, ("--help",)),
    "no arguments": (2, ()),
    "misspelt flag": (2, ("--workdri=x",)),
    "misspelt setting": (2, ("--config.trian.steps=3",)),
}
PRINTED = ("--config=tiny", "--config.train.steps=7", "--config.print=True")
# Every line of words is run as `python -m` runs it, in a fork of a process that has imported
# nothing; a line of JSON says how it ended and which packages it left imported.
RUNNER = """
import json, os, runpy, sys
before = set(sys.modules)

def imported():
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    names -= sys.stdlib_module_names
    # What extension modules make up to share between them has no spec.
    return sorted(name for name in names if sys.modules[name].__spec__ is not None)

for words in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    answer, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.argv[1:] = words[1:]
    status = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    except Exception as error:
        status = repr(error)
    os.write(answer, (json.dumps([status, imported()]) + "\\n").encode())
    os._exit(0)
"""


def python(code: str, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT, env=env, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def run_all(lines: list[list[str]]) -> dict[str, tuple[int, set[str]]]:
    """By the words as text: exit status, and the packages outside of Python's own library."""
    answers = python(RUNNER, json.dumps(lines)).splitlines()
    found = [json.loads(answer) for answer in answers]
    return {
        " ".join(words): (status, set(packages) - OURS)
        for words, (status, packages) in zip(lines, found, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_commands_answer_without_jax(kind: str) -> None:
    status, words = KINDS[kind]
    found = run_all([[name, *words] for name in COMMANDS])
    assert len(found) == len(COMMANDS)
    for line, (ended, packages) in found.items():
        assert ended == status, line
        assert packages <= FLAGS, line


def test_settings_are_printed_and_commands_listed_without_jax() -> None:
    lines = [[name, *PRINTED] for name in CONFIGURED]
    found = run_all([["mass_dpo_jax"], *lines])
    assert len(found) == 1 + len(CONFIGURED)
    for line, (ended, packages) in found.items():
        assert (ended, packages <= FLAGS) == (0, True), (line, packages)


def test_the_runner_sees_what_is_imported() -> None:
    ((_, packages),) = run_all([["numpy.ma.core"]]).values()
    assert packages == {"numpy"}


def required() -> set[str]:
    """The names by which the packages of setup.cfg are imported."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")[1:]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines}
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if wanted & {canonicalize_name(name) for name in distributions}
    }


def test_the_library_is_lazy_and_a_model_needs_no_plotting() -> None:
    code = (
        "import json, sys; before = set(sys.modules); import mass_dpo_jax as mdj\n"
        "print(json.dumps(sorted(set(sys.modules) - before))); mdj.load_model\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    bare, loaded = map(json.loads, python(code).splitlines())
    assert {name.partition(".")[0] for name in bare} <= {"mass_dpo_jax", *sys.stdlib_module_names}
    packages = {name.partition(".")[0] for name in loaded}
    assert {"matplotlib", "datasets", "jax"} <= required()
    assert packages & required() <= MODEL
    assert not packages & {"pandas", "scipy", "torch"}
    assert (
        not ({*COMMANDS} - {"mass_dpo_jax.data"}) & set(loaded) and "mass_dpo_jax.cli" not in loaded
    )
