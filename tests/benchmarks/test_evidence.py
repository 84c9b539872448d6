from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import evidence, evidence_runs, evidence_worlds
from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks, metrics
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.readers import synthetic
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.evaluator import START_LOGPS
from tests.benchmarks.questions import TEMPLATE, write_questions
from tests.support.run_homes import write_base
from tests.support.runs import on_one_device

ROWS = 400


def line(method: str, seed: int, ranks: np.ndarray, **more: Any) -> dict[str, Any]:
    """A line as `Bench.measure` gives it, with the same ranks by policy and by reward."""
    bench = evidence_runs.Bench(Path("runs"), Path("results"))
    config = bench.config("clusters", seed)
    config.update_from_flattened_dict(evidence_runs.METHODS.get(method, {}))
    values = metrics.per_example_ranking(ranks)
    final = {f"{by}/{k}": float(v.mean()) for by in ("policy", "reward") for k, v in values.items()}
    row = {
        "world": "clusters",
        "start": "cold",
        "method": method,
        "seed": seed,
        "settings": evidence_runs.settings_of(config),
        "at_start": {"policy/accuracy": 0.05},
        "final": final,
        "seconds_per_step": 0.02,
        "selection": {},
        "policy_ranks": evidence_runs.pack(ranks),
        "reward_ranks": evidence_runs.pack(ranks),
    }
    return {**row, **more}


def made_up(accuracies: dict[str, float], seeds: int = 3) -> list[dict[str, Any]]:
    """Results in which a method is right on the rows easier than its accuracy."""
    rng = np.random.default_rng(0)
    hard = rng.random(ROWS)
    rows = []
    for seed in range(seeds):
        for method, accuracy in accuracies.items():
            noisy = hard + 0.05 * rng.normal(size=ROWS)
            rows.append(line(method, seed, np.where(noisy < accuracy, 1, 4)))
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "clusters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_ranks_survive_packing():
    ranks = np.array([1, 20, 60, 255])
    np.testing.assert_array_equal(evidence_runs.unpack(evidence_runs.pack(ranks)), ranks)


def test_with_one_seed_the_error_is_that_of_paired_rows():
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 2, size=(2, 1, ROWS)).astype(float)
    found = evidence.difference(ours, theirs)
    mean, error = metrics.paired_difference(ours[0], theirs[0])
    assert found.seeds is None
    assert (found.mean, found.error(0.0)) == pytest.approx((mean, error))


def test_the_parts_of_the_variance_are_found():
    """Against a direct computation with loops, and against what the differences were made of."""
    rng = np.random.default_rng(2)
    seeds, rows = 40, 3000
    made = 0.1 * rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=rows)
    made = made + rng.normal(size=(seeds, rows)) + 0.3
    found = evidence.difference(made, np.zeros_like(made))

    means = [float(np.mean(made[s])) for s in range(seeds)]
    of_rows = [float(np.mean(made[:, m])) for m in range(rows)]
    grand = float(np.mean(means))
    rest = sum(
        (made[s, m] - means[s] - of_rows[m] + grand) ** 2 for s in range(seeds) for m in range(rows)
    ) / ((seeds - 1) * (rows - 1))
    assert found.mean == pytest.approx(grand)
    assert found.rows == pytest.approx(sum((x - grand) ** 2 for x in of_rows) / (rows - 1) / rows)
    between = sum((x - grand) ** 2 for x in means) / (seeds - 1) - rest / rows
    assert found.seeds == pytest.approx(between)
    # So many seeds speak for themselves; of a few, other methods' count.
    assert found.error(7.0) == pytest.approx((found.rows + between / seeds) ** 0.5)
    few = evidence.difference(made[:3], np.zeros_like(made[:3]))
    assert few.error(0.01) == pytest.approx((few.rows + 0.01 / 3) ** 0.5)
    # 0.1 ** 2, known from 40 seeds to a quarter of itself.
    assert 0.004 < between < 0.02
    assert found.rows == pytest.approx((0.5**2 + 1 / seeds) / rows, rel=0.1)


def test_the_variance_between_seeds_is_pooled_over_methods():
    differences = [evidence.Difference(0.0, 1.0, s, 3) for s in (0.3, -0.1, 0.1, None)]
    assert evidence.pooled(differences) == pytest.approx(0.1)
    assert evidence.pooled(differences[1:2]) == 0.0
    assert evidence.pooled([]) == 0.0


