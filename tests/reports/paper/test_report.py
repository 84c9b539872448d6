"""The report, from run folders written by hand: no model is trained here."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import metrics
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.report import make_report
from mass_dpo_jax.reports.paper import cells, figures, paired, runs
from mass_dpo_jax.training.methods import METHODS
from tests.support.paper_runs import ROWS, write_run
from tests.support.processes import command, environment

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two methods and three seeds, the ablations of one, a warm start and a run cut short."""
    base = tmp_path / "paper" / "table1" / "llama" / "lastfm"
    write_run(base / "sft" / "seed0", skill=0.2, method="sft")
    for seed in range(3):
        write_run(base / "mass_dpo" / f"seed{seed}", skill=0.8, seed=seed)
        write_run(base / "sdpo" / f"seed{seed}", skill=0.5, seed=seed, method="sdpo")
    write_run(base / "dpo" / "seed0", skill=0.4, method="dpo", finished=False)
    for beta in (0.5, 1.0):
        write_run(tmp_path / "paper" / "table2" / f"beta{beta}", skill=0.7, beta=beta)
    write_run(tmp_path / "paper" / "table4" / "n5", skill=0.6, num_negatives=5)
    write_run(tmp_path / "paper" / "other", skill=0.6, **{"data.name": "qasc"})
    return tmp_path / "paper"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_records_of_runs(folder: Path, tmp_path: Path):
    make_report([folder], tmp_path / "out")
    records = read(tmp_path / "out" / "table1.csv")
    (ours,) = [
        r
        for r in records
        if r["model"] == "Tiny-Llama" and r["method"] == "mass_dpo"
        and (r["metric"], r["dataset"]) == ("policy/accuracy", "lastfm")
    ]  # fmt: skip
    values = [
        json.loads((folder / f"table1/llama/lastfm/mass_dpo/seed{i}/metrics.json").read_text())
        for i in range(3)
    ]
    accuracies = np.array([100 * v["final"]["policy/accuracy"] for v in values])
    assert float(ours["value"]) == pytest.approx(accuracies.mean(), abs=1e-4)
    assert float(ours["se_seeds"]) == pytest.approx(accuracies.std(ddof=1) / 3**0.5, abs=1e-4)
    assert (ours["seeds"], ours["paper"]) == ("3", "")
    assert {r["method"] for r in records if r["model"] == "Tiny-Llama"} == {
        "sft", "dpo", "sdpo", "mass_dpo",
    }  # fmt: skip
    text = (tmp_path / "out" / "report.md").read_text()
    error = accuracies.std(ddof=1) / 3**0.5
    assert re.search(
        rf"\| MASS-DPO +\|[^|]*\|[^|]*\| +\*\*{accuracies.mean():.1f} ± {error:.1f}\*\* ", text
    )
    assert re.search(r"\| before training +\|", text)
    halves = read(tmp_path / "out" / "table4.csv")
    ours = [r for r in halves if r["seeds_finished"] != "0"]
    assert {(r["table"], r["n"], r["beta"]) for r in ours} == {
        ("4a", "3", "0.1"), ("4a", "3", "0.5"), ("4a", "3", "1"), ("4b", "3", "0.1"),
        ("4b", "5", "0.1"),
    }  # fmt: skip
    for number, dataset in ((3, "lastfm"), (5, "qasc")):
        ours = [r for r in read(tmp_path / "out" / f"table{number}.csv") if r["seeds"] != "0"]
        assert {r["dataset"] for r in ours} == {dataset}
    assert "QASC: the paper's numbers fit 906 rows. The public dev split has 926" in text
    assert f"; ours are on {ROWS} rows of the split test." in text
    seconds = read(tmp_path / "out" / "seconds.csv")
    assert {r["seconds_per_step"] for r in seconds} == {"2"}  # 128 examples at 64 a second.


