"""What is written for an answer without rendering it is what the template writes for it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.data.chat_template import ChatTemplate
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.render import make_renderer
from tests.support.tokenizers import USER, real, settings, small

ANSWERS = (
    "Yo", " Yo ", "\nYo", "Yo\n", "two\nlines", "", "loud", "say loud", "a", "A", "0", "12", "é",
    "x" * 300, "{{ m }}", "<b>&amp;</b>", "a \"quoted\" 'one'", "</i>", "[1, 2]", "%s %d", "user",
    "assistant: ", "a\tb", "\u00a0Yo\u00a0", "one two three four", "http://x.y", "\u65e5\u672c",
)  # fmt: skip

# How a template writes the content c of a message, and whether that needs no rendering.
WRITTEN = {
    "{{ c }}": True,
    "{{ c | trim }}": True,
    "{{ '[' + c.strip() + ']' }}": True,
    "{{ c.lstrip('\\n') }}{{ 'x' * 2 }}": True,
    "{% if 'loud' in c %}!{% endif %}{{ c }}": True,
    "{% if c == 'loud' %}!{% elif c.startswith('A') %}?{% endif %}{{ c }}": True,
    "{% if c %}{{ c }}{% else %}nothing{% endif %}": True,
    "{% if c is string and loop.index0 % 2 == 1 %}{{ c }}{% else %}{{ c }}{% endif %}": True,
    "{% if c != 'a' %}{{ bos_token + c }}{% else %}-{% endif %}": True,
    "{% if c | upper == 'LOUD' %}!{% endif %}{{ c }}": False,
    "{% if c[:1] == 'l' %}!{% endif %}{{ c }}": False,
    "{{ c | length }}{{ c }}": False,
    "{% if c | length > 3 %}long {% endif %}{{ c }}": False,
    "{{ c | tojson }}": False,
    "{{ c | replace('a', 'b') }}": False,
    "{{ c | e }}": False,
    "{{ c.split('\\n')[0] }}": False,
    "{% if c.title() == 'Loud' %}!{% endif %}{{ c }}": False,
    "{{ c | first }}{{ c }}": False,
    "{{ 'say %s' % c }}": False,
    "{% set d = 'say ' ~ c %}{% if 'lo' in d %}!{% endif %}{{ c }}": False,
    "{% set d %}{{ c }}{% endset %}{% if 'lo' in d %}!{% endif %}{{ c }}": False,
    "{% if 'lo' in ['say', c] | join(' ') %}!{% endif %}{{ c }}": False,
    "{% if 'lo' in 'say ' + c %}!{% endif %}{{ c }}": False,
    "{% macro w(x) %}{{ x }}{% endmacro %}{% if 'lo' in w(c) %}!{% endif %}{{ c }}": False,
    "{% if 'lo' in '{}'.format(c) %}!{% endif %}{{ c }}": False,
    "{% filter trim %}{{ c }}{% endfilter %}": False,
    "{{ c }}{{ c }}": False,
    "{% if c < 'b' %}!{% endif %}{{ c }}": False,
    "{% for x in c %}{{ x }}{% endfor %}": False,
    "{% if c | int > 5 %}!{% endif %}{{ c }}": False,
    "{% if c in {'loud': 1} %}!{% endif %}{{ c }}": False,
    "{% if c.isupper() %}!{% endif %}{{ c }}": False,
    "{{ c if c | wordcount < 3 else 'long' }}": False,
}
TALKS: tuple[Any, ...] = ("Hi!", [{"role": "system", "content": "Be nice."}, USER])


def render_all(tokenizer: Any, template: str) -> tuple[ChatTemplate, list[tuple[str, str]]]:
    """The renderer, and its text and the template's for every answer after every prompt."""
    renderer = make_renderer(tokenizer, settings(template))
    assert isinstance(renderer, ChatTemplate)
    found = []
    for talk, answer in itertools.product(TALKS, ANSWERS):
        row = Example("0", talk, answer, ("No",), "file:1")
        prompt = renderer.render_prompt(talk, "")
        messages = [{"role": "user", "content": talk}] if isinstance(talk, str) else talk
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": answer}],
            chat_template=renderer._template,
            tokenize=False,
            enable_thinking=False,
            date_string="26 Jul 2024",
        )
        found.append((prompt + renderer.render_responses(row, prompt)[0], whole.rstrip("\n")))
    return renderer, found


@pytest.mark.parametrize("written", WRITTEN)
def test_every_way_to_write_an_answer(tmp_path: Path, written: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% set c = m.content %}"
        + (written if "macro" not in written else written.replace("{% macro", "{%- macro"))
        + "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer, found = render_all(small(), str(path))
    for ours, theirs in found:
        assert ours == theirs
    assert all((kind.rule is not None) == WRITTEN[written] for kind in renderer._kinds.values())


@pytest.mark.parametrize("name", ["llama3.2", "qwen3", "smollm3"])
def test_the_real_templates_are_of_the_kind(real_data: Path, name: str) -> None:
    renderer, found = render_all(real(real_data, name), "tokenizer")
    for ours, theirs in found:
        assert ours == theirs
    assert all(kind.rule is not None for kind in renderer._kinds.values())
