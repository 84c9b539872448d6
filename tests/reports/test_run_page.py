"""report.html of a run: whole, self-contained, and its figures those of the run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.reports import run_page
from mass_dpo_jax.reports.format import HEADLINE_METRICS
from mass_dpo_jax.reports.run_page import write
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.train import train
from mass_dpo_jax.training.evaluator import EvaluatedSplit
from mass_dpo_jax.training.offline_selection import select_with_model
from tests.support.helpers import log_lines, tiny_config, write_jsonl

EMPTY = "area base br col embed hr img input link meta source track wbr path use rect".split()


class Checker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag


def check(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", page) + re.findall(r'href="#([^"]*)"', page)
    assert used and set(used) <= set(ids)
    assert not re.findall(r'(?:src|href)="(?!#)|<script|@import', page)  # Nothing is fetched.


@pytest.mark.usefixtures("one_device")
def test_a_run_ends_with_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", examples=40)
    config = tiny_config(data, **{"log.report": True, "train.steps": 2, "num_negatives": 2})
    seen: list[EvaluatedSplit] = []
    monkeypatch.setattr(run_page, "_rank_changes", lambda split: seen.append(split))
    done = train(config, tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    check(page)
    value, error = (100 * done["final"][f"policy/mrr{kind}"] for kind in ("", "_se"))
    assert f"<td>{value:.1f} ± {error:.1f}</td>" in page
    drawn = {path.stem for path in (tmp_path / "run/figures").iterdir()}
    assert {"loss", "rewards-at-the-end", "log-determinant-of-the-selected-sets"} <= drawn
    assert len(drawn) == page.count("<svg")
    # What it shows as selected is what the command that selects says of the same rows.
    (tested,) = seen
    assert tested.selected is not None
    rows = select_with_model(run_config.load_config(tmp_path / "run"), tmp_path / "run", None)
    selected = {row["id"]: row["selected"] for row in rows}
    assert len(tested.examples) > 2
    for example, mine in zip(tested.examples, tested.selected, strict=True):
        assert sorted(selected[example.id]) == np.flatnonzero(mine[1:]).tolist()


@pytest.mark.usefixtures("one_device")
def test_a_run_without_its_page_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", examples=40)
    changes = {"log.report": True, "train.steps": 1, "method": "sft"}
    config, run = tiny_config(data, **changes), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_page, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, run)
    done = train(config, run)
    assert done["finished"]
    check((run / "report.html").read_text())


def test_words_of_the_data_are_text(tmp_path: Path) -> None:
    config = config_lib.default()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    example = Example("<b>1", "<script>x</script>", "<i>yes", ("</table>no", "&amp;"), "file:1")
    before, after = (np.array([[x, 2.0, 1.0]], np.float32) for x in (0.0, 3.0))
    tested = EvaluatedSplit(
        [example], np.arange(3)[None], np.ones((1, 3), bool), before, after, 0 * before,
        after - before, np.array([[False, True, False]]),
    )  # fmt: skip
    ranks = {f"policy/{name}{kind}": 0.5 for name in HEADLINE_METRICS for kind in ("", "_se")}
    done = {"step": 1, "examples": 1, "split": "test", "final": ranks}
    write(tmp_path, config, done, tested)
    page = (tmp_path / "report.html").read_text()
    check(page)
    assert "&lt;b&gt;1: rank 3 → 1" in page and "&lt;script&gt;x" in page
    assert "better than at the start in 1 of 1 examples, worse in 0" in page
    order = [page.index(text) for text in ("&lt;i&gt;yes", "&lt;/table&gt;no", "&amp;amp;")]
    assert order == sorted(order)  # The best after training first.
    assert page.count("<td>selected</td>") == page.count("<td>chosen</td>") == 1


def test_metrics_by_grade_stand_beside_the_others_where_there_are_grades(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    final = {"accuracy": 0.5, "map": 0.25, "gain_ndcg@3": 0.75}
    ranks = {f"policy/{name}": value for name, value in final.items()}
    ranks |= {f"{name}_se": 0.01 for name in ranks}
    for graded in (True, False):
        kept = {name: x for name, x in ranks.items() if graded or "accuracy" in name}
        done = {"step": 1, "examples": 9, "split": "test", "start": kept, "final": kept}
        write(tmp_path, config_lib.default(), done, None)
        page = (tmp_path / "report.html").read_text()
        check(page)
        assert ("gain_ndcg@3" in page and "75.0 ± 1.0" in page and "25.0 ± 1.0" in page) == graded
        assert "50.0 ± 1.0" in page and "gain_ndcg@3_se" not in page


def test_a_run_that_was_tested_on_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write(tmp_path, config_lib.default(), {"step": 1, "final": None, "split": None}, None)
    page = (tmp_path / "report.html").read_text()
    check(page)
    assert "nothing to test on" in page
    assert [line["loss"] for line in log_lines(tmp_path)] == [1.0]
