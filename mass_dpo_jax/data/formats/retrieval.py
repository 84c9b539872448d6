"""Formats of retrieval: queries with positive and negative passages."""

from __future__ import annotations

from mass_dpo_jax.data.fields import has_content, to_json_value
from mass_dpo_jax.data.formats.graded import grade
from mass_dpo_jax.data.formats.raw_row import (
    Answer,
    Format,
    RawRow,
    Row,
    check_length,
    find_one,
    get,
    list_answers,
    list_numbered,
    need,
    read_list,
    read_number,
    read_prompt_text,
)
from mass_dpo_jax.errors import UserError

QUERIES = ("query", "anchor", "question", "sentence")
DOCUMENTS = ("docs", "documents", "passages", "responses")
LABELS = ("labels", "label", "scores")


# ---- FlagEmbedding: https://github.com/FlagOpen/FlagEmbedding/tree/master/examples/finetune


def _read_flagembedding(row: Row, location: str) -> RawRow:
    prompt = read_prompt_text(
        row, ("prompt", "query") if get(row, "query") else ("query",), location
    )
    answers: list[Answer] = []
    scores: list[float | None] = []
    for rank, field in enumerate(("pos", "neg")):
        texts = need(row, field, location)
        texts = [texts] if isinstance(texts, str) and texts[:1] != "[" else texts
        texts = read_list(texts, field, location)
        answers += [Answer(f"{field}[{i}]", text, rank) for i, text in enumerate(texts)]
        name = f"{field}_scores"
        if has_content(row.get(name)):
            values = read_list(row[name], name, location)
            check_length(values, name, len(texts), field, location)
            scores += [read_number(v, f"{name}[{i}]", location) for i, v in enumerate(values)]
        else:
            scores += [None] * len(texts)
    if None not in scores:
        answers = [a._replace(score=s) for a, s in zip(answers, scores, strict=True)]
    return RawRow(prompt, "query", answers)


# ---- sentence-transformers: https://sbert.net/docs/sentence_transformer/loss_overview.html


def _has_negatives(row: Row) -> bool:
    if get(row, "positive") is None:
        return True  # It has documents and labels.
    named = get(row, "negative") is not None or get(row, "negatives") is not None
    return named or any(get(row, column) is not None for column in list_numbered(row, "negative"))


def _read_sentence_transformers(row: Row, location: str) -> RawRow:
    query = find_one(row, QUERIES, location)
    prompt = read_prompt_text(row, (query,), location)
    documents = next((name for name in DOCUMENTS if get(row, name) is not None), "")
    if documents and get(row, "positive") is None:
        labels = find_one(row, LABELS, location)
        texts = read_list(row[documents], documents, location)
        return RawRow(prompt, query, grade(texts, documents, row[labels], labels, location))
    answers = list_answers(need(row, "positive", location), "positive", 0, location)
    columns = ["negative", "negatives", *list_numbered(row, "negative")]
    present = [column for column in columns if to_json_value(row.get(column)) is not None]
    if not present:
        raise UserError(f"{location}: field 'negative' is missing; found {', '.join(row)}")
    for column in present:
        answers += list_answers(row[column], column, 1, location)
    return RawRow(prompt, query, answers)


FORMATS = (
    Format(
        "flagembedding", "FlagEmbedding's format", (("query", "pos", "neg"),),
        _read_flagembedding, optional=("prompt", "pos_scores", "neg_scores"),
    ),
    Format(
        "sentence-transformers", "sentence-transformers' format",
        (
            *((query, "positive") for query in QUERIES),
            *((q, docs, labels) for q in QUERIES for docs in DOCUMENTS for labels in LABELS),
        ),
        _read_sentence_transformers, _has_negatives, ("negative", "negatives"), "negative",
    ),
)  # fmt: skip
