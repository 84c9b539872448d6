"""Imports run one way: a part of the package imports what stands before it in `LAYERS`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mass_dpo_jax"
LAYERS = (
    {"errors"},
    {"utils"},
    {"config_values"},
    {"config"},
    {"config_checks"},
    {"losses", "metrics", "theory", "selection", "models", "data"},
    {"runs"},
    {"training"},
    {"estimate"},
    {"reports"},
    {"cli", "api"},
    {"train", "evaluate", "score", "select", "mine", "export", "report", "compare"},
)
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Names of the package itself, as `mass_dpo_jax.__version__`; and entry points, above all.
TOP = ("__init__", "__main__")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of all that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(name: str) -> str:
    """Returns the folder or module of the package's root that a dotted name lies in, or ""."""
    package, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return part if package == "mass_dpo_jax" and part in RANKS else ""


def wrong_imports(source: str, part: str) -> list[str]:
    """Returns the imports of a source in `part` that point the wrong way."""
    return [
        f"line {line}: {name}"
        for line, name in imports(ast.parse(source))
        if (other := part_of(name)) and other != part and RANKS[other] >= RANKS[part]
    ]


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.stem not in TOP)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert part in RANKS, f"{path}: in no layer; tests/test_layers.py lists them"
    assert wrong_imports(path.read_text(encoding="utf-8"), part) == []


def test_wrong_imports_are_noticed() -> None:
    source = (
        "def f():\n    from mass_dpo_jax.training import step\nimport mass_dpo_jax.utils.files\n"
    )
    assert wrong_imports(source, "runs") == ["line 2: mass_dpo_jax.training.step"]
    assert wrong_imports(source, "reports") == []
    assert wrong_imports("from mass_dpo_jax import selection", "models") != []  # The same layer.
    assert wrong_imports("from mass_dpo_jax.models import lora", "models") == []
