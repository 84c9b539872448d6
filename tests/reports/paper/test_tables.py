"""The report's tables beside the paper's: headings, rows, columns, numbers, bold and underlines."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mass_dpo_jax.report import format_tables, make_report
from mass_dpo_jax.reports.paper import cells, tables
from mass_dpo_jax.reports.paper.numbers import read_numbers
from mass_dpo_jax.reports.paper.runs import find_runs
from tests.support.paper_runs import write_run
from tests.support.processes import command

QWEN = "models/Qwen3-4B"
# As the paper prints them, line by line.
HEADERS = {
    1: ["Model Setting Medmcqa QASC LastFM MovieLens Avg↑".split()],
    2: [
        ["Model", "Method", "MedMCQA MRR/Margin", "QASC MRR/Margin", "LastFM MRR/Margin",
         "MovieLens MRR/Margin", "Average↑ MRR/Margin"],
    ],
    3: [
        ["Model", "Method", "LastFM R@1", "LastFM R@3", "LastFM N@1", "LastFM N@3",
         "MovieLens R@1", "MovieLens R@3", "MovieLens N@1", "MovieLens N@3"],
    ],
    4: [
        "Model β Medmcqa QASC LastFM MovieLens".split(),
        "Model k Medmcqa QASC LastFM MovieLens".split(),
    ],
    5: [
        ["Model", "Method", "MedMCQA R@1", "MedMCQA R@3", "MedMCQA N@1", "MedMCQA N@3",
         "QASC R@1", "QASC R@3", "QASC N@1", "QASC N@3"],
    ],
}  # fmt: skip
FIVE = ["DPO", "DMPO", "DPO-k", "S-DPO", "MASS-DPO"]
ROWS = {
    1: [FIVE], 2: [["S-DPO", "MASS-DPO"]], 3: [FIVE], 4: [["0.1", "0.5", "1.0"], ["1", "3", "5"]],
    5: [FIVE],
}  # fmt: skip
MODELS = ["Qwen3", "SmolLM3", "Llama3"]


def read_markdown(text: str) -> dict[int, list[list[list[str]]]]:
    """Returns the rows of every table by number, those of each half of Table 4 apart."""
    found: dict[int, list[list[list[str]]]] = {}
    for part in re.split(r"^## Table ", text, flags=re.MULTILINE)[1:]:
        part = part.split("\n## ")[0]
        blocks = re.findall(r"(?:^\|.*\|$\n?)+", part, re.MULTILINE)
        found[int(part[0])] = [
            [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
            for block in blocks
        ]
    return found


def fill_models(rows: list[list[str]]) -> list[list[str]]:
    """Returns rows with the name of their model, which is printed once."""
    model = ""
    filled = []
    for row in rows:
        model = row[0].strip("—") or model
        filled.append([model, *row[1:]])
    return filled


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[list[str]]]]:
    """The tables beside a run of something that the paper does not have."""
    folder = tmp_path_factory.mktemp("alone")
    write_run(folder / "run", start="", **{"data.name": "synthetic"})
    done = command("mass_dpo_jax.report", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    return read_markdown(done.stdout)


@pytest.mark.parametrize("number", HEADERS)
def test_rows_and_columns_are_the_papers(alone: Any, number: int) -> None:
    assert list(alone) == [1, 2, 3, 4, 5]
    blocks = alone[number]
    assert [block[0] for block in blocks] == HEADERS[number]
    for block, rows in zip(blocks, ROWS[number], strict=True):
        names = [(row[0], row[1]) for row in fill_models(block[2:])]
        assert names == [(model, row) for model in MODELS for row in rows]


def test_every_number_of_the_paper_is_printed_in_its_place(alone: Any) -> None:
    printed = [
        re.sub(r"\*\*|</?u>", "", cell)
        for number in sorted(alone)
        for block in alone[number]
        for row in block[2:]
        for cell in row[2:]
    ]
    texts = [part for cell in printed for part in cell.split(" / ")]
    assert len(texts) == 447
    numbers = [f"{n.text} ± {n.error}" if n.error else n.text for n in read_numbers().values()]
    assert texts == numbers  # Row by row, as the paper has them.


def test_bold_is_the_best_of_table_1_and_underlines_are_the_papers(alone: Any) -> None:
    rows = fill_models(alone[1][0][2:])
    for model in MODELS:
        table = [row[2:] for row in rows if row[0] == model]
        for column in zip(*table, strict=True):
            values = [float(re.sub(r"\*\*|</?u>", "", cell)) for cell in column]
            assert [cell.startswith("**") for cell in column] == [v == max(values) for v in values]
    assert sum(cell.startswith("<u>") for row in rows for cell in row) == 9
    others = "".join(cell for n in (2, 3, 4, 5) for b in alone[n] for row in b for cell in row)
    assert "**" not in others and "<u>" not in others


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one of the paper's models and one of ours, with methods that only we have."""
    base = tmp_path_factory.mktemp("grid")
    skills = {"dpo": 0.3, "sdpo": 0.5, "mass_dpo": 0.6, "pl_sampled": 0.8}
    for data in ("medmcqa", "qasc", "lastfm", "movielens"):
        for method, skill in skills.items():
            for seed in range(2):
                folder = base / "qwen" / data / method / str(seed)
                settings = {"data.name": data, "data.max_train": 20_000}
                write_run(folder, skill=skill, seed=seed, start=QWEN, method=method, **settings)
    rows = {"data.max_train": 20_000}
    for beta in (0.5, 1.0):
        for method in ("mass_dpo", "sdpo"):
            write_run(base / f"{method}{beta}", start=QWEN, method=method, beta=beta, **rows)
    write_run(base / "n5", skill=0.9, start=QWEN, num_negatives=5, **rows)
    write_run(base / "small", skill=0.5, start="models/SmolLM2-135M", **{"data.name": "qasc"})
    return base


