"""Writes a run's figures, under the same names everywhere: metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import configparser
import contextlib
import functools
import importlib.util
import json
import logging
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs.metrics_files import MetricsLog
from mass_dpo_jax.utils import distributed

TENSORBOARD, WANDB = "tensorboard", "wandb"  # Folders inside a run folder.
_log = logging.getLogger(__name__)


def check_requirements(log: ConfigDict) -> None:
    """Raises UserError if a package or the key for W&B is missing that `config.log` needs."""
    if log.tensorboard and not _installed("tensorboardX"):
        raise UserError(
            "config.log.tensorboard=True: TensorBoard's event files need a package: pip install "
            "tensorboardX, or set config.log.tensorboard=False"
        )
    if not log.wandb_project:
        return
    setting = f"config.log.wandb_project={log.wandb_project!r}"
    if not _installed("wandb"):
        raise UserError(f"{setting}: Weights & Biases is not installed: pip install wandb")
    if distributed.is_primary() and not _has_key():
        raise UserError(
            f"{setting}: no key for Weights & Biases is found; run `wandb login` (or set "
            "WANDB_API_KEY), or set WANDB_MODE=offline to keep the figures in the run folder"
        )


def _installed(package: str) -> bool:
    """Whether a package can be imported: not a mere folder of its name, as W&B leaves behind."""
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _has_key() -> bool:
    """Whether W&B has a key or needs none, so that it does not stop to ask for one.

    True also where only W&B itself can tell, as with a private server.
    """
    variables = os.environ
    if variables.get("WANDB_API_KEY") or variables.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    folder = Path(variables.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    stored = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        stored.read([folder / "settings", Path("wandb") / "settings"])  # `wandb offline` writes it.
    except (configparser.Error, UnicodeDecodeError):
        return True
    settings = dict(stored["default"]) if stored.has_section("default") else {}
    mode = variables.get("WANDB_MODE") or settings.get("mode", "")
    disabled = variables.get("WANDB_DISABLED") or settings.get("disabled", "")
    if mode in ("offline", "disabled", "dryrun") or disabled.lower() in ("true", "1"):
        return True
    if "base_url" in settings:
        return True
    server = urlsplit(variables.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    names = [variables["NETRC"]] if variables.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in map(Path, names):
        try:
            if netrc.netrc(file.expanduser()).authenticators(server or ""):
                return True
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError, RuntimeError):
            return True
    return False


class Log(Protocol):
    """Something that takes the figures of steps."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step, by name."""

    def close(self) -> None:
        """Writes what is left."""


class Logs:
    """All logs of a run, on the primary process, opened at the step that the run resumes from.

    What an interrupted run wrote of later steps no longer counts: these steps run again.

    Args:
        log: the section `config.log`.
        settings: all settings of the run by their dotted names, to be shown beside the figures.
        workdir: the run folder.
        step: updates made so far.
    """

    def __init__(self, log: ConfigDict, settings: Mapping[str, Any], workdir: Path, step: int):
        self._logs: list[Log] = []
        if not distributed.is_primary():
            return
        settings = {"mass_dpo_jax": mass_dpo_jax.__version__, **settings}
        self._logs.append(MetricsLog(workdir, step))
        if log.tensorboard:
            make = functools.partial(TensorBoard, settings, workdir, step)
            self._logs.append(OptionalLog("TensorBoard", make))
        if log.wandb_project:
            make_run = functools.partial(
                WeightsAndBiases, log.wandb_project, settings, workdir, step
            )
            self._logs.append(OptionalLog("WeightsAndBiases", make_run))

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes float32 figures, by name, into every log."""
        # The shortest decimal that is this float32 again.
        values = {name: float(str(np.float32(value))) for name, value in figures.items()}
        for log in self._logs:
            log.write(step, values)

    def close(self) -> None:
        """Closes every log."""
        for log in self._logs:
            log.close()


class OptionalLog:
    """A log beside metrics.jsonl, which has all figures.

    The run continues without it after its first error, which is logged.

    Args:
        name: the log's name in messages.
        make: function that opens it.
    """

    def __init__(self, name: str, make: Callable[[], Log]):
        self._name = name
        self._log: Log | None = None
        self._log = self._try(make)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step, by name."""
        if self._log is not None:
            self._try(functools.partial(self._log.write, step, figures))

    def close(self) -> None:
        """Writes what is left."""
        if self._log is not None:
            self._try(self._log.close)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # From a library, its server, or a disk.
            self._log = None
            _log.warning(
                f"{self._name}: {_describe(error)}; the run goes on without, and metrics.jsonl has "
                "its figures"
            )
            return None


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class TensorBoard:
    """Event files in tensorboard/, with the settings as text."""

    def __init__(self, settings: Mapping[str, Any], workdir: Path, step: int):
        # Imported only here: it imports PyTorch where that is installed, which takes seconds.
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(workdir / TENSORBOARD),
            # TensorBoard drops what it has read of this step and later ones.
            purge_step=step + 1 if step else 0,
            flush_secs=1,
            filename_suffix=f".{step}",
        )
        text = json.dumps(settings, indent=2)
        self._writer.add_text("settings", f"```json\n{text}\n```", step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step, by name."""
        from tensorboardX.proto.summary_pb2 import Summary

        # The writer's own add_scalar changes names: recall@3 to recall_3.
        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for the whole run, however often it is interrupted.

    W&B accepts steps in order only, and ignores one that has been logged before.
    """

    def __init__(self, project: str, settings: Mapping[str, Any], workdir: Path, step: int):
        import wandb

        folder = workdir / WANDB
        folder.mkdir(exist_ok=True)
        name = folder / "id"
        if not step or not name.exists():
            name.write_text(secrets.token_hex(4))
        start = functools.partial(
            wandb.init,
            project=project,
            name=workdir.resolve().name,
            id=name.read_text(),
            resume="allow",
            dir=str(workdir),
            config=dict(settings),
        )
        try:
            self._run = start()
        except Exception as error:  # No network, no such server, or a key it does not know.
            _log.warning(
                f"WeightsAndBiases: {_describe(error)}; offline from here: "
                f"`wandb sync {folder}/offline-run-*` sends the figures later"
            )
            with contextlib.suppress(Exception):
                wandb.teardown()  # It would keep the run's id in use.
            self._run = start(mode="offline")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step, by name."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Waits until W&B has everything."""
        self._run.finish()
