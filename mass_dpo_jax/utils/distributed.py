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

# Keys in the coordinator's table.
FAILED_KEY = "mass_dpo_jax/failed"
PROCESSES_KEY = "mass_dpo_jax/processes"
AGREED_KEY = "mass_dpo_jax/agreed"
WAIT_MILLISECONDS = 1000  # A single wait for the coordinator's answer.
PIECE_BYTES = 1 << 24  # What `broadcast_array` sends at a time.
POLL_SECONDS = 0.5  # Between looks for the failure of another process.
LINGER_SECONDS = 4 * POLL_SECONDS  # The coordinator stays, so that all learn of a failure.
STALE_SECONDS = 10  # For which a network's file system may not show a new file.
_log = logging.getLogger(__name__)


def start(group: ProcessGroup) -> None:
    """Joins the other processes, before JAX computes anything or looks for devices.

    Ends the process with a message if the cluster does not tell who the others are, if they do not
    come in time, or if they expect another number of processes.

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
                # `_deadline` comes first: JAX would end the process with a stack trace.
                initialization_timeout=group.start_timeout + 60,
                heartbeat_timeout_seconds=group.peer_timeout,
                shutdown_timeout_seconds=group.peer_timeout,
            )
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            _end(_explain_start_error(group, error), 2)
    state, client = distributed.global_state, _client()
    # JAX does not notice, and a process that expects more of them would wait for ever.
    if state.process_id == 0:
        client.key_value_set(PROCESSES_KEY, str(state.num_processes))
    _watcher.start()
    expected = int(client.blocking_key_value_get(PROCESSES_KEY, 1000 * group.start_timeout))
    if expected != state.num_processes:
        fail(
            f"--num_processes={state.num_processes} of process {state.process_id}: process 0 was "
            f"started with {expected}",
            2,
        )
    jax.devices()  # Finding accelerators takes a while.
    wait_for_all()
    # All processes are here: networks limit how long the first collective computation may wait.
    multihost_utils.sync_global_devices("start")
    if is_primary():
        _log.info(f"{jax.process_count()} processes, {jax.device_count()} devices")


def is_primary() -> bool:
    """Whether this is the process that writes files and prints (process 0)."""
    return not jax.distributed.is_initialized() or distributed.global_state.process_id == 0


def is_multiprocess() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def gather(x: Any) -> np.ndarray:
    """Returns a whole array on every process. All must ask for the same ones in the same order."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def run_on_primary(decide: Callable[[], Any]) -> Any:
    """Calls a function on the primary process and returns its result, of JSON's types, on all.

    The others wait for as long as it takes, and end if it fails.
    """
    if not is_multiprocess():
        return decide()
    key = f"{AGREED_KEY}/{next(_agreements)}"
    if not is_primary():
        return _get(key)
    value = decide()
    _set(key, value)
    return value


def gather_values(value: Any) -> list[Any]:
    """Returns the values of all processes, of JSON's types, in the order of processes.

    None of them returns before all have called it, however long that takes.
    """
    if not is_multiprocess():
        return [value]
    state = distributed.global_state
    key = f"{AGREED_KEY}/{next(_agreements)}"
    _set(f"{key}/{state.process_id}", value)
    values: list[Any] = run_on_primary(
        lambda: [_get(f"{key}/{process}") for process in range(state.num_processes)]
    )
    return values


def wait_for_all() -> None:
    """Returns once all processes have called it, however long that takes."""
    gather_values(None)


def broadcast_array(array: np.ndarray | None) -> np.ndarray | None:
    """Returns the primary process's array, or its None, on every process.

    It is sent in pieces, since each process holds one on its devices for every other.

    Args:
        array: the primary process's array; not read on the others.
    """
    if not is_multiprocess():
        return array
    header = run_on_primary(lambda: None if array is None else [array.dtype.str, array.shape])
    if header is None:
        return None
    dtype, shape = header
    result = np.asarray(array, order="C") if is_primary() else np.empty(shape, dtype)
    content = result.reshape(-1).view(np.uint8)
    for start in range(0, content.size, PIECE_BYTES):
        part = content[start : start + PIECE_BYTES]
        size = 1 << (part.size - 1).bit_length()  # Few sizes: each is a program to compile.
        buffer = np.zeros(size, np.uint8)
        if is_primary():
            buffer[: part.size] = part
        buffer = multihost_utils.broadcast_one_to_all(buffer)
        if not is_primary():
            part[:] = buffer[: part.size]
    return result


