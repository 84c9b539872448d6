"""Formats of ranked and graded answers: of reward models, and of this package."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mass_dpo_jax.data.fields import has_content, make_type_error, to_json_value
from mass_dpo_jax.data.formats.raw_row import (
    SCORE_KEYS,
    Answer,
    Format,
    RawRow,
    Row,
    add_context,
    check_length,
    find_one,
    find_text,
    get,
    need,
    need_number,
    read_list,
    read_number,
    read_objects,
)
from mass_dpo_jax.data.readers.literals import parse_literal
from mass_dpo_jax.errors import UserError

PREFERENCES = ("overall_preference", "preference_strength")
GRADES = ("scores", "labels", "ranks")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _first(value: Any) -> Any:
    """Returns the first value of a list that is not null, also of a list as text."""
    value = to_json_value(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_literal(value)
    if isinstance(value, list):
        return next((v for v in map(to_json_value, value) if v is not None), None)
    return value if isinstance(value, Mapping) else None


def _has_key(*keys: str) -> Any:
    """Returns whether the objects of a row's column `keys[0]` have one of the other keys."""

    def fits(row: Row) -> bool:
        first = _first(row.get(keys[0]))
        return isinstance(first, Mapping) and any(key in first for key in keys[1:])

    return fits


def _read_ranked(row: Row, field: str, text: str, location: str) -> list[Answer]:
    """Reads objects with a text and a `rank` of their own, smaller for better."""
    items = read_objects(need(row, field, location), field, location)
    ranks = [need_number(item, "rank", f"{field}[{i}].", location) for i, item in enumerate(items)]
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] == ranks[j]:
            raise UserError(
                f"{location}: field {field!r}: answers {i} and {j} have the same rank, "
                f"{ranks[i]:g}; expected a rank of its own for each"
            )
    return [
        Answer(f"{field}[{i}].{text}", item.get(text), rank)
        for i, (item, rank) in enumerate(zip(items, ranks, strict=True))
    ]


# ---- NeMo RL: https://docs.nvidia.com/nemo/rl/latest/guides/dpo.html


def _read_nemo(row: Row, location: str) -> RawRow:
    context = need(row, "context", location)
    return RawRow(context, "context", _read_ranked(row, "completions", "completion", location))


# ---- UltraFeedback: https://huggingface.co/datasets/openbmb/UltraFeedback


def _read_ultrafeedback(row: Row, location: str) -> RawRow:
    items = read_objects(need(row, "completions", location), "completions", location)
    scores = _find_ratings(items, location)
    answers = []
    for i, (item, score) in enumerate(zip(items, scores, strict=True)):
        field = f"completions[{i}].response"
        if "response" not in item:
            raise UserError(f"{location}: field {field!r} is missing; found {', '.join(item)}")
        answers.append(Answer(field, item["response"], -score, score))
    return RawRow(need(row, "instruction", location), "instruction", answers)


def _find_ratings(items: Sequence[Row], location: str) -> list[float]:
    """Returns the score of each completion: the first kind that all of them have."""
    for key in ("overall_score", "fine-grained_score"):
        scores = [
            read_number(item.get(key), f"completions[{i}].{key}", location)
            for i, item in enumerate(items)
        ]
        if None not in scores:
            return [score for score in scores if score is not None]
    means = [_average_ratings(item, f"completions[{i}]", location) for i, item in enumerate(items)]
    if None in means:
        absent = [i for i, item in enumerate(items) if get(item, "overall_score") is None]
        i = absent[0] if absent else means.index(None)
        raise UserError(
            f"{location}: field 'completions[{i}].overall_score' is missing or "
            "null, and so are fine-grained_score and numbers in annotations"
        )
    return [mean for mean in means if mean is not None]


def _average_ratings(item: Row, field: str, location: str) -> float | None:
    """Returns the mean rating of an UltraFeedback completion, None without any."""
    annotations = to_json_value(item.get("annotations"))
    if not isinstance(annotations, Mapping):
        return None
    ratings = []
    for name, annotation in annotations.items():
        entries = annotation if isinstance(annotation, list) else [annotation]
        for entry in entries:
            rating = entry.get("Rating") if isinstance(entry, Mapping) else None
            if rating not in (None, "N/A"):
                number = read_number(rating, f"{field}.annotations.{name}.Rating", location)
                ratings += [number] if number is not None else []
    return sum(ratings) / len(ratings) if ratings else None


# ---- Nectar: https://huggingface.co/datasets/berkeley-nest/Nectar


def _read_nectar(row: Row, location: str) -> RawRow:
    answers = _read_ranked(row, "answers", "answer", location)
    return RawRow(_split_turns(need(row, "prompt", location), location), "prompt", answers)


def _split_turns(prompt: Any, location: str) -> Any:
    """Splits a text with Human: and Assistant: into messages; a single question is its text."""
    if not isinstance(prompt, str):
        raise make_type_error(location, "prompt", "a string", prompt)
    before, *parts = _TURN.split(prompt)
    if before.strip() or not parts:
        return prompt
    names, texts = parts[::2], [text.strip() for text in parts[1::2]]
    if names[-1] == "Assistant" and not texts[-1]:
        names, texts = names[:-1], texts[:-1]
    if names == ["Human"]:
        return texts[0]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[n], "content": t} for n, t in zip(names, texts, strict=True)]


# ---- HelpSteer 2 and 3: https://huggingface.co/datasets/nvidia/HelpSteer3


