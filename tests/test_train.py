"""The whole of training: what a step computes, and that a run can stop anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import log_lines, losses, tiny_config, write_jsonl

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.train import train
from mass_dpo_jax.training import run_folder

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


@pytest.mark.parametrize("n", [1, 3, 5])
def test_loss_is_log_of_one_plus_n_at_the_reference(tmp_path: Path, n: int) -> None:
    # Policy = reference: every log-ratio is 0, whatever the data. Pools here hold at least n.
    data = write_jsonl(tmp_path / "data.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows if len(r["rejected"]) >= n))
    train(tiny_config(data, num_negatives=n, **{"train.steps": 1}), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(1 + n), abs=1e-5)


@pytest.mark.parametrize("changes", [{"num_negatives": 6}, {"selection.criterion": "all"}])
def test_pools_smaller_than_n_use_what_they_have(tmp_path: Path, data: Path, changes: dict) -> None:
    lines = data.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:8]]
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[:8]))
    (folder / "test.jsonl").write_text("".join(lines[8:]))
    train(tiny_config(folder, **changes, **{"train.steps": 1}), tmp_path / "run")
    expected = np.mean([math.log(1 + len(row["rejected"])) for row in rows])
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["mass_dpo", "sdpo", "dpo", "sft"])
def test_every_method_lowers_its_loss(tmp_path: Path, data: Path, method: str) -> None:
    changes = {"train.steps": 24, "train.eval_every": 0, "train.clip": 1.0, "beta": 1.0}
    done = train(tiny_config(data, method=method, **changes), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 24
    assert np.mean(found[-3:]) < 0.8 * np.mean(found[:3])
    assert done["finished"] and done["final"] is not None
    rewards = any(name.startswith("reward/") for name in done["final"])
    assert rewards == (method != "sft")  # Without a reference there is no reward.


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("refresh", "criterion"),
    [("step", "pool_fisher"), ("3", "pool_fisher"), ("epoch", "pool_fisher"),
     ("once", "pool_fisher"), ("2", "random")],
)  # fmt: skip
def test_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, refresh: str, criterion: str
) -> None:
    changes = {
        "train.steps": 8, "train.checkpoint_every": 2, "train.micro_batch_size": 4,
        "selection.refresh": refresh, "selection.criterion": criterion,
    }  # fmt: skip
    config = tiny_config(data, **changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(config, whole)

    write = run_folder.MetricsLog.write

    def write_and_stop(self: run_folder.MetricsLog, step: int, figures: dict) -> None:
        if "loss" in figures and step == stop_at[0]:
            raise Stop
        write(self, step, figures)

    stop_at = [0]
    for stop_at[0] in (6, 8):  # Checkpoints 4 and 6: each in the middle of some window above.
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.MetricsLog, "write", write_and_stop)
            with pytest.raises(Stop):
                train(config, parts)
    found = train(config, parts)
    assert losses(parts) == losses(whole)
    assert [line["step"] for line in log_lines(parts)] == [
        line["step"] for line in log_lines(whole)
    ]
    assert found == expected
    assert np.array_equal(np.load(parts / "logps-final.npy"), np.load(whole / "logps-final.npy"))


def test_sets_are_kept_within_a_window(tmp_path: Path, data: Path) -> None:
    # With one batch an epoch, every step of a run sees every example; `once` must train on the
    # same sets throughout while `step` moves on: their first losses agree, later ones do not.
    changes = {"train.batch_size": 24, "train.micro_batch_size": 8, "train.steps": 6,
               "train.learning_rate": 3e-2, "beta": 1.0, "train.clip": 10.0}  # fmt: skip
    runs = {}
    for refresh in ("step", "once", "3"):
        config = tiny_config(data, num_negatives=2, **changes, **{"selection.refresh": refresh})
        train(config, tmp_path / refresh)
        runs[refresh] = losses(tmp_path / refresh)
    assert runs["once"][0] == pytest.approx(runs["step"][0], abs=1e-6)
    assert runs["once"][:3] == pytest.approx(runs["3"][:3], abs=1e-6)
    assert runs["once"] != pytest.approx(runs["step"], abs=1e-6)
    assert runs["once"] != pytest.approx(runs["3"], abs=1e-6)


def test_micro_batches_change_nothing_but_memory(tmp_path: Path, data: Path) -> None:
    one = tiny_config(data, **{"train.micro_batch_size": 8, "train.steps": 3})
    four = tiny_config(data, **{"train.micro_batch_size": 2, "train.steps": 3})
    train(one, tmp_path / "one")
    train(four, tmp_path / "four")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_rectangle_trains_as_packed(tmp_path: Path, data: Path) -> None:
    for layout in ("packed", "rectangle"):
        train(tiny_config(data, **{"model.layout": layout, "train.steps": 3}), tmp_path / layout)
    assert losses(tmp_path / "rectangle") == pytest.approx(losses(tmp_path / "packed"), abs=1e-5)


def test_reference_is_read_again_and_only_while_nothing_changed(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mass_dpo_jax")

    def runs(name: str, **changes: object) -> bool:
        """Does a run read its reference from the cache?"""
        config = tiny_config(data, cache_dir=str(tmp_path / "cache"), **changes)
        config.train.steps = 1
        caplog.clear()
        train(config, tmp_path / name)
        # Validation and test are the same rows here, so the one always reads the other's.
        return caplog.text.count("reference: read") == 3

    assert not runs("first")
    assert runs("same")
    assert runs("other method", method="sdpo", beta=0.5)
    assert not runs("other weights", seed=1)
    assert not runs("other compute type", **{"model.dtype": "bfloat16"})
    assert not runs("other tokens", **{"data.max_prompt_length": 8})
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert not runs("damaged file")
    assert runs("mended file")


def test_a_run_is_a_model_for_the_next(tmp_path: Path, data: Path) -> None:
    first = train(tiny_config(data, method="sft", **{"train.steps": 6}), tmp_path / "sft")
    config = tiny_config(data, **{"model.path": str(tmp_path / "sft"), "train.steps": 2})
    second = train(config, tmp_path / "dpo")
    final = {k: v for k, v in first["final"].items() if k.startswith("policy/")}
    assert second["start"] == pytest.approx(final, abs=1e-5)


def test_workdir_of_another_run_is_refused_and_kept(tmp_path: Path, data: Path) -> None:
    train(tiny_config(data, **{"train.steps": 2}), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"belongs to .*beta \(there 0.1, here 0.2\)"):
        train(tiny_config(data, beta=0.2, **{"train.steps": 2}), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_n_larger_than_every_pool(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"num_negatives=7.*the largest has 6"):
        train(tiny_config(data, num_negatives=7), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