def broadcast_dataclass(cls: type[Any], value: Any) -> Any:
    """Returns the primary process's dataclass of arrays and JSON's types on every process.

    Args:
        cls: the dataclass.
        value: an instance on the primary process; not read on the others.
    """
    if not is_multiprocess():
        return value
    fields = {}
    for name in [field.name for field in dataclasses.fields(cls)]:
        part = getattr(value, name, None)
        text = None if isinstance(part, np.ndarray) else json.dumps(part).encode()
        # Both go as arrays: a list of a million names is too long for the coordinator.
        array = broadcast_array(part if text is None else None)
        if array is None:
            array = broadcast_array(np.frombuffer(text or b"", np.uint8))
            assert array is not None
            fields[name] = json.loads(array.tobytes())
        else:
            fields[name] = array
    return value if is_primary() else cls(**fields)


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError on a process that was started with other settings than the primary one.

    Args:
        settings: values of JSON's types, by flag.
    """
    primary_settings = run_on_primary(lambda: dict(settings))
    for name in sorted({*primary_settings, *settings}):
        value, expected = settings.get(name), primary_settings.get(name)
        if json.dumps(value) != json.dumps(expected):
            raise UserError(
                f"--{name}: {value!r} for process {jax.process_index()} on {socket.gethostname()}, "
                f"{expected!r} for process 0; expected the same flags for every process"
            )


def check_shared_folder(folder: Path, flag: str) -> None:
    """Makes a folder, and raises UserError on a process that does not see what the primary writes.

    Args:
        folder: the folder that all processes read and write.
        flag: the flag that names it.
    """
    if not is_multiprocess():
        return

    def leave_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".shared-{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    mark = folder / run_on_primary(leave_mark)
    deadline = time.monotonic() + STALE_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{flag}={folder}: process {jax.process_index()} on {socket.gethostname()} does "
                "not see what process 0 writes there; expected a folder that all hosts share"
            )
        time.sleep(POLL_SECONDS)
    wait_for_all()
    if is_primary():
        mark.unlink()


def finish() -> None:
    """Waits until every process is done: one that ends early looks dead to the others."""
    if is_multiprocess():
        wait_for_all()
        _finished.set()
        if _watcher.is_alive():
            _watcher.join()


def fail(message: str, status: int) -> NoReturn:
    """Ends every process with an exit status; the primary one prints the message, if it can."""
    try:
        _client().key_value_set(FAILED_KEY, json.dumps([message, status]))
    except RuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            _end(message, status)  # The coordinator is gone.
    # `_watch` ends this process as all others, unless it has ended itself.
    time.sleep(20 * POLL_SECONDS)
    _end(message, status)


def describe_error(error: BaseException) -> str:
    """Returns a line on an unexpected error of this process, for the primary process's log."""
    state = distributed.global_state
    process = f"process {state.process_id} of {state.num_processes} on {socket.gethostname()}"
    lines = str(error).strip().splitlines() or [""]
    if is_lost_peer(error):
        return f"{process} lost another process, which has probably ended: see its log ({lines[0]})"
    return f"{process} failed: see its log ({type(error).__name__}: {lines[0]})"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process has died."""
    names = ("Gloo", "NCCL", "coordination service")
    return isinstance(error, RuntimeError | ValueError) and any(n in str(error) for n in names)


def _client() -> Any:
    """Returns the client of the coordinator's table of keys and values."""
    return distributed.global_state.client


def _set(key: str, value: Any) -> None:
    _client().key_value_set(key, json.dumps(value))


def _get(key: str) -> Any:
    """Waits for what a process sets, for as long as it takes; in steps, so that Ctrl-C works."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(key, WAIT_MILLISECONDS))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _watch() -> None:
    """Ends this process when another one has failed."""
    client = _client()
    while not _finished.wait(POLL_SECONDS):
        try:
            message, status = json.loads(client.key_value_try_get(FAILED_KEY))
        except RuntimeError:  # No such key; or the coordinator is gone, and JAX ends us.
            continue
        if is_primary():
            print(f"error: {message}", file=sys.stderr, flush=True)
            time.sleep(LINGER_SECONDS)
        _end(None, status)


_agreements = itertools.count()  # Counts alike on every process.
_finished = threading.Event()
_watcher = threading.Thread(target=_watch, daemon=True)


def _end(message: str | None, status: int) -> NoReturn:
    """Ends this process without waiting for threads or for computations with lost processes."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _deadline(group: ProcessGroup) -> Iterator[None]:
    """Ends the process if the body takes longer than `start_timeout`."""
    joined = threading.Event()

    def wait() -> None:
        if not joined.wait(group.start_timeout):
            _end(_explain_missing(group), 2)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _explain_missing(group: ProcessGroup) -> str:
    """Returns which processes are missing, as far as this one can tell."""
    state = distributed.global_state
    address = state.coordinator_address or group.coordinator
    process = f"process {state.process_id} of {group.processes or 'the cluster'}"
    waited = f"after {group.start_timeout} s (--start_timeout)"
    if address is None:
        return f"--distributed: {waited}, the cluster has not said who the coordinator is"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"{process}: {waited}, nobody answers at the coordinator's {address} ({error}); is "
            "process 0 running, and does that port of its host let others in?"
        )
    return (
        f"{process}: {waited}, not all processes have come to {address}; expected each to be "
        "started with the same --num_processes and a --process_id of its own"
    )


def _explain_start_error(group: ProcessGroup, error: Exception) -> str:
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
