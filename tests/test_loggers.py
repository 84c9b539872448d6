"""TensorBoard and W&B get what metrics.jsonl gets, an interruption or not."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import log_lines, tiny_config, write_jsonl
from tensorboardX.proto.event_pb2 import Event, SessionLog

import mass_dpo_jax
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.train import train
from mass_dpo_jax.training import loggers, run_folder

pytestmark = pytest.mark.usefixtures("one_device")

Point = tuple[str, int, float]


class Stop(Exception):
    pass


def events(file: Path) -> Iterator[Event]:
    """A file of records: their length in 8 bytes, 4 of a checksum, the event, 4 of another."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def shown(folder: Path) -> tuple[list[Point], list[str]]:
    """The scalars and texts that TensorBoard shows: a session's start takes out what was written
    of its step and later ones."""
    points: list[Point] = []
    texts = []
    for file in sorted(folder.iterdir()):  # Their names start with the time.
        for event in events(file):
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            for value in event.summary.value:
                if value.HasField("tensor"):
                    texts += [text.decode() for text in value.tensor.string_val]
                else:
                    points.append((value.tag, event.step, value.simple_value))
    return points, texts


def test_tensorboard_shows_what_metrics_jsonl_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl"))
    write = run_folder.MetricsLog.write

    def write_and_stop(self: run_folder.MetricsLog, step: int, figures: dict) -> None:
        write(self, step, figures)
        if step == 4:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.MetricsLog, "write", write_and_stop)
        with pytest.raises(Stop):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    points, texts = shown(tmp_path / "run" / "tensorboard")
    lines = log_lines(tmp_path / "run")
    want = [
        (name, line["step"], float(np.float32(value)))
        for line in lines
        for name, value in line.items()
        if name != "step"
    ]
    assert sorted(points) == sorted(want) and len(want) > 40
    assert {"eval/policy/recall@3", "loss", "selection/logdet"} <= {name for name, *_ in points}
    settings = json.loads(texts[0].removeprefix("```json\n").removesuffix("\n```"))
    assert settings["mass_dpo_jax"] == mass_dpo_jax.__version__
    assert settings["train.steps"] == 4
    done = json.loads((tmp_path / "run/metrics.json").read_text())
    assert done["version"] == mass_dpo_jax.__version__


def test_a_run_that_starts_again_shows_nothing_of_the_first_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data.jsonl")
    for steps in (range(4), range(2)):
        log = loggers.TensorBoard(config, tmp_path, 0)
        for step in steps:
            log.write(step, {"eval/policy/ndcg@3": 0.25 * len(steps)})
        log.close()
    points, _ = shown(tmp_path / "tensorboard")
    assert points == [("eval/policy/ndcg@3", 0, 0.5), ("eval/policy/ndcg@3", 1, 0.5)]


def test_no_tensorboard_where_none_is_wanted(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data.jsonl", **{"log.tensorboard": False})
    log = loggers.Logs(config, tmp_path, 0)
    log.write(1, {"loss": np.float32(0.1)})
    log.close()
    assert log_lines(tmp_path) == [{"step": 1, "loss": 0.1}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "data.jsonl", **{"log.wandb_project": "project"})
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match=r"log\.wandb_project='project'.*pip install wandb"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 1):  # Interrupted after step 2, it goes on from step 1.
        log = loggers.Logs(config, tmp_path, start)
        for step in (start + 1, start + 2):
            log.write(step, {"loss": 1.0 / step, "eval/policy/recall@3": 0.5})
        log.close()
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    name = (tmp_path / "wandb/id").read_text()
    assert first.name.endswith(name) and second.name.endswith(name)
    assert (first / f"run-{name}.wandb").stat().st_size > 0
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3]
