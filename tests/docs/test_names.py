"""What the pages name exists: files, dotted names, modules that are run, settings and tests."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib

ROOT = Path(__file__).parents[2]
PAGES = [  # Without those that a program wrote.
    *ROOT.glob("*.md"),
    *(page for page in ROOT.glob("docs/**/*.md") if "results" not in page.parts),
]
FOLDERS = ("mass_dpo_jax", "tests", "benchmarks", "launch", "configs", "docs", "examples")
SUFFIXES = "py|sh|md|png|yaml|yml|sbatch|csv|cfg|cff|toml|jsonl"
# Pages speak of `training/step.py` and of `test_mesh.py` where the folder is clear.
HOMES = ("", "mass_dpo_jax", "tests", "docs")
# Files that readers have or that runs write.
WRITTEN = {"pairs.jsonl", "scores.jsonl", "selected.jsonl", "items.jsonl", "mined.jsonl",
           "metrics.jsonl", "words.jsonl",
           "train.jsonl", "pairs-dev.csv", "prompts.jsonl",
           "pairs.py", "rank.py", "ask.py", "mine.py", "make_model.py", "README.md"}  # fmt: skip
FLAGS = {"print"}  # Behind --config., and no setting.
# Of the architecture page: values of settings, and names of JAX and of splits.
OTHER_NAMES = {"dots", "train", "validation", "test", "custom_vjp", "metrics.json"}


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)), scope="module")
def text(request: pytest.FixtureRequest) -> str:
    return request.param.read_text()


def test_the_files_of_a_page_exist(text: str) -> None:
    missing = [path for path in files_of(text) if not exists(path)]
    assert not missing


def test_the_dotted_names_of_a_page_exist(text: str) -> None:
    missing = [name for name in dotted_names_of(text) if not resolves(name)]
    assert not missing


def test_the_modules_that_a_page_runs_exist(text: str) -> None:
    names = re.findall(r"python -m ((?:mass_dpo_jax|benchmarks|examples)[\w.]*)", text)
    assert not [name for name in names if importlib.util.find_spec(name) is None]


def test_the_settings_of_a_page_exist(text: str) -> None:
    if text.startswith("# Changes"):
        return  # These name settings that are gone, too.
    settings = settings_of(config_lib.default())
    groups = {name.partition(".")[0] for name in settings if "." in name}
    named = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)=?", text))
    for name in re.findall(r"`(?:config\.)?([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
        is_other = exists(name) or resolves(f"mass_dpo_jax.{name}")
        if name.partition(".")[0] in groups and not is_other and name not in WRITTEN:
            named.add(name)
    unknown = named - settings - groups - FLAGS
    # A table's head may end in a dot: `--config.model.lora.`.
    assert not {name for name in unknown if not any(s.startswith(f"{name}.") for s in settings)}


def test_the_tests_of_a_page_exist(text: str) -> None:
    names = set(re.findall(r"`(test_\w+)`", text))
    assert not names - functions_of_tests()


def test_the_names_of_the_architecture_page_are_defined_in_the_package() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    page = re.sub(r"^```(?!text).*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    settings = settings_of(config_lib.default())
    names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(\))?`", page)
    assert len(names) > 60
    known = definitions()
    missing = {
        name
        for name in set(names) - settings - OTHER_NAMES
        if not exists(name)
        and not resolves(f"mass_dpo_jax.{name}")
        and not all(part in known for part in name.split("."))
    }
    assert not missing


def test_the_names_in_the_pictures_of_the_architecture_page_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    pictures = "\n".join(re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    paths = re.findall(r"(?<![\w/])((?:data|models|selection|training)/\w+(?:\.\w+)?)", pictures)
    methods = re.findall(r"\b([A-Z]\w+)\.([a-z_]\w+)", pictures)
    assert len(paths) > 8 and len(methods) > 1
    names = [path.removesuffix(".py").replace("/", ".") for path in paths]
    assert not [name for name in names if not resolves(f"mass_dpo_jax.{name}")]
    assert not [names for names in methods if not {*names} <= definitions()]


def test_what_is_missing_is_found() -> None:
    assert files_of("see `training/nowhere.py` and [x](../mass_dpo_jax/step.py)") == [
        "training/nowhere.py", "mass_dpo_jax/step.py",
    ]  # fmt: skip
    assert not exists("training/nowhere.py") and exists("training/step.py")
    assert not resolves("mass_dpo_jax.losses.nothing") and resolves("mass_dpo_jax.losses.dpo")
    assert "test_what_is_missing_is_found" in functions_of_tests()
    assert "Program" in definitions() and "train_step" in definitions()


def settings_of(config: ConfigDict, prefix: str = "") -> set[str]:
    """Returns the dotted names of all settings."""
    names: set[str] = set()
    for name, value in config.items():
        inner = isinstance(value, ConfigDict)
        names |= settings_of(value, f"{prefix}{name}.") if inner else {prefix + name}
    return names


def files_of(text: str) -> list[str]:
    """Paths in code or links; placeholders in capitals and addresses are none."""
    text = re.sub(r"https?://\S+", "", text)
    found = re.findall(rf"(?<![\w*/{{])((?:\.\./)*[\w./-]*\w\.(?:{SUFFIXES}))(?![\w*])", text)
    paths = (re.sub(r"^(?:\.\./)+", "", path) for path in found)
    return [
        path for path in paths
        if path not in WRITTEN and not re.search(r"[A-Z]{3,}/", path) and "runs/" not in path
    ]  # fmt: skip


@functools.cache
def exists(path: str) -> bool:
    if any((ROOT / home / path).exists() for home in HOMES):
        return True
    # A bare name: of a page beside it, or of a test.
    return "/" not in path and any(True for f in FOLDERS for _ in (ROOT / f).rglob(path))


def dotted_names_of(text: str) -> list[str]:
    return re.findall(r"(?<![\w/.])(mass_dpo_jax(?:\.[A-Za-z_]\w*)+)(?!\w|/)", text)


@functools.cache
def resolves(name: str) -> bool:
    """Whether a name is a module, or what modules and their classes have."""
    module, rest = name, []
    while True:
        try:
            thing = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, dot, last = module.rpartition(".")
            rest.insert(0, last)
            if not dot:
                return False
    for part in rest:
        if part in getattr(thing, "__annotations__", {}):
            return True
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


@functools.cache
def functions_of_tests() -> frozenset[str]:
    files = (ROOT / "tests").rglob("*.py")
    names = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    return frozenset(names | {file.stem for file in (ROOT / "tests").rglob("*.py")})


@functools.cache
def definitions() -> frozenset[str]:
    """Names of modules, classes, functions, fields and constants of the package."""
    names: set[str] = set()
    for file in (ROOT / "mass_dpo_jax").rglob("*.py"):
        names.add(file.stem)
        names.add(file.parent.name)
        names.update(_defined(ast.parse(file.read_text())))
    return frozenset(names)


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.arg):
            yield node.arg
