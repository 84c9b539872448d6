"""Several processes, on one host or many, that run one command together.

Every process runs the same program and computes on its own devices. The primary process (process
0) writes files and prints; it also is the coordinator, whose address all others are given. When a
process stops with an error, all of them end; when one dies, JAX ends the others.

What one process sees alone (files, caches, a clock, a kernel that fails) must not decide what the
others have to do too: `run_on_primary` gives all of them the primary process's answer, and
`gather_values` everybody's. Both wait through the coordinator for as long as it takes. A collective
computation must not wait that long, since some networks give up after 30 seconds: processes meet
through the coordinator before they start one after long work of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # Its client is in no public module; orbax takes it here too.
from jax.experimental import multihost_utils

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.process_group import ProcessGroup

FAILED, PROCESSES = "mass_dpo_jax/failed", "mass_dpo_jax/processes"
AGREED = "mass_dpo_jax/agreed"
WAIT = 1000  # Milliseconds of a single wait for the coordinator's answer.
PIECE = 1 << 24  # Bytes.
POLL = 0.5  # Seconds between looks for the failure of another process.
LINGER = 4 * POLL  # The coordinator outlives its own failure by that, so that all hear of it.
STALE = 10  # Seconds for which a network's file system may not show a new file.
_log = logging.getLogger(__name__)


def start(group: ProcessGroup) -> None:
    """Joins the other processes. Before anything of JAX computes or asks for devices.

    Ends the process with a message if the cluster does not say who the others are, if they do not
    come in time, or if they expect other numbers.

    Raises:
      UserError: as `ProcessGroup.check`.
    """
    group.check()
    with _deadline(group):
        try:
            jax.distributed.initialize(
                group.coordinator,
                group.processes,
                group.process,
                # `_deadline` is earlier: JAX would end the process with a stack trace.
                initialization_timeout=group.start_timeout + 60,
                heartbeat_timeout_seconds=group.peer_timeout,
                shutdown_timeout_seconds=group.peer_timeout,
            )
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            _end(_not_started(group, error), 2)
    state, client = distributed.global_state, _client()
    # Nobody else notices: a process that expects more of them would wait for ever.
    if state.process_id == 0:
        client.key_value_set(PROCESSES, str(state.num_processes))
    _watcher.start()
    expected = int(client.blocking_key_value_get(PROCESSES, 1000 * group.start_timeout))
    if expected != state.num_processes:
        fail(
            f"--num_processes={state.num_processes} of process {state.process_id}: process 0 was "
            f"started with {expected}",
            2,
        )
    jax.devices()  # Of accelerators, this takes a while.
    gather_values("started")
    # While everybody is here: networks limit how long the first computation of all may wait.
    multihost_utils.sync_global_devices("start")
    if is_primary():
        _log.info(f"{jax.process_count()} processes, {jax.device_count()} devices")


def is_primary() -> bool:
    """Is this the process that writes and speaks?"""
    return not jax.distributed.is_initialized() or distributed.global_state.process_id == 0


def is_multiprocess() -> bool:
    """Are there other processes?"""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def gather(x: Any) -> np.ndarray:
    """All of an array, on every process. All of them must ask for it, in the same order."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def run_on_primary(decide: Callable[[], Any]) -> Any:
    """What the first process finds, on every process: anything that JSON can say.

    The others do not look themselves. They wait for as long as the first one takes, and end if it
    fails.
    """
    if not is_multiprocess():
        return decide()
    key = f"{AGREED}/{next(_agreements)}"
    if not is_primary():
        return _get(key)
    found = decide()
    _set(key, found)
    return found


def gather_values(value: Any) -> list[Any]:
    """Each process's value, in the order of processes, on all of them; values as JSON can say.

    Nobody leaves before everybody has come, however long that takes.
    """
    if not is_multiprocess():
        return [value]
    state = distributed.global_state
    key = f"{AGREED}/{next(_agreements)}"
    _set(f"{key}/{state.process_id}", value)
    found: list[Any] = run_on_primary(
        lambda: [_get(f"{key}/{process}") for process in range(state.num_processes)]
    )
    return found


def broadcast_array(array: np.ndarray | None) -> np.ndarray | None:
    """The first process's array, or its None, on every process; what the others give is not read.

    In pieces, since each process holds one on its devices for every other.
    """
    if not is_multiprocess():
        return array
    about = run_on_primary(lambda: None if array is None else [array.dtype.str, array.shape])
    if about is None:
        return None
    found = np.asarray(array, order="C") if is_primary() else np.empty(about[1], about[0])
    content = found.reshape(-1).view(np.uint8)
    for start in range(0, content.size, PIECE):
        part = content[start : start + PIECE]
        size = 1 << (part.size - 1).bit_length()  # Few sizes: each is a program to compile.
        room = np.zeros(size, np.uint8)
        if is_primary():
            room[: part.size] = part
        room = multihost_utils.broadcast_one_to_all(room)
        if not is_primary():
            part[:] = room[: part.size]
    return found


