"""Rows with chosen negatives, written for other programs.

A row has `id`, `prompt`, `chosen` and a list `rejected`, perhaps `tools`, and lists with a value
for each rejected response that say how they were chosen. These are kept, in columns that the
programs ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mass_dpo_jax.data.examples import Text, as_answer, as_messages
from mass_dpo_jax.errors import UserError

Row = dict[str, Any]
# Columns with a list for each prompt, and what they are called with one value for each pair.
PAIR_COLUMNS = {
    "rejected": "rejected",
    "selected": "selected",
    "gains": "gain",
    "weights": "weight",
    "mined_ids": "mined_id",
    "mined_scores": "mined_score",
    "mined_probabilities": "mined_probability",
    "mined_weights": "mined_weight",
}
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def convert_rows(rows: Iterable[Row], name: str, chat: bool) -> Iterator[Row]:
    """Yields rows in one of the formats `config.WRITTEN_FORMATS`.

    Args:
        rows: the rows, see above.
        name: the format.
        chat: texts are rendered by a chat template, so that strings become the messages they
            were rendered as where a program applies templates to messages only.

    Raises:
        UserError: a row has no texts, or the format cannot hold what it has.
    """
    needs_texts = name not in ("lists", "pairs")
    for row in rows:
        if needs_texts and "prompt" not in row:
            raise UserError(
                f"--format={name} takes prompts and responses, and without the data there are "
                "numbers only; expected --config.data.path, or --format=lists or pairs"
            )
        yield from WRITTEN[name](row, chat)


def to_decimals(values: np.ndarray) -> list[float]:
    """Returns float32 values as the shortest decimals that stand for them."""
    return [float(str(value)) for value in values]


def _write_pairs(row: Row, chat: bool) -> Iterator[Row]:
    """Yields a row for each negative, in the columns of TRL's DPOTrainer."""
    shared = {name: value for name, value in row.items() if name not in PAIR_COLUMNS}
    for k in range(len(row["rejected" if "rejected" in row else "selected"])):
        pair = shared | {one: row[many][k] for many, one in PAIR_COLUMNS.items() if many in row}
        pair["id"] = f"{row['id']}-{k}"
        texts = {name: pair[name] for name in ROLES if name in pair}
        # TRL takes no mixture of texts and messages.
        if chat or any(isinstance(text, list) for text in texts.values()):
            texts = {name: as_messages(text, ROLES[name]) for name, text in texts.items()}
        yield pair | texts


def _write_ms_swift(row: Row, chat: bool) -> Iterator[Row]:
    """Yields the conversation with the chosen response, and the rejected ones beside it."""
    answer = as_messages(row["chosen"], ROLES["chosen"])
    rejected = [_take_text(row, text, "ms-swift") for text in row["rejected"]]
    yield {
        **_keep_rest(row, "tools"),
        "messages": [*as_messages(row["prompt"]), *answer],
        "rejected_response": rejected,
    }


def _write_flagembedding(row: Row, chat: bool) -> Iterator[Row]:
    """Yields a query with its positive and negative passages."""
    passages = [_take_text(row, x, "flagembedding") for x in (row["chosen"], *row["rejected"])]
    query = _take_query(row, "flagembedding")
    yield {**_keep_rest(row), "query": query, "pos": passages[:1], "neg": passages[1:]}


def _write_sentence_transformers(row: Row, chat: bool) -> Iterator[Row]:
    """Yields a query with documents and their labels, for the losses of lists."""
    name = "sentence-transformers"
    documents = [_take_text(row, text, name) for text in (row["chosen"], *row["rejected"])]
    labels = [1] + [0] * len(row["rejected"])
    query = _take_query(row, name)
    yield {**_keep_rest(row), "query": query, "docs": documents, "labels": labels}


WRITTEN: Mapping[str, Callable[[Row, bool], Iterator[Row]]] = {
    "lists": lambda row, chat: iter([row]),
    "pairs": _write_pairs,
    "ms-swift": _write_ms_swift,
    "flagembedding": _write_flagembedding,
    "sentence-transformers": _write_sentence_transformers,
}


def _keep_rest(row: Row, *others: str) -> Row:
    taken = {"prompt", "chosen", "rejected", "tools"} - set(others)
    return {name: value for name, value in row.items() if name not in taken}


def _take_text(row: Row, answer: Text, name: str) -> str:
    """Returns a response's text; raises UserError where it is more than that."""
    text = as_answer(answer)
    if isinstance(text, str):
        return text
    raise UserError(
        f"row {row['id']!r}: a response has more than a text (calls or thoughts), which "
        f"--format={name} has no place for; expected --format=lists or pairs"
    )


def _take_query(row: Row, name: str) -> str:
    """Returns a prompt as one text; raises UserError where it is a conversation or has tools."""
    prompt = row["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1 and set(prompt[0]) == {"role", "content"}:
        prompt = prompt[0]["content"]
    if isinstance(prompt, str) and not row.get("tools"):
        return prompt
    what = "tools" if row.get("tools") else "several messages"
    raise UserError(
        f"row {row['id']!r}: the prompt has {what}, and --format={name} has queries of one text; "
        "expected --format=lists, pairs or ms-swift"
    )
