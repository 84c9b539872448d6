"""Figures 2 and 3: which curves are in which panel, how they look, and what the x axis counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mass_dpo_jax.reports import style
from mass_dpo_jax.reports.paper import cells, figures, layout
from mass_dpo_jax.reports.paper.runs import find_runs
from tests.support.paper_runs import write_run

MODELS = {"Qwen3": "models/Qwen3-4B", "Small": "models/Small"}
SKILLS = {"mass_dpo": 0.8, "sdpo": 0.5, "dpo": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, three methods and two seeds on LastFM; MedMCQA has S-DPO of one only."""
    base = tmp_path_factory.mktemp("figures")
    for model, start in MODELS.items():
        for method, skill in SKILLS.items():
            for seed in range(2):
                name = base / model / method / str(seed)
                write_run(name, skill=skill, start=start, method=method, seed=seed)
    write_run(
        base / "other", skill=0.5, start=MODELS["Qwen3"], method="sdpo",
        **{"data.name": "medmcqa"},
    )  # fmt: skip
    return base


@pytest.fixture
def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures before they become bytes; None where there is nothing to draw."""
    monkeypatch.setattr(style, "to_png", lambda figure: figure)
    runs = find_runs([folder])
    found, _ = cells.gather(runs)
    logs = figures.read_logs(runs)
    return [figures.draw_figure(figure, found, logs) for figure in layout.FIGURES]  # type: ignore[misc]


def lines_of(ax: Axes) -> set[tuple[str, str]]:
    return {(to_hex(line.get_color()), line.get_linestyle()) for line in ax.get_lines()}


def test_panels_are_the_papers(drawn: list[Figure]) -> None:
    figure, nothing = drawn
    assert nothing is None  # No run of MovieLens and QASC.
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [
        f"{data}: {metric}"
        for data in ("LastFM", "MedMCQA")
        for metric in ("margin", "accuracy", "chosen reward")
    ]
    assert {ax.get_xlabel() for ax in figure.axes} == {"Step (number of the evaluation)"}


def test_mass_dpo_is_solid_and_s_dpo_dashed_in_the_colour_of_their_model(
    drawn: list[Figure],
) -> None:
    figure = drawn[0]
    (legend,) = figure.legends
    shown = {
        text.get_text(): (to_hex(line.get_color()), line.get_linestyle())
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert set(shown) == {
        "MASS-DPO, Qwen3", "S-DPO, Qwen3", "MASS-DPO, Small", "S-DPO, Small",
    }  # fmt: skip
    for name, (colour, dashes) in shown.items():
        assert dashes == ("-" if name.startswith("MASS") else "--")
        assert colour == shown["MASS-DPO, " + name.split(", ")[1]][0]
    assert len({colour for colour, _ in shown.values()}) == 2
    for ax in figure.axes[:3]:
        assert lines_of(ax) == set(shown.values())
    for ax in figure.axes[3:]:
        assert lines_of(ax) == {shown["S-DPO, Qwen3"]}


def test_a_line_is_the_mean_over_seeds_against_evaluations(
    drawn: list[Figure], folder: Path
) -> None:
    margins = []
    for seed in range(2):
        log = (folder / "Qwen3" / "mass_dpo" / str(seed) / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in log.splitlines()]
        margins.append([r["eval/rewards/margins"] for r in rows if "eval/rewards/margins" in r])
    line = next(line for line in drawn[0].axes[0].get_lines() if line.get_linestyle() == "-")
    np.testing.assert_allclose(np.asarray(line.get_ydata()), np.mean(margins, axis=0))
    # Every tenth of 40 steps.
    assert np.asarray(line.get_xdata()).tolist() == [1, 2, 3, 4]


def test_the_evaluation_before_training_is_number_0() -> None:
    steps = np.array([0.0, 25.0, 50.0])
    run = {"eval/policy/accuracy": (steps, steps), "eval/rewards/margins": (steps[1:], steps[1:])}
    counted = figures._count_evaluations(run)
    assert counted["eval/policy/accuracy"][0].tolist() == [0, 1, 2]
    assert counted["eval/rewards/margins"][0].tolist() == [1, 2]


def test_panels_of_a_row_have_one_axis_of_whole_numbers(drawn: list[Figure]) -> None:
    for row in (drawn[0].axes[:3], drawn[0].axes[3:]):
        row[1].set_xlim(0, 2)  # As with a point of the accuracy before training.
        assert {ax.get_xlim() for ax in row} == {(0, 2)}
        assert all(float(tick).is_integer() for ax in row for tick in ax.get_xticks())
    assert drawn[0].axes[3].get_xlim() == (0, 2)


def test_a_single_evaluation_of_s_dpo_is_a_ring(drawn: list[Figure]) -> None:
    for line in drawn[0].axes[0].get_lines():
        assert line.get_marker() == "o"
        assert (line.get_markerfacecolor() == "none") == (line.get_linestyle() == "--")