def test_table():
    rows = made_up({"random-step": 0.2, "all": 0.6, "sampled": 0.4})
    table = evidence.Table(rows)
    mean, error = table.compare("sampled", "random-step", "reward")
    hits = {
        m: np.stack(
            [evidence_runs.unpack(r["reward_ranks"]) == 1 for r in rows if r["method"] == m]
        )
        for m in table.runs
    }
    assert mean == pytest.approx(100 * (hits["sampled"].mean() - hits["random-step"].mean()))
    assert 0 < error < 5
    text = table.markdown().splitlines()
    cells = {row.split(" | ")[0][2:]: row.strip("| ").split(" | ") for row in text if "|" in row}
    names = cells["method"]
    for method in table.runs:
        assert cells[method][names.index("seeds")] == "3"
        shown = float(cells[method][names.index("R@1 policy")])
        assert shown == pytest.approx(100 * hits[method].mean(), abs=0.051)
    whole, _ = table.compare("all", "random-step", "policy")
    share = f"{100 * table.compare('sampled', 'random-step', 'policy')[0] / whole:.0f} %"
    assert cells["sampled"][names.index("share policy")] == share
    assert f"{mean:+.1f} ± {error:.1f}" in cells["sampled"]
    assert "80 % power" in text[-1]


def test_no_share_of_a_way_that_is_not_there():
    rows = made_up({"random-step": 0.4, "all": 0.4, "sampled": 0.5})
    assert evidence.Table(rows).markdown().count(" %") == 1  # That of the power.


@pytest.mark.parametrize(
    ("mean", "expected", "word"),
    [
        (3.0, "above", "holds"),
        (1.0, "above", "not seen"),
        (-3.0, "above", "contradicted"),
        (-3.0, "below", "holds"),
        (3.0, "below", "contradicted"),
        (1.0, "not above", "holds"),
        (3.0, "not above", "contradicted"),
    ],
)
def test_verdicts(mean: float, expected: str, word: str):
    assert evidence.verdict(mean, 1.0, expected) == word


def test_report_reads_results_alone(tmp_path):
    names = (*evidence_runs.METHODS, *evidence_runs.RETIRED)
    accuracies = dict.fromkeys(names, 0.3) | {"all": 0.6, "pool_fisher-step": 0.1}
    write(tmp_path, made_up(accuracies))
    with (tmp_path / "clusters.jsonl").open("a") as file:
        file.write('{"world": "clu')  # Cut short.
    text = evidence.report(tmp_path)
    assert text.startswith("### clusters, cold start")
    assert all(f"| {name} |" in text for name in names)
    assert sum(words in text for _, words, *_ in evidence.PREDICTIONS) == len(evidence.PREDICTIONS)
    [loses] = [row for row in text.splitlines() if "Algorithm 1 at every step" in row]
    assert loses.count("holds") == 2
    assert evidence.report(tmp_path / "nothing").endswith("no results")


def test_finished_cells_are_skipped_and_new_ones_written(tmp_path, monkeypatch):
    write(tmp_path, made_up({"random-step": 0.2}, seeds=1))
    ran = []

    def measure(self: evidence_runs.Bench, cell: evidence_runs.Cell) -> dict[str, Any]:
        ran.append(cell)
        return line(cell.method, cell.seed, np.ones(ROWS, int))

    monkeypatch.setattr(evidence_runs.Bench, "measure", measure)
    cells = evidence_runs.cells_of("clusters", ["cold"], ["random-step", "all"], [0, 1])
    bench = evidence_runs.Bench(tmp_path / "runs", tmp_path)
    bench.run(cells)
    assert [(cell.method, cell.seed) for cell in ran] == [
        ("all", 0),
        ("random-step", 1),
        ("all", 1),
    ]
    assert len(evidence_runs.read_results(tmp_path)) == 4
    bench.run(cells)
    assert len(ran) == 3


def test_results_of_other_settings_are_refused(tmp_path):
    write(tmp_path, made_up({"random-step": 0.2}, seeds=1))
    bench = evidence_runs.Bench(tmp_path / "runs", tmp_path, changes={"train.steps": 7})
    with pytest.raises(UserError, match=r"train\.steps .there 300, here 7"):
        bench.run(evidence_runs.cells_of("clusters", ["cold"], ["random-step"], [0]))


def test_unknown_names_are_errors():
    with pytest.raises(UserError, match="no method 'best'; expected random-once"):
        evidence_runs.cells_of("plain", ["cold"], ["best"], [0])
    with pytest.raises(UserError, match="no start 'hot'; expected cold, warm"):
        evidence_runs.cells_of("plain", ["hot"], ["all"], [0])
    with pytest.raises(UserError, match="no start 'cold'; expected instruct, warm"):
        evidence_runs.cells_of("qasc", ["cold"], ["all"], [0])