def broadcast_dataclass(kind: type[Any], value: Any) -> Any:
    """The first process's dataclass of arrays and of what JSON can say, on every process."""
    if not is_multiprocess():
        return value
    found = {}
    for name in [field.name for field in dataclasses.fields(kind)]:
        part = getattr(value, name, None)
        text = None if isinstance(part, np.ndarray) else json.dumps(part).encode()
        # As arrays both: a list of a million names is too long for the coordinator.
        array = broadcast_array(part if text is None else None)
        if array is None:
            array = broadcast_array(np.frombuffer(text or b"", np.uint8))
            assert array is not None
            found[name] = json.loads(array.tobytes())
        else:
            found[name] = array
    return value if is_primary() else kind(**found)


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError on a process that was started with other settings than the first one.

    Args:
      settings: by flag, what JSON can say.
    """
    theirs = run_on_primary(lambda: dict(settings))
    for name in sorted({*theirs, *settings}):
        ours, expected = settings.get(name), theirs.get(name)
        if json.dumps(ours) != json.dumps(expected):
            raise UserError(
                f"--{name}: {ours!r} for process {jax.process_index()} on {socket.gethostname()}, "
                f"{expected!r} for process 0; expected the same flags for every process"
            )


def check_shared_folder(folder: Path, flag: str) -> None:
    """Makes a folder, and raises UserError on a process that does not see it as the first one does.

    Args:
      folder: what all processes read and write.
      flag: what named it.
    """
    if not is_multiprocess():
        return

    def leave_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".shared-{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    mark = folder / run_on_primary(leave_mark)
    deadline = time.monotonic() + STALE
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{flag}={folder}: process {jax.process_index()} on {socket.gethostname()} does "
                "not see what process 0 writes there; expected a folder that all hosts share"
            )
        time.sleep(POLL)
    gather_values("seen")
    if is_primary():
        mark.unlink()


def finish() -> None:
    """Waits until every process is through: who ends early looks dead to the others."""
    if is_multiprocess():
        gather_values("finished")
        _through.set()
        if _watcher.is_alive():
            _watcher.join()


def fail(message: str, status: int) -> NoReturn:
    """Ends every process with an exit status. The first one prints the message, once, if it can."""
    try:
        _client().key_value_set(FAILED, json.dumps([message, status]))
    except RuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            _end(message, status)  # The coordinator is gone.
    # `_watch` ends this process as all others, unless it has ended itself.
    time.sleep(20 * POLL)
    _end(message, status)


def describe_error(error: BaseException) -> str:
    """An unexpected error of this process, in a line, for those who look at the first one's log."""
    state = distributed.global_state
    where = f"process {state.process_id} of {state.num_processes} on {socket.gethostname()}"
    lines = str(error).strip().splitlines() or [""]
    if is_lost_peer(error):
        return f"{where} lost another process, which has probably ended: see its log ({lines[0]})"
    return f"{where} failed: see its log ({type(error).__name__}: {lines[0]})"


def is_lost_peer(error: BaseException) -> bool:
    """Is this what a computation raises whose other processes are gone?"""
    names = ("Gloo", "NCCL", "coordination service")
    return isinstance(error, RuntimeError | ValueError) and any(n in str(error) for n in names)


def _client() -> Any:
    """Of the coordinator's small table of keys and values."""
    return distributed.global_state.client


def _set(key: str, value: Any) -> None:
    _client().key_value_set(key, json.dumps(value))


def _get(key: str) -> Any:
    """Waits, without an end, for what some process sets. In steps: Ctrl-C comes between them."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(key, WAIT))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _watch() -> None:
    """Ends this process when another one has failed."""
    client = _client()
    while not _through.wait(POLL):
        try:
            message, status = json.loads(client.key_value_try_get(FAILED))
        except RuntimeError:  # No such key; or the coordinator is gone, and JAX ends us.
            continue
        if is_primary():
            print(f"error: {message}", file=sys.stderr, flush=True)
            time.sleep(LINGER)
        _end(None, status)


_agreements = itertools.count()  # The same number on every process.
_through = threading.Event()
_watcher = threading.Thread(target=_watch, daemon=True)


def _end(message: str | None, status: int) -> NoReturn:
    """Without waiting for threads, or for computations that others will not answer."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _deadline(group: ProcessGroup) -> Iterator[None]:
    """Ends the process if the body takes longer than `start_timeout`."""
    came = threading.Event()

    def wait() -> None:
        if not came.wait(group.start_timeout):
            _end(_not_all_came(group), 2)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        came.set()


def _not_all_came(group: ProcessGroup) -> str:
    """Who is missing, as far as this process can tell."""
    state = distributed.global_state
    address = state.coordinator_address or group.coordinator
    who = f"process {state.process_id} of {group.processes or 'the cluster'}"
    after = f"after {group.start_timeout} s (--start_timeout)"
    if address is None:
        return f"--distributed: {after}, the cluster has not said who the coordinator is"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"{who}: {after}, nobody answers at the coordinator's {address} ({error}); is process "
            "0 running, and does that port of its host let others in?"
        )
    return (
        f"{who}: {after}, not all processes have come to {address}; expected each to be started "
        "with the same --num_processes and a --process_id of its own"
    )


def _not_started(group: ProcessGroup, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "RPC server" in text:
        return (
            f"process 0 cannot listen on the port of {group.coordinator or 'the coordinator'}: "
            "does another program (or an earlier run) use it?"
        )
    if "must be defined" in text or "should be defined" in text:
        return (
            "--distributed: found no cluster that says who the processes are (Cloud TPU, SLURM, "
            "Kubernetes, Open MPI); give --coordinator_address, --num_processes and --process_id"
        )
    return f"--distributed: {type(error).__name__}: {text[:500]}"
