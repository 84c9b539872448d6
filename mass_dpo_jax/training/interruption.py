"""Signals that ask a run to end: it is asked between steps, so that it can save first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (int(signal.SIGTERM), int(signal.SIGINT))


class Stopped(Exception):
    """The run was asked to end; the text names the signal."""


class _Asked:
    """Of this process: by which signal, and how often `check` was called."""

    by = ""
    checks = 0


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C let `check` raise `Stopped`; a second one ends the process.

    A program of several processes leaves SIGTERM to JAX, which agrees with all of them on one step.
    """
    if jax.distributed.is_initialized():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        _Asked.by = signal.Signals(number).name
        signal.signal(number, before[number])

    # What is ignored stays so: Ctrl-C by programs that `nohup` or a shell put in the background.
    before: dict[int, Any] = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        _Asked.by = ""
        for number, handler in before.items():
            signal.signal(number, handler)


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