def ours(folder: Path, metric: str) -> tuple[float, float]:
    """Returns the mean over two seeds in percent and its error, from metrics.json alone."""
    texts = [(folder / str(seed) / "metrics.json").read_text() for seed in range(2)]
    found = [float(re.findall(rf'"{metric}": ([-\d.e]+)', text)[-1]) for text in texts]
    return 50 * sum(found), 100 * abs(found[0] - found[1]) / 2


def test_ours_stand_beside_the_papers(grid: Path) -> None:
    found = read_markdown(format_tables([grid]))
    rows = {(row[0], row[1]): row[2:] for row in fill_models(found[1][0][2:])}
    mean, error = ours(grid / "qwen/medmcqa/mass_dpo", "policy/accuracy")
    assert rows["Qwen3", "MASS-DPO"][0] == f"**56.66** [**{mean:.1f} ± {error:.1f}**]"
    mean, error = ours(grid / "qwen/qasc/dpo", "policy/accuracy")
    assert rows["Qwen3", "DPO"][1] == f"68.43 [{mean:.1f} ± {error:.1f}]"
    mean, error = ours(grid / "qwen/qasc/sdpo", "policy/accuracy")
    assert rows["Qwen3", "S-DPO"][1] == f"71.08 [<u>{mean:.1f} ± {error:.1f}</u>]"
    assert rows["Qwen3", "DMPO"][0] == "28.91"
    assert rows["SmolLM3", "DPO"][0] == "33.27"
    # What the paper does not have: a method below a line, and a model after its three.
    names = list(rows)
    assert names.index(("Qwen3", "*not in the paper:*")) == 5
    assert names[6] == ("Qwen3", "pl_sampled") and rows[names[6]][0].count("±") == 1
    assert [model for model, row in names if row == "DPO"] == [*MODELS, "SmolLM2-135M"]
    assert rows["SmolLM2-135M", "MASS-DPO"][0] == ""
    assert rows["SmolLM2-135M", "MASS-DPO"][1].endswith("*")  # One seed: an error over rows.
    assert rows["SmolLM2-135M", "MASS-DPO"][4] == ""  # No average of one dataset.
    # Our average is that of the four, as its error is.
    four = [ours(grid / f"qwen/{d}/mass_dpo", "policy/accuracy") for d in cells.DATASETS]
    mean, error = np.mean([m for m, _ in four]), np.sqrt(sum(e**2 for _, e in four)) / 4
    assert rows["Qwen3", "MASS-DPO"][4] == f"**57.18** [**{mean:.1f} ± {error:.1f}**]"


def test_what_is_printed_says_how_it_is_read(grid: Path) -> None:
    before, _ = format_tables([grid]).split("## Table 1", 1)
    for sign in ("square brackets", "with a star", "Bold", "no per cents"):
        assert sign in before


