"""Several processes, on one host or many, that run one command together.

Every process runs the same program and computes on its own devices. The first one (process 0)
writes files and speaks; it also is the coordinator, whom all others know by its address. Where a
process stops with an error, all of them end; where it is dead, JAX ends the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # Its client is in no public module; orbax takes it here too.
from jax.experimental import multihost_utils

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.process_group import Group

FAILED, PROCESSES = "mass_dpo_jax/failed", "mass_dpo_jax/processes"
POLL = 0.5  # Seconds between looks for the failure of another process.
LINGER = 4 * POLL  # The coordinator outlives its own failure by that, so that all hear of it.
STALE = 10  # Seconds for which a network's file system may not show a new file.
_log = logging.getLogger(__name__)


def start(group: Group) -> None:
    """Joins the other processes. Before anything of JAX computes or asks for devices.

    Ends the process with a message if the cluster does not say who the others are, if they do not
    come in time, or if they expect other numbers.

    Raises:
      UserError: as `Group.check`.
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
    if first():
        _log.info(f"{jax.process_count()} processes, {jax.device_count()} devices")


def first() -> bool:
    """Is this the process that writes and speaks?"""
    return not jax.distributed.is_initialized() or distributed.global_state.process_id == 0


def several() -> bool:
    """Are there other processes?"""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def whole(x: Any) -> np.ndarray:
    """All of an array, on every process. All of them must ask for it, in the same order."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def from_first(value: Any) -> Any:
    """What the first process has, on every process: anything that JSON can say."""
    if not several():
        return value
    text = np.frombuffer(json.dumps(value).encode() if first() else b"", np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(text.size))
    room = text if first() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(room).tobytes())


def table_from_first(table: np.ndarray | None) -> np.ndarray | None:
    """The first process's float32 table, or its None, on every process."""
    if not several():
        return table
    shape = from_first(None if table is None else table.shape)
    if shape is None:
        return None
    here = np.zeros(shape, np.float32) if table is None else table
    return multihost_utils.broadcast_one_to_all(here)


@contextlib.contextmanager
def first_goes_ahead(name: str) -> Iterator[None]:
    """The others run the body when the first process is through, which waits for them: they find
    what it wrote, and a mistake that it stops at is found once."""
    if not several():
        yield
        return
    if not first():
        multihost_utils.sync_global_devices(name)
    yield
    if first():
        multihost_utils.sync_global_devices(name)
    multihost_utils.sync_global_devices(f"{name}: all")


def check_shared(folder: Path, flag: str) -> None:
    """Makes a folder, and raises UserError on a process that does not see it as the first one does.

    Args:
      folder: what all processes read and write.
      flag: what named it.
    """
    if not several():
        return
    mark = folder / from_first(f".shared-{uuid.uuid4().hex}")
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    multihost_utils.sync_global_devices("mark")
    deadline = time.monotonic() + STALE
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{flag}={folder}: process {jax.process_index()} on {socket.gethostname()} does "
                "not see what process 0 writes there; expected a folder that all hosts share"
            )
        time.sleep(POLL)
    multihost_utils.sync_global_devices("seen")
    if first():
        mark.unlink()


def finish() -> None:
    """Waits until every process is through: who ends early looks dead to the others."""
    if several():
        multihost_utils.sync_global_devices("finish")
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


def describe(error: BaseException) -> str:
    """An unexpected error of this process, in a line, for those who look at the first one's log."""
    state = distributed.global_state
    where = f"process {state.process_id} of {state.num_processes} on {socket.gethostname()}"
    lines = str(error).strip().splitlines() or [""]
    if lost(error):
        return f"{where} lost another process, which has probably ended: see its log ({lines[0]})"
    return f"{where} failed: see its log ({type(error).__name__}: {lines[0]})"


def lost(error: BaseException) -> bool:
    """Is this what a computation raises whose other processes are gone?"""
    names = ("Gloo", "NCCL", "coordination service")
    return isinstance(error, RuntimeError | ValueError) and any(n in str(error) for n in names)


def _client() -> Any:
    """Of the coordinator's small table of keys and values."""
    return distributed.global_state.client


def _watch() -> None:
    """Ends this process when another one has failed."""
    client = _client()
    while not _through.wait(POLL):
        try:
            message, status = json.loads(client.key_value_try_get(FAILED))
        except RuntimeError:  # No such key; or the coordinator is gone, and JAX ends us.
            continue
        if first():
            print(f"error: {message}", file=sys.stderr, flush=True)
            time.sleep(LINGER)
        _end(None, status)


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
def _deadline(group: Group) -> Iterator[None]:
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


def _not_all_came(group: Group) -> str:
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


def _not_started(group: Group, error: Exception) -> str:
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
