"""`data.group=prompt`: rows of one prompt become one pool, contradictions are counted."""

from __future__ import annotations

import itertools
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from tests.support.data import load, write_lines

Row = dict[str, Any]


def pair(prompt: Any, chosen: str, rejected: Any, **fields: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields}


def group(folder: Path, rows: list[Row], **changes: Any) -> list[Example]:
    file = write_lines(folder / "file.jsonl", rows)
    return load("preferences", file, group="prompt", **changes)


def describe(example: Example) -> Any:
    return example.prompt, example.chosen, example.rejected, example.also_chosen


def test_chosen_and_rejected_of_all_rows_are_united(tmp_path: Path, caplog: Any) -> None:
    rows = [
        pair("p", "a", ["b", "c"], id="x"),
        pair("q", "a", "b"),
        pair(" p\n", "a", ["c", "d", "d"], id="x"),
        pair([{"role": "user", "content": "p"}], "e", {"role": "assistant", "content": "b"}),
    ]
    with caplog.at_level(logging.INFO):
        found = group(tmp_path, rows)
    assert list(map(describe, found)) == [
        ("p", "a", ("b", "c", "d"), ("e",)),
        ("q", "a", ("b",), ()),
    ]
    assert [example.id for example in found] == ["x", "file-1"]
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "4 rows are 2 pools" in caplog.text


def test_contradictions_are_left_out_and_counted(tmp_path: Path, caplog: Any) -> None:
    rows = [
        pair("p", "a", "b"),
        pair("p", "b", "c"),
        pair("p", "d", "e"),
        pair("q", "a", "b"),
        pair("q", "b", "a"),
        pair("r", "a", "b"),
        pair("r", "c", "a"),
        pair("s", "a", "b"),
        pair("s", "b", "c"),
    ]
    found = group(tmp_path, rows)
    assert list(map(describe, found)) == [
        ("p", "a", ("c", "e"), ("d",)),
        ("r", "c", ("b",), ()),
        ("s", "a", ("c",), ()),
    ]
    assert "file.jsonl: 5 responses are chosen in one row and rejected in another" in caplog.text
    assert "file.jsonl: 1 prompts have no chosen or no rejected response left" in caplog.text
    with pytest.raises(UserError, match="no prompt has a response that is only chosen"):
        group(tmp_path, rows[3:5])


@pytest.mark.parametrize("seed", range(3))
def test_pools_are_those_of_sets(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = []
    for _ in range(200):
        first, second = draw.sample("abcdefgh", 2)
        rows.append(pair(f"p{draw.randrange(12)}", first, second))
    expected = {}
    for prompt in sorted({row["prompt"] for row in rows}):
        of_prompt = [row for row in rows if row["prompt"] == prompt]
        better, worse = {r["chosen"] for r in of_prompt}, {r["rejected"] for r in of_prompt}
        if better - worse and worse - better:
            expected[prompt] = (better - worse, worse - better)
    rows += [pair("one", "a", "b"), pair("one", "a", "c")]
    expected["one"] = ({"a"}, {"b", "c"})
    found = group(tmp_path, rows)
    assert {e.prompt: ({e.chosen, *e.also_chosen}, set(e.rejected)) for e in found} == expected
    assert all(len(set(e.responses)) == len(e.responses) for e in found)


def test_scores_are_kept_where_all_rows_of_a_prompt_have_them(tmp_path: Path) -> None:
    rows = [
        pair("p", "a", "b", score_chosen=9, score_rejected=2),
        pair("p", "c", ["b", "d"], score_chosen=8, score_rejected=[3, 1]),
        pair("q", "a", "b", score_chosen=9, score_rejected=2),
        pair("q", "a", "c"),
    ]
    found = group(tmp_path, rows)
    assert [example.scores for example in found] == [(9.0, 2.5, 1.0, 8.0), None]
    assert found[0].responses == ("a", "b", "d", "c")


def test_ranks_of_a_single_row_are_kept(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": f"p{i}", "responses": ["a", "b", "b", "c"]} for i in (0, 1, 1)]
    rows[2]["responses"] = ["a", "d", "e"]
    found = group(tmp_path, rows)
    assert [(e.responses, e.ranks) for e in found] == [
        (("a", "b", "c"), (0, 1, 3)),
        (("a", "b", "c", "d", "e"), None),
    ]


def test_probabilities_of_one_draw_are_kept_and_several_draws_are_refused(tmp_path: Path) -> None:
    rows = [pair("p", "a", ["b", "c"], mined_probabilities=[0.5, 0.25]), pair("q", "a", "b")]
    assert [example.probabilities for example in group(tmp_path, rows)] == [(0.5, 0.25), None]
    rows[1]["prompt"] = "p"
    with pytest.raises(UserError, match=r":1: field 'mined_probabilities' .* 2 rows of this"):
        group(tmp_path, rows)
    [pool] = group(tmp_path, rows, columns="mined_probabilities=")
    assert pool.rejected == ("b", "c") and pool.probabilities is None


def test_splits_are_by_prompt(tmp_path: Path) -> None:
    rows = [pair(f"p{i % 20}", "a", f"b{i}") for i in range(60)]
    trained, held_out = (group(tmp_path, rows, split=split) for split in ("train", "validation"))
    assert len(trained) == 18 and len(held_out) == 2
    assert {e.prompt for e in trained} | {e.prompt for e in held_out} == {
        f"p{i}" for i in range(20)
    }
    assert all(len(e.rejected) == 3 for e in itertools.chain(trained, held_out))


def test_two_prompts_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = [pair("p", "a", "b", id="x"), pair("q", "a", "b", id="x")]
    with pytest.raises(UserError, match=r":2: id 'x' is taken by .*:1, of another prompt"):
        group(tmp_path, rows)