@pytest.mark.parametrize("world", ["clusters", "qasc"])
def test_methods_are_valid_different_and_differ_in_nothing_else(tmp_path, world):
    bench = evidence_runs.Bench(tmp_path, tmp_path, model=str(tmp_path))
    shared = dict(config_lib.flatten(bench.config(world, 3)))
    free = {"method", "selection.criterion", "selection.refresh", "selection.draw"}
    seen = set()
    for changes in evidence_runs.METHODS.values():
        config = bench.config(world, 3)
        config.update_from_flattened_dict(changes)
        config.model.path = "model"
        config_checks.check(config)
        found = dict(config_lib.flatten(config))
        assert {name for name in found if found[name] != shared[name]} <= {*free, "model.path"}
        # What is published names no place of a file.
        assert str(tmp_path) not in json.dumps(evidence_runs.settings_of(config))
        seen.add(tuple(found[name] for name in sorted(free)))
    assert len(seen) == len(evidence_runs.METHODS)


class TestColdStart:
    def rows(self, seed: int = 0) -> tuple[list[Any], list[dict[str, Any]]]:
        data = ConfigDict(
            {
                "name": "synthetic",
                "path": "clusters",
                "list_candidates": False,
                "num_candidates": 20,
                "max_train": 0,
                "columns": "",
                "splits": "",
                "subset": "",
                "format": "auto",
                "group": "none",
            }
        )
        examples = load_examples(data, "train", seed)
        return examples, evidence_worlds.cold_rows(examples, seed)

    def test_rows_keep_prompts_and_candidates(self):
        examples, rows = self.rows()
        assert len(rows) == len(examples) == synthetic.ROWS["train"]
        for example, row in zip(examples, rows, strict=True):
            assert row["prompt"] == example.prompt.text
            assert sorted([row["chosen"], *row["rejected"]]) == sorted(
                [example.chosen, *example.rejected]
            )

    def test_any_candidate_is_as_likely_as_any_other(self):
        """The chosen one is the true one, and has the largest utility, one time in 20."""
        examples, rows = self.rows()
        utilities = synthetic.compute_oracle_scores(examples)
        best = [
            (example.chosen, *example.rejected)[u.argmax()]
            for example, u in zip(examples, utilities, strict=True)
        ]
        for names in ([example.chosen for example in examples], best):
            hits = np.mean([row["chosen"] == name for row, name in zip(rows, names, strict=True)])
            assert hits == pytest.approx(1 / 20, abs=4 * (0.05 * 0.95 / len(rows)) ** 0.5)

    def test_the_draw_is_a_function_of_the_seed(self):
        _, first = self.rows()
        _, again = self.rows()
        _, other = self.rows(seed=1)
        assert first == again
        assert (
            np.mean([a["chosen"] == b["chosen"] for a, b in zip(first, other, strict=True)]) < 0.1
        )


@pytest.mark.slow(reason="three trainings; a plain cell's pieces have tests of their own")
def test_a_cell_of_a_pretrained_model(tmp_path, monkeypatch):
    """From the model as it is, and from a supervised start that trains on other rows."""
    base = write_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    data = write_questions(tmp_path / "data")
    few = {"data.max_train": 8, "train.steps": 2, "train.batch_size": 4}
    few |= {"train.micro_batch_size": 4, "eval.batch_size": 4, "train.learning_rate": 0.01}
    bench = evidence_runs.Bench(tmp_path / "runs", tmp_path, str(data), str(base), few)
    monkeypatch.setattr(evidence_worlds, "PRETRAINED_STEPS", {"instruct": 0, "warm": 1})
    cells = [evidence_runs.Cell("qasc", start, "all", 0) for start in ("instruct", "warm")]
    with on_one_device():
        bench.run(cells)
    instruct, warm = evidence_runs.read_results(tmp_path)
    assert instruct["settings"] == warm["settings"]
    before, after = (
        np.load(tmp_path / f"runs/qasc-{start}-all-0" / START_LOGPS)
        for start in ("instruct", "warm")
    )
    assert not np.allclose(before, after, atol=1e-3)
    rows = {
        split: [
            json.loads(x) for x in (tmp_path / "runs/qasc-data" / file).read_text().split("\n")[:-1]
        ]
        for split, file in (("train", "train.jsonl"), ("test", "test.jsonl"))
    }
    assert {row["id"] for row in rows["test"]} == {"dev0", "dev1", "dev2"}
    assert len(rows["train"]) == 40
    # No list of candidates: a prompt names none of them.
    assert all("One of these" not in row["prompt"] for row in rows["train"])
    assert len(evidence_runs.unpack(warm["policy_ranks"])) == 3
    text = evidence.report(tmp_path)
    assert "### qasc, instruct start" in text
    assert "### qasc, warm start" in text
