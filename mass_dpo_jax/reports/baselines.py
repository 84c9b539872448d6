"""Rankings that need no language model: what a trained one has to beat.

Both count in the training split and give scores [M, C], candidates in the order of the example
with the chosen one first, -inf where an example has fewer than C. They see responses as strings;
space around them does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mass_dpo_jax.data.examples import Example, History, Text


def popularity(train: Sequence[Example], examples: Sequence[Example]) -> np.ndarray:
    """Scores a candidate by how often it is the chosen one in `train`; float64 [M, C]."""
    count = Counter(_text(example.chosen) for example in train)
    return _scores([[float(count[c]) for c in _candidates(example)] for example in examples])


def cooccurrence(train: Sequence[Example], examples: Sequence[Example]) -> np.ndarray:
    """Scores a candidate by how often it was chosen after the items of the history; float64 [M, C].

    With count(h) the rows of `train` that have h in their history, count(h, c) those of them
    where c is the chosen one, and share(c) the part of all rows where it is,

        score(c) = sum_h (count(h, c) + share(c)) / (count(h) + 1)

    over the distinct items h of the history: the estimated probabilities of c after h, with one
    row of popularity added to each, so that what was never seen together is ranked by popularity.
    Examples whose prompt is no `History` are scored by popularity.
    """
    share: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for example in train:
        chosen = _text(example.chosen)
        share[chosen] += 1
        for item in _history(example):
            seen[item] += 1
            together[item, chosen] += 1

    def score(history: set[str], candidate: str) -> float:
        prior = share[candidate] / len(train)
        # Without a history: one imagined item that was never seen.
        return sum(
            (together[item, candidate] + prior) / (seen[item] + 1) for item in history or {""}
        )

    return _scores(
        [
            [score(history, candidate) for candidate in _candidates(example)]
            for example, history in ((example, _history(example)) for example in examples)
        ]
    )


def _text(response: Text) -> str:
    if isinstance(response, str):
        return response.strip()
    return "\n".join(message["content"].strip() for message in response)


def _candidates(example: Example) -> list[str]:
    return [_text(response) for response in (example.chosen, *example.rejected)]


def _history(example: Example) -> set[str]:
    if isinstance(example.prompt, History):
        return {item.strip() for item in example.prompt.items}
    return set()


def _scores(rows: list[list[float]]) -> np.ndarray:
    scores = np.full((len(rows), max(map(len, rows), default=0)), -np.inf)
    for target, row in zip(scores, rows, strict=True):
        target[: len(row)] = row
    return scores
