"""Calls of functions, tools and thoughts: rendered as transformers renders them, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.render import make_renderer
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.errors import UserError
from tests.support.data import load, write_lines
from tests.support.tokenizers import USER, real, settings, small

Message = dict[str, Any]
DATE = "26 Jul 2024"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up {name}.",
            "parameters": {
                "type": "object",
                "properties": {"planet": {"type": "string", "description": "Which one"}},
                "required": ["planet"],
            },
        },
    }
    for name in ("moons", "mass")
]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "name": "moons", "tool_call_id": "c0", "content": '["Phobos"]'}


def calls(*names: str, content: Any = None, **arguments: Any) -> Message:
    """The message of an assistant that calls functions."""
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def says(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


CALL = calls("moons", planet="Mars")
AGENT = [SYSTEM, USER, CALL, TOOL]  # A tool has answered.
# Prompt, tools, answers; then the models whose templates write all of it.
ALL, LLAMA, QWEN = ("llama3.2", "qwen3"), ("llama3.2",), ("qwen3",)
ROWS: list[tuple[Any, Any, list[Message], tuple[str, ...]]] = [
    ([USER], TOOLS, [CALL, says("None.")], ALL),
    ("Hi!", TOOLS, [calls("mass", planet="é\"'<"), says("None.")], ALL),
    (AGENT, TOOLS, [says("Phobos."), calls("mass", planet="Mars")], ALL),
    (AGENT, None, [says("Phobos."), says("None.")], ALL),
    ([*AGENT, says("Phobos."), USER], TOOLS[:1], [CALL, calls("mass")], ALL),
    ([USER], TOOLS, [calls("moons", planet=1, deep={"a": [1.5, True]}), says("x")], ALL),
    ([USER], TOOLS, [calls("moons", "mass", planet="Mars"), CALL], QWEN),
    ([USER], TOOLS, [calls("moons", content="Let me look.", planet="Mars"), CALL], QWEN),
    ([USER, calls("moons", "mass", planet="Mars"), TOOL, TOOL], TOOLS, [says("a"), CALL], QWEN),
]


# A template that writes everything.
CALLS_AND_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.name }}{{ m.tool_call_id }}{% if m.reasoning_content %}{{ m.reasoning_content }}"
    "{% endif %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def list_rows() -> list[dict[str, Any]]:
    """Rows with calls and tools, and with thoughts, as TRL has them."""
    given = [(prompt, tools, answers) for prompt, tools, answers, _ in ROWS]
    given += [(prompt, None, answers) for prompt, answers in THOUGHTS]
    return [
        {"prompt": prompt, "chosen": [a], "rejected": [[b]], "tools": tools}
        for prompt, tools, (a, b) in given
    ]


@pytest.mark.parametrize("row", ROWS)
def test_calls_and_tools_are_rendered_as_by_transformers(
    real_data: Path, tmp_path: Path, row: Any
) -> None:
    prompt, tools, answers, models = row
    # Arguments as JSON, as OpenAI and TRL have them, and tools as JSON.
    written = json.loads(json.dumps([prompt, answers]))
    for message in [*(written[0] if isinstance(prompt, list) else []), *written[1]]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    chosen, *rejected = [[answer] for answer in answers]
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools},
        {
            "prompt": written[0],
            "chosen": written[1][0],
            "rejected": written[1][1:],
            "tools": json.dumps(tools) if tools else "",
        },
    ]
    examples = load("preferences", write_lines(tmp_path / "file.jsonl", rows))
    first, second = examples
    assert (first.prompt, first.chosen, first.tools) == (second.prompt, second.chosen, second.tools)
    for name in models:
        for example in examples:
            tokenizer = real(real_data, name)
            renderer = make_renderer(tokenizer, settings("tokenizer"))
            text = renderer.render_prompt(example.prompt, "", example.tools)
            responses = renderer.render_responses(example, text)
            renderer.find_warnings(example, example.prompt)
            messages = [USER] if isinstance(prompt, str) else with_contents(prompt)
            options = {"tokenize": False, "tools": tools, "enable_thinking": False}
            options["date_string"] = DATE
            asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
            assert text == asked
            for answer, response in zip(answers, responses, strict=True):
                whole = tokenizer.apply_chat_template(
                    [*messages, *with_contents([answer])], **options
                )
                assert text + response == whole.rstrip("\n")


def with_contents(messages: list[Message]) -> list[Message]:
    """Qwen3's template needs a content, as many do."""
    return [{**m, "content": m["content"] or ""} for m in messages]


