"""Where a run's figures go, under the same names everywhere: metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax import config as config_lib
from mass_dpo_jax import hosts
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.run_folder import MetricsLog

TENSORBOARD, WANDB = "tensorboard", "wandb"  # Folders inside a run folder.


def check(config: ConfigDict) -> None:
    """Raises UserError if a package that the settings need is not there."""
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.log.wandb_project={config.log.wandb_project!r}: Weights & Biases is not "
            "installed: pip install wandb"
        )


class Log(Protocol):
    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Logs:
    """All logs of a run, opened at the step that it goes on from; of the first process only.

    What an interrupted run wrote of later steps, which run again, counts no more.
    """

    def __init__(self, config: ConfigDict, workdir: Path, step: int):
        self._logs: list[Log] = []
        if not hosts.first():
            return
        self._logs.append(MetricsLog(workdir, step))
        if config.log.tensorboard:
            self._logs.append(TensorBoard(config, workdir, step))
        if config.log.wandb_project:
            self._logs.append(WeightsAndBiases(config, workdir, step))

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        # The shortest decimal that is this float32 again.
        values = {name: float(str(np.float32(value))) for name, value in figures.items()}
        for log in self._logs:
            log.write(step, values)

    def close(self) -> None:
        for log in self._logs:
            log.close()


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
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=workdir.resolve().name,
            id=name.read_text(),
            resume="allow",
            dir=str(workdir),
            config=_settings(config),
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _settings(config: ConfigDict) -> dict[str, Any]:
    return {"mass_dpo_jax": mass_dpo_jax.__version__, **dict(config_lib.flat(config))}
