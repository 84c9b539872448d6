"""How the paper prints its tables: captions, headings, columns and rows, in its words and order."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mass_dpo_jax.reports.paper.numbers import AVERAGE

BETA, N = 0.1, 3  # The main setting; DPO has one negative.


class Model(NamedTuple):
    """A base model.

    Attributes:
        name: its name in numbers.csv.
        title: its name in the paper.
        folder: its name on the Hugging Face hub, and so of its folder, in small letters.
    """

    name: str
    title: str
    folder: str


MODELS = (
    Model("qwen", "Qwen3", "qwen3-4b"),
    Model("smollm", "SmolLM3", "smollm3-3b"),
    Model("llama", "Llama3", "llama-3.2-3b-instruct"),
)


class Row(NamedTuple):
    """A row of each model: an experiment.

    Attributes:
        title: how the paper names it.
        method: its method.
        n: negatives that it trains on.
        beta: its beta.
    """

    title: str
    method: str
    n: int = N
    beta: float = BETA


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        title: its own title.
        dataset: the dataset, or "average".
        metrics: what a cell shows, with slashes between.
        group: the heading above this and neighbouring columns; "" for none.
    """

    title: str
    dataset: str
    metrics: tuple[str, ...] = ("accuracy",)
    group: str = ""


METHODS = (
    Row("DPO", "dpo", n=1),
    Row("DMPO", "dmpo"),
    Row("DPO-k", "dpo_k"),
    Row("S-DPO", "sdpo"),
    Row("MASS-DPO", "mass_dpo"),
)
ACCURACIES = (
    Column("Medmcqa", "medmcqa"),
    Column("QASC", "qasc"),
    Column("LastFM", "lastfm"),
    Column("MovieLens", "movielens"),
)
TITLES = {
    "medmcqa": "MedMCQA", "qasc": "QASC", "lastfm": "LastFM", "movielens": "MovieLens",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """A table, or a half of Table 4.

    Attributes:
        name: its name in numbers.csv.
        title: its heading; "" where it is a whole table.
        labels: headings of the two columns that name a row, a model and what is varied.
        columns: the columns of numbers.
        rows: the rows of each model.
        varied: the setting that the rows differ in; "" where it is the method.
        marks: whether the best and the second best of a column are marked.
    """

    name: str
    title: str
    labels: tuple[str, str]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    varied: str = ""
    marks: bool = False


class Layout(NamedTuple):
    """A table as it is printed.

    Attributes:
        number: its number.
        caption: its caption.
        parts: itself, or its halves.
    """

    number: int
    caption: str
    parts: tuple[Part, ...]


def _ranking(name: str, datasets: tuple[str, str]) -> Part:
    metrics = {"R@1": "recall@1", "R@3": "recall@3", "N@1": "ndcg@1", "N@3": "ndcg@3"}
    columns = tuple(
        Column(title, dataset, (metric,), TITLES[dataset])
        for dataset in datasets
        for title, metric in metrics.items()
    )
    return Part(name, "", ("Model", "Method"), columns, METHODS)


TABLES = (
    Layout(
        1,
        "Accuracy (%) on four tasks across three base models. Bold = best, underlined = second "
        "best.",
        (
            Part(
                "1",
                "",
                ("Model", "Setting"),
                (*ACCURACIES, Column("Avg↑", AVERAGE)),
                METHODS,
                marks=True,
            ),
        ),
    ),
    Layout(
        2,
        "MRR and Margin across four datasets. Each cell shows MRR / Margin.",
        (
            Part(
                "2",
                "",
                ("Model", "Method"),
                tuple(
                    Column("MRR/Margin", dataset, ("mrr", "margin"), title)
                    for dataset, title in {**TITLES, AVERAGE: "Average↑"}.items()
                ),
                METHODS[-2:],
            ),
        ),
    ),
    Layout(
        3,
        "Recall (R) and NDCG (N) at k={1,3} on LastFM and MovieLens.",
        (_ranking("3", ("lastfm", "movielens")),),
    ),
    Layout(
        4,
        "MASS-DPO ablations on two hyperparameters. (a) Varying the scale β (0.1, 0.5, 1.0) while "
        "holding the number of negatives k fixed. (b) Varying k (1, 3, 5) while holding β fixed.",
        (
            Part(
                "4a",
                "(a) β ablation",
                ("Model", "β"),
                ACCURACIES,
                tuple(Row(f"{beta}", "mass_dpo", beta=beta) for beta in (0.1, 0.5, 1.0)),
                varied="beta",
            ),
            Part(
                "4b",
                "(b) Negatives k ablation",
                ("Model", "k"),
                ACCURACIES,
                tuple(Row(f"{n}", "mass_dpo", n=n) for n in (1, 3, 5)),
                varied="n",
            ),
        ),
    ),
    Layout(
        5,
        "Recall (R) and NDCG (N) at k={1,3} on MedMCQA and QASC.",
        (_ranking("5", ("medmcqa", "qasc")),),
    ),
)


class Figure(NamedTuple):
    """A figure with curves of MASS-DPO and S-DPO.

    Attributes:
        number: its number.
        datasets: the datasets it shows.
        caption: what it shows.
    """

    number: int
    datasets: tuple[str, str]
    caption: str


FIGURES = (
    Figure(
        2,
        ("lastfm", "medmcqa"),
        "Margin, accuracy, and chosen reward comparisons on LastFM and MedMCQA datasets.",
    ),
    Figure(
        3,
        ("movielens", "qasc"),
        "Comparison of MASS-DPO and SDPO on the MovieLens and QASC datasets.",
    ),
)
