"""What the numbers in the paper's tables say about themselves: the tables of docs/paper.md.

    python -m benchmarks.paper_numbers

Nothing is measured: everything follows from the 447 numbers as they are printed, which are in
mass_dpo_jax/reports/paper/numbers.csv. Standard errors are those of a share of rows, and errors of
differences are those of independent rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from mass_dpo_jax.reports.format import markdown_table
from mass_dpo_jax.reports.paper.layout import METHODS, MODELS, TABLES, TITLES, Row
from mass_dpo_jax.reports.paper.numbers import Place, read_numbers

# Rows that the numbers of a dataset fit; of MedMCQA, those of Tables 1 and 4, then of Table 5.
ROWS = {"medmcqa": 1996, "qasc": 906, "lastfm": 2000, "movielens": 1984}
MEDMCQA_RANKED = 1995
LARGEST = (
    2500  # Sizes that are tried: from 100 to somewhat more than the 2,000 that the paper names.
)
OURS, RIVALS = METHODS[-1], METHODS[:-1]


class Difference(NamedTuple):
    """A difference of two accuracies, in points.

    Attributes:
        what: what was compared.
        mean: the difference.
        error: its standard error.
    """

    what: str
    mean: float
    error: float

    @property
    def exceeds(self) -> bool:
        """Whether it is more than two of its standard errors."""
        return abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        return f"{self.what} {self.mean:+.1f} ± {self.error:.1f}"


def number(table: str, model: str, dataset: str, row: Row, metric: str = "accuracy") -> float:
    """Returns a number of the paper."""
    place = Place(table, model, dataset, row.method, row.n, row.beta, metric)
    return read_numbers()[place].value


def count_range(text: str, rows: int) -> range:
    """Returns the counts k for which k of `rows`, in percent, is printed as `text`."""
    half = Fraction(1, 200)
    value = Fraction(text)
    low, high = (x * rows / 100 for x in (value - half, value + half))
    return range(math.ceil(low), math.floor(high) + 1)


def fitting_sizes(texts: Iterable[str], sizes: Iterable[int]) -> list[int]:
    """Returns the numbers of rows of which all the texts can be shares."""
    texts = list(texts)
    return [rows for rows in sizes if all(count_range(text, rows) for text in texts)]


def shares(dataset: str, tables: Sequence[str]) -> list[str]:
    """Returns the printed shares of rows of a dataset in the tables: accuracies and recalls."""
    return [
        n.text
        for place, n in read_numbers().items()
        if place.dataset == dataset
        and place.table in tables
        and place.metric in ("accuracy", "recall@1", "recall@3", "ndcg@1")
    ]


def standard_error(percent: float, rows: int) -> float:
    """Returns the standard error of a share of rows, both in percent."""
    return math.sqrt(percent * (100 - percent) / rows)


def subtract(what: str, ours: float, theirs: float, dataset: str) -> Difference:
    """Returns the difference of two accuracies on a dataset, with the error of independent rows."""
    errors = (standard_error(value, ROWS[dataset]) for value in (ours, theirs))
    return Difference(what, ours - theirs, math.hypot(*errors))


def compare_with(rival: Row, ours: Row = OURS, table: str = "1") -> list[Difference]:
    """Returns the differences between two methods in the twelve cells of Table 1.

    Args:
        rival: the method that is subtracted.
        ours: the other one.
        table: the table of the other one.
    """
    return [
        subtract(
            f"{model.title}, {title}",
            number(table, model.name, dataset, ours),
            number("1", model.name, dataset, rival),
            dataset,
        )
        for model in MODELS
        for dataset, title in TITLES.items()
    ]


def compare_one_negative() -> list[Difference]:
    """Returns a selected negative (Table 4b, k = 1) minus a random one (DPO in Table 1)."""
    return compare_with(RIVALS[0], OURS._replace(n=1), "4b")


def average(differences: Sequence[Difference]) -> list[Difference]:
    """Returns the mean of each model's four differences."""
    size = len(TITLES)
    groups = [differences[i : i + size] for i in range(0, len(differences), size)]
    return [
        Difference(
            model.title,
            sum(d.mean for d in group) / size,
            math.hypot(*(d.error for d in group)) / size,
        )
        for model, group in zip(MODELS, groups, strict=True)
    ]


def compare_rows(table: str, ours: Row, theirs: Row) -> list[tuple[Difference, Difference]]:
    """Returns the differences of two rows of Table 4, with our errors and with the printed ones."""
    pairs = []
    for model in MODELS:
        for dataset, title in TITLES.items():
            places = [
                Place(table, model.name, dataset, row.method, row.n, row.beta, "accuracy")
                for row in (ours, theirs)
            ]
            a, b = (read_numbers()[place] for place in places)
            difference = subtract(f"{model.title}, {title}", a.value, b.value, dataset)
            printed = math.hypot(float(a.error), float(b.error))
            pairs.append((difference, difference._replace(error=printed)))
    return pairs


def printed_error_ratios() -> list[float]:
    """Returns the standard errors of Table 4 over those of their shares of rows."""
    return [
        float(n.error) / standard_error(n.value, ROWS[place.dataset])
        for place, n in read_numbers().items()
        if n.error
    ]


