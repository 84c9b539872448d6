"""TensorBoard and W&B get what metrics.jsonl gets, an interruption or not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog

import mass_dpo_jax
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import loggers, metrics_files
from mass_dpo_jax.train import train
from tests.support.helpers import log_lines, tiny_config, write_jsonl

pytestmark = pytest.mark.usefixtures("one_device")

Point = tuple[str, int, float]


def open_logs(config: ConfigDict, workdir: Path, step: int) -> loggers.Logs:
    return loggers.Logs(config.log, dict(config_lib.flatten(config)), workdir, step)


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
    write = metrics_files.MetricsLog.write

    def write_and_stop(self: metrics_files.MetricsLog, step: int, figures: dict) -> None:
        write(self, step, figures)
        if step == 4:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(metrics_files.MetricsLog, "write", write_and_stop)
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
    for steps in (range(4), range(2)):
        log = loggers.TensorBoard({}, tmp_path, 0)
        for step in steps:
            log.write(step, {"eval/policy/ndcg@3": 0.25 * len(steps)})
        log.close()
    points, _ = shown(tmp_path / "tensorboard")
    assert points == [("eval/policy/ndcg@3", 0, 0.5), ("eval/policy/ndcg@3", 1, 0.5)]


def test_no_tensorboard_where_none_is_wanted(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data.jsonl", **{"log.tensorboard": False})
    log = open_logs(config, tmp_path, 0)
    log.write(1, {"loss": np.float32(0.1)})
    log.close()
    assert log_lines(tmp_path) == [{"step": 1, "loss": 0.1}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeWandb(ModuleType):
    """Stands for the package; `init` fails as often as it is told to."""

    def __init__(self, failures: int = 0, broken: bool = False):
        super().__init__("wandb")
        self.failures, self.broken = failures, broken
        self.modes: list[str | None] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, mode: str | None = None, **settings: Any) -> FakeWandb:
        self.modes.append(mode)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no network\nand more lines")
        return self

    def teardown(self) -> None: ...

    def log(self, figures: dict[str, float], step: int) -> None:
        if self.broken and step > 1:
            raise OSError("connection lost")
        self.lines.append((step, figures))

    def finish(self) -> None:
        self.finished += 1
        if self.broken:
            raise OSError("connection lost")


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key of W&B, and a current folder without its settings."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    return home


WITH_WANDB = {"log.wandb_project": "project", "log.tensorboard": False}


@pytest.mark.usefixtures("nobody")
def test_without_a_key_a_run_is_refused_before_its_data_are_read(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "missing.jsonl", **WITH_WANDB)
    with pytest.raises(
        UserError, match=r"wandb_project='project': no key .*`wandb login`.*offline"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_API_KEY": "0" * 40},
        {"WANDB_IDENTITY_TOKEN_FILE": "token"},
        {"WANDB_MODE": "offline"},
        {"WANDB_MODE": "disabled"},
        {"WANDB_MODE": "dryrun"},
        {"WANDB_DISABLED": "true"},
    ],
)
def test_a_key_or_no_need_for_one_in_the_environment(
    tmp_path: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    loggers.check_requirements(tiny_config(tmp_path / "data.jsonl", **WITH_WANDB).log)


@pytest.mark.parametrize(
    ("file", "content", "enough"),
    [
        (".netrc", "machine api.wandb.ai login user password key", True),
        ("_netrc", "machine api.wandb.ai login user password key", True),
        (".netrc", "machine github.com login user password key", False),
        ("wandb/settings", "[default]\nmode = offline\n", True),
        ("wandb/settings", "[default]\nentity = me\n", False),
        (".config/wandb/settings", "[default]\nbase_url = https://wandb.example\n", True),
        (".config/wandb/settings", "not such a file", True),
    ],
)
def test_a_key_or_no_need_for_one_in_files(
    tmp_path: Path, nobody: Path, file: str, content: str, enough: bool
) -> None:
    (nobody / file).parent.mkdir(parents=True, exist_ok=True)
    (nobody / file).write_text(content)
    config = tiny_config(tmp_path / "data.jsonl", **WITH_WANDB)
    with contextlib.nullcontext() if enough else pytest.raises(UserError, match="no key"):
        loggers.check_requirements(config.log)


@pytest.mark.parametrize(
    ("wandb", "modes", "steps", "message"),
    [
        (FakeWandb(), [None], [1, 2, 3], ""),
        (FakeWandb(1), [None, "offline"], [1, 2, 3], "RuntimeError: no network; offline from here"),
        (FakeWandb(2), [None, "offline"], [], "RuntimeError: no network; the run goes on without"),
        (FakeWandb(broken=True), [None], [1], "OSError: connection lost; the run goes on without"),
    ],
)
def test_weights_and_biases_never_ends_a_run(
    tmp_path: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str],
    wandb: FakeWandb, modes: list[str | None], steps: list[int], message: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_config(tmp_path / "data.jsonl", **WITH_WANDB)
    log = open_logs(config, nobody, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    log.close()
    assert (wandb.modes, [step for step, _ in wandb.lines]) == (modes, steps)
    assert [line["step"] for line in log_lines(nobody)] == [1, 2, 3]
    assert message in said() and said().count("goes on without") == message.count("goes on")


def test_weights_and_biases_may_fail_to_finish(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    wandb = FakeWandb(broken=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = open_logs(tiny_config(nobody / "data.jsonl", **WITH_WANDB), nobody, 0)
    log.write(1, {"loss": 1.0})
    log.close()
    assert wandb.finished == 1 and "connection lost" in said()


def test_a_folder_that_wandb_left_is_no_package(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb/` in the current folder, which is on Python's path, can be imported."""
    monkeypatch.delitem(sys.modules, "wandb")
    (nobody / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(nobody)])
    config = tiny_config(nobody / "data.jsonl", **{"log.wandb_project": "project"})
    with pytest.raises(UserError, match="is not installed: pip install wandb"):
        loggers.check_requirements(config.log)


def test_tensorboard_that_cannot_be_written_is_left_out(
    tmp_path: Path, said: Callable[[], str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder is to be")
    log = open_logs(tiny_config(tmp_path / "data.jsonl"), tmp_path, 0)
    log.write(1, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in log_lines(tmp_path)] == [1]
    assert said().count("TensorBoard: ") == said().count("the run goes on without") == 1


def test_tensorboard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "_installed", lambda package: package != "tensorboardX")
    with pytest.raises(
        UserError, match=r"config\.log\.tensorboard=True: .*pip install tensorboardX"
    ):
        loggers.check_requirements(tiny_config(tmp_path / "data.jsonl").log)


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
        log = open_logs(config, tmp_path, start)
        for step in (start + 1, start + 2):
            log.write(step, {"loss": 1.0 / step, "eval/policy/recall@3": 0.5})
        log.close()
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    name = (tmp_path / "wandb/id").read_text()
    assert first.name.endswith(name) and second.name.endswith(name)
    assert (first / f"run-{name}.wandb").stat().st_size > 0
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3]
