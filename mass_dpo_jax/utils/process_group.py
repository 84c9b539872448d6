"""The processes that run one command together, as its flags describe them."""

from __future__ import annotations

import dataclasses

from mass_dpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes of one command, and which of them this one is; distributed.py joins them.

    Attributes:
        coordinator: host:port of the primary process; None: provided by the cluster.
        processes: number of processes; None: provided by the cluster.
        process: number of this process, from 0; None: provided by the cluster.
        start_timeout: seconds to wait for the others at the start.
        peer_timeout: seconds without a heartbeat after which a process counts as dead.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    start_timeout: int = 300
    peer_timeout: int = 60

    def check(self) -> None:
        """Raises UserError for flags that are incomplete or have impossible values."""
        values = {
            "--coordinator_address": self.coordinator,
            "--num_processes": self.processes,
            "--process_id": self.process,
        }
        missing = [name for name, value in values.items() if value is None]
        if 0 < len(missing) < len(values):
            given = ", ".join(name for name in values if name not in missing)
            raise UserError(
                f"{given} without {', '.join(missing)}: expected all three, or --distributed alone "
                "where the cluster says them (Cloud TPU, SLURM, Kubernetes, Open MPI)"
            )
        for name, value in (
            ("--start_timeout", self.start_timeout),
            ("--peer_timeout", self.peer_timeout),
        ):
            if value < 1:
                raise UserError(f"{name}={value}: expected a number of seconds above 0")
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(
                f"--coordinator_address={self.coordinator}: expected HOST:PORT, for example "
                "10.0.0.1:1234"
            )
        if self.processes < 1:
            raise UserError(f"--num_processes={self.processes}: expected a number above 0")
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"--process_id={self.process}: expected 0 to {self.processes - 1}, one less than "
                "--num_processes"
            )
