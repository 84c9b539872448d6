"""An exported run in transformers (PyTorch): the same logits, tokens, templates and rankings."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import ModelCard
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.export import export
from mass_dpo_jax.models import attention
from mass_dpo_jax.models import tensors as tensors_lib
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.weights import INDEX, SINGLE, load_hf, save_hf
from mass_dpo_jax.reports import model_card
from mass_dpo_jax.runs import run_config, run_folder
from mass_dpo_jax.selection.registry import CRITERIA
from mass_dpo_jax.train import train
from mass_dpo_jax.training import checkpoint, checkpoint_reading
from mass_dpo_jax.training.mesh import make_mesh
from mass_dpo_jax.training.methods import METHODS
from mass_dpo_jax.training.open_policy import open_policy, save_description
from mass_dpo_jax.training.step import TrainState
from tests.support.helpers import WORDS, log_lines, slow, tiny_config, write_jsonl
from tests.support.models import hf_config, random_tensors
from tests.support.models import tiny_config as decoder_config

VOCABULARY = 320
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CASES = {
    "llama, llama3 scaling": ("llama", {}),
    "llama tied, one head each": (
        "llama",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [0, 1, 0, 1]}),
    "smollm3 tied": ("smollm3", {"tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, its upper layers local": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "mistral": ("mistral", {"sliding_window": 9}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gemma2 tied": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {}),
}


def model_folder(torch: ModuleType, folder: Path, model_type: str, **changes: Any) -> Any:
    """A random model of transformers with a tokenizer of ours; the model."""
    train_tokenizer([" ".join(WORDS)], 300, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = hf_config(model_type, vocab_size=VOCABULARY, **changes)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(config)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = "norm" in name and not model_type.startswith("gemma")
            parameter.normal_(1.0 if ones else 0.0, 0.1)
    model.save_pretrained(folder)
    return model


def untrained_run(workdir: Path, config: ConfigDict) -> Path:
    """What a run of no steps would leave: the model it starts from, as a checkpoint."""
    run_folder.write_config(workdir, config)
    policy = open_policy(config.model, make_mesh(config.mesh), workdir)
    save_description(policy, config.model, config.data.chat_template, workdir)
    saved = checkpoint.Checkpoints(workdir)
    params = policy.weights(config.model.path, 0)
    saved.save(TrainState(np.int32(0), params, {"none": jnp.zeros(1)}), None, {})
    saved.close()
    return workdir


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def their_logits(torch: ModuleType, folder: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def our_logits(params: Any, folder: Path, ids: np.ndarray) -> np.ndarray:
    graphdef, _ = nnx.split(abstract_decoder(load_config(folder)))
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = jax.jit(lambda t, p: model(t, p, attention.attend_causally))(ids, positions)
    logits = hidden @ model.vocabulary_weights().T
    cap = model.config.logit_soft_cap
    return np.asarray(logits if cap is None else cap * jnp.tanh(logits / cap))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("case", CASES)
def test_logits_and_weights_of_an_untrained_run(
    tmp_path: Path, torch: ModuleType, case: str
) -> None:
    model_type, changes = CASES[case]
    model = model_folder(torch, tmp_path / "model", model_type, **changes)
    config = config_lib.default()
    config.update_from_flattened_dict(
        {"model.path": str(tmp_path / "model"), "data.chat_template": "none"}
    )
    run, output = untrained_run(tmp_path / "run", config), tmp_path / "out"
    export(run, output, max_shard_gb=1e-4)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
    logits = their_logits(torch, output, ids)
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-6)
    ours = our_logits(load_hf(output, load_config(output)), output, ids)
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)

    before, after = tensors_of(tmp_path / "model"), tensors_of(output)
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != changes.get("tie_word_embeddings", False)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    sizes = [path.stat().st_size for path in output.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 1.1e5 + 2e4  # One tensor is larger than 1e5 bytes.
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in after.values())
    written = json.loads((output / "config.json").read_text())
    assert {"rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"} <= set(written)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("model_type", [slow("llama"), slow("qwen3"), "smollm3"])
def test_a_trained_run(tmp_path: Path, torch: ModuleType, model_type: str) -> None:
    model_folder(torch, tmp_path / "model", model_type, tie_word_embeddings=model_type == "llama")
    (tmp_path / "model/generation_config.json").write_text(
        '{"do_sample": true, "top_p": 0.7, "eos_token_id": 2}'
    )
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    data = write_jsonl(tmp_path / "data.jsonl", examples=40)
    changes = {
        "model.path": str(tmp_path / "model"), "data.chat_template": str(template),
        "train.steps": 1, "train.eval_every": 0,
    }  # fmt: skip
    run, output = tmp_path / "run", tmp_path / "out"
    done = train(tiny_config(data, **changes), run)
    template.unlink()  # The run has its own copy.
    export(run, output, base_model="someone/something")
    assert {path.name for path in output.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", SINGLE,
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    before, after = tensors_of(tmp_path / "model"), tensors_of(output)
    assert all((before[name] != after[name]).any() for name in before)

    # Given as a model, it ranks as the run did.
    changes = {"model.path": str(output), "data.chat_template": "tokenizer"}
    found = evaluate(tiny_config(data, **changes), None, "test")
    policy = {k: v for k, v in done["final"].items() if k.startswith("policy/")}
    assert len(policy) == 24 and found == policy

    # transformers tokenizes alike, and its log-probs are those that the run reported.
    tokenizer = AutoTokenizer.from_pretrained(output)
    net = AutoModelForCausalLM.from_pretrained(output).eval()
    rows = {row["id"]: row for row in map(json.loads, data.read_text().splitlines())}
    examples = load_examples(run_config.load_config(run).data, "test", 0)
    table = np.load(run / "logps-final.npy")
    assert len(table) == len(examples) > 2
    for example, logps in zip(examples, table, strict=True):
        row = rows[example.id]
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == f"<bos>user: {row['prompt'].strip()}<end>\nassistant: "
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        for found_here, words in zip(logps, (row["chosen"], *row["rejected"]), strict=False):
            response = tokenizer(words + "<end>", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = net(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            picked = torch.log_softmax(logits, -1)[range(len(response)), response]
            assert found_here == pytest.approx(float(picked.sum()), rel=1e-4, abs=1e-4)

    assert "<end>" in tokenizer.all_special_tokens
    # Names that readers before transformers 5 know.
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["additional_special_tokens"] == ["<end>"]
    settings = GenerationConfig.from_pretrained(output)
    assert settings.top_p == 0.7
    assert settings.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<end>")]
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == "someone/something"
    assert card.data.library_name == "transformers" and "mass-dpo" in card.data.tags
    accuracy, error = (100 * done["final"][f"policy/mrr{kind}"] for kind in ("", "_se"))
    assert f"{accuracy:.1f} ± {error:.1f}" in card.content
    assert str(tmp_path) not in card.content


@pytest.mark.usefixtures("one_device")
def test_what_a_base_names_null_stays_null(tmp_path: Path, torch: ModuleType) -> None:
    """Special tokens and settings of generation; generate() works with them."""
    base, output = tmp_path / "model", tmp_path / "out"
    model_folder(torch, base, "llama")
    path = base / "tokenizer_config.json"
    nulls: dict[str, Any] = {"bos_token": None, "pad_token": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | nulls))
    (base / "generation_config.json").write_text('{"eos_token_id": null, "top_k": null}')
    config = config_lib.default()
    config.update_from_flattened_dict({"model.path": str(base), "data.chat_template": "none"})
    export(untrained_run(tmp_path / "run", config), output)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, output))
    assert before.special_tokens_map == after.special_tokens_map
    assert after.bos_token is None and after.pad_token is None
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert nulls.items() <= settings.items()
    found = json.loads((output / "generation_config.json").read_text())
    assert found == {
        "eos_token_id": [2], "top_k": None, "bos_token_id": 1, "pad_token_id": None
    }  # fmt: skip
    net = AutoModelForCausalLM.from_pretrained(output)
    assert net.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2).shape[1] > 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4, from scratch, weights split over eight devices."""
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "data.jsonl")
    train(tiny_config(data, **{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}), folder / "run")
    return folder / "run"