def _read_helpsteer(row: Row, location: str) -> RawRow:
    name = find_one(row, PREFERENCES, location)
    preference = need_number(row, name, "", location)
    if not preference:
        raise UserError(f"{location}: field {name!r} is 0: neither response is preferred")
    fields = [find_one(row, (f"response_{i}", f"response{i}"), location) for i in (1, 2)]
    better = int(preference > 0)  # Above 0 the second one is.
    answers = [
        Answer(field, row[field], i != better, abs(preference) * (i == better))
        for i, field in enumerate(fields)
    ]
    prompt = find_one(row, ("prompt", "context"), location)
    return RawRow(row[prompt], prompt, answers)


# ---- RewardBench 2: https://huggingface.co/datasets/allenai/reward-bench-2


def _has_several_chosen(row: Row) -> bool:
    chosen = to_json_value(row.get("chosen"))
    if isinstance(chosen, str) and not (chosen[:1] == "[" and "num_correct" in row):
        return False
    return isinstance(_first(chosen), (str, list))


def _read_rewardbench(row: Row, location: str) -> RawRow:
    answers = []
    for rank, field in enumerate(("chosen", "rejected")):
        for i, text in enumerate(read_list(need(row, field, location), field, location)):
            answers.append(Answer(f"{field}[{i}]", text, rank))
    return RawRow(need(row, "prompt", location), "prompt", answers)


# ---- Answers that are objects with a text and, perhaps, a score


def _has_objects(row: Row) -> bool:
    first = _first(row.get("rejected"))
    return isinstance(first, Mapping) and "role" not in first and "from" not in first


def _read_objects(row: Row, location: str) -> RawRow:
    items = [(need(row, "chosen", location), "chosen")]
    rejected = read_objects(need(row, "rejected", location), "rejected", location)
    items += [(item, f"rejected[{i}]") for i, item in enumerate(rejected)]
    answers, scores = [], []
    for item, field in items:
        item, score = to_json_value(item), None
        if isinstance(item, Mapping) and "role" not in item:
            field, text = find_text(item, field, location)
            key = next((key for key in SCORE_KEYS if key in item), "")
            score = read_number(item.get(key), field.rpartition(".")[0] + f".{key}", location)
        else:
            text = item
        answers.append(Answer(field, text, 0))
        scores.append(score)
    ranks = [0.0] + [1.0] * len(rejected)
    if None not in scores[1:]:  # The chosen one is the best all the same.
        ranks = [float("-inf"), *(-score for score in scores[1:] if score is not None)]
    whole = None not in scores
    answers = [
        answer._replace(rank=rank, score=score if whole else None)
        for answer, rank, score in zip(answers, ranks, scores, strict=True)
    ]
    return RawRow(need(row, "prompt", location), "prompt", answers)


# ---- A list of responses, best first or with grades


def _read_responses(row: Row, location: str) -> RawRow:
    responses = read_list(need(row, "responses", location), "responses", location)
    prompt = add_context(row, need(row, "prompt", location), location)
    name = next((name for name in GRADES if has_content(row.get(name))), "")
    if not name:
        answers = [Answer(f"responses[{i}]", text, i) for i, text in enumerate(responses)]
        return RawRow(prompt, "prompt", answers)
    return RawRow(prompt, "prompt", grade(responses, "responses", row[name], name, location))


def grade(
    responses: Sequence[Any], field: str, values: Any, name: str, location: str
) -> list[Answer]:
    """Returns answers with the grades that another field has: ranks if it is called so."""
    values = read_list(values, name, location)
    check_length(values, name, len(responses), field, location)
    answers = []
    for i, (text, value) in enumerate(zip(responses, values, strict=True)):
        number = read_number(value, f"{name}[{i}]", location)
        if number is None and to_json_value(text) is not None:
            raise UserError(f"{location}: field '{name}[{i}]' is null or not finite")
        number = number or 0.0
        is_rank = name.startswith("rank")
        rank, score = (number, None) if is_rank else (-number, number)
        answers.append(Answer(f"{field}[{i}]", text, rank, score))
    return answers


FORMATS = (
    Format(
        "nemo", "NeMo's format", (("context", "completions"),),
        _read_nemo, _has_key("completions", "rank", "completion"),
    ),
    Format(
        "ultrafeedback", "UltraFeedback's format", (("instruction", "completions"),),
        _read_ultrafeedback, _has_key("completions", "response"),
    ),
    Format(
        "nectar", "Nectar's format", (("prompt", "answers"),),
        _read_nectar, _has_key("answers", "rank"),
    ),
    Format(
        "helpsteer", "HelpSteer's format",
        tuple(
            (prompt, first, second, preference)
            for prompt in ("prompt", "context")
            for first, second in (("response_1", "response_2"), ("response1", "response2"))
            for preference in PREFERENCES
        ),
        _read_helpsteer,
    ),
    Format(
        "rewardbench2", "RewardBench 2's format", (("prompt", "chosen", "rejected"),),
        _read_rewardbench, _has_several_chosen,
        ("num_correct", "num_incorrect", "num_rejected", "total_completions"),
    ),
    Format(
        "objects", "answers that are objects", (("prompt", "chosen", "rejected"),),
        _read_objects, _has_objects,
    ),
    Format(
        "responses", "lists of responses", (("prompt", "responses"),),
        _read_responses, optional=("system", "history", *GRADES),
    ),
)  # fmt: skip