THOUGHTS = [
    ([USER], [says("Two.", reasoning_content="Count."), says("One.")]),
    (
        [USER],
        [says("Two.", reasoning_content="\nCount.\n\nTwice.\n"), says("<think>x</think>One.")],
    ),
    (
        [SYSTEM, USER, says("A", reasoning_content="hm"), USER],
        [{**CALL, "reasoning_content": "Which?"}, says("One.", reasoning_content="Count")],
    ),
    (
        [USER, {**CALL, "reasoning_content": "Which?"}, TOOL],
        [says("a", reasoning_content="b"), says("c")],
    ),
    ([USER, says("A", reasoning="hm"), USER], [says("Two.", reasoning="Count."), says("One.")]),
]


@pytest.mark.parametrize(("prompt", "answers"), THOUGHTS)
def test_thoughts_are_rendered_as_by_transformers(
    real_data: Path, prompt: Any, answers: Any
) -> None:
    tokenizer = real(real_data, "qwen3")
    chosen, rejected = ([answer] for answer in with_contents(answers))
    example = Example("0", with_contents(prompt), chosen, (rejected,), "file:1")
    thinking = settings("tokenizer", {"chat_template_kwargs": '{"enable_thinking": true}'})
    renderer = make_renderer(tokenizer, thinking)
    text = renderer.render_prompt(example.prompt, "")
    for answer, response in zip(answers, renderer.render_responses(example, text), strict=True):
        whole = tokenizer.apply_chat_template(
            with_contents([*prompt, answer]), tokenize=False, enable_thinking=True
        )
        assert text + response == whole.rstrip("\n")
    with pytest.raises(
        UserError, match=r"file:1: field 'chosen' has reasoning.*, and the chat temp"
    ):
        renderer = make_renderer(tokenizer, settings("tokenizer"))
        renderer.render_responses(example, renderer.render_prompt(example.prompt, ""))


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLING = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
)
NO_END = CHATML.replace(
    "<eos>", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}<eos>{% endif %}"
)


def look(
    tokenizer: Any, template: str, prompt: Any, chosen: Message, tools: Any = (), **arguments: Any
) -> list[str]:
    """What is odd about a row; raises UserError where it cannot be rendered."""
    data = settings(template, {"chat_template_kwargs": json.dumps(arguments)})
    renderer = make_renderer(tokenizer, data)
    example = Example("0", prompt, [chosen], ("x",), "file:1", tools=tuple(tools))
    renderer.render_responses(example, renderer.render_prompt(prompt, "file:1", example.tools))
    return renderer.find_warnings(example, prompt)


CALL_ = calls("moons", content="", planet="Mars")
LACKS = r"the chat template does not write it; take a model"
REFUSED: list[tuple[str, Any, Message, Any, str]] = [
    ("smollm3", [USER], says("a"), TOOLS, rf"field 'tools': {LACKS}.*chat_template=FILE"),
    ("smollm3", [USER], CALL_, [], rf"field 'chosen.tool_calls': {LACKS}"),
    ("smollm3", [USER, CALL_, TOOL], says("a"), [], rf"field 'prompt\[1\].tool_calls': {LACKS}"),
    ("qwen3", [USER], says("a<|im_end|>b", name="n"), [], "'chosen' contains the end-of-seq"),
    ("qwen3", [USER], calls("moons", content="", x="<|im_end|>"), [], "'chosen' contains the end"),
    ("llama3.2", [USER], calls("moons", "mass", content=""), [], "only supports single tool-calls"),
    (
        "llama3.2",
        [USER],
        {**CALL_, "content": "So:"},
        [],
        "'chosen.content': .* a text beside call",
    ),
    (
        "llama3.2",
        [USER],
        says("a", reasoning_content="b"),
        [],
        "'chosen.reasoning_content': .*<thi",
    ),
    (CALLING, [USER], CALL_, [], rf"field 'chosen.tool_calls': {LACKS}"),
    (NO_END, [USER], CALL_, [], "no special token at the end of field 'chosen'"),
    (
        CHATML,
        [USER, says("a", thinking="b"), USER],
        says("a"),
        [],
        r"'prompt\[1\].thinking': the c",
    ),
]


