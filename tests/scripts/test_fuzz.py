"""A little of `fuzz.py` at every test run, the same each time, and what makes its verdicts."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mass_dpo_jax.errors import UserError
from tests.scripts import corruptions, fuzz_targets

# Those that train a run first, or compile, are left to fuzz.py.
COUNTS = {
    "jsonl": 60, "written": 60, "formats": 60, "qasc": 60, "lastfm": 60, "movielens": 40,
    "hetrec": 40, "medmcqa": 60,
    "saved": 20, "parquet": 15, "tokenizer": 40, "caches": 60, "model": 40, "settings": 60,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    fuzz_targets.quiet()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", COUNTS)
def test_spoilt_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    spoiler = fuzz_targets.Spoiler(name, tmp_path)
    for i in range(COUNTS[name]):
        rng = random.Random(f"{name} {i}")
        number = rng.randrange(len(spoiler.files))
        kind = fuzz_targets.KINDS[i % 32 % 4] if i % 32 < 4 else "content"
        try:
            spoiler.read(number, kind, corruptions.mutate(spoiler.whole[number], rng))
        except Exception as error:
            error.add_note(f"input {i} of {name}: {spoiler.files[number].name}, {kind}")
            raise


def test_what_a_message_must_be(tmp_path: Path) -> None:
    fuzz_targets.check_message(f"{tmp_path}/a:3: wrong", tmp_path)
    for message in ("wrong", f"{tmp_path}: two\nlines", f"{tmp_path}: \ud800"):
        with pytest.raises(AssertionError):
            fuzz_targets.check_message(message, tmp_path)


def test_any_other_exception_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")

    def read(folder: Path) -> Iterator:
        yield lambda: int((folder / "a").read_text())

    target = fuzz_targets.Target(lambda folder: None, read)
    with pytest.raises(ValueError, match="invalid literal"):
        fuzz_targets.read_spoilt(target, tmp_path)


def test_a_user_error_is_one_short_line_that_can_be_printed() -> None:
    message = str(UserError("a\nb\x1b[31m\ud800é" + "x" * 5000))
    assert message.startswith("a\\nb\\x1b[31m\\ud800éxx") and len(message) < 1100
    assert message.isprintable() and message.encode()
