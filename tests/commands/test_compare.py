"""Runs beside each other: the same rows, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax.compare import compare
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.comparison import read_logps
from mass_dpo_jax.train import train
from tests.support.helpers import tiny_config, write_jsonl


@pytest.mark.usefixtures("one_device")
def test_table_and_paired_difference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", examples=60)
    config = tiny_config(data, method="sft", **{"data.validation_share": 0.3})
    first, second = tmp_path / "first" / "run", tmp_path / "second" / "run"
    train(config, first)
    config = tiny_config(data, **{"data.validation_share": 0.3, "model.path": str(first)})
    done = train(config, second)
    text = compare([first, second])
    lines = dict.fromkeys(line[:28].strip() for line in text.splitlines())
    # Both folders are called the same, and both have a row.
    assert {"random weights", "first/run", "second/run", "popularity in training"} <= set(lines)

    # The paired figures, from the rows themselves.
    def gains() -> np.ndarray:
        correct = []
        for name in ("logps-final.npy", "logps-start.npy"):
            logps = np.load(second / name)
            best = np.where(np.load(second / "logps-exist.npy"), logps, -np.inf)
            correct.append((best[:, :1] > best[:, 1:]).all(1))
        return correct[0].astype(float) - correct[1]

    assert done["gain"]["policy/accuracy"] == pytest.approx(gains().mean())
    # So few updates may change no rank; with these log-probs there is a gain for certain.
    final = np.load(second / "logps-final.npy")
    final[::2, 0] = -0.001
    np.save(second / "logps-final.npy", final)
    gain = gains()
    expected = f"{100 * gain.mean():+.1f} ± {100 * gain.std(ddof=1) / np.sqrt(len(gain)):.1f}"
    lines = compare([first, second]).splitlines()
    # The second run's start is the first run; the other way round it is not.
    assert not any(line.startswith("second/run - first/run") for line in lines)
    assert compare([second, first]).count("first/run - second/run") == 2
    accuracy, graded = [line for line in lines if line.startswith("second/run - its start")]
    assert gain.mean() > 0 and accuracy.endswith(f" {expected}")

    # The rows have scores, with one best each: average precision is 1 over its rank.
    precision = []
    for name in ("logps-final.npy", "logps-start.npy"):
        logps, exists = (np.load(second / file) for file in (name, "logps-exist.npy"))
        above = exists & (logps >= logps[:, :1])
        precision.append(1 / above.sum(1))
    gain = precision[0] - precision[1]
    expected = f"{100 * gain.mean():+.1f} ± {100 * gain.std(ddof=1) / np.sqrt(len(gain)):.1f}"
    assert graded.split("start")[1].strip().startswith(expected)
    (titles,) = [line for line in lines if line.startswith("difference by grade")]
    assert titles.split()[-4:] == ["map", "gain_ndcg@1", "gain_ndcg@3", "gain_ndcg@5"]

    # Folders of earlier versions have no grades.
    (second / "logps-grades.npy").unlink()
    assert compare([first, second]).splitlines()[-1] == accuracy
    assert "second/run: has no logps-grades.npy" in caplog.text
    caplog.clear()
    (first / "logps-grades.npy").unlink()
    assert compare([first, second]).splitlines()[-1] == accuracy and not caplog.text
    np.save(second / "logps-grades.npy", final[:, 1:])
    np.save(first / "logps-grades.npy", final[:, 1:])
    with pytest.raises(UserError, match=r"logps-grades.npy: an array float32\[18, 6\], expected"):
        compare([first, second])


@pytest.mark.usefixtures("one_device")
def test_other_examples_and_unfinished_runs_are_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    other = write_jsonl(tmp_path / "other.jsonl", seed=1)
    for name, source in (("one", data), ("two", other)):
        train(tiny_config(source, method="sft", **{"train.steps": 1}), tmp_path / name)
    with pytest.raises(UserError, match=r"two: tested on other examples than .*one"):
        compare([tmp_path / "one", tmp_path / "two"])
    (tmp_path / "two" / "metrics.json").unlink()
    with pytest.raises(UserError, match="two: not a finished run"):
        compare([tmp_path / "one", tmp_path / "two"])


def test_a_log_prob_of_0_is_one(tmp_path: Path) -> None:
    """As where the model has no doubt of a token. Files beside each other say who is missing."""
    logps = np.array([[0, -1, 0, 0], [-2, 0, -3, 0], [-1, -1, -1, 0]], np.float32)
    exists = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    path = tmp_path / "logps-final.npy"
    np.save(path, logps)
    with pytest.raises(UserError, match=r"logps-exist.npy: no such file"):
        read_logps(path)
    np.save(tmp_path / "logps-exist.npy", exists)
    for kept, there in zip(read_logps(path), (logps, exists), strict=True):
        np.testing.assert_array_equal(kept, there)
    for other in (exists[:, :3], exists.astype(np.float32), exists & False):
        np.save(tmp_path / "logps-exist.npy", other)
        with pytest.raises(UserError, match=r"logps-exist.npy: an array .* expected bool\[3, 4\]"):
            read_logps(path)
    np.save(path, -logps)
    with pytest.raises(UserError, match="numbers above 0"):
        read_logps(path)
