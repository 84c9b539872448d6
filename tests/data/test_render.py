"""Chat templates: what is the prompt, what is the response, and which templates cannot be used."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.render import Renderer, make_renderer
from mass_dpo_jax.errors import UserError
from tests.support.tokenizers import USER, real, settings, small

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def example(prompt: Any = "Hi!", chosen: Any = " Yo ", rejected: tuple[Any, ...] = ("No",)) -> Any:
    return Example("0", prompt, chosen, rejected, "file:1")


def written(folder: Path, template: str) -> str:
    path = folder / "template.jinja"
    path.write_text(template)
    return str(path)


def render(tokenizer: Any, template: str, row: Any) -> tuple[str, list[str]]:
    renderer = make_renderer(tokenizer, settings(template))
    return renderer.render_prompt(row.prompt, row.place), responses(renderer, row)


def responses(renderer: Renderer, row: Example) -> list[str]:
    return renderer.render_responses(row, renderer.render_prompt(row.prompt, row.place))


def test_response_is_what_the_template_writes_up_to_its_end_token(tmp_path: Path) -> None:
    path = written(tmp_path, TEMPLATE)
    prompt, responses = render(small(), path, example(rejected=("No", "No no")))
    assert prompt == "<bos>user: Hi!<eos>\nassistant: "
    assert responses == ["Yo<eos>", "No<eos>", "No no<eos>"]
    system = {"role": "system", "content": "Be nice."}
    messages = [system, USER, {"role": "assistant", "content": "?"}, USER]
    chat = example(messages, [{"role": "assistant", "content": "Yo"}])
    prompt, responses = render(small(), path, chat)
    assert prompt == (
        "<bos>system: Be nice.<eos>\nuser: Hi!<eos>\nassistant: ?<eos>\nuser: Hi!<eos>\nassistant: "
    )
    assert responses == ["Yo<eos>", "No<eos>"]
    history = example(History("<", ("a", "b"), ">"))
    assert render(small(), path, history)[0] == "<bos>user: <a, b><eos>\nassistant: "


def test_answers_depend_on_the_kind_of_prompt(tmp_path: Path) -> None:
    # A template may write an answer another way after another prompt: nothing is mixed up.
    kind = "{% if messages[0].content == 'loud' %}!{{ m.content }}{% else %}{{ m.content }}"
    path = written(tmp_path, TEMPLATE.replace("{{ m.content | trim }}", kind + "{% endif %}"))
    renderer = make_renderer(small(), settings(path))
    rows = [example(prompt, "a", ("b",)) for prompt in ("low", "loud", "low")]
    assert [responses(renderer, row) for row in rows] == [
        ["a<eos>", "b<eos>"],
        ["!a<eos>", "!b<eos>"],
        ["a<eos>", "b<eos>"],
    ]


def test_every_date_is_the_configured_one(tmp_path: Path) -> None:
    dates = "{{ strftime_now('%d %b %Y') + '|' + date_string }} {{ enable_thinking }} "
    assert render(small(), written(tmp_path, "\n" + dates + TEMPLATE), example())[0].startswith(
        "\n26 Jul 2024|26 Jul 2024 False <bos>"
    )


def test_no_template() -> None:
    renderer = make_renderer(small(), settings("none"))
    assert (renderer.special_tokens, renderer.end_id) == (True, small().eos_token_id)
    assert renderer.render_prompt(History("<", ("a",), "> "), "") == "<a> "
    assert responses(renderer, example()) == [" Yo ", "No"]
    assert responses(renderer, example(chosen="Yo<eos>", rejected=("<eos>",))) == ["Yo", ""]


def test_arguments_of_the_template(tmp_path: Path) -> None:
    path = written(tmp_path, "{{ strftime_now('%d') }} {{ enable_thinking }} {{ more }}" + TEMPLATE)

    def prompt(arguments: str) -> str:
        data = settings(path, {"chat_template_kwargs": arguments})
        return make_renderer(small(), data).render_prompt("Hi!", "").partition("<bos>")[0]

    assert prompt("") == "26 Jul 2024 False "
    given = '{"enable_thinking": true, "more": [1], "date_string": "5 May"}'
    assert prompt(given) == "5 May True [1]"
    for wrong, message in {
        "{": "not JSON",
        "[1]": "expected a JSON object",
        '{"tokenize": true}': "'tokenize' is not for a user to set",
        '{"add_generation_prompt": true}': "'add_generation_prompt' is not",
    }.items():
        with pytest.raises(UserError, match=f"chat_template_kwargs.*{message}"):
            prompt(wrong)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{{ raise_exception('no\n system') }}", example(), "fails on .user.: no system"),
        ("{{ messages[7].content.x }}", example(), "the chat template fails on"),
        (
            TEMPLATE.replace("{{ eos_token }}", ""),
            example(),
            "no special token at the end.*write {{ eos_",
        ),
        ("{{ messages|length }}" + TEMPLATE, example(), "does not start with its generation"),
        (
            TEMPLATE,
            example(rejected=("b<eos>c",)),
            r"'rejected\[0\]' contains the end-of-seq.*<eos>",
        ),
        ("tokenizer", example(), "has no chat template: set it to none"),
        ("none", example(prompt=[USER]), "'prompt' is a list of chat messages, which need a templ"),
        ("none", example(chosen=[{"role": "assistant", "content": "x"}]), "'chosen' is a list of"),
        ("none", example(chosen="b<eos>c"), "'chosen' contains the end-of-sequence token <eos>"),
        ("no/such/file", example(), "'no/such/file': expected tokenizer, none or a readable templ"),
    ],
)
def test_what_cannot_be_rendered(tmp_path: Path, template: str, row: Any, message: str) -> None:
    path = written(tmp_path, template) if "{" in template else template
    with pytest.raises(UserError, match=message) as error:
        render(small(), path, row)
    assert "\n" not in str(error.value)


def doubts(tokenizer: Any, template: str, *prompts: Any) -> list[str]:
    renderer = make_renderer(tokenizer, settings(template))
    found = []
    for i, prompt in enumerate(prompts):
        row = Example("0", prompt, "a", ("b",), f"file:{i}")
        found.append("; ".join(renderer.find_warnings(row, prompt)))
    return found


RENDERED = {
    "llama3.2": (
        "<|begin_of_text|>Hi",
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "\n <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi",
    ),
    "qwen3": ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>system\nBe nice.<|im_end|>"),
    "smollm3": (" <|im_start|>user\nHi", "<|begin_of_text|>Hi"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_prompts_that_are_rendered_already_are_refused(real_data: Path, name: str) -> None:
    tokenizer = real(real_data, name)
    for text in RENDERED[name]:
        for prompt in (text, [{"role": "system", "content": text}, USER]):
            with pytest.raises(UserError, match=r"file:0: .*--config.data.chat_template=none"):
                doubts(tokenizer, "tokenizer", prompt)
        assert doubts(tokenizer, "none", text + "assistant") == [""]  # As it should be.


def test_what_is_odd_about_a_prompt_is_said(real_data: Path, tmp_path: Path) -> None:
    inside, looks = "with special tokens in their text", "that look rendered already"
    tokenizer = real(real_data, "smollm3")
    talk = [USER, {"role": "assistant", "content": "a<|im_end|>b"}, USER]
    texts = ["Hi <|im_end|> you", "Hi<|im_end|>\n<|im_start|>assistant\n", talk]
    assert doubts(tokenizer, "tokenizer", *texts) == [inside] * 3
    texts = [
        "[INST] Hi [/INST]",
        "<|user|>\nHi",
        "<start_of_turn>user\nHi",
        "<s>[INST] Hi",
        "<s>Hi",
    ]
    assert doubts(tokenizer, "tokenizer", *texts) == [looks] * 5
    harmless = ["Hi!", "a < b | c > d", "<b>Hi</b>", "What does [INST] mean?", "user: Hi", "im_end"]
    assert doubts(tokenizer, "tokenizer", *harmless) == [""] * 6
    alpaca = written(
        tmp_path,
        "Below is a task.\n\n{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n"
        "{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    )
    rows = ["### Instruction:\nHi\n\n### Response:\n", "Hi", "# Instruction:"]
    assert doubts(small(), alpaca, *rows) == [looks, "", ""]
    assert doubts(small(), "none", "Hi<eos>", "Hi", "<bos>Hi") == ["that end with <eos>", "", ""]


def test_one_end_is_taken_off_an_answer(tmp_path: Path) -> None:
    for template in (written(tmp_path, TEMPLATE), "none"):
        renderer = make_renderer(small(), settings(template))
        row = example(chosen="Yo<eos>", rejected=("No<eos>\n", "Maybe", "Well\n"))
        found = [text.removesuffix("<eos>") for text in responses(renderer, row)]
        assert [text.strip() for text in found] == ["Yo", "No", "Maybe", "Well"]
        for wrong in ("Yo<eos><eos>", "<eos>Yo", "Yo<eos>No<eos>", "Yo<eos> <eos>"):
            with pytest.raises(UserError, match="'chosen' contains the end-of-sequence token"):
                responses(renderer, example(chosen=wrong))


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
@pytest.mark.parametrize(
    "answer", ["<think>\nWell.\n</think>\n\nYo", "<think></think>Yo", "a</think>Yo", "<think>Yo"]
)
def test_thoughts_need_a_template_that_is_told_to_think(
    real_data: Path, name: str, answer: str
) -> None:
    tokenizer = real(real_data, name)
    with pytest.raises(UserError, match=r"file:1: .*chat_template_kwargs='{\"enable_thinking\": "):
        render(tokenizer, "tokenizer", example(rejected=("No", answer)))
    data = settings("tokenizer", {"chat_template_kwargs": '{"enable_thinking": true}'})
    renderer = make_renderer(tokenizer, data)
    assert "Yo" in responses(renderer, example(chosen=answer))[0]


def test_a_template_without_thoughts_does_not_care(real_data: Path) -> None:
    tokenizer = real(real_data, "llama3.2")
    found = render(tokenizer, "tokenizer", example(chosen="<think>x</think>Yo"))[1][0]
    assert found == "<think>x</think>Yo<|eot_id|>"


CASES = {
    "llama3.2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
        "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yo<|eot_id|>",
    ),
    "qwen3": (
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        " Yo <|im_end|>",
    ),
    "smollm3": (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: "
        "/no_think\n\n## Custom Instructions\n\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face.\n\n<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n",
        " Yo <|im_end|>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_real_templates(real_data: Path, name: str) -> None:
    tokenizer = real(real_data, name)
    prompt, responses = render(tokenizer, "tokenizer", example())
    assert (prompt, responses[0]) == CASES[name]
    # A longer talk with a system message: the last turn is written as in a talk of one turn.
    talk = [
        {"role": "system", "content": "Be nice."},
        USER,
        {"role": "assistant", "content": "Well?"},
        USER,
    ]
    prompt, longer = render(tokenizer, "tokenizer", example(talk))
    assert longer == responses
    assert prompt.endswith(CASES[name][0][-20:])
    assert re.search(r"Be nice\.[\s\S]*Hi![\s\S]*Well\?[\s\S]*Hi!", prompt)
    # The whole is what the template writes for the whole, but for a newline at the end.
    whole = tokenizer.apply_chat_template(
        [*talk, {"role": "assistant", "content": " Yo "}],
        tokenize=False,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    assert (prompt + longer[0]) == whole.rstrip("\n")


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_texts_are_those_of_transformers(real_data: Path, name: str, thinking: bool) -> None:
    """As TRL renders a row (`tests/scripts/trl_check.py` asks TRL itself)."""
    tokenizer = real(real_data, name)
    today = datetime.datetime.now().strftime("%d %B %Y")  # SmolLM3's template prints no other date.
    arguments = {"enable_thinking": thinking, "date_string": today}
    data = settings("tokenizer", {"chat_template_kwargs": json.dumps(arguments)})
    renderer = make_renderer(tokenizer, data)
    talk = [{"role": "system", "content": "Be brief."}, USER]
    answer = {"role": "assistant", "content": "Yo, "}
    row = example(talk, [answer])
    prompt = renderer.render_prompt(row.prompt, "")
    expected = tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True, **arguments
    )
    assert prompt == expected
    whole = tokenizer.apply_chat_template([*talk, answer], tokenize=False, **arguments)
    written = prompt + responses(renderer, row)[0]
    assert whole.startswith(written)
    assert whole.removeprefix(written).strip() == ""


SYSTEM, ASSISTANT = (
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "A"},
)
DEVELOPER, TOOL = {**SYSTEM, "role": "developer"}, {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("name", "prompt", "lost"),
    [
        ("smollm3", [SYSTEM, {**SYSTEM, "content": "Be nice."}, USER], "system"),
        ("smollm3", [DEVELOPER, USER], "developer"),
        ("qwen3", [DEVELOPER, USER], "developer"),
        ("qwen3", [USER, ASSISTANT, {**USER, "role": "critic"}, USER], "critic"),
        ("qwen3", [SYSTEM, USER, ASSISTANT, SYSTEM, USER], ""),
        ("qwen3", [{**SYSTEM, "content": ""}, USER], ""),
        ("qwen3", [USER, {**ASSISTANT, "content": "<think>no</think>A"}, USER], ""),
        ("llama3.2", [DEVELOPER, USER, ASSISTANT, TOOL, USER], ""),
        ("smollm3", [SYSTEM, USER, ASSISTANT, USER], ""),
        ("smollm3", "Hi!", ""),
    ],
)
def test_messages_that_a_template_leaves_out_are_said(
    real_data: Path, name: str, prompt: Any, lost: str
) -> None:
    said = f"with a {lost} message that the chat template does not write" if lost else ""
    assert doubts(real(real_data, name), "tokenizer", prompt) == [said]


def test_roles_of_other_programs_are_refused(real_data: Path, tmp_path: Path) -> None:
    roles = {"human": "user", "gpt": "assistant", "User": "user", "SYSTEM": "system"}
    for name in ("llama3.2", "qwen3", "smollm3"):
        for role, meant in roles.items():
            prompt = [{"role": role, "content": "Hi"}, USER]
            with pytest.raises(UserError, match=f"file:0: .* the role '{role}',.* write '{meant}'"):
                doubts(real(real_data, name), "tokenizer", prompt)
    human = written(tmp_path, "{# 'human' #}" + TEMPLATE)
    assert doubts(small(), human, [{"role": "human", "content": "Hi"}, USER]) == [""]


@pytest.mark.parametrize(
    ("answer", "is_odd"),
    [
        ("<|im_start|>assistant\nYo", True),
        ("Yo<|endoftext|>", True),
        ("a <|im_start|> b", True),
        ("Yo<|im_end|>", False),
        ("<b>Yo</b> <s>a</s> <|user|>", False),
    ],
)
def test_special_tokens_in_responses_are_said(real_data: Path, answer: str, is_odd: bool) -> None:
    """They are no text any more."""
    renderer = make_renderer(real(real_data, "qwen3"), settings("tokenizer"))
    for row in (example(chosen=answer), example(rejected=("No", answer)), example(chosen=answer)):
        responses(renderer, row)
        said = renderer.find_warnings(row, row.prompt)
        assert said == ["with special tokens in their responses"] * is_odd


def test_a_template_without_a_generation_prompt_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    always = written(tmp_path, TEMPLATE.split("{% if add_generation_prompt")[0])
    renderer = make_renderer(small(), settings(always))
    for row in (example(), example("Hi again"), example([USER, ASSISTANT, USER])):
        assert responses(renderer, row)[-1] == "assistant: No<eos>"
    [said] = [r.getMessage() for r in caplog.records]
    assert "no generation prompt: all responses begin with 'assistant: ', which is tra" in said


def test_templates_that_need_no_generation_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inst = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    channel = TEMPLATE.replace("{{ m.role }}: ", "{{ m.role }}: {% if loop.last and "
                               "m.role == 'assistant' %}final: {% endif %}")  # fmt: skip
    for template in (inst, channel, TEMPLATE):
        render(small(), written(tmp_path, template), example())
    assert not caplog.records
