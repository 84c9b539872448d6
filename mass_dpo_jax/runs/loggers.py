"""Where a run's figures go, under the same names everywhere: metrics.jsonl, TensorBoard, W&B."""

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
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs.metrics_files import MetricsLog
from mass_dpo_jax.utils import distributed

TENSORBOARD, WANDB = "tensorboard", "wandb"  # Folders inside a run folder.
_log = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
    """Raises UserError if a package that the settings need is not there, or no key for W&B."""
    if config.log.tensorboard and not _installed("tensorboardX"):
        raise UserError(
            "config.log.tensorboard=True: TensorBoard's event files need a package: pip install "
            "tensorboardX, or set config.log.tensorboard=False"
        )
    if not config.log.wandb_project:
        return
    place = f"config.log.wandb_project={config.log.wandb_project!r}"
    if not _installed("wandb"):
        raise UserError(f"{place}: Weights & Biases is not installed: pip install wandb")
    if distributed.is_primary() and not _has_key():
        raise UserError(
            f"{place}: no key for Weights & Biases is found; run `wandb login` (or set "
            "WANDB_API_KEY), or set WANDB_MODE=offline to keep the figures in the run folder"
        )


def _installed(package: str) -> bool:
    """Whether it can be imported; a mere folder of its name, as W&B leaves where it ran, cannot."""
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _has_key() -> bool:
    """Whether W&B can do without asking for a key: it has one, or sends nothing.

    Where only W&B itself can tell, as with a server of one's own, it is believed to have one.
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
    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Logs:
    """All logs of a run, opened at the step that it goes on from; of the first process only.

    What an interrupted run wrote of later steps, which run again, counts no more.
    """

    def __init__(self, config: ConfigDict, workdir: Path, step: int):
        self._logs: list[Log] = []
        if not distributed.is_primary():
            return
        self._logs.append(MetricsLog(workdir, step))
        if config.log.tensorboard:
            self._logs.append(Beside(TensorBoard, config, workdir, step))
        if config.log.wandb_project:
            self._logs.append(Beside(WeightsAndBiases, config, workdir, step))

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        # The shortest decimal that is this float32 again.
        values = {name: float(str(np.float32(value))) for name, value in figures.items()}
        for log in self._logs:
            log.write(step, values)

    def close(self) -> None:
        for log in self._logs:
            log.close()


class Beside:
    """A log beside metrics.jsonl, which has all figures: what goes wrong with this one is said
    once, and the run goes on without it."""

    def __init__(
        self,
        kind: Callable[[ConfigDict, Path, int], Log],
        config: ConfigDict,
        workdir: Path,
        step: int,
    ):
        self._name = kind.__name__
        self._log: Log | None = None
        self._log = self._try(lambda: kind(config, workdir, step))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self._log is not None:
            self._try(functools.partial(self._log.write, step, figures))

    def close(self) -> None:
        if self._log is not None:
            self._try(self._log.close)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # Of a library, of its server, of a disk.
            self._log = None
            _log.warning(
                f"{self._name}: {_reason(error)}; the run goes on without, and metrics.jsonl has "
                "its figures"
            )
            return None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class TensorBoard:
    """Event files in tensorboard/, with the settings and the version as text."""

    def __init__(self, config: ConfigDict, workdir: Path, step: int):
        from tensorboardX import SummaryWriter  # Where PyTorch is, it is imported: seconds.

        self._writer = SummaryWriter(
            str(workdir / TENSORBOARD),
            # TensorBoard forgets what it has read of this step and later ones.
            purge_step=step + 1 if step else 0,
            flush_secs=1,
            filename_suffix=f".{step}",
        )
        settings = json.dumps(_settings(config), indent=2)
        self._writer.add_text("settings", f"```json\n{settings}\n```", step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        # The writer's own add_scalar changes names: recall@3 to recall_3.
        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for the whole run, however often it is interrupted.

    A step that has been logged before is not logged again: W&B takes steps in order only.
    """

    def __init__(self, config: ConfigDict, workdir: Path, step: int):
        import wandb

        folder = workdir / WANDB
        folder.mkdir(exist_ok=True)
        name = folder / "id"
        if not step or not name.exists():
            name.write_text(secrets.token_hex(4))
        start = functools.partial(
            wandb.init,
            project=config.log.wandb_project,
            name=workdir.resolve().name,
            id=name.read_text(),
            resume="allow",
            dir=str(workdir),
            config=_settings(config),
        )
        try:
            self._run = start()
        except Exception as error:  # No network, no such server, a key that it does not know.
            _log.warning(
                f"WeightsAndBiases: {_reason(error)}; offline from here: "
                f"`wandb sync {folder}/offline-run-*` sends the figures later"
            )
            with contextlib.suppress(Exception):
                wandb.teardown()  # It holds the run's id.
            self._run = start(mode="offline")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _settings(config: ConfigDict) -> dict[str, Any]:
    return {"mass_dpo_jax": mass_dpo_jax.__version__, **dict(config_lib.flatten(config))}