def test_same_runs_same_bytes(folder: Path, tmp_path: Path):
    make_report([folder], tmp_path / "one")
    # Another order of arguments, a folder inside another, another process with other hashes.
    result = command(
        "mass_dpo_jax.report", str(folder / "table2"), str(folder),
        f"--output={tmp_path / 'two'}", env=environment(PYTHONHASHSEED="5"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 14
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_not_finished_is_marked_and_listed(folder: Path, tmp_path: Path):
    base = folder / "table1" / "llama" / "lastfm"
    (base / "sdpo" / "seed2" / "metrics.json").unlink()
    (base / "sdpo" / "seed1" / "metrics.json").write_text("{")
    broken = write_run(folder / "broken")
    (broken / "config.json").write_text("{")
    (folder / "failed").mkdir()
    (folder / "failed" / runs.LOG).write_text("loading\nerror: no such data\n")
    np.save(base / "mass_dpo" / "seed2" / "logps-final.npy", np.zeros((3, 2), np.float32))
    np.save(base / "mass_dpo" / "seed2" / "logps-exist.npy", np.ones((3, 2), bool))
    make_report([folder], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- " + (folder / "failed").as_posix() + ": failed at its start: error: no such" in text
    assert (base / "sdpo" / "seed2").as_posix() + ": unfinished, step 40" in text
    assert (base / "sdpo" / "seed1").as_posix() + ": unreadable: metrics.json" in text
    assert broken.as_posix() + ": unreadable: config.json is no valid JSON" in text
    assert re.search(r"\| S-DPO +\|[^|]*\|[^|]*\| +<u>[\d.]+ ± [\d.]+\* \(1 of 3\)</u> \|", text)
    assert re.search(r"\| DPO +\|[^|]*\|[^|]*\| +unfinished \|", text)
    assert "mass_dpo/seed2: its log-probabilities cannot be used: other rows" in text
    listed = {record["folder"]: record["state"] for record in read(tmp_path / "out" / "runs.csv")}
    assert len(listed) == 14 and listed[(base / "dpo" / "seed0").as_posix()].startswith("unfin")


def direct(folder: Path, kind: str) -> np.ndarray:
    """Returns for every test row whether the chosen response scores above all others."""
    final, start = (np.load(folder / f"logps-{name}.npy") for name in ("final", "start"))
    scores = np.where(final < 0, final - start if kind == "reward" else final, -np.inf)
    return (scores[:, :1] > scores[:, 1:]).all(1).astype(float)


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_paired_difference_is_the_direct_one(folder: Path, tmp_path: Path, kind: str):
    make_report([folder], tmp_path / "out")
    (record,) = [
        r
        for r in read(tmp_path / "out" / "paired.csv")
        if r["ours"].startswith("mass_dpo") and r["theirs"].startswith("sdpo")
        and r["metric"] == f"{kind}/accuracy"
    ]  # fmt: skip
    base = folder / "table1" / "llama" / "lastfm"
    gains = [
        direct(base / "mass_dpo" / f"seed{i}", kind) - direct(base / "sdpo" / f"seed{i}", kind)
        for i in range(3)
    ]
    mean = 100 * np.mean(gains)
    assert float(record["difference"]) == pytest.approx(mean, abs=1e-3)
    assert float(record["low"]) < mean < float(record["high"])
    assert (record["seeds"], record["rows"]) == ("3", str(3 * ROWS))


def test_other_rows_are_never_compared(folder: Path, tmp_path: Path):
    base = tmp_path / "runs"
    write_run(base / "a", skill=0.8)
    write_run(base / "b", skill=0.5, method="sdpo", **{"data.max_test": 100})
    write_run(base / "c", skill=0.5, method="dpo", seed=1)
    write_run(base / "d", skill=0.5, method="dmpo", start="models/Other")
    make_report([base], tmp_path / "out")
    assert read(tmp_path / "out" / "paired.csv") == []
    text = (tmp_path / "out" / "report.md").read_text()
    # The settings that the rows follow from are in the names too.
    assert "sdpo (redrawn), data.max_test=100" in text
    assert text.count("have no finished runs of one seed on the same test rows") == 3


def test_interval():
    rng = np.random.default_rng(3)
    one = rng.normal(0.5, 1.0, 2000)
    found = paired.pool_differences([one])
    error = metrics.standard_error(one)
    assert found.mean == pytest.approx(one.mean())
    assert found.low == pytest.approx(one.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(one.mean() + 1.96 * error, abs=0.15 * error)
    # The same rows twice tell nothing new; seeds that disagree widen the interval.
    assert paired.pool_differences([one, one]).low == pytest.approx(found.low, abs=0.1 * error)
    apart = paired.pool_differences([one - 1, one + 1])
    assert apart.low < -0.4 and apart.high > 1.4
    assert paired.pool_differences([one]) == found
    assert paired.pool_differences([np.zeros(50)]) == paired.Difference(0.0, 0.0, 0.0, 1, 50)


def test_page_needs_nothing_else(folder: Path, tmp_path: Path):
    make_report([folder], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "url(" not in text
    assert "<script" not in text and "http" not in text
    assert text.count('src="data:image/png;base64,') == 4  # Figures 2 and 3, two datasets' curves.
    assert 'name="viewport"' in text and "color-scheme: light dark" in text
    for tag in ("table", "div", "details", "ul"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>")


def test_models_are_named_by_where_training_began(tmp_path: Path):
    first = write_run(tmp_path / "runs" / "warm", method="sft")
    write_run(tmp_path / "runs" / "second", start=first)
    write_run(tmp_path / "runs" / "third", method="dpo", start="elsewhere/runs/second")
    write_run(tmp_path / "runs" / "alone", method="sdpo", start="")
    found = {run.folder.name: run for run in runs.find_runs([tmp_path])}
    assert {found[n].model for n in ("warm", "second")} == {"Tiny-Llama"}
    assert found["second"].start == "sft"
    assert found["third"].model == "Tiny-Llama"  # Found again after a move, by the end of its path.
    assert found["third"].start == "mass_dpo (pool_fisher, step)"
    assert (found["alone"].model, found["alone"].start) == ("scratch", "")


def test_every_method_has_its_place_in_tables():
    assert set(cells.METHODS) == set(METHODS)


def test_labels():
    config = dict(config_lib.flatten(config_lib.default()))
    assert runs.describe_method(config) == ("mass_dpo (pool_fisher, step)", 3, 0.1)
    once = {**config, "method": "sdpo", "selection.refresh": "once"}
    assert runs.describe_method(once) == ("sdpo (fixed)", 3, 0.1)
    assert runs.describe_method({**config, "method": "dpo"}) == ("dpo", 1, 0.1)
    assert runs.describe_method({**config, "method": "pl_all"}) == ("pl_all", "all", 0.1)
    assert runs.describe_method({**config, "method": "sft"}) == ("sft", None, None)


def test_other_settings_are_another_cell(tmp_path: Path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, **{"train.learning_rate": 3e-5})
    write_run(tmp_path / "c", seed=0)
    found, repeats = cells.gather(runs.find_runs([tmp_path]))
    assert [(cell.method, len(cell.runs)) for cell in found] == [
        ("mass_dpo (pool_fisher, step), train.learning_rate=1e-05", 1),
        ("mass_dpo (pool_fisher, step), train.learning_rate=3e-05", 1),
    ]
    assert [(a.folder.name, b.folder.name) for a, b in repeats] == [("c", "a")]


def test_no_runs(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        make_report([tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(UserError, match="no runs"):
        make_report([tmp_path], tmp_path / "out")


def test_band_over_seeds():
    steps = np.array([10.0, 20.0, 30.0])
    band = figures.band_over_seeds([(steps, steps), (steps[:2], steps[:2] + 4)])
    assert band is not None
    np.testing.assert_array_equal(np.stack(band), [[10, 20], [10, 20], [12, 22], [14, 24]])


# A Python that trains at once; one method fails, and what runs is written down.
STUB = """#!/usr/bin/env bash
case "$2" in
  mass_dpo_jax.train)
    echo "$*" >>"$RECORD"
    for word in "$@"; do case "$word" in --workdir=*) folder="${word#*=}" ;; esac; done
    case "$*" in *method=$FAILS*) echo "error: no luck" >&2; exit 2 ;; esac
    echo '{"finished": true}' >"$folder/metrics.json" ;;
  mass_dpo_jax.report) echo "$*" >>"$RECORD" ;;
esac
"""


def launch(
    tmp_path: Path, *words: str, fails: str = "sdpo"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs launch/paper.sh with the stub; the commands that it ran or, dry, printed."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(STUB)
    python.chmod(0o755)
    for name in ("Llama", "lastfm", "qasc"):
        (tmp_path / name).mkdir(exist_ok=True)
    record = tmp_path / "record"
    record.unlink(missing_ok=True)
    result = subprocess.run(
        ["bash", str(ROOT / "launch/paper.sh"), "LLAMA=Llama", "LASTFM=lastfm", "OUT=out", *words],
        cwd=tmp_path,
        env={
            **os.environ,
            "MASS_DPO_VENV": str(tmp_path / "venv"),
            "RECORD": str(record),
            "FAILS": fails,
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = record.read_text() if record.exists() else result.stdout
    return result, [line for line in lines.splitlines() if "mass_dpo_jax." in line]


def test_launch_prints_every_command(tmp_path: Path):
    words = ["QASC=qasc", "METHODS=mass_dpo dpo sdpo+selection.refresh=once", "SEEDS=0 1"]
    result, lines = launch(tmp_path, *words, "EXTRA=--config.train.steps=5", "--dry-run")
    assert result.returncode == 0, result.stderr
    # Two data sets and seeds: three methods, S-DPO of the ablations, four ablated runs of two.
    assert len(lines) == 2 * 2 * (3 + 1 + 2 * 4) + 1
    assert len({line.split("--workdir=")[1].split()[0] for line in lines[:-1]}) == len(lines) - 1
    (line,) = [x for x in lines if "main/Llama/qasc/sdpo+selection.refresh=once/seed1 " in x]
    assert "--config=configs/llama3.py" in line and f"--config.model.path={tmp_path}/Llama" in line
    assert f"--config.data.name=qasc --config.data.path={tmp_path}/qasc" in line
    assert "--config.train.steps=5 --config.method=sdpo" in line
    assert line.split()[-2:] == ["--config.seed=1", "--config.selection.refresh=once"]
    assert not (tmp_path / "out").exists()
    assert lines[-1].split()[1:4] == ["-m", "mass_dpo_jax.report", f"{tmp_path}/out"]


def test_launch_goes_on_after_a_failure_and_skips_what_is_finished(tmp_path: Path):
    words = ["METHODS=sdpo mass_dpo", "ABLATED=mass_dpo", "BETAS=", "NEGATIVES=1 3", "SEEDS=0"]
    result, lines = launch(tmp_path, *words)
    assert result.returncode == 1, result.stderr
    assert len(lines) == 4 and "mass_dpo_jax.report" in lines[-1]
    assert "1 failed:" in result.stdout
    failed = tmp_path / "out" / "main" / "Llama" / "lastfm" / "sdpo" / "seed0"
    assert result.stdout.splitlines()[-1].strip() == f"{failed} (exit status 2)"
    assert (failed / "log.txt").read_text() == "error: no luck\n"
    (found,) = [run for run in runs.find_runs([tmp_path / "out"]) if run.folder == failed]
    assert found.state == "failed at its start: error: no luck"
    result, lines = launch(tmp_path, *words)
    assert [("sdpo" in line, "report" in line) for line in lines] == [(True, False), (False, True)]
    assert result.stdout.count("finished: ") == 2


def test_launch_starts_methods_from_a_finished_supervised_stage_only(tmp_path: Path):
    words = ["METHODS=mass_dpo", "ABLATED=", "SEEDS=0", "SFT=1"]
    _, lines = launch(tmp_path, *words)
    sft = f"{tmp_path}/out/main/Llama/lastfm/sft/seed0"
    assert f"--workdir={sft} --config.model.path={tmp_path}/Llama " in lines[0]
    assert f"--config.model.path={sft} " in lines[1]
    result, lines = launch(tmp_path, *words, "OUT=other", fails="sft")
    assert result.returncode == 1 and len(lines) == 2  # The supervised stage and the report.
    assert "mass_dpo/seed0 (its supervised stage did not finish)" in result.stdout


def test_launch_refuses_what_it_does_not_know(tmp_path: Path):
    result, _ = launch(tmp_path, "NOTHING=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: NOTHING: unknown")
