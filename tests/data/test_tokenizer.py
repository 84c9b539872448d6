"""Tokenizers: of folders, with their special tokens or errors, and trained ones."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mass_dpo_jax.data import tokenizer as tokenizer_module
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.errors import UserError
from tests.support.tokenizers import write_with_spaces

NAMES = ("bos", "eos", "pad")


def write(folder: Path, settings: dict[str, Any] | None, config: dict[str, Any]) -> Path:
    """A tokenizer with <pad>, <bos>, <eos> as 0, 1, 2, with tokenizer_config.json or without."""
    train_tokenizer(["amber"], 270, folder)
    path = folder / "tokenizer_config.json"
    path.unlink()
    if settings is not None:
        path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokens_of(tokenizer: Any) -> list[str | None]:
    return [getattr(tokenizer, f"{name}_token") for name in NAMES]


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({}, IDS, ["<bos>", "<eos>", "<pad>"]),
        (None, IDS, ["<bos>", "<eos>", "<pad>"]),
        ({"bos_token": None}, IDS, [None, "<eos>", "<pad>"]),
        ({"bos_token": None, "eos_token": "<eos>", "pad_token": None}, IDS, [None, "<eos>", None]),
        ({f"{name}_token": None for name in NAMES}, IDS, [None, None, None]),
        ({"bos_token": "<eos>"}, IDS, ["<eos>", "<eos>", "<pad>"]),
        ({}, IDS | {"pad_token_id": -1}, ["<bos>", "<eos>", None]),
        (None, IDS | {"pad_token_id": -1}, ["<bos>", "<eos>", None]),
        (None, IDS | {"pad_token_id": 270}, ["<bos>", "<eos>", None]),
        (None, {"bos_token_id": -1, "eos_token_id": 10**6, "pad_token_id": 2**40}, [None] * 3),
        (None, {"bos_token_id": None, "eos_token_id": [], "pad_token_id": []}, [None] * 3),
        (None, {"eos_token_id": [2, 0]}, [None, "<eos>", None]),
        (None, {"eos_token_id": [-1, 2]}, [None, "<eos>", None]),
        (None, {"bos_token_id": True, "eos_token_id": 2.0, "pad_token_id": "0"}, [None] * 3),
        (None, {"bos_token_id": {"a": 1}, "eos_token_id": [[2]]}, [None] * 3),
    ],
)
def test_only_special_tokens_that_no_file_names_are_those_of_config(
    tmp_path: Path,
    settings: dict[str, Any] | None,
    config: dict[str, Any],
    expected: list[str | None],
) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "model", settings, config))
    assert tokens_of(tokenizer) == expected
    # What a run and an export write of it is read alike, whatever config.json says beside it.
    tokenizer.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "again")
    explicit = set(settings or ())
    again = tokens_of(load_tokenizer(tmp_path / "again"))
    for name, before, after in zip(NAMES, expected, again, strict=True):
        assert before == after or f"{name}_token" not in explicit


@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_saved_tokenizer_is_read_alike(tmp_path: Path, legacy: bool | None) -> None:
    """Llama 2's puts a space after each special token or only before a text, by a setting."""
    folder = write_with_spaces("first", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer"} | (
        {} if legacy is None else {"legacy": legacy}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    for text in ("Moons</s>Phobos", "Moons </s> Phobos", " x"):
        expected = tokenizer(text)["input_ids"]
        assert load_tokenizer(tmp_path / "again")(text)["input_ids"] == expected
        assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == expected


def test_a_map_of_special_tokens_names_them(tmp_path: Path) -> None:
    """Writers before transformers 5 name them there, too, some as objects."""
    names = {"bos_token": {"content": "<pad>", "lstrip": False}, "eos_token": "<bos>"}
    for settings in (None, {}):
        folder = write(tmp_path / str(settings), settings, IDS)
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
        assert tokens_of(load_tokenizer(folder)) == ["<pad>", "<bos>", "<pad>"]


def test_a_published_tokenizer_without_a_beginning(real_data: Path, tmp_path: Path) -> None:
    """Qwen3's: bos_token is null, and config.json has a bos_token_id."""
    source = real_data / "tokenizers" / "qwen3"
    packed = (source / "tokenizer.json.gz").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(packed))
    shutil.copy(source / "config.Qwen3-0.6B.json", tmp_path / "config.json")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.bos_token is None
    assert ours.special_tokens_map == theirs.special_tokens_map
    messages = [{"role": "user", "content": "Hi"}]
    for tokenizer in (ours, theirs):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "<|endoftext|>" not in text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer: expected tokenizer.json"),
        ({"tokenizer_config.json": "{}"}, "no tokenizer: expected tokenizer.json"),
        ({"chat_template.jinja": "a", "special_tokens_map.json": "{}"}, "no tokenizer: expected"),
        ({"tokenizer.model": "\n"}, "no tokenizer_config.json, only tokenizer.model"),
        (
            {"tokenizer.model": "\n", "tokenizer_config.json": "{}"},
            "only tokenizer.model, .* `pip install sentencepiece`",
        ),
        (
            {"tokenizer.model": "IQ== 0", "tokenizer_config.json": "{}"},
            "only tokenizer.model, .* `pip install tiktoken`",
        ),
        ({"vocab.json": "{}", "merges.txt": ""}, "no tokenizer_config.json, only vocab.json"),
        ({"tokenizer.json": "{}", "config.json": "[]"}, "config.json: found list, expected a JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[1]"}, "found list, expected a JSON"),
        ({"tokenizer.json": "{}", "special_tokens_map.json": "3"}, "found int, expected a JSON"),
        ({"tokenizer.json": "", "config.json": "{}"}, "the tokenizer cannot be read"),
    ],
)
def test_what_there_is_instead_of_a_tokenizer(
    tmp_path: Path,
    files: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # Nor sentencepiece.
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_whether_converted_tokenizers_write_a_beginning_must_be_said(
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """transformers 4 assumes that they do, 5 that they do not."""
    converted = load_tokenizer(write(tmp_path / "converted", {"bos_token": "<bos>"}, {}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "sentencepiece")
    monkeypatch.setattr(tokenizer_module, "_load_by_settings", lambda folder: converted)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(tmp_path)
    assert ("no add_bos_token, so texts begin with <bos>" in caplog.text) == (not settings)


def test_code_of_a_folder_is_named_in_one_sentence(tmp_path: Path) -> None:
    auto = {"AutoTokenizer": ["tokenization_own.Own", None]}
    write(tmp_path, {"tokenizer_class": "Own", "auto_map": auto}, {"model_type": "own"})
    (tmp_path / "tokenization_own.py").write_text("class Own:\n    pass\n")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert "code of the folder's own (auto_map in tokenizer_config.json)" in str(error.value)
    assert "is not run" in str(error.value) and "trust_remote_code" not in str(error.value)


TEXTS = [f"Enjoyed: Velumo, Karidesh {i}. Next: Tarun" for i in range(50)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new"
    train_tokenizer(TEXTS, 300, path)
    return path


@pytest.mark.parametrize("kind", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_load_a_trained_tokenizer(trained: Path, kind: type) -> None:
    tokenizer = kind.from_pretrained(trained)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 300
    ids = tokenizer("Next: Tarun").input_ids
    assert ids[0] == 1 and 2 not in ids
    assert tokenizer("Next: Tarun", add_special_tokens=False).input_ids == ids[1:]


def test_frequent_words_become_single_tokens(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer(" Velumo", add_special_tokens=False).input_ids) == 1


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(trained: Path, text: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not any(special in text for special in ("<pad>", "<bos>", "<eos>")):
        assert tokenizer.decode(ids) == text


def test_same_texts_give_the_same_files(trained: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_too_small_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size=258: .* at least 259"):
        train_tokenizer(TEXTS, 258, tmp_path)
    train_tokenizer(TEXTS, 259, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 259