def test_each_table_has_our_run_of_the_same_setting(grid: Path) -> None:
    found = read_markdown(format_tables([grid]))
    betas, counts = (
        {row[1]: row[2:] for row in fill_models(block[2:]) if row[0] == "Qwen3"}
        for block in found[4]
    )
    assert [bool(re.search(r"\[.*\*\]", betas[b][2])) for b in ("0.1", "0.5", "1.0")] == [
        False, True, True,
    ]  # fmt: skip
    assert "[" not in betas["0.5"][0]  # The ablation was run on LastFM only.
    assert {"0.1, S-DPO", "0.5, S-DPO", "1.0, S-DPO"} <= set(betas)
    assert ["[" in counts[n][2] for n in ("1", "3", "5")] == [False, True, True]
    mrr, mrr_error = ours(grid / "qwen/lastfm/sdpo", "policy/mrr")
    texts = [(grid / f"qwen/lastfm/sdpo/{s}/metrics.json").read_text() for s in range(2)]
    margins = [float(re.findall(r'"rewards/margins": ([-\d.e]+)', text)[0]) for text in texts]
    margin, spread = sum(margins) / 2, abs(margins[0] - margins[1]) / 2
    row = next(r for r in found[2][0] if r[:2] == ["Qwen3", "S-DPO"])
    assert row[4] == (f"64.12 / 4.67 [{mrr:.1f} ± {mrr_error:.1f} / {margin:.2f} ± {spread:.2f}]")
    row = next(r for r in found[3][0] if r[1] == "S-DPO")
    recall, error = ours(grid / "qwen/movielens/sdpo", "policy/recall@3")
    assert row[7] == f"71.47 [{recall:.1f} ± {error:.1f}]"


def test_records_hold_every_number_and_both_rankings(grid: Path, tmp_path: Path) -> None:
    make_report([grid], tmp_path)
    records = []
    for number in range(1, 6):
        with (tmp_path / f"table{number}.csv").open(newline="") as file:
            records += list(csv.DictReader(file))
    assert sum(bool(r["paper"]) for r in records if not r["metric"].startswith("reward/")) == 447
    (record,) = [
        r for r in records
        if (r["table"], r["model"], r["dataset"], r["method"]) == ("1", "Qwen3", "qasc", "sdpo")
        and r["metric"] == "reward/accuracy"
    ]  # fmt: skip
    assert float(record["value"]) == pytest.approx(
        ours(grid / "qwen/qasc/sdpo", "reward/accuracy")[0], abs=1e-3
    )
    assert record["paper"] == "71.08"
    assert {r["unit"] for r in records if r["metric"] == "rewards/margins"} == {"logits"}
    text = (tmp_path / "report.md").read_text()
    assert text.index("## Table 5") < text.index("## Figure 2") < text.index("## Figure 3")
    assert text.index("## Figure 3") < text.index("## Tables 1 to 5 with ours by the log-ratio")
    html = (tmp_path / "report.html").read_text()
    assert "56.66" in html and "<sub>0.77</sub>" in html and html.count("<b>") > 13


def test_only_the_same_model_stands_beside_the_papers(tmp_path: Path) -> None:
    names = ("Qwen3-0.6B", "Qwen3-4B-Base", "qwen3-4b", "Llama-3.2-3B-Instruct")
    for name in names:
        write_run(tmp_path / name, start=f"models/{name}")
    # Named as on the hub.
    write_run(tmp_path / "smollm3", start="HuggingFaceTB/SmolLM3-3B@main")
    found, _ = cells.gather(find_runs([tmp_path]))
    groups = [(title, len(members)) for title, _, members in cells.group_by_model(found)]
    assert groups == [
        ("Qwen3", 1), ("SmolLM3", 1), ("Llama3", 1), ("Qwen3-0.6B", 1), ("Qwen3-4B-Base", 1),
    ]  # fmt: skip


def test_settings_of_other_versions_are_not_the_papers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", start=QWEN, **{"data.max_train": 20_000})
    config = json.loads((run / "config.json").read_text())
    config["selection"]["search"] = "exchange"  # Gone since.
    (run / "config.json").write_text(json.dumps(config))
    make_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "that are not the paper's: model.dtype=float32, selection.search=exchange." in text


def test_the_papers_row_takes_its_own_method_and_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "fast", start=QWEN, skill=0.9, **{"train.learning_rate": 1e-3})
    write_run(tmp_path / "paper", start=QWEN, skill=0.3)
    write_run(tmp_path / "once", start=QWEN, skill=0.9, **{"selection.refresh": "once"})
    write_run(tmp_path / "other", start=QWEN, skill=0.9, **{"selection.criterion": "contrast"})
    table = tables.paper_tables(cells.gather(find_runs([tmp_path]))[0])[0]
    qwen = table.blocks[0].sections[:2]  # The paper's rows and ours.
    by_name = {row[1]: row for section in qwen for row in section.rows}
    alone = cells.gather(find_runs([tmp_path / "paper"]))[0][0].estimate("policy/accuracy")
    assert alone is not None and by_name["MASS-DPO"][4].ours == alone.text()
    assert {name for name in by_name if "mass_dpo" in name or "," in name} == {
        "MASS-DPO, train.learning_rate=0.001",
        "mass_dpo (pool_fisher, once)",
        "mass_dpo (contrast, step)",
    }
    make_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "train.learning_rate=0.001 (1 of 4 runs)" in text
