"""Rankings that need no language model, which a trained one has to beat.

Both count in the training split and give scores [M, C]: candidates in the order of
`Example.responses`, -inf where an example has fewer than C. Responses are compared as strings
without the space around them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mass_dpo_jax.data.examples import Example, History, Text, format_message


def popularity(train: Sequence[Example], examples: Sequence[Example]) -> np.ndarray:
    """Scores a candidate by how often it is the chosen one in `train`, float64 [M, C]."""
    count = Counter(_text(example.chosen) for example in train)
    return _to_array([[float(count[c]) for c in _candidates(example)] for example in examples])


def cooccurrence(train: Sequence[Example], examples: Sequence[Example]) -> np.ndarray:
    """Scores a candidate by how often it was chosen after the history's items, float64 [M, C].

    With count(h) the rows of `train` that have h in their history, count(h, c) those among them
    where c is the chosen one, and share(c) the fraction of all rows where it is,

        score(c) = sum_h (count(h, c) + share(c)) / (count(h) + 1)

    over the distinct items h of the history. These are the estimated probabilities of c after h,
    each with one row of popularity added, so that what was never seen together is ranked by
    popularity. Examples whose prompt is not a `History` are scored by popularity.
    """
    chosen_count: Counter[str] = Counter()
    item_count: Counter[str] = Counter()
    pair_count: Counter[tuple[str, str]] = Counter()
    for example in train:
        chosen = _text(example.chosen)
        items = _history(example)
        chosen_count[chosen] += 1
        item_count.update(items)
        pair_count.update((item, chosen) for item in items)

    def score(items: set[str], candidate: str) -> float:
        share = chosen_count[candidate] / len(train)
        return sum((pair_count[h, candidate] + share) / (item_count[h] + 1) for h in items)

    return _to_array(
        [
            # Without a history: an item that was never seen.
            [score(_history(example) or {""}, candidate) for candidate in _candidates(example)]
            for example in examples
        ]
    )


def _text(response: Text) -> str:
    if isinstance(response, str):
        return response.strip()
    return "\n".join(format_message(message).strip() for message in response)


def _candidates(example: Example) -> list[str]:
    return [_text(response) for response in example.responses]


def _history(example: Example) -> set[str]:
    if isinstance(example.prompt, History):
        return {item.strip() for item in example.prompt.items}
    return set()


def _to_array(rows: list[list[float]]) -> np.ndarray:
    scores = np.full((len(rows), max(map(len, rows), default=0)), -np.inf)
    for padded, row in zip(scores, rows, strict=True):
        padded[: len(row)] = row
    return scores
