"""Mined negatives against a full sort by hand, catalogues of several forms, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mass_dpo_jax.api import load_model
from mass_dpo_jax.data.examples import Example, History, format_text
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.selection import mining as arrays
from mass_dpo_jax.training import mining, mining_sources
from tests.support.data import write_lines
from tests.support.helpers import WORDS, tiny_config
from tests.support.models import hf_config, random_tensors, write_weights

M, N, D = 9, 60, 5
MARGIN = 0.5


def make_examples() -> list[Example]:
    """Of prompt 0 there are two rows; example 2 has a history of items."""
    prompts: list[Any] = [f"prompt {i}" for i in range(M)]
    prompts[1] = prompts[0]
    prompts[2] = History("after ", ("item 7", "ITEM  8"), " comes ")
    return [Example(f"row{i}", prompts[i], f"item {i}", ("other",), f"x:{i}") for i in range(M)]


def make_catalogue(tmp_path: Path) -> mining.Catalogue:
    path = tmp_path / "items.jsonl"
    texts = [f"item {i}" for i in range(N)]
    texts[50] = "Item 49"  # Once more.
    path.write_text(
        "".join(json.dumps({"id": f"a{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    return mining.read_catalogue(path)


def run(
    catalogue: mining.Catalogue, source: mining_sources.Source, **changes: Any
) -> list[dict[str, Any]]:
    limits = {"first": 2, "last": 12, "margin": MARGIN, **changes}
    draw = limits.pop("draw", "top")
    examples = make_examples()
    positives = mining.find_positives(examples, examples)
    ranked = mining.rank(source, catalogue, positives, limits["last"])
    found = mining.mine(ranked, examples, catalogue, arrays.Limits(**limits), 4, draw, 1.0, 0)
    return list(found)


@pytest.mark.parametrize("kind", ["scores", "dot", "cosine"])
def test_mined_negatives_are_those_of_a_full_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(mining, "PROMPTS_AT_A_TIME", 4)
    monkeypatch.setattr(arrays, "ITEMS_AT_A_TIME", 16)
    rng = np.random.default_rng(0)
    items = rng.normal(size=(N, D))
    prompts = items[:M] + 0.5 * rng.normal(size=(M, D))
    catalogue, examples = make_catalogue(tmp_path), make_examples()
    index = mining.chosen_index(examples, catalogue)
    table = prompts @ items.T
    if kind == "cosine":
        table /= np.linalg.norm(prompts, axis=1)[:, None] * np.linalg.norm(items, axis=1)
    if kind == "scores":
        source = mining_sources.by_scores(table, index)
    else:
        source = mining_sources.by_features(prompts, items, None, similarity=kind, index=index)
    margin = 0.2 if kind == "cosine" else MARGIN
    found = {row["id"]: row for row in run(catalogue, source, margin=margin)}
    cut = 0
    for i in range(M):
        never = {50, i} | ({0, 1} if i < 2 else set()) | ({7, 8} if i == 2 else set())
        ranked = [j for j in np.argsort(-table[i]) if j not in never][2:12]
        want = [int(j) for j in ranked if table[i, j] <= table[i, i] - margin][:4]
        cut += want != ranked[:4]
        if not want:
            assert f"row{i}" not in found
            continue
        row = found[f"row{i}"]
        assert row["mined_ids"] == [f"a{j}" for j in want]
        assert row["rejected"] == [catalogue.texts[j] for j in want]
        np.testing.assert_allclose(row["mined_scores"], table[i, want], rtol=1e-5, atol=1e-5)
    assert len(found) > M / 2 and cut  # Else the margin did all, or nothing.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with random weights."""
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer([" ".join(WORDS)], 300, folder)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(hf_config(**sizes, tie_word_embeddings=True)))
    write_weights(folder, random_tensors(load_config(folder)))
    return folder