def test_weights_that_were_split_are_whole_and_in_their_layers(tmp_path: Path, run: Path) -> None:
    config = run_config.load_config(run)
    policy = open_policy(config.model, make_mesh(config.mesh), run)
    params = checkpoint_reading.load_params(run, policy.abstract)
    export(run, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"])
    for layer in range(2):
        for name, want in (("gate", "mlp.gate_proj"), ("output", "self_attn.o_proj")):
            kernel = np.asarray(params["blocks"][name]["kernel"][layer])
            np.testing.assert_array_equal(tensors[f"model.layers.{layer}.{want}.weight"], kernel.T)
    assert len(tensors) == 2 + 2 * 9


def test_steps_and_types(tmp_path: Path, run: Path) -> None:
    export(run, tmp_path / "two", step=2)
    export(run, tmp_path / "four")
    export(run, tmp_path / "half", dtype="bfloat16")
    two, four, half = (tensors_of(tmp_path / name) for name in ("two", "four", "half"))
    assert any((two[name] != four[name]).any() for name in two)
    for name, tensor in four.items():
        np.testing.assert_array_equal(half[name], tensor.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "half" / SINGLE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    # Where no type is given, it is the one that the run computed in.
    other = shutil.copytree(run, tmp_path / "run in bfloat16")
    settings = json.loads((other / "config.json").read_text())
    settings["model"]["dtype"] = "bfloat16"
    (other / "config.json").write_text(json.dumps(settings))
    export(other, tmp_path / "same")
    for name, tensor in tensors_of(tmp_path / "same").items():
        np.testing.assert_array_equal(tensor, half[name], strict=True)
    # Of another step than the last there are only figures of the validation split.
    assert "weights after update 2" in (tmp_path / "two/README.md").read_text()
    found = next(line for line in log_lines(run) if "eval/policy/mrr" in line and line["step"] == 2)
    card = (tmp_path / "two/README.md").read_text()
    assert "On the validation split" in card and f"{100 * found['eval/policy/mrr']:.1f} ±" in card


@pytest.mark.parametrize(
    ("settings", "bos", "pad", "ends"),
    [
        ({}, 1, 0, [2]),
        ({"eos_token_id": None}, 1, 0, [2]),
        ({"eos_token_id": [2, None, -1], "pad_token_id": -1}, 1, None, [2]),
        ({"eos_token_id": -1, "pad_token_id": 10**6}, 1, None, [2]),
        ({"eos_token_id": [7, 2], "bos_token_id": None, "pad_token_id": None}, None, None, [7, 2]),
        ({"eos_token_id": 7}, 1, 0, [7, 2]),
        ({"eos_token_id": [], "bos_token_id": True}, None, 0, [2]),
        ({"eos_token_id": {"a": 2}, "pad_token_id": [5]}, 1, 5, [2]),
        ({"eos_token_id": [2.0, "2"]}, 1, 0, [2]),
    ],
)
def test_generation_ends_with_tokens_that_there_are(
    run: Path, tmp_path: Path, settings: dict[str, Any], bos: Any, pad: Any, ends: list[int]
) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    (other / "model" / "generation_config.json").write_text(json.dumps(settings))
    export(other, tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert [found.bos_token_id, found.pad_token_id, found.eos_token_id] == [bos, pad, ends]


def test_a_model_is_called_after_the_one_that_its_chain_of_runs_started_from(
    tmp_path: Path, run: Path
) -> None:
    export(run, tmp_path / "out")
    config = tiny_config(run.parent / "data.jsonl", **{"model.path": str(tmp_path / "out")})
    assert model_card.base_name(str(untrained_run(tmp_path / "next", config))) == "out"
    assert model_card.base_name(str(run)) == ""
    hub = "/x/hub/models--org--some-model/snapshots/0123"
    assert model_card.base_name(hub) == "org/some-model"


def test_refusals_leave_nothing_behind(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    export(run, taken)  # An empty folder is as good as none.
    with pytest.raises(UserError, match=rf"^{taken}: exists and is not empty"):
        export(run, taken)
    with pytest.raises(UserError, match=r"--step=3: .*/run has checkpoints of steps 2, 4"):
        export(run, tmp_path / "out", step=3)
    for size in (0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"max_shard_gb={size}: expected a finite number above"):
            export(run, tmp_path / "out", max_shard_gb=size)
    with pytest.raises(UserError, match="dtype='int8': expected bfloat16 or float32"):
        export(run, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="not a run folder"):
        export(taken, tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints/4/params")
    with pytest.raises(UserError, match=r"broken/checkpoints/4: not a readable checkpoint"):
        export(broken, tmp_path / "out")
    shutil.rmtree(broken)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        export(run, tmp_path / "file/out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"^\.: expected the name of a new folder"):
        export(run, Path())
    (tmp_path / "here").rmdir()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    def full_of_tensors(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tensors_lib, "save_file", full_of_tensors)
        with pytest.raises(UserError, match=rf"{SINGLE}: cannot be written: .*No space left"):
            export(run, tmp_path / "out")
    monkeypatch.setattr(model_card, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "file"}


def test_no_more_than_a_file_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder_config(num_hidden_layers=12)
    tensors = random_tensors(config)
    state = nnx.to_pure_dict(nnx.state(abstract_decoder(config), nnx.Param))
    shapes = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    sources: list[weakref.ref] = []
    written: list[weakref.ref] = []
    sizes = []

    def alive(references: list[weakref.ref]) -> int:
        return sum(reference() is not None for reference in references)

    def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        assert alive(sources) <= 1  # The last one, whose name is about to be another's.
        array = np.zeros(shapes[path] if layer is None else shapes[path][1:], np.float32)
        sources.append(weakref.ref(array))
        return array

    save_file = tensors_lib.save_file

    def save(arrays: dict[str, np.ndarray], *args: Any, **kwargs: Any) -> None:
        assert alive(written) == 0  # Of the files before.
        written.extend(weakref.ref(array) for array in arrays.values())
        sizes.append((sum(array.nbytes for array in arrays.values()), len(arrays)))
        save_file(arrays, *args, **kwargs)

    monkeypatch.setattr(tensors_lib, "save_file", save)
    save_hf(tmp_path, config, read, dtype=np.float32, max_bytes=100_000)
    assert len(sizes) > 5 and all(size <= 100_000 or count == 1 for size, count in sizes)
    assert sum(size for size, _ in sizes) == sum(x.nbytes for x in tensors.values())
    assert len(sources) == len(written) == len(tensors)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_its_words(tmp_path: Path, method: str) -> None:
    config = config_lib.default()
    config.method = method
    config.data.path = "/home/someone/pairs.jsonl"
    card = ModelCard(model_card.write(tmp_path, config, decoder_config(), 7, "float32", ""))
    assert METHODS[method].description in card.content
    assert "This checkpoint was not evaluated" in card.content
    assert ("beta" in card.content.split("## Data")[0]) == METHODS[method].uses_reference
    assert "`pairs.jsonl`" in card.content and "someone" not in card.content
    settings = json.loads(card.content.split("```json\n")[1].split("```")[0])
    assert settings["method"] == method and settings["train.batch_size"] == 128
    assert {name for name, criterion in CRITERIA.items() if not criterion.summary} == {"sampled"}
    assert "supervised term" not in card.content
    config.sft_weight = 0.5
    text = model_card.write(tmp_path, config, decoder_config(), 7, "float32", "")
    assert "A supervised term" in text and "is added with weight 0.5." in text
