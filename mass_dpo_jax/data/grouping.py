"""Rows of one prompt as one pool (`data.group=prompt`): pairs, or answers with labels.

All chosen responses of a prompt are taken for better than all rejected ones. A response that is
chosen in one row and rejected in another says that this is not so, and is left out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from mass_dpo_jax.data.examples import Example, Prompt, Text, identify_answer, identify_prompt
from mass_dpo_jax.data.rows import DuplicateId
from mass_dpo_jax.errors import UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer with a label, half of what makes an `Example`, whose attributes are the same.

    Attributes:
        text: the answer.
        is_good: the label.
    """

    id: str
    prompt: Prompt
    text: Text
    is_good: bool
    place: str
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def question(self) -> Hashable:
        """Equal for rows whose prompts ask the same."""
        return identify_prompt(self.prompt)


Row = Example | Completion


def group_by_prompt(examples: Sequence[Row], name: str) -> list[Example]:
    """Returns one example for each prompt, in the order in which prompts first occur.

    Prompts are equal if `Example.question` and `Example.tools` are, responses if their texts are,
    calls of functions included. The pool has each response once; those chosen in some row and
    rejected in another are left out, and a prompt without chosen or without rejected responses
    then. Scores are kept if all rows of a prompt have them, as the mean where a response has
    several; ranks and probabilities if it has one row.

    Args:
        examples: the rows of a split.
        name: of the table, for messages.

    Raises:
        UserError: no prompt is left, two prompts have the same id, or a pool would be of several
            draws, whose probabilities are not those of all together.
    """
    groups: dict[Hashable, list[Row]] = {}
    for example in examples:
        tools = json.dumps(example.tools) if example.tools else ""
        groups.setdefault((example.question, tools), []).append(example)
    pools = []
    contradictions = dropped = 0
    for rows in groups.values():
        chosen, rejected = _collect(rows, chosen=True), _collect(rows, chosen=False)
        both = chosen.keys() & rejected.keys()
        contradictions += len(both)
        chosen = {text: value for text, value in chosen.items() if text not in both}
        rejected = {text: value for text, value in rejected.items() if text not in both}
        if chosen and rejected:
            pools.append(_make_pool(rows, list(chosen.values()), list(rejected.values())))
        else:
            dropped += 1
    _log.info(
        "%s: %d rows are %d pools, of one prompt each (config.data.group)",
        name, len(examples), len(pools),
    )  # fmt: skip
    if contradictions:
        _log.warning(
            "%s: %d responses are chosen in one row and rejected in another of the same prompt; "
            "they are left out", name, contradictions,
        )  # fmt: skip
    if dropped:
        _log.warning(
            "%s: %d prompts have no chosen or no rejected response left; they are left out",
            name, dropped,
        )  # fmt: skip
    if not pools:
        raise UserError(
            f"{name}: no prompt has a response that is only chosen and one that is only rejected "
            "(config.data.group=prompt)"
        )
    _check_ids(pools)
    return pools


def _collect(rows: Iterable[Row], chosen: bool) -> dict[str, Text]:
    """Returns all chosen or all rejected responses by their texts, the first of equal ones."""
    responses: dict[str, Text] = {}
    for row in rows:
        for response in _list_responses(row, chosen):
            responses.setdefault(identify_answer(response), response)
    return responses


def _list_responses(row: Row, chosen: bool) -> Sequence[Text]:
    if isinstance(row, Completion):
        return (row.text,) if row.is_good == chosen else ()
    return (row.chosen, *row.also_chosen) if chosen else row.rejected


def _make_pool(rows: Sequence[Row], chosen: Sequence[Text], rejected: Sequence[Text]) -> Example:
    """Returns the example of some rows of one prompt; name, place and prompt are the first's."""
    responses = [chosen[0], *rejected, *chosen[1:]]
    texts = [identify_answer(response) for response in responses]
    scores: dict[str, list[float]] = {}
    paired = [row for row in rows if isinstance(row, Example)]
    has_scores = paired == rows and all(row.scores is not None for row in paired)
    for row in paired if has_scores else ():
        for response, score in zip(row.responses, row.scores or (), strict=True):
            scores.setdefault(identify_answer(response), []).append(score)
    ranks = probabilities = None
    if len(rows) == 1 and paired and paired[0].ranks is not None:
        given = zip(map(identify_answer, paired[0].responses), paired[0].ranks, strict=True)
        by_text = dict(reversed(list(given)))
        ranks = tuple(by_text[text] for text in texts)
    if drawn := next((row for row in paired if row.probabilities is not None), None):
        if len(rows) > 1:
            raise UserError(
                f"{drawn.place}: field 'mined_probabilities' is that of one draw, and {len(rows)} "
                "rows of this prompt become one pool (config.data.group=prompt); expected "
                "config.data.group=none, or --config.data.columns=mined_probabilities= to read none"
            )
        by_response = dict(
            zip(map(identify_answer, drawn.rejected), drawn.probabilities or (), strict=True)
        )
        probabilities = tuple(by_response[identify_answer(text)] for text in rejected)
    return Example(
        rows[0].id,
        rows[0].prompt,
        chosen[0],
        tuple(rejected),
        rows[0].place,
        tuple(sum(scores[t]) / len(scores[t]) for t in texts) if has_scores else None,
        tuple(chosen[1:]),
        ranks,
        probabilities,
        rows[0].tools,
    )


def _check_ids(pools: Iterable[Example]) -> None:
    locations: dict[str, str] = {}
    for pool in pools:
        if pool.id in locations:
            raise DuplicateId(
                f"{pool.place}: id {pool.id!r} is taken by {locations[pool.id]}, of another prompt"
                "; --config.data.columns=id= numbers rows instead"
            )
        locations[pool.id] = pool.place