def test_features_of_texts_are_those_of_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining_sources, "TEXTS_AT_A_TIME", 2)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)) for size in (1, 9, 3, 20, 5, 2, 30, 4, 4, 17, 11)]
    policy = load_model(folder, tiny_config("")).policy
    found = mining_sources.encode(policy, policy.weights(str(folder), 0), texts, 1000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, features in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(features, hidden.mean(0).numpy(), rtol=1e-4, atol=1e-4)
    # Of a long text the last tokens are read, as if it were they alone.
    ids = tokenizer(texts[6], add_special_tokens=False)["input_ids"]
    before = tokenizer("", return_tensors="pt")["input_ids"][0].tolist()
    with torch.no_grad():
        hidden = theirs(torch.tensor([[*before, *ids[-5:]]])).last_hidden_state[0]
    cut = mining_sources.encode(policy, policy.weights(str(folder), 0), texts[6:7], 5)[0]
    np.testing.assert_allclose(cut, hidden.mean(0).numpy(), rtol=1e-4, atol=1e-4)


def test_a_policy_ranks_by_its_features(folder: Path, tmp_path: Path) -> None:
    catalogue, examples = make_catalogue(tmp_path), make_examples()
    model = load_model(folder, tiny_config(""))
    arguments = model.policy, model.params, examples, catalogue.texts, 100
    rows = np.arange(M)
    source = mining_sources.by_policy(*arguments, "dot")
    prompts = mining_sources.encode(
        model.policy, model.params, [format_text(x.prompt) for x in examples], 100
    )
    items = mining_sources.encode(model.policy, model.params, catalogue.texts, 100)
    table = prompts.astype(float) @ items.T.astype(float)
    np.testing.assert_allclose(source.score(rows, slice(0, N)), table, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(source.score_chosen(rows), table[rows, rows], rtol=1e-4, atol=1e-3)


def test_draws_stay_in_the_range_of_ranks_and_repeat_with_the_seed(tmp_path: Path) -> None:
    table = np.tile(-np.arange(N, dtype=float), (M, 1))
    catalogue = make_catalogue(tmp_path)
    source = mining_sources.by_scores(table, mining.chosen_index(make_examples(), catalogue))
    found = run(catalogue, source, margin=None, draw="softmax")
    assert found == run(catalogue, source, margin=None, draw="softmax")
    for row in found[3:]:  # Ranks 2 to 11 of all but the chosen one.
        places = [int(name[1:]) for name in row["mined_ids"]]
        assert min(places) >= 2 and max(places) <= 12 and len(places) == 4
    probabilities = np.array([p for row in found for p in row["mined_probabilities"]])
    assert ((probabilities > 0) & (probabilities <= 1)).all() and (probabilities < 1).any()


def test_chosen_responses_of_rows_that_are_not_mined_for_are_positives(tmp_path: Path) -> None:
    def row(i: int, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "chosen": f"item {i}", "rejected": ["other"]}

    write_lines(tmp_path / "train.jsonl", [row(i, "p") for i in range(5)])
    write_lines(tmp_path / "test.jsonl", [row(7, "p"), row(8, "q")])
    limits = {"data.max_train": 2, "data.max_test": 1, "data.validation_share": 0.0}
    examples, everything = mining.load_rows(tiny_config(tmp_path, **limits), "train")
    assert len(examples) == 2
    want = {f"item {i}" for i in (*range(5), 7)}
    assert mining.find_positives(examples, everything) == [want, want]


def test_a_split_that_cannot_be_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": ["b"]} for i in range(3)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", [{"prompt": "p"}])
    _, everything = mining.load_rows(tiny_config(tmp_path), "train")
    assert len(everything) == 3
    assert "split 'test' is not read for chosen responses:" in caplog.text


def test_a_shortlist_is_ranked_anew(tmp_path: Path) -> None:
    """By scores made up here; a row that cannot be scored is left out, as is a long response."""
    catalogue, tools = make_catalogue(tmp_path), ({"name": "find"},)
    examples = [dataclasses.replace(example, tools=tools) for example in make_examples()]
    table = np.random.default_rng(0).normal(size=(M, N))
    logps = np.random.default_rng(1).normal(size=(M, N))
    size = 7

    def score(pools: Sequence[Example]) -> tuple[list[str], np.ndarray, np.ndarray]:
        assert all(pool.tools == tools for pool in pools)  # Chat templates read them.
        names = [pool.id for pool in pools if pool.id != "row4"]
        found = np.zeros((len(names), 1 + size))
        for i, name in enumerate(names):
            [pool] = [pool for pool in pools if pool.id == name]
            items = [catalogue.texts.index(str(text)) for text in pool.responses]
            found[i] = logps[int(name[3:]), items]
        valid = np.ones(found.shape, bool)
        valid[0, 3] = False
        return names, np.where(valid, found, 0), valid

    source = mining_sources.by_scores(table, mining.chosen_index(examples, catalogue))
    positives = mining.find_positives(examples, examples)
    ranked = mining.rank(source, catalogue, positives, size)
    rescored = mining.rescore(ranked, examples, catalogue, size, score)
    limits = arrays.Limits(1, 5, margin=0.3)
    found = {r["id"]: r for r in mining.mine(rescored, examples, catalogue, limits, 9, "top", 1, 0)}
    for i in range(M):
        never = {50, i} | ({0, 1} if i < 2 else set()) | ({7, 8} if i == 2 else set())
        short = [int(j) for j in np.argsort(-table[i]) if j not in never][:size]
        short = short[:2] + short[3:] if i == 0 else short
        ordered = sorted(short, key=lambda j: -logps[i, j])[1:5]
        want = [j for j in ordered if logps[i, j] <= logps[i, i] - 0.3]
        assert (f"row{i}" in found) == bool(want and i != 4)
        if want and i != 4:
            assert found[f"row{i}"]["mined_ids"] == [f"a{j}" for j in want]
            np.testing.assert_allclose(found[f"row{i}"]["mined_scores"], logps[i, want], rtol=1e-6)
    assert len(found) > M / 3


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("a.txt", "one\n\ntwo words \n", (["one", "two words"], [0, 1])),
        ("a.jsonl", '"one"\n"two"\n', (["one", "two"], [0, 1])),
        ("a.jsonl", '{"id": 7, "text": "one"}\n{"text": "two"}\n', (["one", "two"], [7, 1])),
        ("a.json", '[{"text": "one"}, {"text": "two"}]', (["one", "two"], [0, 1])),
        ("a.csv", "id,text\nx,one\ny,two\n", (["one", "two"], ["x", "y"])),
        ("a.csv", "id,text\nx,one\n,two\n", (["one", "two"], ["x", 1])),  # An empty cell.
    ],
)
def test_forms_of_a_catalogue(
    tmp_path: Path, name: str, content: str, want: tuple[list[str], list[Any]]
) -> None:
    (tmp_path / name).write_text(content)
    found = mining.read_catalogue(tmp_path / name)
    assert (found.texts, found.ids) == want


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"txt": "two"}\n', "expected a text, or an object with a 'text'"),
        ('{"text": "one"}\n{"text": " "}\n', "expected a text, or an object with a 'text'"),
        ('"one"\n"\\ud83d"\n', "a.jsonl:2: field 'text' has half a surrogate pair"),
        ('{"text": "one"}\n{"text": "ONE "}\n', "1 different texts, expected two or more"),
    ],
)
def test_a_catalogue_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        mining.read_catalogue(path)


def test_margins_need_the_chosen_response_and_an_empty_range_is_an_error(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path)
    source = mining_sources.by_scores(np.zeros((M, N)), np.full(M, -1))
    with pytest.raises(UserError, match="x:0: its chosen response is not in the catalogue"):
        run(catalogue, source)
    with pytest.raises(UserError, match="no item of the catalogue is left for any of 9 prompts"):
        run(catalogue, source, margin=None, max_score=-1.0)


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[0.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(UserError, match=r"\[0, 1\] is not a finite number"):
        mining_sources.read_table(path, "scores", 2, 2)
    with pytest.raises(UserError, match=r"shape \[2, 2\], expected \[3, 2\]"):
        mining_sources.read_table(path, "scores", 3, 2)