@pytest.mark.parametrize(("name", "prompt", "chosen", "tools", "message"), REFUSED)
def test_what_a_template_does_not_write_is_refused(
    real_data: Path, tmp_path: Path, name: str, prompt: Any, chosen: Any, tools: Any, message: str
) -> None:
    template, tokenizer = "tokenizer", small()
    if "{" in name:
        (tmp_path / "t.jinja").write_text(name)
        template = str(tmp_path / "t.jinja")
    else:
        tokenizer = real(real_data, name)
    with pytest.raises(UserError, match=f"^file:1: .*{message}") as error:
        look(tokenizer, template, prompt, chosen, tools)
    assert "\n" not in str(error.value)


def test_what_a_template_leaves_out_on_purpose_is_counted(real_data: Path) -> None:
    qwen, llama = real(real_data, "qwen3"), real(real_data, "llama3.2")
    earlier = [USER, says("A", reasoning_content="hm"), USER]
    assert look(qwen, "tokenizer", earlier, says("a")) == [
        "with reasoning_content in earlier turns that the chat template does not write"
    ]
    assert look(qwen, "tokenizer", [USER, CALL_, TOOL], says("a")) == [
        f"with a {key} of a tool message that the chat template does not write"
        for key in ("name", "tool_call_id")
    ]
    beside = [USER, {**CALL_, "content": "Let me look."}, {"role": "tool", "content": "2"}]
    assert look(llama, "tokenizer", beside, says("a")) == [
        "with text beside tool calls that the chat template does not write"
    ]
    assert look(qwen, "tokenizer", beside, says("a")) == []
    control = [USER, calls("moons", content="", planet="<|im_end|>"), TOOL]
    assert look(qwen, "tokenizer", control, says("a"))[0] == "with special tokens in their text"


def test_tools_need_a_template() -> None:
    with pytest.raises(UserError, match=r"file:1: field 'tools' has functions, .*columns=tools="):
        look(small(), "none", "p", says("a"), TOOLS)


BEGINNINGS = ["The answer is", "The answer is ", "\n{", "So"]


@pytest.mark.parametrize("name", ["llama3.2", "qwen3", "smollm3"])
@pytest.mark.parametrize("thinking", [False, True])
def test_answers_go_on_with_the_assistant_s_last_message(
    real_data: Path, name: str, thinking: bool
) -> None:
    tokenizer = real(real_data, name)
    options = {"enable_thinking": thinking, "date_string": DATE}
    data = settings("tokenizer", {"chat_template_kwargs": json.dumps(options)})
    renderer = make_renderer(tokenizer, data)
    for beginning in BEGINNINGS:
        prompt = [SYSTEM, USER, says(beginning)]
        example = Example("0", prompt, " 42. ", ([says("4")], "x\ny"), "file:1")
        text = renderer.render_prompt(prompt, "")
        if name != "smollm3":  # Its template prints today's date for transformers.
            assert text == tokenizer.apply_chat_template(
                prompt, tokenize=False, continue_final_message=True, **options
            )
        responses = renderer.render_responses(example, text)
        for answer, response in zip((" 42. ", "4", "x\ny"), responses, strict=True):
            whole = tokenizer.apply_chat_template(
                [SYSTEM, USER, says(beginning + answer)], tokenize=False, **options
            )
            if name != "smollm3":
                assert text + response == whole.rstrip("\n")
            assert response.endswith(("<|eot_id|>", "<|im_end|>"))
        assert renderer.find_warnings(example, prompt) == []


