from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import simulation
from mass_dpo_jax import compare, report
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import curves
from mass_dpo_jax.reports.format import short_names
from tests.support.processes import command


def write(folder: Path, lines: list[dict[str, float]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def preference_run(folder: Path, steps: int = 40) -> Path:
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        margin = step / steps
        lines.append(
            {
                "step": step,
                "loss": 1.4 - 0.5 * margin,
                "rewards/margins": margin,
                "rewards/margins_hard": margin - 0.5,
                "rewards/chosen": 0.2,
                "rewards/rejected": 0.2 - margin,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, curves.ACCURACY: 0.3, f"{curves.ACCURACY}_se": 0.02})
    return write(folder, lines)


def supervised_run(folder: Path, steps: int = 30) -> Path:
    return write(folder, [{"step": step, "loss": 9.0 / step} for step in range(1, steps + 1)])


def shape(path: Path) -> tuple[int, ...]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10  # Something is drawn.
    return pixels.shape


def test_lines_hold_different_names(tmp_path: Path):
    path = write(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "a": 5}, {"step": 3, "loss": 1}])
    read = curves.read_metrics_log(path)
    assert set(read) == {"loss", "a"}
    np.testing.assert_array_equal(read["loss"], [[1, 3], [2, 1]])
    np.testing.assert_array_equal(read["a"], [[2], [5]])


def test_panels_without_data_are_left_out(tmp_path: Path):
    curves.plot({"a": supervised_run(tmp_path / "a")}, tmp_path / "one.png")
    curves.plot({"b": preference_run(tmp_path / "b")}, tmp_path / "four.png")
    one, four = shape(tmp_path / "one.png"), shape(tmp_path / "four.png")
    assert four[0] > 1.5 * one[0] and four[1] == 2 * one[1]


def test_stages_and_baselines_are_drawn(tmp_path: Path):
    runs = {
        "warm start": supervised_run(tmp_path / "a"),
        "MASS-DPO": preference_run(tmp_path / "b"),
    }
    plain, staged = tmp_path / "plain.png", tmp_path / "new" / "staged.png"
    curves.plot(runs, plain)
    curves.plot(runs, staged, in_sequence=True, accuracies={"popularity": 0.17})
    assert shape(plain) == shape(staged)
    assert plain.read_bytes() != staged.read_bytes()


def test_not_a_number_leaves_a_gap(tmp_path: Path):
    path = write(tmp_path, [{"step": i, "loss": float("nan") if i == 3 else 1.0} for i in range(9)])
    curves.plot({"a": path}, tmp_path / "x.png")
    shape(tmp_path / "x.png")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.floats(-5, 5), st.floats(-5, 5))
def test_smoothing_keeps_lines_and_lengths(length: int, start: float, slope: float):
    constant = curves.smooth(np.full(length, start))
    np.testing.assert_allclose(constant, start, atol=1e-9)
    line = start + slope * np.arange(length)
    half = length // 30
    inner = slice(half, length - half)
    np.testing.assert_allclose(curves.smooth(line)[inner], line[inner], atol=1e-8)


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": 1, "loss": "low"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: expected"):
        curves.read_metrics_log(path)


def test_nothing_to_draw_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        curves.plot({"a": tmp_path / "metrics.jsonl"}, tmp_path / "x.png")
    with pytest.raises(UserError, match="nothing to draw yet"):
        curves.plot({"a": write(tmp_path, [])}, tmp_path / "x.png")


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    monkeypatch.setattr(curves, "plot", lambda runs, output: shown.extend(runs))
    monkeypatch.setattr(
        sys, "argv", ["compare", "a/run", f"{tmp_path}/b/run", "b/other", "c/a/run", "--plot=x.png"]
    )
    monkeypatch.chdir(tmp_path)
    for run in ("a/run", "b/run", "b/other", "c/a/run"):
        Path(run).mkdir(parents=True)
        Path(run, "config.json").write_text("{}")
    compare.main()
    assert shown == [f"{tmp_path.name}/a/run", "b/run", "other", "c/a/run"]
    assert short_names([Path()]) == [tmp_path.name]


def test_command(tmp_path: Path):
    preference_run(tmp_path / "a")
    result = command("mass_dpo_jax.compare", "a", "--plot=x.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table, picture = result.stdout.splitlines()  # The run is not finished.
    assert table.startswith("No table: a: ") and picture == "Curves: x.png"
    shape(tmp_path / "x.png")
    result = command("mass_dpo_jax.compare", "missing", "--plot=x.png", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: missing")


def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refused(main: Callable[[], None], *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        with pytest.raises(SystemExit) as end:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ")
        return line

    preference_run(tmp_path / "a")
    (tmp_path / "folder.png").mkdir()
    # Nothing is computed before: there is no such run, and the simulation takes minutes.
    for path in (tmp_path / "folder.png", tmp_path / "a.pdf", tmp_path):
        for main, words in ((compare.main, ["missing", "--plot"]), (simulation.main, ["--output"])):
            line = refused(main, *words[:-1], f"{words[-1]}={path}")
            assert f"'{path}', expected a file that ends in .png" in line
    (tmp_path / "file").touch()
    line = refused(report.main, "missing", f"--output={tmp_path / 'file'}")
    assert "file: is a file, expected the folder to write" in line

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")  # As a library's, without the file.

    monkeypatch.setattr(Figure, "savefig", full)
    picture = tmp_path / "x.png"
    line = refused(compare.main, str(tmp_path / "a"), f"--plot={picture}")
    assert line == f"error: {picture}: No space left on device"
    monkeypatch.setattr(report, "make_report", full)
    line = refused(report.main, "a", f"--output={tmp_path}")
    assert line == f"error: {tmp_path}: No space left on device"
    monkeypatch.setattr(compare, "compare", full)
    line = refused(compare.main, "a")
    assert line == "error: python -m mass_dpo_jax.compare: No space left on device"


def test_rounding_errors_do_not_fill_a_picture():
    ax = Figure().add_subplot()
    panel = curves.Panel("Value over that of the best set", {"a": ""})
    series = {"a": np.array([[1, 2, 3], [1.0, 1.0 + 2e-7, 1.0 - 1e-7]])}
    curves.draw_run(ax, panel, series, 0.0, "#000000")
    curves.finish_panel(ax, panel)
    low, high = ax.get_ylim()
    assert high - low == pytest.approx(1e-3)
    assert low < 1.0 < high
