from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mass_dpo_jax.data.vocabulary import train_tokenizer
from mass_dpo_jax.errors import UserError

TEXTS = [f"Enjoyed: Velumo, Karidesh {i}. Next: Tarun" for i in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new"
    train_tokenizer(TEXTS, 300, path)
    return path


@pytest.mark.parametrize("kind", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_load_it(folder: Path, kind: type):
    tokenizer = kind.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 300
    ids = tokenizer("Next: Tarun").input_ids
    assert ids[0] == 1 and 2 not in ids
    assert tokenizer("Next: Tarun", add_special_tokens=False).input_ids == ids[1:]


def test_frequent_words_become_single_tokens(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer(" Velumo", add_special_tokens=False).input_ids) == 1


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(folder: Path, text: str):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not any(special in text for special in ("<pad>", "<bos>", "<eos>")):
        assert tokenizer.decode(ids) == text


def test_same_texts_give_the_same_files(folder: Path, tmp_path: Path):
    train_tokenizer(iter(TEXTS), 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_too_small_a_vocabulary_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"vocab_size=258: .* at least 259"):
        train_tokenizer(TEXTS, 258, tmp_path)
    train_tokenizer(TEXTS, 259, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 259