def rank_counts(place: Place, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields how many rows rank the chosen response first, second and third.

    Args:
        place: an R@1 of Table 3 or 5; R@3 and N@3 are beside it.
        rows: the number of rows.
    """
    texts = {
        m: read_numbers()[place._replace(metric=m)].text for m in ("recall@1", "recall@3", "ndcg@3")
    }
    for first in count_range(texts["recall@1"], rows):
        for three in count_range(texts["recall@3"], rows):
            for second in range(three - first + 1):
                third = three - first - second
                gain = 100 * (first + second / math.log2(3) + third / 2) / rows
                if abs(gain - float(texts["ndcg@3"])) <= 0.005 + 1e-9:
                    yield first, second, third


def mrr(counts: tuple[int, int, int], rows: int, last: int) -> float:
    """Returns the MRR in percent if all rows that miss the first three are evenly on 4 to `last`.

    Args:
        counts: rows that rank the chosen response first, second and third.
        rows: the number of rows.
        last: the last rank.
    """
    missed = rows - sum(counts)
    beyond = sum(1 / rank for rank in range(4, last + 1)) / (last - 3)
    found = sum(count / rank for rank, count in enumerate(counts, start=1))
    return 100 * (found + missed * beyond) / rows


def sizes_table() -> str:
    """Returns which numbers of rows fit the printed numbers."""
    rows = []
    groups = [
        ("lastfm", ("1", "3", "4a", "4b")),
        ("movielens", ("1", "3", "4a", "4b")),
        ("qasc", ("1", "4a", "4b", "5")),
        ("medmcqa", ("1", "4a", "4b")),
        ("medmcqa", ("5",)),
        ("medmcqa", ("1", "4a", "4b", "5")),
    ]
    for dataset, tables in groups:
        texts = set(shares(dataset, tables))
        fits = ", ".join(f"{size:,}" for size in fitting_sizes(texts, range(100, LARGEST + 1)))
        names = ", ".join(dict.fromkeys(table[0] for table in tables))
        rows.append([TITLES[dataset], names, str(len(texts)), fits or "none"])
    return markdown_table(["data", "tables", "different numbers", "rows that fit all"], rows, 2)


def options_table() -> str:
    """Returns the MRR on MedMCQA that follows from Table 5 with four and with twenty options."""
    rows = []
    for model in MODELS:
        for row in METHODS[-2:]:
            place = Place("5", model.name, "medmcqa", row.method, row.n, row.beta, "recall@1")
            counts = next(rank_counts(place, MEDMCQA_RANKED))
            printed = read_numbers()[place._replace(table="2", metric="mrr")].text
            texts = [f"{mrr(counts, MEDMCQA_RANKED, last):.2f}" for last in (4, 20)]
            rows.append([f"{model.title}, {row.title}", printed, *texts])
    header = ["MRR on MedMCQA, %", "Table 2", "Table 5, four options", "Table 5, twenty options"]
    return markdown_table(header, rows)


def differences_table() -> str:
    """Returns how many differences of Table 1 exceed two standard errors."""
    compared = {f"MASS-DPO − {r.title}": compare_with(r) for r in reversed(RIVALS)}  # noqa: RUF001
    compared["one selected − one random negative"] = compare_one_negative()  # noqa: RUF001
    rows = [
        [
            name,
            *(f"{sum(map(test, cells))} of {len(cells)}" for test in (_above, _below)),
            *(f"{d.mean:+.2f} ± {d.error:.2f}" for d in average(cells)),
        ]
        for name, cells in compared.items()
    ]
    header = [
        "difference in accuracy, points", "above two errors", "below minus two",
        *(f"average, {model.title}" for model in MODELS),
    ]  # fmt: skip
    return markdown_table(header, rows)


def ablations_table() -> str:
    """Returns how many differences of Table 4 exceed two standard errors, ours and the printed."""
    rows = []
    part = {part.name: part.rows for table in TABLES for part in table.parts}
    betas, counts = part["4a"], part["4b"]
    steps = [
        ("4a", "β", betas[0], betas[1]), ("4a", "β", betas[1], betas[2]),
        ("4b", "k", counts[1], counts[0]), ("4b", "k", counts[2], counts[1]),
    ]  # fmt: skip
    for table, letter, ours, theirs in steps:
        pairs = compare_rows(table, ours, theirs)
        exceeding = [sum(pair[i].exceeds for pair in pairs) for i in (0, 1)]
        better = sum(pair[0].mean > 0 for pair in pairs)
        rows.append(
            [f"{letter} = {ours.title} − {letter} = {theirs.title}"]  # noqa: RUF001
            + [f"{count} of {len(pairs)}" for count in (better, *exceeding)]
        )
    header = ["difference", "above 0", "beyond two errors", "beyond two printed errors"]
    return markdown_table(header, rows)


def _above(difference: Difference) -> bool:
    return difference.exceeds and difference.mean > 0


def _below(difference: Difference) -> bool:
    return difference.exceeds and difference.mean < 0


PRINTED = (sizes_table, options_table, differences_table, ablations_table)


def main() -> None:
    """Prints the tables."""
    print("\n\n".join(table() for table in PRINTED))


if __name__ == "__main__":
    main()
