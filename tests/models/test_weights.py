"""Reading safetensors: into sharded arrays, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import weights
from mass_dpo_jax.models.decoder import abstract_decoder, param_dims
from mass_dpo_jax.models.weights import INDEX, list_entries, load_hf
from tests.support.models import FAMILIES, random_tensors, tiny_config, write_weights

CONFIG = tiny_config("qwen3")
NORM = "model.layers.1.self_attn.q_norm.weight"
GATE = "model.layers.2.mlp.gate_proj.weight"
QUANTIZED = "model.layers.2.mlp.gate_proj.qweight"
FIRST = "model.embed_tokens.weight"


def write_shards(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Two files and their index; returns its weight_map."""
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_names_every_parameter_once(model_type: str, tied: bool) -> None:
    config = tiny_config(model_type, tie_word_embeddings=tied)
    params = nnx.to_pure_dict(nnx.state(abstract_decoder(config), nnx.Param))
    paths = [
        "/".join(str(key.key) for key in path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    assert sorted("/".join(entry.path) for entry in list_entries(config)) == sorted(paths)
    entries = list_entries(config)
    names = [(name, e.first_row) for e in entries for name in e.list_names(config)]
    assert len(set(names)) == len(names)
    assert (("lm_head.weight", 0) in names) == (not tied)


def test_one_file_and_shards_give_the_same(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    write_shards(tmp_path, tensors)
    sharded = load_hf(tmp_path, CONFIG)
    write_weights(tmp_path, tensors)
    single = load_hf(tmp_path, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)
    key = tensors["model.layers.2.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(single["blocks"]["key"]["kernel"][...][2], key.T)


@pytest.mark.parametrize(
    ("model_type", "as_dict"), [("qwen3", True), ("qwen3", False), ("phi3", True)]
)
def test_each_shard_reads_its_own_slices_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, as_dict: bool
) -> None:
    config = tiny_config(model_type, vocab_size=104)
    write_weights(tmp_path, random_tensors(config))
    expected = load_hf(tmp_path, config)

    read: dict[str, int] = {}
    whole = weights.WeightFiles.read

    def counted(self: Any, name: str, *args: Any) -> np.ndarray:
        part = whole(self, name, *args)
        read[name] = read.get(name, 0) + part.size
        return part

    monkeypatch.setattr(weights.WeightFiles, "read", counted)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    axes = {"embed": "a", "vocab": "b", "heads": "b", "kv_heads": "b", "mlp": "b"}
    shardings = jax.tree.map(
        lambda _, dims: NamedSharding(mesh, P(*(axes.get(dim) for dim in dims))),
        expected,
        param_dims(nnx.state(abstract_decoder(config), nnx.Param)),
    )
    given = nnx.to_pure_dict(shardings) if as_dict else shardings
    found = load_hf(tmp_path, config, given)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    placed = jax.tree.map(lambda x, place: x.sharding == place, found, shardings)
    assert all(jax.tree.leaves(placed))
    gate = found["blocks"]["gate"]["kernel"][...]
    assert gate.addressable_shards[0].data.shape == (4, 48 // 4, 80 // 2)
    # Replicas are not read again either: every number is read once.
    assert read == {name: x.size for name, x in random_tensors(config).items()}


def test_half_precision_files_and_a_chosen_type(tmp_path: Path) -> None:
    tensors = {name: x.astype(np.float16) for name, x in random_tensors(CONFIG).items()}
    write_weights(tmp_path, tensors)
    for dtype in ("float32", "bfloat16"):
        embed = load_hf(tmp_path, CONFIG, dtype=dtype)["embed"][...]
        assert embed.dtype == dtype
        expected = tensors["model.embed_tokens.weight"].astype(dtype)
        np.testing.assert_array_equal(np.asarray(embed), expected)


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    """Old files store rotary frequencies, and some store a tied head again."""
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    write_weights(tmp_path, tensors)
    expected = load_hf(tmp_path, config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_weights(tmp_path, tensors)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path, config), expected)


def test_a_tied_model_whose_file_has_another_head_is_refused(tmp_path: Path) -> None:
    """transformers computes with that head since version 5, and without it before."""
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config)
    embed = tensors["model.embed_tokens.weight"]
    one_off = embed.copy()
    one_off[-1, -1] += 1e-3
    for head in (one_off, -embed, embed[:-1], embed[:, :5], np.concatenate([embed, embed])):
        write_weights(tmp_path, tensors | {"lm_head.weight": head})
        with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens") as e:
            load_hf(tmp_path, config)
        assert '"tie_word_embeddings": false in config.json' in str(e.value)
    for head in (embed, embed.astype(np.float64)):
        write_weights(tmp_path, tensors | {"lm_head.weight": head})
        assert "head" not in load_hf(tmp_path, config)
    # What the message says.
    write_weights(tmp_path, tensors | {"lm_head.weight": one_off})
    found = load_hf(tmp_path, tiny_config("llama", tie_word_embeddings=False))
    np.testing.assert_array_equal(found["head"], one_off)


def test_embeddings_and_head_are_compared_to_the_last_row(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True, vocab_size=9001)
    tensors = random_tensors(config)
    for row in (0, 4095, 4096, 9000):
        head = tensors["model.embed_tokens.weight"].copy()
        head[row, 3] += 1.0
        write_weights(tmp_path, tensors | {"lm_head.weight": head})
        with pytest.raises(UserError, match="differs from"):
            load_hf(tmp_path, config)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, dtype: DTypeLike, value: float
) -> None:
    for name in (FIRST, NORM, GATE, "model.norm.weight", "lm_head.weight"):
        tensors = {k: x.astype(dtype) for k, x in random_tensors(CONFIG).items()}
        tensors[name].flat[-1] = value
        write_weights(tmp_path, tensors)
        with pytest.raises(UserError, match=f"tensor {name} holds NaN or infinity"):
            load_hf(tmp_path, CONFIG)


def test_weights_too_large_for_float32_are_not_finite(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[GATE] = tensors[GATE].astype(np.float64) * 1e300
    write_weights(tmp_path, tensors)
    with pytest.raises(UserError, match=f"tensor {GATE} holds NaN or infinity"):
        load_hf(tmp_path, CONFIG)


def _wrong(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = random_tensors(CONFIG)
        change(tensors)
        write_weights(folder, tensors)

    return make


def _cut(folder: Path) -> None:
    path = write_weights(folder, random_tensors(CONFIG))
    path.write_bytes(path.read_bytes()[:-100])


def _wrong_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weight_map = write_shards(folder, random_tensors(CONFIG))
        change(weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return make


def _renamed(form: str, prefix: str = "") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = random_tensors(CONFIG)
        write_weights(folder, {form.format(k.removeprefix(prefix)): x for k, x in tensors.items()})

    return make


def _missing_shard(folder: Path) -> None:
    write_shards(folder, random_tensors(CONFIG))
    (folder / "model-2.safetensors").unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty": (lambda folder: None, ["no weights", "model.safetensors", INDEX]),
    "missing tensor": (
        _wrong(lambda tensors: tensors.pop(NORM)),
        ["model.safetensors", "missing", NORM, "[16]"],
    ),
    "extra tensor": (
        _wrong(lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": np.ones(1)})),
        ["model.safetensors", "unexpected", "model.layers.4.mlp.up_proj.weight"],
    ),
    "shape": (
        _wrong(lambda tensors: tensors.update({NORM: np.ones((4, 4), np.float32)})),
        ["model.safetensors", NORM, "[4, 4]", "[16]"],
    ),
    "type": (
        _wrong(lambda tensors: tensors.update({NORM: np.ones(16, np.int8)})),
        ["model.safetensors", NORM, "I8", "BF16"],
    ),
    "truncated": (_cut, ["model.safetensors", "not a readable safetensors file", "cut short?"]),
    "no safetensors at all": (
        lambda folder: (folder / "model.safetensors").write_text("not found"),
        ["model.safetensors", "not a readable safetensors file"],
    ),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("{"), [INDEX, "JSON"]),
    "index without a map": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": []}'),
        [INDEX, "weight_map"],
    ),
    "missing shard": (_missing_shard, [INDEX, "model-2.safetensors", "1 of 2 files are missing"]),
    "names of a wrapped model": (_renamed("base_model.model.{}"), [f"base_model.model.{FIRST}"]),
    "names of a compiled model": (
        _renamed("_orig_mod.{}"),
        [f"found _orig_mod.{FIRST}"],
    ),
    "names of a parallel model": (_renamed("module.{}"), ["missing", f"found module.{FIRST}"]),
    "names of a decoder in a decoder": (_renamed("model.{}"), [f"found model.{FIRST}"]),
    "names without the model's": (_renamed("{}", "model."), ["found embed_tokens.weight"]),
    "no tensors": (lambda folder: write_weights(folder, {}), ["the file has none"]),
    "quantized by GPTQ": (
        _wrong(
            lambda tensors: tensors.update({GATE.replace("weight", "qweight"): tensors.pop(GATE)})
        ),
        ["missing", "mlp.gate_proj.qweight: quantized weights", "unquantized original"],
    ),
    "quantized to 8 bits": (
        _wrong(lambda tensors: tensors.update({GATE: tensors[GATE].astype(np.int8)})),
        [GATE, "found type I8", "unquantized original"],
    ),
    "tensor not in its shard": (
        _wrong_index(lambda weight_map: weight_map.update(extra="model-1.safetensors")),
        ["model-1.safetensors", "missing tensor extra"],
    ),
    "shard elsewhere": (
        _wrong_index(lambda weight_map: weight_map.update({NORM: "../other.safetensors"})),
        [INDEX, "'../other.safetensors'", "plain file name"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(tmp_path: Path, name: str) -> None:
    make, words = BROKEN[name]
    make(tmp_path)
    with pytest.raises(UserError) as error:
        load_hf(tmp_path, CONFIG)
    message = str(error.value)
    assert "\n" not in message
    for word in [str(tmp_path), *words]:
        assert word in message


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_hf(tmp_path / "missing", CONFIG)
