"""Token ids: of prompts and responses apart, under the length limits, and the tokenizers."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from tests.support.tokenizers import real, settings, small

BOS, EOS = 1, 2


def example(prompt: Any, chosen: str, *rejected: str) -> Example:
    return Example(f"id of {prompt}", prompt, chosen, rejected, f"place of {prompt}")


def tokens_of(*examples: Example, **changes: Any) -> Tokens:
    return tokenize(examples, small(), settings("none", changes), progress=False)


def ids(text: str) -> list[int]:
    found: list[int] = small()(text, add_special_tokens=False)["input_ids"]
    return found


def test_prompt_and_responses_are_tokenized_apart() -> None:
    tokens = tokens_of(
        example("amber ", "basil", "cedar delta", "x"),
        example("x", "ember ember ember", "fjord"),
    )
    assert len(tokens) == 2
    assert tokens.ids == ["id of amber ", "id of x"]
    assert tokens.prompt(0).tolist() == [BOS, *ids("amber ")]
    assert tokens.prompt(1).tolist() == [BOS, *ids("x")]
    texts = [["basil", "cedar delta", "x"], ["ember ember ember", "fjord"]]
    for i, row in enumerate(texts):
        expected = [[*ids(text), EOS] for text in row]
        assert [tokens.response(i, c).tolist() for c in range(len(row))] == expected
        assert tokens.responses(i).tolist() == [token for answer in expected for token in answer]
    assert tokens.response_lengths.shape == (2, 3)
    assert tokens.response_lengths[1, 2] == 0
    assert tokens.response(1, 2).tolist() == []
    assert not any(tokens.cut.values())
    for array in (tokens.prompt_tokens, tokens.prompt_lengths, tokens.response_tokens):
        assert array.dtype == np.int32
    assert tokens.response_lengths.dtype == np.int32


def test_digest_changes_with_every_part() -> None:
    rows = [example("amber", "basil", "cedar"), example("delta", "ember", "fjord")]
    tokens = tokens_of(*rows)
    assert tokens.digest() == tokens_of(*rows).digest()
    others = [
        tokens_of(*reversed(rows)),
        tokens_of(dataclasses.replace(rows[0], id="other"), rows[1]),
        tokens_of(dataclasses.replace(rows[0], prompt="x"), rows[1]),
        tokens_of(dataclasses.replace(rows[0], rejected=("x",)), rows[1]),
        tokens_of(dataclasses.replace(rows[0], rejected=("cedar", "x")), rows[1]),
    ]
    moved = tokens.response_lengths + np.array([[1, -1], [0, 0]])  # The same tokens in all.
    others.append(dataclasses.replace(tokens, response_lengths=moved))
    assert len({tokens.digest(), *(other.digest() for other in others)}) == 7


def test_long_texts_lose_tokens_from_the_left_but_not_their_first() -> None:
    row = example("abcdefgh", "x", "y")
    tokens = tokens_of(row, example("q", "x", "y"), max_prompt_length=4)
    assert tokens.prompt(0).tolist() == [BOS, *ids("abcdefgh")[-3:]]
    assert tokens.prompt(1).tolist() == [BOS, *ids("q")]
    assert tokens.cut["prompts_truncated"] == 1


@pytest.mark.parametrize("limit", range(4, 30))
def test_long_histories_lose_the_fewest_oldest_items(limit: int) -> None:
    histories = [
        History("<", tuple("k" * (1 + (7 * i) % 5) for i in range(size)), ">")
        for size in range(1, 9)
    ]
    tokens = tokens_of(*(example(h, "x", "y") for h in histories), max_prompt_length=limit)
    dropped = shortened = truncated = 0
    for i, history in enumerate(histories):
        lengths = [1 + len(ids(history.without_oldest(k).text)) for k in range(len(history.items))]
        fewest = next((k for k, length in enumerate(lengths) if length <= limit), len(lengths) - 1)
        expected = [BOS, *ids(history.without_oldest(fewest).text)[1 - limit :]]
        assert tokens.prompt(i).tolist() == expected
        dropped, shortened = dropped + fewest, shortened + (fewest > 0)
        truncated += lengths[fewest] > limit
    assert tokens.cut["history_items_dropped"] == dropped
    assert tokens.cut["prompts_with_shorter_history"] == shortened
    assert tokens.cut["prompts_truncated"] == truncated


def test_a_long_response_is_an_error_that_names_it() -> None:
    rows = [
        example("a", "x", "y"),
        example("b", "x", "y", "abcdefgh"),
        example("c", "jklmnopq", "z"),
    ]
    with pytest.raises(UserError) as error:
        tokens_of(*rows, max_response_length=4)
    count = len(ids("abcdefgh")) + 1
    assert f"place of b: field 'rejected[1]' has {count} tokens" in str(error.value)
    assert "data.max_response_length is 4" in str(error.value)
    assert "data.long_response=drop" in str(error.value)
    assert len(tokens_of(*rows, max_response_length=count + 1)) == 3


def test_long_responses_leave_their_pool_where_asked() -> None:
    long = "abcdefgh"
    tokens = tokens_of(
        example("a", "x", long, "y", long + "x", "z"),
        example("b", long, "y"),
        example("c", "x", long),
        example("d", "x", "y"),
        max_response_length=4,
        long_response="drop",
    )
    assert tokens.ids == ["id of a", "id of d"]
    assert [tokens.response(0, c).tolist() for c in range(3)] == [[*ids(t), EOS] for t in "xyz"]
    assert [tokens.prompt(i).tolist() for i in range(2)] == [[BOS, *ids(t)] for t in "ad"]
    assert tokens.response_lengths.tolist() == [[2, 2, 2], [2, 2, 0]]
    assert tokens.cut["responses_too_long"] == 4
    assert tokens.cut["examples_dropped"] == 2
    with pytest.raises(UserError, match="no example is left"):
        tokens_of(example("b", long, "y"), max_response_length=4, long_response="drop")


def test_scores_move_with_their_responses() -> None:
    long = "abcdefgh"
    rows = [
        dataclasses.replace(example("a", "x", long, "y", long, "z"), scores=(9, 1, 2, 3, 4.5)),
        dataclasses.replace(example("b", long, "y"), scores=(7, 6)),
        dataclasses.replace(example("c", "x", "y"), scores=(-1, -2)),
    ]
    tokens = tokens_of(*rows, max_response_length=4, long_response="drop")
    assert tokens.ids == ["id of a", "id of c"]
    assert tokens.scores is not None and tokens.scores.dtype == np.float32
    assert tokens.scores.tolist() == [[9, 2, 4.5], [-1, -2, 0]]
    assert tokens.scores.shape == tokens.response_lengths.shape
    # Where an example has none, there are none; one that leaves does not count.
    assert tokens_of(*rows, example("d", "x", "y")).scores is None
    dropped = tokens_of(
        rows[0], example("d", long, "y"), max_response_length=4, long_response="drop"
    )
    assert dropped.scores is not None and dropped.scores.tolist() == [[9, 2, 4.5]]


def test_repeated_negatives_stay_and_are_counted() -> None:
    tokens = tokens_of(example("a", "x", "y", "z", "y", "y"), example("b", "x", "y"))
    assert tokens.cut["repeated_negatives"] == 2
    assert (tokens.response_lengths > 0).sum(1).tolist() == [5, 2]


def test_chosen_and_rejected_are_compared_after_rendering(tmp_path: Path) -> None:
    template = tmp_path / "trims.jinja"
    template.write_text("{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}")
    rows = [example("a", " yes", "no", "yes ")]
    with pytest.raises(UserError, match=r"place of a: .* the same tokens as rejected\[1\]"):
        tokenize(rows, small(), settings(str(template)), progress=False)
    assert len(tokens_of(*rows)) == 1


def test_whatever_is_wrong_with_a_row_it_can_be_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.content == 'fail' %}{{ 1 / 0 }}{% endif %}"
        "{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    wrong = [
        example("fail", "x", "y"),
        example("a", "x", "fail"),
        example("b", "x", "y", "z<eos>z"),
        example("c", "x ", "y", " x"),
        example("<bos>d", "x", "y"),
        example("e", "x", "long" * 30),
    ]
    rows = [example(f"good {i}", "x", "y", "z") for i in range(8)]
    mixed = [*rows[:2], *wrong[:3], rows[2], *wrong[3:], *rows[3:]]
    mixed.insert(5, example("b again", "x", "y", "q<eos>q"))
    mixed = [dataclasses.replace(row, place=f"file:{i}") for i, row in enumerate(mixed)]
    data = settings(str(template), {"on_bad_row": "skip", "max_response_length": 60})
    with caplog.at_level(logging.INFO):
        tokens = tokenize(mixed, small(), data, progress=False)
    assert tokens.ids == [row.id for row in rows]
    expected = tokenize(rows, small(), settings(str(template)), progress=False)
    assert tokens.digest() == expected.digest()
    assert tokens.candidate_ids.tolist() == [[0, 1, 2]] * 8
    for text in (
        "skipped 2 of 15 rows; first: file:4: field 'rejected[1]' contains",
        "skipped 1 of 15 rows; first: file:7: the chosen response has the same tokens as",
    ):
        assert text in caplog.text
    data.on_bad_row = "error"
    for row in wrong:
        with pytest.raises(UserError, match=f"{row.place}: .*on_bad_row=skip leaves such rows"):
            tokenize([*rows, row], small(), data, progress=False)
    data.on_bad_row = "skip"
    with pytest.raises(UserError, match="none of its 6 rows can be used; first: place of fail: "):
        tokenize(wrong, small(), data, progress=False)


def test_prompts_with_special_tokens_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    rows = [example("a", "x", "y"), example("b<eos>b", "x", "y"), example("c<eos>", "x", "y")]
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(rows, small(), settings(str(template)), progress=False)
    assert tokens.cut["prompts_with_special_tokens_in_their_text"] == 2
    message = "2 of 3 prompts with special tokens in their text; first: place of b<eos>b"
    assert caplog.text.count(message) == 1


def test_a_prompt_without_tokens_is_an_error(tmp_path: Path) -> None:
    template = tmp_path / "silent.jinja"
    template.write_text("{% for m in messages[1:] %}{{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(UserError, match="place of a: the prompt has no tokens"):
        tokenize([example("a", "b", "c")], small(), settings(str(template)), progress=False)


def test_special_tokens_come_from_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    train_tokenizer(["amber"], 270, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer and config.json name none"):
        tokenize(
            [example("a", "b", "c")], load_tokenizer(tmp_path), settings("none"), progress=False
        )
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0]}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<bos>", 2)
    assert tokenizer.chat_template == "{{ bos_token }}"


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer: expected tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["llama3.2", "qwen3", "smollm3"])
def test_the_real_tokenizers(real_data: Path, name: str) -> None:
    tokenizer = real(real_data, name)
    vectors = json.loads((real_data / "tokenizers" / name / "test_vectors.json").read_text())
    texts = [v["text"] for v in vectors]
    assert tokenizer(texts)["input_ids"] == [v["ids"] for v in vectors]
    data = settings("tokenizer")
    rows = [Example(str(i), f"Say {t}", "yes", ("no",), "") for i, t in enumerate(texts)]
    tokens = tokenize(rows, tokenizer, data, progress=False)
    end = {"llama3.2": "<|eot_id|>"}.get(name, "<|im_end|>")
    expected = tokenizer(["yes" + end, "no" + end])["input_ids"]
    for i in range(len(rows)):
        assert [tokens.response(i, c).tolist() for c in (0, 1)] == expected
        assert end in tokenizer.decode(tokens.prompt(i))
    assert (tokens.prompt(0)[0] == tokenizer.bos_token_id) == (name == "llama3.2")


def test_the_real_stories_tokenizer(real_data: Path) -> None:
    folder = real_data / "stories260K"
    tokenizer, plain = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text in ("Once upon a time", " two  spaces", "Júpiter\nMaçã"):
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids


def test_lastfm_with_a_short_limit(real_data: Path) -> None:
    data = default().data
    data.update(name="lastfm", path=str(real_data / "lastfm"), max_test=300, max_prompt_length=170)
    examples = load_examples(data, "test", seed=0)
    tokens = tokenize(examples, real(real_data, "llama3.2"), data, progress=False)
    assert 100 < tokens.cut["prompts_with_shorter_history"] < 300
    assert tokens.prompt_lengths.max() == 170
    assert tokens.response_lengths.shape == (300, 20)
    tokenizer = real(real_data, "llama3.2")
    for i, row in enumerate(examples):
        assert isinstance(row.prompt, History)
        prompt = tokenizer.decode(tokens.prompt(i))
        assert row.prompt.items[-1] in prompt  # The newest stays.
        assert tokenizer.decode(tokens.response(i, 0)) == f"{row.chosen}<|eot_id|>"


def graded(prompt: str, *fields: Any) -> Example:
    chosen, rejected, scores, also_chosen, ranks = fields
    return Example(prompt, prompt, chosen, rejected, f"{prompt}:1", scores, also_chosen, ranks)


def test_ranks_and_grades() -> None:
    plain = graded("p", "x", ("y", "z"), None, (), None)
    several = graded("q", "x", ("y",), None, ("u", "x"), None)
    ranked = graded("r", "x", ("y", "z", "w"), None, ("u",), (0, 1, 2, 2, 0))
    assert tokens_of(plain).ranks is None and tokens_of(plain).grades is None
    tokens = tokens_of(plain, several, ranked)
    assert tokens.ranks is not None and tokens.grades is not None
    # The second "x" of `several` is the chosen one again.
    assert tokens.candidate_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert tokens.ranks.tolist() == [[0, 1, 1, -1, -1], [0, 1, 0, -1, -1], [0, 1, 2, 2, 0]]
    assert tokens.grades.tolist() == [[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [2, 1, 0, 0, 2]]
    assert tokens.compared.tolist() == [
        [True, True, True, False, False],
        [True, True, False, False, False],
        [True, True, True, True, False],
    ]


def test_scores_are_the_grades_where_they_agree_with_the_order() -> None:
    ranked = graded("p", "x", ("y", "z"), (5.0, 1.0, 3.0), (), (0, 2, 1))
    also = graded("q", "x", ("y",), (5.0, 1.0, 4.0), ("z",), None)  # The best need not be equal.
    tied = graded("r", "x", ("y", "z"), (5.0, 4.0, 4.0), (), (0, 1, 2))
    swapped = graded("s", "x", ("y", "z"), (5.0, 5.0, 4.0), (), None)
    for rows in ([ranked], [ranked, also]):
        tokens = tokens_of(*rows)
        assert tokens.grades is tokens.scores is not None
    for other in (tied, swapped):
        tokens = tokens_of(ranked, other)
        assert tokens.grades is not None
        assert tokens.grades[0].tolist() == [2, 0, 1]
    assert tokens_of(swapped).grades is None


def test_without_ties_the_chosen_response_is_the_only_best_one() -> None:
    rows = [
        graded("p", "x", ("y", "zz"), (9.0, 2.0, 1.0, 9.0, 9.0), ("u", "vv"), (0, 1, 2, 0, 0)),
        graded("q", "xx", ("y",), (9.0, 2.0), (), None),
    ]
    tokens = tokens_of(*rows)
    less = tokens.without_ties()
    expected = tokens_of(graded("p", "x", ("y", "zz"), (9.0, 2.0, 1.0), (), (0, 1, 2)), rows[1])
    for name in ("response_tokens", "response_lengths", "candidate_ids", "scores", "ranks"):
        np.testing.assert_array_equal(getattr(less, name), getattr(expected, name), err_msg=name)
    assert less.cut["as_good_as_the_chosen_one_left_out"] == 2
    assert less.compared.tolist() == (less.response_lengths > 0).tolist()
    assert expected.without_ties() is expected


def test_the_same_tokens_among_chosen_and_rejected() -> None:
    row = graded("p", "x", ("y", "z"), None, ("u", "z"), None)
    with pytest.raises(UserError, match=r"p:1: field 'chosen\[2\]' has the same .* rejected\[1\]"):
        tokens_of(row)
    long = graded("p", "x", ("y",), None, ("u u u u u u u u u u u u u u u u u u u u u",), None)
    with pytest.raises(UserError, match=r"p:1: field 'chosen\[1\]' has \d+ tokens"):
        tokens_of(long, max_response_length=8)
    kept = tokens_of(long, max_response_length=8, long_response="drop")
    assert kept.candidate_ids.tolist() == [[0, 1]] and kept.cut["responses_too_long"] == 1
