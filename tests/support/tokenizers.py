"""Tokenizers that tests use: a small one made on the spot, and the real models'."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mass_dpo_jax.config import default
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer

CONFIGS = {
    "llama3.2": "config.Llama-3.2-3B-Instruct.json",
    "qwen3": "config.Qwen3-0.6B.json",
    "smollm3": "config.SmolLM3-3B.json",
}
USER = {"role": "user", "content": "Hi!"}


@functools.cache
def small() -> Any:
    """Makes a tokenizer of bytes and a few merges; <bos> starts a text, <eos> has id 2."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["amber basil cedar delta ember fjord"] * 3, 300, Path(folder))
        return load_tokenizer(folder)


@functools.cache
def real(real_data: Path, name: str) -> Any:
    """Loads the tokenizer of a folder with tokenizer.json, config.json and chat_template.jinja."""
    source = real_data / "tokenizers" / name
    with tempfile.TemporaryDirectory() as folder:
        zipped = (source / "tokenizer.json.gz").read_bytes()
        Path(folder, "tokenizer.json").write_bytes(gzip.decompress(zipped))
        shutil.copy(source / "chat_template.jinja", folder)
        shutil.copy(source / CONFIGS[name], Path(folder, "config.json"))
        return load_tokenizer(folder)


def settings(template: str, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    data = default().data
    data.update({"chat_template": template, **(changes or {})})
    return data


SPACES = ("prepend", "first", "always", "never", "replace", "strip", "bytes")


def write_with_spaces(kind: str, folder: Path) -> Path:
    """Writes a tokenizer by how it treats the beginning of a text; <s> and </s> are 1 and 2.

    "prepend" is as Llama 2's was published, "first" as transformers now reads it, "replace" as
    Gemma's: BPE over pieces with ▁ for a space, other characters as bytes.
    """
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = ["Moons of Mars? Phobos, Deimos.", "[INST] Say x [/INST] The answer is Phobos."] * 5
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=360, special_tokens=pieces, show_progress=False)
    )
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = {
        "prepend": normalizers.Sequence([normalizers.Prepend("▁"), replace]),
        "replace": replace,
        "strip": normalizers.Sequence([normalizers.Strip(right=False), replace]),
    }.get(kind)
    if kind in ("first", "always", "never"):
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind in ("prepend", "first", "always"):
        steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)
    settings, parts = json.loads(made.to_str()), json.loads(trained.to_str())
    settings["model"] |= {name: parts["model"][name] for name in ("vocab", "merges")}
    made = Tokenizer.from_str(json.dumps(settings))
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(texts, trainer)
    # Phi-3's takes the line break behind it.
    made.add_special_tokens([*special, AddedToken("<|assistant|>", rstrip=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
