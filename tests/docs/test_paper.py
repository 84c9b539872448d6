"""docs/paper.md says what the paper's numbers say: its tables and its counts are computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import paper_numbers as benchmark
from benchmarks.paper_numbers import LARGEST, OURS, RIVALS, ROWS, number
from mass_dpo_jax.reports.paper import layout
from mass_dpo_jax.reports.paper.numbers import AVERAGE, Number, Place, read_numbers

PAGE = Path(__file__).parents[2] / "docs/paper.md"
CELLS = [(model.name, dataset) for model in layout.MODELS for dataset in layout.TITLES]
SDPO, DPO_K = RIVALS[3], RIVALS[2]


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join(PAGE.read_text().split())


@pytest.mark.parametrize("table", benchmark.PRINTED, ids=lambda table: table.__name__)
def test_the_tables_of_the_page_are_the_computed_ones(table: Callable[[], str]) -> None:
    assert f"\n\n{table()}\n\n" in PAGE.read_text()


def test_fitting_sizes_are_those_of_a_direct_search() -> None:
    """By rounding every k/n, without intervals."""
    for dataset, tables in (("medmcqa", "5"), ("qasc", "1")):
        texts = benchmark.shares(dataset, [tables])
        direct = [
            rows
            for rows in range(880, 2010)
            if set(texts) <= {f"{100 * k / rows:.2f}" for k in range(rows + 1)}
        ]
        assert direct == benchmark.fitting_sizes(texts, range(880, 2010))


def test_sizes_that_are_used_fit(page: str) -> None:
    for dataset, rows in ROWS.items():
        tables = ("1", "4a", "4b")
        assert (
            rows
            == benchmark.fitting_sizes(benchmark.shares(dataset, tables), range(100, LARGEST + 1))[
                0
            ]
        )
    assert f"sizes from 100 to {LARGEST:,}" in page


def test_dmpo_is_at_the_chance_of_four_options(page: str) -> None:
    row = RIVALS[1]
    for metric, chance, name in (("recall@1", 25, "R@1"), ("recall@3", 75, "R@3")):
        values = [number("5", m.name, "medmcqa", row, metric) for m in layout.MODELS]
        errors = [benchmark.standard_error(chance, benchmark.MEDMCQA_RANKED)] * 3
        assert all(abs(v - chance) < 2 * e for v, e in zip(values, errors, strict=True))
        assert f"{name} {min(values):.2f} to {max(values):.2f}" in page


def test_mrr_of_ranks_is_the_mean_of_their_inverses() -> None:
    # 4 rows at ranks 1, 2, 3 and 4; then the last one on rank 4 or 5 alike.
    assert benchmark.mrr((1, 1, 1), 4, 4) == pytest.approx(25 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert benchmark.mrr((1, 1, 1), 4, 5) == pytest.approx(25 * (1 + 1 / 2 + 1 / 3 + 9 / 40))


def test_every_printed_n_at_3_fits_the_rows_of_its_table() -> None:
    for place in read_numbers():
        if place.metric == "recall@1":
            rows = benchmark.MEDMCQA_RANKED if place.dataset == "medmcqa" else ROWS[place.dataset]
            assert list(benchmark.rank_counts(place, rows)), place


def test_the_mrr_of_four_options_is_the_printed_one(page: str) -> None:
    apart = []
    for model in layout.MODELS:
        for row in (SDPO, OURS):
            place = Place("5", model.name, "medmcqa", row.method, 3, 0.1, "recall@1")
            printed = number("2", model.name, "medmcqa", row, "mrr")
            rows = benchmark.MEDMCQA_RANKED
            counts = list(benchmark.rank_counts(place, rows))
            assert all(abs(benchmark.mrr(c, rows, 4) - printed) < 0.04 for c in counts)
            assert all(benchmark.mrr(c, rows, 20) < printed - 0.7 for c in counts)
            accuracy = number("1", model.name, "medmcqa", row)
            apart.append(abs(accuracy - read_numbers()[place].value))
    assert f"up to {max(apart):.2f} apart" in page


def test_accuracy_and_r_at_1_differ(page: str) -> None:
    differences = [
        round(
            number("1", model, dataset, row)
            - number("3" if dataset in ("lastfm", "movielens") else "5", model, dataset, row,
                     "recall@1"),
            2,
        )
        for model, dataset in CELLS
        for row in layout.METHODS
    ]  # fmt: skip
    count = sum(difference != 0 for difference in differences)
    assert (
        f"in {count} of {len(differences)} cells, by {min(differences):.2f} to "
        f"{max(differences):+.2f} points"
    ) in page


def test_printed_errors_are_too_small(page: str) -> None:
    ratios = benchmark.printed_error_ratios()
    assert len(ratios) == 72
    mean = sum(ratios) / len(ratios)
    assert f"are {min(ratios):.2f} to {max(ratios):.2f} of that, {mean:.2f} on average" in page
    assert 1 / mean**2 == pytest.approx(2, abs=0.02)  # "Twice as many rows".


def test_an_error_is_that_of_a_share_of_rows() -> None:
    share = benchmark.subtract("", 50.0, 50.0, "lastfm")
    assert share.error == pytest.approx(100 * (2 * 0.25 / 2000) ** 0.5) and not share.exceeds
    assert not benchmark.Difference("", -2.0, 1.0).exceeds
    assert benchmark.Difference("", -2.1, 1.0).exceeds


def test_the_two_cells_beyond_two_errors(page: str) -> None:
    for rival in (SDPO, DPO_K):
        (cell,) = [d for d in benchmark.compare_with(rival) if d.exceeds]
        where, _, figure = str(cell).partition(" +")
        assert where.replace(", ", " on ") in page
        assert (
            f"+{figure} points over {rival.title}" in page
            or f"+{figure} over {rival.title}" in page
        )
    printed = benchmark.compare_rows("4a", OURS, OURS._replace(beta=0.5))
    opposite = [pair[1].what for pair in printed if pair[1].exceeds and pair[1].mean < 0]
    assert opposite == ["SmolLM3, MovieLens"]


def test_averages_are_those_of_their_columns() -> None:
    for place, average in read_numbers().items():
        if place.dataset == AVERAGE:
            values = [read_numbers()[place._replace(dataset=d)].value for d in layout.TITLES]
            assert abs(sum(values) / 4 - average.value) <= 0.005 + 1e-9
    assert sum(place.dataset == AVERAGE for place in read_numbers()) == 27


def test_what_the_text_says_and_the_tables_do_not(page: str) -> None:
    ranks = {
        cell: sorted(layout.METHODS, key=lambda row: -number("1", *cell, row)) for cell in CELLS
    }
    best = [ranking[0] for ranking in ranks.values()]
    assert f"the best in {best.count(OURS)} of 12 cells, S-DPO in {best.count(SDPO)}" in page
    assert [cell for cell in CELLS if OURS not in ranks[cell][:2]] == [("llama", "qasc")]
    places = ", ".join(f"{number('1', 'llama', 'qasc', r):.2f}" for r in ranks["llama", "qasc"][:3])
    assert f"third on QASC with Llama3: {places}" in page

    above = sum(number("1", *cell, DPO_K) > number("1", *cell, SDPO) for cell in CELLS)
    averages = [
        model.title
        for model in layout.MODELS
        if number("1", model.name, AVERAGE, DPO_K) > number("1", model.name, AVERAGE, SDPO)
    ]
    assert f"above S-DPO in {above} of 12 cells, and in Qwen3's average" in page
    assert averages == ["Qwen3"]

    def gains(metric: str, cells: list[tuple[str, str]]) -> list[float]:
        return [number("2", *c, OURS, metric) - number("2", *c, SDPO, metric) for c in cells]

    assert f"in {sum(g > 0 for g in gains('mrr', CELLS))} of 12 cells" in page
    lower = [-g for g in gains("margin", CELLS) if g < 0]
    assert f"lower in {len(lower)} of 12 cells, by up to {max(lower):.2f}, and in two" in page
    assert sum(g < 0 for g in gains("margin", [(m.name, AVERAGE) for m in layout.MODELS])) == 2

    betas = [(number("4a", *c, OURS._replace(beta=0.5)) - number("4a", *c, OURS)) for c in CELLS]
    assert [CELLS[i] for i, gain in enumerate(betas) if gain > 0] == [
        ("smollm", "movielens"), ("llama", "movielens"),
    ]  # fmt: skip
    assert [CELLS[i] for i, gain in enumerate(betas) if gain == 0] == [("smollm", "qasc")]
    steps = [number("4b", *c, OURS._replace(n=5)) - number("4b", *c, OURS) for c in CELLS]
    assert [CELLS[i] for i, gain in enumerate(steps) if gain <= 0] == [("smollm", "qasc")]


def test_the_one_underline_that_is_not_the_second_best(page: str) -> None:
    wrong = []
    for place, underlined in read_numbers().items():
        if underlined.underlined:
            column: list[Number] = [
                read_numbers()[place._replace(method=row.method, n=row.n)] for row in layout.METHODS
            ]
            second = sorted(column, key=lambda n: -n.value)[1]
            if second != underlined._replace(underlined=second.underlined):
                wrong.append((place.model, place.dataset, underlined.text, second.text))
    assert wrong == [("qwen", "medmcqa", "52.56", "55.56")]
    assert "52.56 is underlined and 55.56 is second" in page
    assert sum(n.underlined for n in read_numbers().values()) == 9
