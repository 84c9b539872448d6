"""The paper's own numbers: every cell of its Tables 1 to 5, from numbers.csv.

The file has a row for each number, in the paper's order. `table` is 1, 2, 3, 4a, 4b or 5; `model`
is llama, qwen or smollm; `dataset`, `method` and `metric` have our names, and the dataset "average"
is the paper's last column. `unit` is percent, or logits for margins. `value` and its standard
error `se` are written as printed. `mark` says what is underlined: the text that the file was made
from keeps that, but no bold.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

NUMBERS = Path(__file__).with_name("numbers.csv")
AVERAGE = "average"


class Place(NamedTuple):
    """Where a number is: what it was measured on, with which settings.

    Attributes:
        table: the number of its table; 4a and 4b are the halves of Table 4.
        model: the base model.
        dataset: the dataset, or "average".
        method: the method.
        n: negatives of a prompt that it trains on.
        beta: the factor from log-ratios to rewards.
        metric: the metric, without policy/ or reward/ before it: the paper does not say which.
    """

    table: str
    model: str
    dataset: str
    method: str
    n: int
    beta: float
    metric: str


class Number(NamedTuple):
    """A number as it is printed.

    Attributes:
        text: its digits.
        unit: "percent" or "logits".
        error: its standard error; "" where none is printed.
        underlined: whether it is underlined.
    """

    text: str
    unit: str
    error: str
    underlined: bool

    @property
    def value(self) -> float:
        """The number."""
        return float(self.text)


@functools.cache
def read_numbers() -> Mapping[Place, Number]:
    """Reads all numbers of the paper's tables, in its order."""
    with NUMBERS.open(newline="", encoding="utf-8") as file:
        return {
            Place(
                row["table"], row["model"], row["dataset"], row["method"], int(row["n"]),
                float(row["beta"]), row["metric"],
            ): Number(row["value"], row["unit"], row["se"], row["mark"] == "underlined")
            for row in csv.DictReader(file)
        }  # fmt: skip
