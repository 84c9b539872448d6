"""What ruff's rules do not hold of docstrings: they begin with a verb, and have one layout."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mass_dpo_jax"
SECTIONS = ("Args", "Attributes", "Examples", "Raises", "Returns", "Yields")
# A verb in the third person, or what a predicate says.
FIRST_WORD = re.compile(r"[A-Z][a-z]+(?:-[a-z]+)?s|Whether|Is")
NOT_VERBS = {"This", "Its", "Does", "As", "Has", "Was", "Always", "Classes", "Figures", "Settings"}
PROPERTIES = {"property", "cached_property"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yields the functions and methods with docstrings that are not properties or dunders."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            names = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
            if not names & PROPERTIES and ast.get_docstring(node):
                yield node


def begins_with_a_verb(docstring: str) -> bool:
    word = re.split(r"[\s,:;.]", docstring, maxsplit=1)[0]
    return bool(FIRST_WORD.fullmatch(word)) and word not in NOT_VERBS


def badly_indented(docstring: str) -> list[str]:
    """Returns the first lines of sections that are not indented by four."""
    lines = docstring.splitlines()
    return [
        after
        for line, after in itertools.pairwise(lines)
        if line.rstrip(":") in SECTIONS and line.endswith(":") and not re.match(r" {4}\S", after)
    ]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_docstrings_of_functions(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.name: ast.get_docstring(node) or "" for node in functions(tree)}
    first = {name: text.splitlines()[0] for name, text in docstrings.items()}
    assert {n: text for n, text in first.items() if not begins_with_a_verb(text)} == {}
    assert {n: bad for n, text in docstrings.items() if (bad := badly_indented(text))} == {}


def test_what_is_no_verb_is_noticed() -> None:
    assert begins_with_a_verb("Returns the rows.") and begins_with_a_verb("Whether it is one.")
    assert begins_with_a_verb("Un-pads the rows.") and not begins_with_a_verb("Of metrics.json.")
    assert not begins_with_a_verb("This is the loss.") and not begins_with_a_verb("The loss.")
    assert badly_indented("Sums.\n\nArgs:\n  x: a number.") == ["  x: a number."]
    assert badly_indented("Sums.\n\nArgs:\n    x: a number.\n\nReturns:\n    A sum.") == []
