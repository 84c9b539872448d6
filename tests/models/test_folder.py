"""What is said of a folder that is no readable model, before any data are looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mass_dpo_jax.config import default
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.folder import INDEX
from mass_dpo_jax.training.mesh import make_mesh
from mass_dpo_jax.training.model_paths import find_description
from mass_dpo_jax.training.open_policy import open_policy
from tests.support.models import hf_config, random_tensors, tiny_config, write_weights

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 9085657\n"
)
PAGE = "<!DOCTYPE html>\n<html><title>Sign in</title></html>"
CONFIG = hf_config("llama", vocab_size=300, tie_word_embeddings=True)


def write_model(folder: Path) -> Path:
    """A model that can be read, in one file."""
    train_tokenizer(["amber"], 270, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_weights(folder, random_tensors(tiny_config(**CONFIG)))
    return folder


def opened(folder: Path, **changes: Any) -> Any:
    config = default()
    config.model.path = str(folder)
    config.update(changes)
    weights = not config.dry_run
    return open_policy(config.model, make_mesh(config.mesh), None, weights=weights)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        opened(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


def test_what_the_others_are_made_of_is_read(tmp_path: Path) -> None:
    assert opened(write_model(tmp_path / "model")).config.vocab_size == 300


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def without_weights(*names: str) -> Callable[[Path], None]:
    """Other files in their place."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).touch()

    return make


