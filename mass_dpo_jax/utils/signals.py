"""Ctrl-C ends a command with one line and status 130, whatever the process is doing.

Python itself raises KeyboardInterrupt once the main thread is back in Python. That prints a
traceback, and a compilation or a long read delays it by minutes. Here a thread learns of signals at
once.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

EXIT_STATUS = 130
GRACE_SECONDS = 2.0  # Time for the main thread to clean up before the process ends without it.


def _end() -> NoReturn:
    sys.stdout.flush()
    os.write(2, f"{ctrl_c.line}\n".encode())
    os._exit(EXIT_STATUS)


@dataclasses.dataclass
class CtrlC:
    """How this process ends on Ctrl-C.

    Attributes:
        line: printed at the end, says what was left.
        noticed: the main thread has seen the interruption.
        held: the first Ctrl-C only asks training to end, see training/interruption.py.
        end: ends the process at once; several processes end together.
    """

    line: str = "interrupted; nothing was written"
    noticed: bool = False
    held: bool = False
    end: Callable[[], NoReturn] = _end


ctrl_c = CtrlC()


def watch() -> None:
    """Starts to watch for Ctrl-C. For our own programs only, as the first thing they do."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # Ignored, by `nohup` or a shell that put the process in the background.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _interrupt)
    sys.excepthook = _without_traceback(sys.excepthook)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    ctrl_c.noticed = True
    raise KeyboardInterrupt


def _without_traceback(previous: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an excepthook that ends without a traceback after an interruption."""

    def hook(error_type: type[BaseException], *details: Any) -> None:
        if ctrl_c.noticed or issubclass(error_type, KeyboardInterrupt):
            ctrl_c.end()
        previous(error_type, *details)

    return hook


def _listen(reader: int) -> None:
    pressed = 0
    while number := os.read(reader, 1):
        if number[0] != signal.SIGINT:
            continue
        pressed += 1
        if pressed > 1:
            ctrl_c.end()
        elif not ctrl_c.held:
            threading.Timer(GRACE_SECONDS, _end_unless_noticed).start()


def _end_unless_noticed() -> None:
    if not ctrl_c.noticed:
        ctrl_c.end()
