"""Signals that ask a run to stop.

Until a run has something to save, they stop it at once; then they wait for a point between steps
where it can be saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from mass_dpo_jax.utils.signals import ctrl_c

SIGNALS = (int(signal.SIGTERM), int(signal.SIGINT))


class Stopped(Exception):
    """The run was asked to stop; the text names the signal."""


@dataclasses.dataclass
class _State:
    """The state of this process.

    Attributes:
        requested_by: the signal that asked the run to stop; "" for none.
        checks: number of calls of `raise_if_requested`.
        previous_handlers: handlers before `handle_signals`, by signal; empty outside of it.
    """

    requested_by: str = ""
    checks: int = 0
    previous_handlers: dict[int, Any] = dataclasses.field(default_factory=dict)


_state = _State()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Makes SIGTERM raise `Stopped` at once, until `defer_signals` is called.

    Several processes leave SIGTERM to JAX, which agrees with all of them on one step.
    """
    if jax.distributed.is_initialized():
        yield
        return
    # Ignored signals stay ignored: `nohup` and shells ignore Ctrl-C for background programs.
    _state.previous_handlers = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    if signal.SIGTERM in _state.previous_handlers:
        signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        yield
    finally:
        for number, handler in _state.previous_handlers.items():
            signal.signal(number, handler)
        _state.requested_by, _state.previous_handlers = "", {}
        ctrl_c.held = False


def defer_signals() -> None:
    """Makes SIGTERM and Ctrl-C wait for `raise_if_requested`, since there is something to save.

    A second signal ends the process.
    """
    if _state.previous_handlers and not ctrl_c.held:
        ctrl_c.held = True
        for number in _state.previous_handlers:
            signal.signal(number, _request)


def allow_signals() -> None:
    """Undoes `defer_signals`, as everything is saved: signals stop the run at once again.

    One that came before is still to be asked for by `raise_if_requested`.
    """
    if _state.previous_handlers and ctrl_c.held:
        ctrl_c.held = False
        for number, handler in _state.previous_handlers.items():
            signal.signal(number, _raise_stopped if number == signal.SIGTERM else handler)


def raise_if_requested() -> None:
    """Raises `Stopped` if this run was asked to stop.

    To be called between things that take long, and by every process equally often.
    """
    _state.checks += 1
    if jax.distributed.is_initialized():
        if multihost_utils.reached_preemption_sync_point(_state.checks):
            raise Stopped("SIGTERM")
    elif _state.requested_by:
        raise Stopped(_state.requested_by)


def _raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Stopped(signal.Signals(number).name)


def _request(number: int, frame: FrameType | None) -> None:
    del frame
    _state.requested_by = signal.Signals(number).name
    signal.signal(number, _state.previous_handlers[number])
