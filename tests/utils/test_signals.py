"""Ctrl-C at any moment of a command: one line, status 130, and nothing half written."""

from __future__ import annotations

import os
import pkgutil
from pathlib import Path

import pytest

from tests.support.helpers import write_jsonl
from tests.support.processes import ROOT, ended, environment, spawn

LINE = "interrupted; the same command goes on from what was saved\n"
EARLY = "interrupted; nothing was written\n"
# Python runs a module of this name first. This one sends a signal, or two, when the command comes
# to some moment: the import of a module, or the call of a function.
AT_A_MOMENT = """
import builtins, hashlib, os, signal, sys, threading, time
where, how = os.environ["MOMENT"].split(":")
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may have it ignored.
real = builtins.__import__

def now():
    send(0.3)  # While this thread is at something.
    if how == "once":
        time.sleep(60)
    elif how == "twice":
        send(0.6)
        wait()
    elif how == "deaf":
        wait()
    elif how == "turned":  # Into another error, as libraries do.
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("something else") from None

def send(later):
    threading.Timer(later, os.kill, (os.getpid(), signal.SIGINT)).start()

def wait():
    # Many minutes in C, during which no Python runs in this thread.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)

def traced(name, *args, **kwargs):
    found = real(name, *args, **kwargs)
    if name == where:
        builtins.__import__ = real
        now()
    module, _, function = where.rpartition(".")
    loaded = sys.modules.get(module)
    if loaded is not None and function in vars(loaded) and callable(vars(loaded)[function]):
        builtins.__import__ = real
        setattr(loaded, function, lambda *_, **__: now())
    return found

builtins.__import__ = traced
"""
MOMENTS = {
    "absl:once": EARLY,  # The flags are not there yet.
    "ml_collections:turned": EARLY,
    "jax.numpy:once": LINE,
    "transformers:turned": LINE,
    "mass_dpo_jax.training.prepare.open_splits:once": LINE,
    "mass_dpo_jax.training.prepare.open_splits:deaf": LINE,
    "mass_dpo_jax.training.prepare.open_policy:twice": LINE,
    "mass_dpo_jax.training.loop._read_weights:once": LINE,
}


@pytest.mark.parametrize("half", [0, 1])
def test_ctrl_c_at_any_moment(tmp_path: Path, half: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_A_MOMENT)
    data = write_jsonl(tmp_path / "data.jsonl")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    train = ["-m", "mass_dpo_jax.train", "--config=tiny", f"--config.data.path={data}"]
    train += ["--config.data.name=jsonl", f"--config.cache_dir={tmp_path}/cache"]
    moments = list(MOMENTS)[half::2]
    for moment in moments:
        pkgutil.resolve_name(moment.partition(":")[0])  # A moment that never comes tests nothing.
    started = [
        spawn(
            [*train, f"--workdir={tmp_path}/run{number}"],
            env=environment(1, MOMENT=moment, PYTHONPATH=path),
        )
        for number, moment in enumerate(moments)
    ]
    for moment, (status, _, said) in zip(moments, ended(started, 100), strict=True):
        assert (status, said) == (130, MOMENTS[moment]), moment
    assert not [*tmp_path.rglob("*tmp*"), *tmp_path.rglob("metrics*")]
