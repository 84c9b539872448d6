"""The faults of `mutation_list` are ones: each is in one place, is Python, and has its tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.scripts.mutation_list import MUTATIONS, locate

ROOT = Path(__file__).parents[2]
AREAS = set(
    "losses methods selection catalogue prompts masks positions responses replay chunks log-probs "
    "models export lora optimizer steps refresh checkpoint resume origin loaders tokens batches "
    "formats grouping metrics mesh hosts signals runs config cli help files estimate "
    "reports".split()
) | {"model card"}


def test_a_mutation_is_another_program() -> None:
    for mutation in MUTATIONS:
        source = locate(mutation.old, ROOT).read_text()
        mutated = source.replace(mutation.old, mutation.new)
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source)), mutation.name


def test_the_tests_that_mutations_name_are_there() -> None:
    named = {test for mutation in MUTATIONS for test in mutation.tests}
    for file in {test.partition("::")[0] for test in named}:
        body = ast.parse((ROOT / file).read_text()).body
        functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        known = {file, *(f"{file}::{name}" for name in functions)}
        missing = {test for test in named if test.partition("::")[0] == file} - known
        assert not missing
    assert all(mutation.tests for mutation in MUTATIONS)


def test_every_area_has_mutations() -> None:
    assert len(MUTATIONS) >= 60 and len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert {mutation.area for mutation in MUTATIONS} == AREAS


def test_a_text_that_is_not_there_once_is_an_error(tmp_path: Path) -> None:
    package = tmp_path / "mass_dpo_jax"
    package.mkdir()
    (package / "a.py").write_text("x = 1\ny = 1\n")
    assert locate("x = 1", tmp_path) == package / "a.py"
    for text, times in (("z", 0), ("= 1", 2)):
        with pytest.raises(ValueError, match=f"found {times} times"):
            locate(text, tmp_path)
