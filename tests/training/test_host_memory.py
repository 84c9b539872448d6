"""Where the host has not the memory: one line, for real under a limit, and as libraries say it."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax.cli import running
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.readers import preferences
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.models import random_tensors, write_weights
from tests.support.models import tiny_config as tiny_model
from tests.support.processes import python

LIMITED = """
import resource, runpy, sys
from mass_dpo_jax.training import loop
real = loop._read_weights

def limited(*args):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + 2**23
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return real(*args)

loop._read_weights = limited
runpy.run_module("mass_dpo_jax.train", run_name="__main__", alter_sys=True)
"""


def test_weights_that_the_host_has_no_room_for(tmp_path: Path) -> None:
    """A limit as batch systems set it, from when the weights are read on."""
    data = write_jsonl(tmp_path / "data.jsonl")
    config = dataclasses.replace(tiny_model("llama"), vocab_size=20_000, hidden_size=512)
    train_tokenizer(["amber basil"], 300, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(config.to_hf()))
    write_weights(tmp_path / "model", random_tensors(config))
    settings = (
        "data.chat_template=none", f"data.path={data}", "model.dtype=float32",
        f"model.path={tmp_path}/model",
    )  # fmt: skip
    flags = [f"--config.{setting}" for setting in settings]
    done = python("-c", LIMITED, "--config=llama3", *flags, f"--workdir={tmp_path}/run")
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: not enough memory on the host to load the weights; what helps: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def too_large() -> MemoryError:
    with pytest.raises(MemoryError) as kept:
        np.empty(2**50)
    return kept.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the host; .*MemoryError"),
        (MemoryError("Cannot allocate memory (os error 12)"), "the host; .*os error 12"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the host; .*Cannot allocate"),
        (RuntimeError("std::bad_alloc"), "the host; .*bad_alloc"),
        (ImportError("libx.so: failed to map segment from shared object"), "the host; .*libx.so"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), "a device: "),
        (too_large(), "the host; .*8.00 PiB"),
    ],
)
def test_no_memory_in_the_words_of_several_libraries(error: Exception, said: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(UserError, match=f"not enough memory on {said}"):
        running.run_within_limits(fail)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "gone"), RuntimeError("memory"), ImportError("no module")]
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as kept:
        running.run_within_limits(fail)
    assert kept.value is error


def test_data_that_the_host_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(preferences, "read_preferences", fail)
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match=r"to read the data; .* config\.data\.max_train"):
        running.run_within_limits(lambda: load_examples(config.data, "train", 0))
