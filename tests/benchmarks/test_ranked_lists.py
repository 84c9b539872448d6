"""The benchmark of ranked lists: its rows, and its table."""

from __future__ import annotations

import numpy as np

from benchmarks import ranked_lists as bench
from benchmarks.evidence_runs import read_results
from mass_dpo_jax.data.examples import Example, History
from tests.support.packages import ROOT


def test_windows_of_a_user_are_one_list() -> None:
    windows = [("ab", "c"), ("bc", "d"), ("xy", "z")]  # Two of a user, one of another.
    examples = [
        Example(answer, History("", tuple(items), ""), answer, ("?",), "")
        for items, answer in windows
    ]
    lists, owners = bench.join_windows(examples)
    assert lists == [list("abcd"), list("xyz")] and owners == [0, 0, 1]


def test_rows_rank_what_comes_next_above_what_a_user_does_not_have() -> None:
    names = [f"n{i}" for i in range(60)]
    lists = [names[:25], names[30:44]]  # The second is too short for a row.
    rows = list(bench.make_rows(lists, names, seed=0))
    assert [row["id"] for row in rows] == ["0-0", "0-5", "0-10"]
    for start, row in zip((0, 5, 10), rows, strict=True):
        end = start + bench.HISTORY
        assert ", ".join(names[start:end]) in row["prompt"]
        responses = [row["chosen"], *row["rejected"]]
        assert responses[: bench.RANKED] == names[end : end + bench.RANKED]
        others = responses[bench.RANKED :]
        assert len(set(others)) == bench.OTHERS and not set(others) & set(lists[0])
        assert [row["score_chosen"], *row["score_rejected"]] == bench.GRADES.tolist()


def test_the_table_has_paired_differences_to_the_best_alone() -> None:
    rng = np.random.default_rng(0)
    names = [f"gain_ndcg@{k}" for k in bench.CUTOFFS]
    rows, values = [], {}
    for loss in bench.LOSSES:
        for seed in range(2):
            values[loss, seed] = rng.random(50)
            gains = dict.fromkeys(names, bench.pack(values[loss, seed]))
            rows.append(
                {
                    "loss": loss,
                    "seed": seed,
                    "gains": dict.fromkeys(("start", "policy", "reward"), gains),
                }
            )
    np.testing.assert_allclose(
        bench.unpack(bench.pack(values["best", 0])), values["best", 0], atol=1e-5
    )
    table = bench.report(rows)
    (line,) = [x for x in table.split("\n\n")[0].splitlines() if x.startswith("| whole ranking")]
    mean, best = (
        np.mean([values[loss, s] for s in range(2)]) for loss in ("whole ranking", "best")
    )
    assert line.split(" | ")[1:3] == ["2", f"{100 * mean:.1f}"]
    (before,) = [x for x in table.splitlines() if x.startswith("| before")]
    start = np.mean([values["LiPO-lambda", s] for s in range(2)])  # A seed's last row has it, too.
    assert before.split(" | ")[1:3] == ["2", f"{100 * start:.1f}"]
    assert line.split(" | ")[3].startswith(f"{100 * (mean - best):+.1f} ± ")


def test_the_page_has_the_tables_of_the_results() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    assert all(
        table in page for table in bench.report(read_results(ROOT / bench.RESULTS)).split("\n\n")
    )