def cut(size: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return make


def configured(**changes: Any) -> Callable[[Path], None]:
    return written("config.json", json.dumps(CONFIG | changes))


def sharded(missing: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = random_tensors(tiny_config(**CONFIG))
        parts = np.array_split(sorted(tensors), 4)
        weight_map = {}
        for number, names in enumerate(parts, 1):
            path = write_weights(folder, {name: tensors[name] for name in names.tolist()})
            file = f"model-0000{number}-of-00004.safetensors"
            path.rename(folder / file)
            weight_map |= dict.fromkeys(names.tolist(), file)
            if number <= missing:
                (folder / file).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return make


def without_index(missing: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        sharded(missing)(folder)
        (folder / INDEX).unlink()

    return make


def adapters_beside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    written("adapter_config.json", '{"base_model_name_or_path": "org/base-1b"}')(folder)


def linked_away(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/not/mounted/model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "pointer as weights": (
        written("model.safetensors", POINTER),
        ["model.safetensors", "Git LFS pointer", "git lfs pull", "hf download"],
    ),
    "pointer as config": (written("config.json", POINTER), ["config.json: a Git LFS pointer"]),
    "pointer as tokenizer": (written("tokenizer.json", POINTER), ["tokenizer.json: a Git LFS"]),
    "pointer as index": (
        lambda folder: (without_weights()(folder), written(INDEX, POINTER)(folder)),
        [f"{INDEX}: a Git LFS pointer"],
    ),
    "page as weights": (written("model.safetensors", PAGE), ["a web page", "login"]),
    "page as config": (written("config.json", "\n" + PAGE), ["config.json: a web page"]),
    "page as tokenizer": (written("tokenizer.json", PAGE), ["tokenizer.json: a web page"]),
    "empty config": (written("config.json", ""), ["config.json: is empty", "cut short?"]),
    "empty tokenizer": (written("tokenizer.json", ""), ["tokenizer.json: is empty"]),
    "empty weights": (written("model.safetensors", ""), ["model.safetensors", "is empty"]),
    "zeros as weights": (written("model.safetensors", bytes(5000)), ["begins with zeros only"]),
    "half of the weights": (cut(300_000), ["has 300,000 bytes of the", "cut short?"]),
    "half of the header": (cut(1000), ["has 1,000 bytes of the", "cut short?"]),
    "one byte less": (cut(-1), ["that its header tells of", "cut short?"]),
    "three bytes of weights": (cut(3), ["not a readable safetensors file"]),
    "config that is no JSON": (written("config.json", "model_type: llama"), ["invalid JSON"]),
    "config that is a list": (
        written("config.json", "[1]"),
        ["found list, expected a JSON"],
    ),
    "generation that is no JSON": (written("generation_config.json", "{"), ["invalid JSON"]),
    "generation that is a list": (
        written("generation_config.json", "[]"),
        ["generation_config.json: expected a JSON object"],
    ),
    "GGUF under our name": (
        written("model.safetensors", b"GGUF\3\0\0\0" + bytes(100)),
        ["GGUF under another name"],
    ),
    "pickle under our name": (
        written("model.safetensors", b"PK\3\4" + bytes(100)),
        ["pickle under another name", "save_pretrained"],
    ),
    "nothing for weights": (without_weights(), ["no weights: expected model.safetensors or"]),
    "pickle": (
        without_weights("pytorch_model.bin"),
        ["found pytorch_model.bin: pickles are not read", "save_pretrained"],
    ),
    "pickles": (
        without_weights("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        ["found pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin"],
    ),
    "GGUF": (without_weights("a-q4.gguf"), ["found a-q4.gguf: GGUF is not read"]),
    "TensorFlow": (without_weights("tf_model.h5"), ["found tf_model.h5: TensorFlow's"]),
    "Flax": (without_weights("flax_model.msgpack"), ["found flax_model.msgpack: Flax's"]),
    "ONNX": (without_weights("model.onnx", "model.onnx_data"), ["found model.onnx: ONNX"]),
    "Meta's": (without_weights("consolidated.00.pth"), ["found consolidated.00.pth: Meta's"]),
    "DeepSpeed's": (without_weights("zero_to_fp32.py", "latest"), ["DeepSpeed's checkpoint"]),
    "a download that goes on": (without_weights("x.incomplete"), ["start it again"]),
    "state of a trainer": (without_weights("optimizer.pt", "rng_state.pth"), ["no weights"]),
    "weights of another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "best.safetensors"),
        ["found best.safetensors: is it the model under another name?"],
    ),
    "adapters and a config": (
        adapters_beside,
        ["found adapters", "--config.model.lora.path=", "(org/base-1b) as --config.model.path"],
    ),
    "a link to nowhere": (linked_away, ["a link to /not/mounted/model.safetensors, which is not"]),
    "a missing file": (sharded(1), ["model-00001-of-00004", "1 of 4 files are missing"]),
    "missing files": (sharded(3), ["model-00001-of-00004", "3 of 4 files are missing"]),
    "no index": (without_index(0), ["so only the index is missing: fetch it"]),
    "no index, and files missing": (without_index(2), ["found 2 of 4 files", "cut short?"]),
    "GPTQ": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantization_config: found 'gptq weights'", "unquantized original", "--config=qlora"],
    ),
    "bitsandbytes": (
        configured(quantization_config={"load_in_4bit": True}),
        ["found 'bitsandbytes weights'"],
    ),
    "FP8": (configured(quantization_config={"quant_method": "fp8"}), ["found 'fp8 weights'"]),
    "AWQ": (configured(quantization_config={"quant_method": "awq"}), ["found 'awq weights'"]),
    "MLX": (configured(quantization={"bits": 4}), ["quantization: found 'quantized weights'"]),
    "unnamed": (configured(quantization_config=[]), ["found 'quantized weights'"]),
    "GPT-2": (configured(model_type="gpt2"), ["found 'gpt2', expected one of llama, qwen2"]),
    "Gemma": (configured(model_type="gemma3n_text"), ["found 'gemma3n_text'", "not supported"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(tmp_path: Path, name: str) -> None:
    make, words = BROKEN[name]
    folder = write_model(tmp_path / "model")
    make(folder)
    message = refusal(folder)
    for word in words:
        assert word in message


def files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


OTHERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty": (files(), ["no config.json: expected the folder of a Hugging Face model", "is empty"]),
    "anything": (files("a.txt", "b"), ["no config.json", "found a.txt, b"]),
    "much": (files(*map(str, range(9))), ["found 0, 1, 2, 3, 4 and 4 more"]),
    "a cached model": (
        files("snapshots/0a1b/config.json", "refs/main"),
        ["the hub's cache of a model", "snapshots/0a1b: give that folder"],
    ),
    "the cache": (
        files("models--org--a/snapshots/0/config.json", "models--org--b/refs/main"),
        ["the hub's cache (models--org--a, models--org--b)", "models--org--a/snapshots/HASH"],
    ),
    "adapters": (
        files("adapter_config.json", "adapter_model.safetensors"),
        ["adapters (adapter_config.json)", "--config.model.lora.path=", "as --config.model.path"],
    ),
    "adapters that name their base": (
        lambda folder: (
            (folder / "adapter_config.json").write_text(
                '{"base_model_name_or_path": "org/base-1b"}'
            )
            and None
        ),
        ["the model that they adapt (org/base-1b) as --config.model.path"],
    ),
    "MLX's adapters": (files("adapters.safetensors"), ["MLX's adapters"]),
    "Meta's": (
        files("consolidated.00.pth", "params.json", "tokenizer.model"),
        ["found consolidated.00.pth: Meta's or Mistral's own format"],
    ),
    "GGUF": (files("a-Q4_K_M.gguf", "a-Q8_0.gguf"), ["found a-Q4_K_M.gguf, a-Q8_0.gguf: GGUF"]),
    "a folder of checkpoints": (
        files("checkpoint-100/config.json", "checkpoint-200/config.json"),
        ["checkpoint-100, checkpoint-200 in it has one: give that folder"],
    ),
    "saved data": (files("dataset_dict.json", "train/state.json"), ["a data set", "data.path"]),
    "downloaded data": (files("data/train-0.parquet", "README.md"), ["a data set", "train-0"]),
    "rows": (files("train.jsonl"), ["a data set (found train.jsonl): --config.data.path"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_folders_of_something_else(tmp_path: Path, name: str) -> None:
    make, words = OTHERS[name]
    folder = tmp_path / "given"
    folder.mkdir()
    make(folder)
    message = refusal(folder)
    for word in words:
        assert word in message


def test_the_newest_of_several_snapshots_is_named(tmp_path: Path) -> None:
    files("snapshots/b/config.json", "snapshots/a/config.json")(tmp_path)
    os.utime(tmp_path / "snapshots" / "a", (1e9, 1e9))
    assert f"{tmp_path}/snapshots/b: give that" in refusal(tmp_path)


def test_files_in_the_place_of_folders(tmp_path: Path) -> None:
    for name, word in (("model.safetensors", "expected the folder"), ("a.gguf", "GGUF is not")):
        (tmp_path / name).touch()
        assert f"{name}: a file; {word}" in refusal(tmp_path / name)
    assert "no such folder; expected a run" in refusal(tmp_path / "nowhere")


def test_weights_may_be_links_to_another_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, disk = write_model(tmp_path / "model"), tmp_path / "disk"
    disk.mkdir()
    weights = folder / "model.safetensors"
    weights.rename(disk / "blob")
    weights.symlink_to(disk / "blob")
    assert opened(folder).config.vocab_size == 300
    assert "1 of 1 files of weights are links to elsewhere" in caplog.text
    (folder / "tokenizer.json").rename(disk / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(disk / "tokenizer.json")
    assert "a link to" in (message := refusal(folder)) and "put a copy of the file" in message
    # What is no safetensors file is not shown.
    (folder / "tokenizer.json").unlink()
    (disk / "tokenizer.json").rename(folder / "tokenizer.json")
    (disk / "blob").write_text("root:secret")
    assert "not a readable safetensors file" in (message := refusal(folder))
    assert "secret" not in message


def test_a_tokenizer_needs_no_weights(tmp_path: Path) -> None:
    """`python -m mass_dpo_jax.data` reads one from such a folder."""
    folder = write_model(tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    assert find_description(folder) == folder
    (folder / "model.safetensors").write_text(POINTER)
    assert find_description(folder) == folder


def test_a_dry_run_needs_no_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert opened(folder, dry_run=True).config.vocab_size == 300
    (folder / "tokenizer.json").write_text(POINTER)
    with pytest.raises(UserError, match=r"tokenizer.json: a Git LFS pointer"):
        opened(folder, dry_run=True)
