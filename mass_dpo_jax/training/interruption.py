"""Signals that ask a run to end: once it has something to save, between steps, so that it can."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar, NoReturn

import jax
from jax.experimental import multihost_utils

from mass_dpo_jax.utils.signals import ctrl_c

SIGNALS = (int(signal.SIGTERM), int(signal.SIGINT))


class Stopped(Exception):
    """The run was asked to end; the text names the signal."""


class _Asked:
    """Of this process: by which signal, how often `check` was called, and the handlers of before
    `on_signals`, outside of which there are none."""

    by = ""
    checks = 0
    before: ClassVar[dict[int, Any]] = {}


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Within, SIGTERM raises `Stopped` wherever it comes, until `hold` is called.

    A program of several processes leaves SIGTERM to JAX, which agrees with all of them on one step.
    """
    if jax.distributed.is_initialized():
        yield
        return
    # What is ignored stays so: Ctrl-C by programs that `nohup` or a shell put in the background.
    _Asked.before = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    if signal.SIGTERM in _Asked.before:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        for number, handler in _Asked.before.items():
            signal.signal(number, handler)
        _Asked.by, _Asked.before = "", {}
        ctrl_c.held = False


def hold() -> None:
    """From here on there is something to save: SIGTERM and Ctrl-C wait for `check`, which raises
    `Stopped`. A second one ends the process."""
    if _Asked.before and not ctrl_c.held:
        ctrl_c.held = True
        for number in _Asked.before:
            signal.signal(number, _ask)


def check() -> None:
    """Raises `Stopped` if this run was asked to end.

    To be called between things that take long, and by every process equally often.
    """
    _Asked.checks += 1
    if jax.distributed.is_initialized():
        if multihost_utils.reached_preemption_sync_point(_Asked.checks):
            raise Stopped("SIGTERM")
    elif _Asked.by:
        raise Stopped(_Asked.by)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Stopped(signal.Signals(number).name)


def _ask(number: int, frame: FrameType | None) -> None:
    del frame
    _Asked.by = signal.Signals(number).name
    signal.signal(number, _Asked.before[number])
