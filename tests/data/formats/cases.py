"""Rows as each format's tool documents them, and the examples that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def says(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def share(name: str, text: str) -> Row:
    return {"from": name, "value": text}


DEFAULTS: Row = {"scores": None, "also_chosen": (), "ranks": None, "tools": ()}


def moons(arguments: Any, **more: Any) -> Row:
    """A call as OpenAI and transformers have it."""
    return {"type": "function", **more, "function": {"name": "moons", "arguments": arguments}}


def calls(arguments: Any, content: Any = "", **more: Any) -> Row:
    return {"role": "assistant", "content": content, "tool_calls": [moons(arguments, **more)]}


MARS = {"planet": "Mars"}
# A call in a message of its own, as ms-swift and LLaMA-Factory have it.
BARE = '{"name": "moons", "arguments": {"planet": "Mars"}}'
MOONS = {"name": "moons", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": MOONS}


def example(
    i: int, prompt: Any, chosen: Any, *rejected: Any, **fields: Any
) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    return prompt, chosen, rejected, {**DEFAULTS, **fields}


def ultra(i: int, *scores: Any, key: str = "overall_score") -> Row:
    completions = [
        {"model": f"m{k}", "response": f"r{k} {i}", key: score, "critique": "x"}
        for k, score in enumerate(scores)
    ]
    return {"source": "x", "instruction": f"q{i}", "models": ["a"], "completions": completions}


def ratings(i: int) -> Row:
    def rated(*values: str) -> Row:
        names = ("helpfulness", "honesty")
        return {name: {"Rating": v, "Rationale": "x"} for name, v in zip(names, values)}

    row = ultra(i, None, None)
    row["completions"][0]["annotations"] = rated("2", "N/A")
    row["completions"][1]["annotations"] = rated("4", "5")
    return row


# By format and variant: what row i is, and the example that it stands for, written by hand.
CASES: dict[str, tuple[str, Callable[[int], Row], Callable[[int], Any]]] = {
    "LLaMA-Factory": (
        "alpaca",
        lambda i: {"instruction": f"q{i}", "input": "in", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: example(i, f"q{i}\nin", f"a{i}", f"b{i}"),
    ),
    "LLaMA-Factory, several rejected, nulls": (
        "alpaca",
        lambda i: {
            "instruction": f"q{i}",
            "input": "",
            "system": None,
            "history": [],
            "chosen": f"a{i}",
            "rejected": [f"b{i}", None, "c"],
            "note": 1,
        },
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}", "c"),
    ),
    "LLaMA-Factory, history and system": (
        "alpaca",
        lambda i: {
            "instruction": f"q{i}",
            "system": "s",
            "history": [["x", "y"], ["z", "w"]],
            "chosen": f"a{i}",
            "rejected": f"b{i}",
        },
        lambda i: example(
            i,
            [system("s"), user("x"), says("y"), user("z"), says("w"), user(f"q{i}")],
            f"a{i}",
            f"b{i}",
        ),
    ),
    "LLaMA-Factory, list of outputs": (
        "alpaca",
        lambda i: {"instruction": f"q{i}", "input": None, "output": [f"a{i}", f"b{i}", "c"]},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}", "c"),
    ),
    "ShareGPT": (
        "sharegpt",
        lambda i: {
            "conversations": [share("human", "x"), share("gpt", "y"), share("human", f"q{i}")],
            "chosen": share("gpt", f"a{i}"),
            "rejected": share("gpt", f"b{i}"),
        },
        lambda i: example(i, [user("x"), says("y"), user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ShareGPT, system and several rejected": (
        "sharegpt",
        lambda i: {
            "conversations": [share("human", f"q{i}")],
            "system": "s",
            "chosen": share("gpt", f"a{i}"),
            "rejected": [share("gpt", f"b{i}"), share("gpt", "c")],
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}", "c"),
    ),
    "ShareGPT, whole conversations": (
        "sharegpt",
        lambda i: {
            "chosen": [share("human", f"q{i}"), share("gpt", f"a{i}")],
            "rejected": [share("human", f"q{i}"), share("gpt", f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ms-swift": (
        "ms-swift",
        lambda i: {"messages": [user(f"q{i}"), says(f"a{i}")], "rejected_response": f"b{i}"},
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ms-swift, list": (
        "ms-swift",
        lambda i: {
            "messages": [system("s"), user(f"q{i}"), says(f"a{i}")],
            "rejected_response": [f"b{i}", "c"],
            "images": [],
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}", "c"),
    ),
    "ms-swift, rejected messages": (
        "ms-swift",
        lambda i: {
            "messages": [user(f"q{i}"), says(f"a{i}")],
            "rejected_messages": [user(f"q{i}"), says(f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "ms-swift, positive and negative": (
        "ms-swift",
        lambda i: {
            "messages": [user(f"q{i}")],
            "positive_messages": [[user(f"a{i}")], [user("d")]],
            "negative_messages": [[user(f"b{i}")], [says("c")]],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}", "c", also_chosen=("d",)),
    ),
    "ms-swift, query and response": (
        "ms-swift",
        lambda i: {"query": f"q{i}", "response": f"a{i}", "rejected_response": f"b{i}"},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}"),
    ),
    "OpenAI": (
        "openai",
        lambda i: {
            "input": {"messages": [user(f"q{i}")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [says(f"a{i}")],
            "non_preferred_output": [says(f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl": (
        "axolotl",
        lambda i: {"system": "s", "question": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl, empty system": (
        "axolotl",
        lambda i: {"system": "", "prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}"),
    ),
    "axolotl, messages": (
        "axolotl",
        lambda i: {"messages": [user(f"q{i}")], "chosen": says(f"a{i}"), "rejected": says(f"b{i}")},
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl, argilla": (
        "axolotl",
        lambda i: {"instruction": f"q{i}", "chosen_response": "a", "rejected_response": f"b{i}"},
        lambda i: example(i, f"q{i}", "a", f"b{i}"),
    ),
    "axolotl, icr without system": (
        "axolotl",
        lambda i: {"input": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}", "ratings": [9, 3]},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}"),
    ),
    "axolotl, ultra with system": (
        "axolotl",
        lambda i: {
            "system": "s",
            "prompt": f"q{i}",
            "chosen": [user(f"q{i}"), says(f"a{i}")],
            "rejected": [user(f"q{i}"), says(f"b{i}")],
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl, argilla with other questions": (
        "axolotl",
        lambda i: {
            "system": "s",
            "question": f"q{i}",
            "chosen_response": f"a{i}",
            "rejected_response": f"b{i}",
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "axolotl, messages and texts": (
        "axolotl",
        lambda i: {
            "messages": [system("s"), user(f"q{i}")],
            "chosen": f"a{i}",
            "rejected": [f"b{i}", "c"],
        },
        lambda i: example(i, [system("s"), user(f"q{i}")], f"a{i}", f"b{i}", "c"),
    ),
    "axolotl, a text for messages": (
        "axolotl",
        lambda i: {"messages": f"q{i}", "chosen": says(f"a{i}"), "rejected": [says(f"b{i}")]},
        lambda i: example(i, f"q{i}", f"a{i}", f"b{i}"),
    ),
    "OpenAI, calls": (
        "openai",
        lambda i: {
            "input": {
                "messages": [
                    user(f"q{i}"),
                    calls('{"planet": "Mars"}', None, id="1"),
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                ],
                "tools": [TOOL],
                "parallel_tool_calls": False,
            },
            "preferred_output": [says(f"a{i}")],
            "non_preferred_output": [says(f"b{i}")],
        },
        lambda i: example(
            i,
            [
                user(f"q{i}"),
                calls(MARS, id="1"),
                {"role": "tool", "content": "2", "tool_call_id": "1"},
            ],
            f"a{i}",
            f"b{i}",
            tools=(TOOL,),
        ),
    ),
    "OpenAI, a call preferred": (
        "openai",
        lambda i: {
            "input": {"messages": [user(f"q{i}")], "tools": [TOOL]},
            "preferred_output": [calls('{"planet": "Mars"}', None)],
            "non_preferred_output": [says(f"b{i}")],
        },
        lambda i: example(i, [user(f"q{i}")], [calls(MARS)], f"b{i}", tools=(TOOL,)),
    ),
    "ShareGPT, calls": (
        "sharegpt",
        lambda i: {
            "conversations": [
                share("human", f"q{i}"),
                share("function_call", BARE),
                share("observation", "2"),
            ],
            "chosen": share("gpt", f"a{i}"),
            "rejected": share("function_call", BARE),
            "tools": json.dumps([MOONS]),
        },
        lambda i: example(
            i,
            [user(f"q{i}"), calls(MARS), {"role": "tool", "content": "2"}],
            f"a{i}",
            [calls(MARS)],
            tools=(TOOL,),
        ),
    ),
    "ms-swift, calls": (
        "ms-swift",
        lambda i: {
            "tools": json.dumps([TOOL]),
            "messages": [
                user(f"q{i}"),
                says("Let me look."),
                {"role": "tool_call", "content": BARE},
                {"role": "tool_response", "content": "2"},
                says(f"a{i}"),
            ],
            "rejected_response": f"b{i}",
        },
        lambda i: example(
            i,
            [user(f"q{i}"), calls(MARS, "Let me look."), {"role": "tool", "content": "2"}],
            f"a{i}",
            f"b{i}",
            tools=(TOOL,),
        ),
    ),
    "ms-swift, a call chosen": (
        "ms-swift",
        lambda i: {
            "tools": json.dumps([TOOL]),
            "messages": [user(f"q{i}"), says("So:"), {"role": "tool_call", "content": BARE}],
            "rejected_messages": [user(f"q{i}"), {"role": "tool_call", "content": BARE}],
        },
        lambda i: example(i, [user(f"q{i}")], [calls(MARS, "So:")], [calls(MARS)], tools=(TOOL,)),
    ),
    "numbered": (
        "numbered",
        lambda i: {
            "prompt": f"q{i}",
            "chosen": "a",
            "rejected10": "z",
            "rejected1": "b",
            "rejected2": None if i % 2 else "c",
        },
        lambda i: example(i, f"q{i}", "a", *(("b", "z") if i % 2 else ("b", "c", "z"))),
    ),
    "NeMo": (
        "nemo",
        lambda i: {
            "context": [user(f"q{i}")],
            "completions": [
                {"rank": 1, "completion": [says(f"b{i}")]},
                {"rank": 0, "completion": [says(f"a{i}")]},
            ],
        },
        lambda i: example(i, [user(f"q{i}")], f"a{i}", f"b{i}"),
    ),
    "NeMo, three": (
        "nemo",
        lambda i: {
            "context": f"q{i}",
            "completions": [
                {"rank": 3, "completion": [says("c")]},
                {"rank": 1, "completion": [says("a")]},
                {"rank": 2, "completion": [says("b")]},
            ],
        },
        lambda i: example(i, f"q{i}", "a", "c", "b", ranks=(0, 2, 1)),
    ),
    "UltraFeedback": (
        "ultrafeedback",
        lambda i: ultra(i, 3.0, 8.5, 7, 8.5),
        lambda i: example(
            i,
            f"q{i}",
            f"r1 {i}",
            f"r0 {i}",
            f"r2 {i}",
            scores=(8.5, 3.0, 7.0, 8.5),
            also_chosen=(f"r3 {i}",),
            ranks=(0, 2, 1, 0),
        ),
    ),
    "UltraFeedback, fine-grained": (
        "ultrafeedback",
        lambda i: ultra(i, 1.25, 4.75, key="fine-grained_score"),
        lambda i: example(i, f"q{i}", f"r1 {i}", f"r0 {i}", scores=(4.75, 1.25)),
    ),
    "UltraFeedback, ratings": (
        "ultrafeedback",
        ratings,
        lambda i: example(i, f"q{i}", f"r1 {i}", f"r0 {i}", scores=(4.5, 2.0)),
    ),
    "UltraFeedback, columns": (
        "ultrafeedback",
        lambda i: {
            "instruction": f"q{i}",
            "completions": {"response": ["b", "a"], "overall_score": [1.0, 2.0]},
        },
        lambda i: example(i, f"q{i}", "a", "b", scores=(2.0, 1.0)),
    ),
    "Nectar": (
        "nectar",
        lambda i: {
            "prompt": f"\n\nHuman: q{i}\n\nAssistant: ",
            "answers": [
                {"answer": "c", "model": "x", "rank": 3.0},
                {"answer": "a", "model": "y", "rank": 1.0},
                {"answer": "b", "model": "z", "rank": 2.0},
            ],
            "turns": 1,
        },
        lambda i: example(i, f"q{i}", "a", "c", "b", ranks=(0, 2, 1)),
    ),
    "Nectar, turns": (
        "nectar",
        lambda i: {
            "prompt": f"\n\nHuman: x\n\nAssistant: y: z\n\nHuman: q{i}\n\nAssistant:",
            "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}],
        },
        lambda i: example(i, [user("x"), says("y: z"), user(f"q{i}")], "a", "b"),
    ),
    "HelpSteer 2": (
        "helpsteer",
        lambda i: {
            "prompt": f"q{i}",
            "response_1": "x",
            "response_2": "y",
            "split": "train",
            "preference_strength": -2 if i % 2 else 3,
        },
        lambda i: (
            example(i, f"q{i}", "x", "y", scores=(2.0, 0.0))
            if i % 2
            else example(i, f"q{i}", "y", "x", scores=(3.0, 0.0))
        ),
    ),
    "HelpSteer 3": (
        "helpsteer",
        lambda i: {
            "domain": "general",
            "context": [user(f"q{i}")],
            "response1": "x",
            "response2": "y",
            "overall_preference": -1,
            "individual_preference": [{"score": -1, "reasoning": "z"}],
        },
        lambda i: example(i, [user(f"q{i}")], "x", "y", scores=(1.0, 0.0)),
    ),
    "RewardBench 2": (
        "rewardbench2",
        lambda i: {
            "id": str(i),
            "prompt": f"q{i}",
            "chosen": ["a", "d"],
            "rejected": ["b", "c", "e"],
            "num_correct": 2,
            "num_incorrect": 3,
            "total_completions": 5,
            "subset": "Ties",
        },
        lambda i: example(i, f"q{i}", "a", "b", "c", "e", also_chosen=("d",)),
    ),
    "objects": (
        "objects",
        lambda i: {
            "prompt": f"q{i}",
            "chosen": "a",
            "rejected": [{"text": "b", "score": 0}, {"text": "c", "score": 1}],
        },
        lambda i: example(i, f"q{i}", "a", "b", "c", ranks=(0, 2, 1)),
    ),
    "objects, dict of lists": (
        "objects",
        lambda i: {"prompt": f"q{i}", "chosen": "a", "rejected": {"text": ["b", "c"]}},
        lambda i: example(i, f"q{i}", "a", "b", "c"),
    ),
    "objects, all with scores": (
        "objects",
        lambda i: {
            "prompt": f"q{i}",
            "chosen": {"answer": "a", "score": 1.0},
            "rejected": [{"answer": "b", "score": 0.0}, {"answer": "c", "score": 0.0}],
        },
        lambda i: example(i, f"q{i}", "a", "b", "c", scores=(1.0, 0.0, 0.0)),
    ),
    "ranked responses": (
        "responses",
        lambda i: {"prompt": f"q{i}", "responses": ["a", "b", "c"]},
        lambda i: example(i, f"q{i}", "a", "b", "c", ranks=(0, 1, 2)),
    ),
    "graded responses": (
        "responses",
        lambda i: {"prompt": f"q{i}", "responses": ["a", "b", "c"], "scores": [1, 5, 1]},
        lambda i: example(i, f"q{i}", "b", "a", "c", scores=(5.0, 1.0, 1.0)),
    ),
    "responses with ranks": (
        "responses",
        lambda i: {"prompt": f"q{i}", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
        lambda i: example(i, f"q{i}", "b", "a", "c", ranks=(0, 1, 2)),
    ),
    "FlagEmbedding": (
        "flagembedding",
        lambda i: {"query": f"q{i}", "pos": ["a", "d"], "neg": ["b", "c"], "type": "normal"},
        lambda i: example(i, f"q{i}", "a", "b", "c", also_chosen=("d",)),
    ),
    "FlagEmbedding, scores and prompt": (
        "flagembedding",
        lambda i: {
            "query": f"q{i}",
            "pos": ["a"],
            "neg": ["b", "c"],
            "prompt": "Find it.",
            "pos_scores": [0.9],
            "neg_scores": [0.1, 0.2],
        },
        lambda i: example(i, f"Find it.\nq{i}", "a", "b", "c", scores=(0.9, 0.1, 0.2)),
    ),
    "sentence-transformers, triplets": (
        "sentence-transformers",
        lambda i: {"anchor": f"q{i}", "positive": "a", "negative": "b"},
        lambda i: example(i, f"q{i}", "a", "b"),
    ),
    "sentence-transformers, n-tuples": (
        "sentence-transformers",
        lambda i: {"query": f"q{i}", "positive": "a", "negative_2": "c", "negative_1": "b"},
        lambda i: example(i, f"q{i}", "a", "b", "c"),
    ),
    "sentence-transformers, labelled lists": (
        "sentence-transformers",
        lambda i: {"query": f"q{i}", "docs": ["b", "a", "c", "d"], "labels": [0, 1, 0, 1]},
        lambda i: example(
            i, f"q{i}", "a", "b", "c", scores=(1.0, 0.0, 0.0, 1.0), also_chosen=("d",)
        ),
    ),
}


# Answers with labels: the four rows of prompt i, and its pool when they are grouped.
UNPAIRED: dict[str, tuple[Callable[[int, str, Any], Row], Callable[[int], Any]]] = {
    "TRL": (
        lambda i, answer, label: {"prompt": f"q{i}", "completion": answer, "label": label},
        lambda i: f"q{i}",
    ),
    "TRL, conversations": (
        lambda i, answer, label: {
            "prompt": [user(f"q{i}")],
            "completion": [says(answer)],
            "label": label,
        },
        lambda i: [user(f"q{i}")],
    ),
    "TRL, numbers": (
        lambda i, answer, label: {"prompt": f"q{i}", "completion": answer, "label": int(label)},
        lambda i: f"q{i}",
    ),
    "axolotl, argilla": (
        lambda i, answer, label: {
            "system": "s",
            "instruction": f"q{i}",
            "completion": answer,
            "label": label,
        },
        lambda i: [system("s"), user(f"q{i}")],
    ),
    "axolotl, intel": (
        lambda i, answer, label: {"question": f"q{i}", "completion": answer, "label": label},
        lambda i: f"q{i}",
    ),
    "axolotl, argilla_chat": (
        lambda i, answer, label: {"completion": [user(f"q{i}"), says(answer)], "label": label},
        lambda i: [user(f"q{i}")],
    ),
    "ms-swift": (
        lambda i, answer, label: {"messages": [user(f"q{i}"), says(answer)], "label": label},
        lambda i: [user(f"q{i}")],
    ),
    "ms-swift, query": (
        lambda i, answer, label: {"query": f"q{i}", "response": answer, "label": label},
        lambda i: f"q{i}",
    ),
    "LLaMA-Factory": (
        lambda i, answer, label: {
            "instruction": f"q{i}",
            "input": "in",
            "output": answer,
            "kto_tag": label,
        },
        lambda i: f"q{i}\nin",
    ),
    "LLaMA-Factory, ShareGPT": (
        lambda i, answer, label: {
            "conversations": [share("human", f"q{i}"), share("gpt", answer)],
            "kto_tag": label,
        },
        lambda i: [user(f"q{i}")],
    ),
    "LLaMA-Factory, messages": (
        lambda i, answer, label: {"messages": [user(f"q{i}"), says(answer)], "kto_tag": label},
        lambda i: [user(f"q{i}")],
    ),
}


def label_rows(case: str, i: int) -> list[Row]:
    make_row = UNPAIRED[case][0]
    return [make_row(i, f"{answer}{i}", answer in "ad") for answer in "abcd"]
