"""numbers.csv holds what the paper prints: cells typed from its text, and every cell there is."""

from __future__ import annotations

import collections

import pytest

from mass_dpo_jax.reports.paper import layout
from mass_dpo_jax.reports.paper.numbers import Number, Place, read_numbers

# Typed from the paper's text, not from the file.
TYPED = {
    ("1", "qwen", "medmcqa", "dpo", 1, 0.1, "accuracy"): "43.49",
    ("1", "smollm", "movielens", "sdpo", 3, 0.1, "accuracy"): "55.70",
    ("1", "llama", "qasc", "mass_dpo", 3, 0.1, "accuracy"): "73.62",
    ("1", "llama", "average", "sdpo", 3, 0.1, "accuracy"): "63.23",
    ("2", "qwen", "medmcqa", "mass_dpo", 3, 0.1, "mrr"): "73.30",
    ("2", "llama", "medmcqa", "sdpo", 3, 0.1, "margin"): "23.93",
    ("2", "smollm", "average", "mass_dpo", 3, 0.1, "margin"): "9.26",
    ("3", "qwen", "lastfm", "dpo_k", 3, 0.1, "recall@3"): "76.45",
    ("3", "llama", "movielens", "mass_dpo", 3, 0.1, "ndcg@3"): "65.57",
    ("4a", "smollm", "movielens", "mass_dpo", 3, 0.5, "accuracy"): "56.30 ± 0.79",
    ("4a", "qwen", "qasc", "mass_dpo", 3, 1.0, "accuracy"): "69.65 ± 1.06",
    ("4b", "llama", "lastfm", "mass_dpo", 5, 0.1, "accuracy"): "60.05 ± 0.80",
    ("4b", "smollm", "medmcqa", "mass_dpo", 1, 0.1, "accuracy"): "29.26 ± 0.72",
    ("5", "smollm", "medmcqa", "dmpo", 3, 0.1, "recall@1"): "26.02",
    ("5", "llama", "qasc", "dpo_k", 3, 0.1, "ndcg@1"): "73.95",
}
UNDERLINED = {
    ("qwen", "qasc", "dpo_k"), ("qwen", "medmcqa", "sdpo"), ("smollm", "qasc", "dpo_k"),
    ("smollm", "medmcqa", "mass_dpo"), ("smollm", "movielens", "mass_dpo"),
    ("llama", "qasc", "dpo_k"), ("llama", "lastfm", "sdpo"), ("llama", "medmcqa", "mass_dpo"),
    ("llama", "average", "mass_dpo"),
}  # fmt: skip


@pytest.mark.parametrize("place", TYPED, ids=lambda place: "-".join(map(str, place)))
def test_a_cell_is_what_the_paper_prints(place: tuple) -> None:
    text, _, error = TYPED[place].partition(" ± ")
    number = read_numbers()[Place(*place)]
    unit = "logits" if place[-1] == "margin" else "percent"
    assert (number.text, number.error, number.unit) == (text, error, unit)
    assert number.value == float(text)


def test_underlined_are_those_of_table_1_that_the_text_shows() -> None:
    underlined = {place for place, number in read_numbers().items() if number.underlined}
    assert {place.table for place in underlined} == {"1"}
    assert {(p.model, p.dataset, p.method) for p in underlined} == UNDERLINED


def test_every_cell_of_every_table_is_there_and_no_other() -> None:
    count = collections.Counter(place.table for place in read_numbers())
    assert count == {"1": 75, "2": 60, "3": 120, "4a": 36, "4b": 36, "5": 120}
    places = {
        Place(part.name, model.name, column.dataset, row.method, row.n, row.beta, metric)
        for table in layout.TABLES
        for part in table.parts
        for model in layout.MODELS
        for row in part.rows
        for column in part.columns
        for metric in column.metrics
    }
    assert places == set(read_numbers())


def test_the_main_setting_of_table_4_is_that_of_table_1() -> None:
    numbers = read_numbers()
    for model in layout.MODELS:
        for column in layout.ACCURACIES:
            place = Place("1", model.name, column.dataset, "mass_dpo", 3, 0.1, "accuracy")
            same = [numbers[place._replace(table=table)] for table in ("4a", "4b")]
            assert {number.text for number in same} == {numbers[place].text}
            assert len({number.error for number in same}) == 1


def test_r_at_1_is_n_at_1() -> None:
    numbers = read_numbers()
    for place, number in numbers.items():
        if place.metric == "recall@1":
            assert numbers[place._replace(metric="ndcg@1")] == number


def test_a_number_knows_its_value() -> None:
    assert Number("43.40", "percent", "", False).value == 43.4