def test_nulls_are_those_of_tables_unless_they_are_in_json(tmp_path: Path) -> None:
    nulls = {"planet": "Mars", "moon": None, "of": [None, {"a": None}]}
    schema = {"type": "function", "function": {"name": "moons", "strict": None}}
    answers = [calls("moons", **nulls), calls("mass")]
    rows = [{"prompt": "q", "chosen": answers[:1], "rejected": answers[1:], "tools": [schema]}]
    written = json.loads(json.dumps(rows[0]))
    function = written["chosen"][0]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(nulls)
    rows.append({**written, "tools": json.dumps([schema])})
    table, text = load("preferences", write_lines(tmp_path / "file.jsonl", rows))
    found = [row.chosen[0]["tool_calls"][0]["function"]["arguments"] for row in (table, text)]
    assert found == [{"planet": "Mars", "of": [None, {}]}, nulls]
    assert (table.tools, text.tools) == (
        ({"type": "function", "function": {"name": "moons"}},),
        (schema,),
    )


def test_what_is_not_json_or_too_deep_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    deep = "{'name': 'f', 'x': " + "[" * 500 + "]" * 500 + "}"
    for tools, message in {
        "[{'name': 'f', 'x': {1, 2}}]": "'tools[0]' is not for JSON: ",
        "[{'name': 'f', (1, 2): 3}]": "'tools[0]' is not for JSON: ",
        f"[{deep}]": "'tools' must be a list",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            load("preferences", write_lines(tmp_path / "f.jsonl", [{**row, "tools": tools}]))
    with pytest.raises(UserError, match=r"'tools\[0\]' must be a function"):
        load("preferences", write_lines(tmp_path / "f.jsonl", [{**row, "tools": [deep]}]))


def test_long_prompts_keep_calls_and_tools(real_data: Path) -> None:
    tokenizer = real(real_data, "qwen3")
    old = [{"role": "user", "content": "old " * 50}, says("x")]
    prompt = [SYSTEM, *old, USER, CALL_, {"role": "tool", "content": "12 " * 200 + "end"}]
    example = Example("0", prompt, "a", ("b",), "file:1", tools=tuple(TOOLS[:1]))
    data = settings("tokenizer", {"max_prompt_length": 300})
    tokens = tokenize([example], tokenizer, data, progress=False)
    assert (tokens.cut["history_items_dropped"], tokens.cut["prompts_truncated"]) == (1, 1)
    text = tokenizer.decode(tokens.prompt(0))
    assert 290 <= tokens.prompt_lengths[0] <= 300
    for kept in ("Be brief.", "Looks up moons.", "Hi!", '"planet": "Mars"', "12 end\n</tool_resp"):
        assert kept in text
    assert "old" not in text
    beginning = [SYSTEM, *old, {"role": "user", "content": "new " * 400}, says("So:")]
    example = Example("0", beginning, " a", (" b",), "file:1")
    text = tokenizer.decode(tokenize([example], tokenizer, data, progress=False).prompt(0))
    assert text.endswith("new <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSo:")
    assert "old" not in text


def test_a_template_may_need_names_or_ids(tmp_path: Path) -> None:
    needs = "{% if m.role == 'tool' and not m.name %}{{ raise_exception('no name') }}{% endif %}"
    path = tmp_path / "t.jinja"
    path.write_text(CALLS_AND_TOOLS.replace("{{ m.name }}", needs))
    assert look(small(), str(path), [USER, CALL_, TOOL], says("a"), TOOLS) == []
    nameless = {"role": "tool", "content": "2"}
    with pytest.raises(UserError, match=r"^file:1: .* fails on \(user, assistant, tool\): no name"):
        look(small(), str(path), [USER, CALL_, nameless], says("a"))


def test_calls_may_end_with_a_token_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    end = "{% if m.tool_calls %}<bos>{% else %}<eos>{% endif %}"
    path.write_text(CALLS_AND_TOOLS.replace("<eos>", end))
    renderer = make_renderer(small(), settings(str(path)))
    example = Example("0", "q", [calls("f", content="")], ("x",), "file:1")
    call, text = renderer.render_responses(example, renderer.render_prompt("q", ""))
    assert call.endswith("}]<bos>") and text == "x<eos>"
