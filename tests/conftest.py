"""What every test starts from: simulated devices, no network, no traces in the user's home.

Environment variables that change a test run:

- `MASS_DPO_TEST_DATA`: the folder with the real data sets; tests that need it skip without it.
- `MASS_DPO_REQUIRE_DATA=1`: a skipped test is a failure (continuous integration sets it).
- `MASS_DPO_TEST_ACCELERATOR=1`: run on the accelerator JAX finds, tests marked for one included.
- `MASS_DPO_TEST_SMOLLM2`: a folder with SmolLM2-135M-Instruct, for the tests marked for it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import pytest

from tests.support.processes import ACCELERATOR, xla_flags

# Tests that are for some machines only, by their mark, and what has them run.
OPTIONAL = {
    "accelerator": ("MASS_DPO_TEST_ACCELERATOR=1", ACCELERATOR),
    "smollm2": ("MASS_DPO_TEST_SMOLLM2=DIR", "MASS_DPO_TEST_SMOLLM2" in os.environ),
}
REQUIRE = os.environ.get("MASS_DPO_REQUIRE_DATA") == "1"
CACHE = tempfile.mkdtemp(prefix="mass_dpo_jax_tests_")

# JAX and the Hugging Face libraries read these once, when they are first imported.
if not ACCELERATOR:
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{xla_flags(devices=8)} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = CACHE
os.environ.pop("HF_HOME", None)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Modules whose functions say the shapes and types of their arrays: every call in a test is checked.
# The hook works on what is imported after it, so nothing above imports the package.
SHAPES_CHECKED = [
    "mass_dpo_jax.losses",
    "mass_dpo_jax.metrics",
    "mass_dpo_jax.selection",
    "mass_dpo_jax.theory",
]
jaxtyping.install_import_hook(SHAPES_CHECKED, "beartype.beartype")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow"):
            if not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: expected pytest.mark.slow(reason=...)")
    for mark_name, (needed, is_given) in OPTIONAL.items():
        for item in items:
            if item.get_closest_marker(mark_name) and not is_given:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed}"))


def _forbid_skip(report: Any) -> None:
    """Turns a skip into a failure that shows the reason for the skip."""
    if REQUIRE and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: MASS_DPO_REQUIRE_DATA=1 allows no skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if not any(map(item.get_closest_marker, OPTIONAL)):
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Returns the folder with the real data sets."""
    folder = os.environ.get("MASS_DPO_TEST_DATA")
    if not folder:
        pytest.skip("needs the real data: set MASS_DPO_TEST_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.fail(f"MASS_DPO_TEST_DATA={folder} is not a folder")
    return Path(folder)


# Compiled programs hold memory mappings, of which Linux grants a process 65,530: the whole suite in
# one process ran out of them and crashed in the compiler.
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _few_mappings() -> Iterator[None]:
    """Forgets compiled programs after a file where there are many. Else the next file uses them."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > MOST_MAPPINGS:
        import gc

        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def one_device() -> Iterator[None]:
    """Lets runs see one of the simulated devices: faster, and what most users have."""
    from tests.support.runs import on_one_device

    with on_one_device():
        yield


@pytest.fixture
def strict_jax() -> Iterator[None]:
    """Forbids arrays to be given dimensions that the code does not write out: `[B] - [B, B]`, where
    `[B, 1] - [B, B]` was meant, is a wrong number without a word."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def own_criteria(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets at the end of a test the criteria that it has registered."""
    from mass_dpo_jax import config
    from mass_dpo_jax.selection import registry

    summaries, usual = config.CRITERION_SUMMARIES, dict(config.CRITERION_SUMMARIES)
    monkeypatch.setattr(registry, "CRITERIA", dict(registry.CRITERIA))
    monkeypatch.setitem(config.CHOICES, "selection.criterion", tuple(usual))
    yield
    summaries.clear()
    summaries.update(usual)


@pytest.fixture
def shapes_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets wrong shapes through to the package's own errors, which users see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """Returns PyTorch, which only the tests use, as an oracle."""
    module: ModuleType = pytest.importorskip("torch", reason="needs PyTorch")
    return module


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Returns a function that gives what the program has logged so far."""
    monkeypatch.setattr(logging.getLogger("mass_dpo_jax"), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: caplog.text
