"""Responses are tokenized as what goes on after their prompt; oracle: the whole text's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer
from tests.support.tokenizers import SPACES, settings, small, write_with_spaces

EOS = 2
PROMPTS = ("Moons of Mars?", "Moons:\n", "Say x [/INST]", "x</s>", " x  ", "😀", "")
RESPONSES = (" Phobos", "\nPhobos, Deimos", " 😀 é", "  two", "\n")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=SPACES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_with_spaces(request.param, tmp_path_factory.mktemp("t") / "m"))


def tokens_of(tokenizer: Any, template: str, *rows: tuple[str, ...]) -> list[list[list[int]]]:
    """The prompt's tokens and the responses', row by row."""
    examples = [Example(str(i), row[0], row[1], row[2:], "") for i, row in enumerate(rows)]
    tokens = tokenize(examples, tokenizer, settings(template), progress=False)
    return [
        [tokens.prompt(i).tolist(), *(tokens.response(i, c).tolist() for c in range(len(row) - 1))]
        for i, row in enumerate(rows)
    ]


def test_without_a_template(tokenizer: Any) -> None:
    rows = [(prompt, *RESPONSES) for prompt in PROMPTS]
    for row, (before, *found) in zip(rows, tokens_of(tokenizer, "none", *rows), strict=True):
        assert before == tokenizer(row[0])["input_ids"]
        for text, tokens in zip(row[1:], found, strict=True):
            assert [*before, *tokens] == [*tokenizer(row[0] + text)["input_ids"], EOS], (row, text)


def test_with_a_template(tokenizer: Any, tmp_path: Path) -> None:
    (path := tmp_path / "template.jinja").write_text(TEMPLATE)
    tokenizer.chat_template = TEMPLATE
    [(before, *found)] = tokens_of(tokenizer, str(path), ("Moons?", "Phobos", "Deimos 😀"))
    for text, tokens in zip(("Phobos", "Deimos 😀"), found, strict=True):
        messages = [{"role": "user", "content": "Moons?"}, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        assert [*before, *tokens] == whole


@pytest.mark.parametrize("between", ["</s>", "<|assistant|>\n", "</s>\n"])
def test_a_template_that_ends_prompts_with_an_added_token(
    tokenizer: Any, tmp_path: Path, between: str
) -> None:
    """Some tokenizers begin anew after it."""
    template = (
        f"{{% for m in messages %}}{{{{ m.content }}}}{{% if m.role == 'user' %}}{between}"
        "{% else %}</s>{% endif %}{% endfor %}"
    )
    (path := tmp_path / "template.jinja").write_text(template)
    [(before, *found)] = tokens_of(tokenizer, str(path), ("Moons?", "Phobos", "Deimos"))
    for text, tokens in zip(("Phobos", "Deimos"), found, strict=True):
        whole = tokenizer(f"Moons?{between}{text}</s>", add_special_tokens=False)["input_ids"]
        assert [*before, *tokens] == whole


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    texts=st.lists(st.text(min_size=1, max_size=20), min_size=3, max_size=3, unique=True)
)
def test_the_text_comes_back_where_tokens_would_merge(tokenizer: Any, texts: list[str]) -> None:
    """Tokens of the whole may lie across the border; the text is the same."""
    hypothesis.assume(not any("<" in text for text in texts))
    [(before, *found)] = tokens_of(tokenizer, "none", tuple(texts))
    for text, tokens in zip(texts[1:], found, strict=True):
        whole = tokenizer(texts[0] + text)["input_ids"]
        assert tokenizer.decode([*before, *tokens]) == tokenizer.decode([*whole, EOS])


def test_a_tokenizer_that_changes_nothing_is_used_as_it_is() -> None:
    from mass_dpo_jax.data.continuation import ResponseEncoder

    assert ResponseEncoder(small())._continuing is small()
