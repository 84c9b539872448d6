"""Prompts as tokens: what the template writes stays, what is too long goes, nothing is doubled."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.render import make_renderer
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from tests.support.tokenizers import real, settings, small

BOS, EOS = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = "amber basil cedar delta ember fjord".split()


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows(*prompts: Any) -> list[Example]:
    return [Example(str(i), p, "Yo", ("No",), f"file:{i + 1}") for i, p in enumerate(prompts)]


def run(tokenizer: Any, template: str, prompts: Any, **changes: Any) -> Tokens:
    return tokenize(rows(*prompts), tokenizer, settings(template, changes), progress=False)


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def theirs(tokenizer: Any, messages: Any) -> list[int]:
    """As transformers renders and tokenizes a conversation by itself."""
    found: list[int] = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    return found


LONG = " ".join(f"{word} number {i}," for i in range(60) for word in WORDS)


@pytest.mark.parametrize("name", ["llama3.2", "qwen3", "smollm3"])
@pytest.mark.parametrize("limit", [90, 91, 128, 200])
def test_a_long_text_is_cut_and_all_around_it_stays(real_data: Path, name: str, limit: int) -> None:
    tokenizer = real(real_data, name)
    system = say("system", "Be nice.")
    talks = [LONG, LONG[:900], [system, say("user", LONG)], "A short question?"]
    tokens = run(tokenizer, "tokenizer", talks, max_prompt_length=limit)
    for i, talk in enumerate(talks):
        messages = talk if isinstance(talk, list) else [say("user", talk)]
        content = messages[-1]["content"]
        found = tokens.prompt(i).tolist()
        if i == 3:
            assert found == theirs(tokenizer, messages)
        else:
            # Exactly what transformers makes of a message without the first characters.
            assert limit - 2 <= len(found) <= limit
            starts = _starts(content, tokenizer.decode(found))
            cuts = [[*messages[:-1], say("user", content[k:])] for k in starts]
            assert found in [theirs(tokenizer, cut) for cut in cuts]
    assert tokens.cut["prompts_truncated"] == 3


def _starts(content: str, text: str) -> range:
    """Where what is left of the content in a text can start: the template trims it."""
    start = next(k for k in range(len(content)) if content[k:] in text)
    return range(max(0, start - 2), start + 1)


def test_the_oldest_turns_go_first(template: str) -> None:
    system = say("system", "Be nice.")
    turns = [m for i in range(9) for m in (say("user", f"ask {i}"), say("assistant", f"say {i}"))]
    talk = [system, *turns, say("user", "12345678")]
    tokenizer = small()
    renderer = make_renderer(tokenizer, settings(template))

    def ids(messages: Any) -> list[int]:
        text = renderer.render_prompt(messages, "")
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for limit in range(len(ids([system, talk[-1]])), len(ids(talk)), 7):
        fitting = ([system, *turns[2 * k :], talk[-1]] for k in range(10))
        expected = next(ids(messages) for messages in fitting if len(ids(messages)) <= limit)
        tokens = run(tokenizer, template, [talk], max_prompt_length=limit)
        assert tokens.prompt(0).tolist() == expected
        assert tokens.cut["prompts_with_shorter_history"] == 1
        assert tokens.cut["prompts_truncated"] == 0
    fewer = len(ids([system, talk[-1]])) - 2
    tokens = run(tokenizer, template, [talk], max_prompt_length=fewer)
    text = tokenizer.decode(tokens.prompt(0))
    assert text.startswith("<bos>system: Be nice.<eos>\nuser: ") and text.endswith("assistant: ")
    assert len(tokens.prompt(0)) <= fewer
    assert (tokens.cut["history_items_dropped"], tokens.cut["prompts_truncated"]) == (9, 1)


def test_an_assistants_greeting_is_the_oldest_turn(template: str) -> None:
    talk = [say("assistant", "Hello! " * 9), say("user", "amber"), say("assistant", "x")]
    tokens = run(small(), template, [[*talk, say("user", "basil")]], max_prompt_length=60)
    text = small().decode(tokens.prompt(0))
    assert text.startswith("<bos>user: amber<eos>\nassistant: x<eos>\nuser: basil<eos>\n")


def test_histories_are_cut_inside_a_template(template: str) -> None:
    history = History("Seen: ", tuple(WORDS), ". Next?")
    whole = run(small(), template, [history]).prompt(0)
    for limit in range(28, len(whole)):
        tokens = run(small(), template, [history], max_prompt_length=limit)
        text = small().decode(tokens.prompt(0))
        assert len(tokens.prompt(0)) <= limit
        assert text.startswith("<bos>user: ") and text.endswith("Next?<eos>\nassistant: ")


@pytest.mark.parametrize("kind", ["text", "template"])
def test_what_becomes_of_long_prompts(template: str, kind: str) -> None:
    name = "none" if kind == "text" else template
    prompts = ["x", LONG, "y"]
    cut = run(small(), name, prompts, max_prompt_length=40)
    assert cut.ids == ["0", "1", "2"] and cut.prompt_lengths.max() == 40
    assert cut.cut["prompts_truncated"] == 1
    dropped = run(small(), name, prompts, max_prompt_length=40, long_prompt="drop")
    assert dropped.ids == ["0", "2"]
    assert (dropped.cut["prompts_too_long"], dropped.cut["examples_dropped"]) == (1, 1)
    with pytest.raises(UserError, match=r"file:2: the prompt has \d+ tokens, .*length is 40.*long"):
        run(small(), name, prompts, max_prompt_length=40, long_prompt="error")
    changes = {"long_prompt": "error", "on_bad_row": "skip"}
    assert run(small(), name, prompts, max_prompt_length=40, **changes).ids == ["0", "2"]
    with pytest.raises(UserError, match="no example is left"):
        run(small(), name, prompts[1:2], max_prompt_length=40, long_prompt="drop")


def test_a_limit_below_what_the_template_writes_is_refused(template: str) -> None:
    talk = [say("system", LONG), say("user", "amber basil")]
    with pytest.raises(
        UserError, match=r"file:2: without its text .* config.data.max_prompt_length is 40"
    ):
        run(small(), template, ["x", talk], max_prompt_length=40)
    assert run(small(), template, ["x", talk], max_prompt_length=40, on_bad_row="skip").ids == ["0"]


def with_ends(**ends: Any) -> Any:
    """A tokenizer that adds other special tokens."""
    tokenizer = _fresh()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=ends["single"], special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def _fresh() -> Any:
    import copy

    return copy.deepcopy(small())


@pytest.mark.parametrize(
    ("single", "before", "warned"),
    [
        ("<bos> $A", [BOS], False),
        ("<bos> $A <eos>", [BOS], True),
        ("$A <eos>", [], True),
        ("$A", [], False),
        ("<bos> <bos> $A <eos> <eos>", [BOS, BOS], True),
        ("<eos> $A <bos>", [EOS], True),
    ],
)
def test_nothing_comes_after_a_prompt_and_nothing_twice_before_it(
    single: str, before: list[int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_ends(single=single)
    text = [small()(word, add_special_tokens=False)["input_ids"] for word in ("amber", "x")]
    with caplog.at_level(logging.WARNING):
        written = "".join(small().convert_ids_to_tokens(before))
        tokens = run(tokenizer, "none", ["amber", "x", written + "amber"])
    assert tokens.prompt(0).tolist() == [*before, *text[0]]
    assert tokens.prompt(1).tolist() == [*before, *text[1]]
    assert tokens.prompt(2).tolist() == [*before, *text[0]]
    assert ("left out of the prompts" in caplog.text) == warned
    assert caplog.text.count("left out of the prompts") == warned
    # A long one keeps what comes before.
    long = run(tokenizer, "none", [LONG], max_prompt_length=10).prompt(0).tolist()
    assert long[: len(before)] == before and len(long) == 10


def test_a_text_with_bos_of_its_own_keeps_it_where_it_is_cut() -> None:
    tokens = run(with_ends(single="$A"), "none", ["<bos>" + LONG, LONG], max_prompt_length=10)
    assert tokens.prompt(0)[0] == BOS
    assert BOS not in tokens.prompt(1)


def test_a_template_with_bos_and_a_tokenizer_that_adds_it(template: str) -> None:
    tokens = run(with_ends(single="<bos> $A <eos>"), template, ["amber"])
    expected = small()("<bos>user: amber<eos>\nassistant: ", add_special_tokens=False)["input_ids"]
    assert tokens.prompt(0).tolist() == expected


def test_a_tokenizer_that_changes_texts_is_refused() -> None:
    class Odd:
        name_or_path = "odd"
        bos_token_id, eos_token_id, eos_token = 1, 2, "<eos>"

        def _encode_plus(self) -> None: ...

        def __call__(self, text: Any, add_special_tokens: bool, **more: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            found = [[ord(c) + 3 * add_special_tokens for c in t] for t in texts]
            return {"input_ids": found[0] if isinstance(text, str) else found}

    with pytest.raises(UserError, match="odd: the tokenizer changes a text"):
        run(Odd(), "none", ["a"])


@pytest.mark.parametrize("size", [1, 3, 5000])
def test_tokens_do_not_depend_on_how_many_rows_there_are(
    monkeypatch: pytest.MonkeyPatch, template: str, size: int
) -> None:
    prompts = [f"amber {i}" if i % 3 else LONG[: 40 * i] + "x" for i in range(20)]
    expected = run(small(), template, prompts, max_prompt_length=60)
    monkeypatch.setattr("mass_dpo_jax.data.tokenization.CHUNK_ROWS", size)
    found = run(small(), template, prompts, max_prompt_length=60)
    for field in dataclasses.fields(Tokens):
        np.testing.assert_equal(getattr(found, field.name), getattr(expected, field.name))


def test_every_token_counts_in_the_position(tmp_path: Path) -> None:
    train_tokenizer(["amber"], 270, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    examples = [
        Example("a", "abcd", "x", ("yz",), "file:1"),  # 5 + 3 with <bos> and <eos>
        Example("b", "abcde", "x", ("y", "zzz"), "file:2"),  # 6 + 4
    ]

    def found(most: int, **changes: Any) -> list[str]:
        data = settings("none", changes)
        return tokenize(examples, tokenizer, data, progress=False, max_positions=most).ids

    assert found(10) == ["a", "b"]
    message = r"file:2: the prompt and field 'rejected\[1\]' have 6 \+ 4 tokens, .* 9 positions"
    with pytest.raises(UserError, match=message):
        found(9)
    assert found(9, on_bad_row="skip") == ["a"]
    assert found(9, max_prompt_length=5) == ["a", "b"]
    assert found(8, max_response_length=3, long_response="drop") == ["a", "b"]
    with pytest.raises(UserError, match="none of its 2 rows can be used"):
        found(7, on_bad_row="skip")
