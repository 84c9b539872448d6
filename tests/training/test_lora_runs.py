"""Whole runs with LoRA: what they start from, keep, and can be given to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import train as train_lib
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.export import export
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models import tensors as tensors_lib
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.lora import zero_idle_adapters
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.score import score
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.model_paths import read_lora
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import Batches, abstract_state, first_state
from mass_dpo_jax.utils import mesh_axes
from tests.support.helpers import WORDS, log_lines, losses, slow, tiny_config, write_jsonl
from tests.support.models import hf_config, random_tensors, write_weights

LORA = {"model.lora.rank": 2, "model.lora.targets": "q_proj,down_proj", "model.lora.base": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with random weights."""
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer([" ".join(WORDS)], 300, folder)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(hf_config(**sizes, tie_word_embeddings=True)))
    tensors = random_tensors(load_config(folder))
    write_weights(folder, {name: 0.2 * x for name, x in tensors.items()})
    return folder


def config_of(base: Path, tmp_path: Path, **changes: Any) -> Any:
    data = write_jsonl(tmp_path / "data.jsonl", examples=40)
    paths = {"model.path": str(base), "cache_dir": str(tmp_path / "cache")}
    return tiny_config(data, **{**paths, **LORA, "train.learning_rate": 0.03, **changes})


def logps(run: Path | None, **changes: Any) -> list[list[float]]:
    config = run_config.load_config(run) if run else changes.pop("config")
    config.update_from_flattened_dict(changes)
    return [row["logps"] for row in score(config, run, "test")]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.usefixtures("one_device")
def test_a_run(base: Path, tmp_path: Path, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = config_of(base, tmp_path, **{"model.lora.dropout": dropout}), tmp_path / "run"
    done = train_lib.train(config, run)
    lines = log_lines(run)
    first = next(line for line in lines if "loss" in line)
    # Adapters add nothing yet, so the policy is the reference: the loss of 3 negatives is log(4).
    # Pools with 2 negatives only are in the batch.
    assert np.log(3) - 1e-5 <= first["loss"] <= np.log(4) + 1e-5
    assert abs(first["rewards/margins"]) < 1e-5
    assert abs(losses(run)[-1] - first["loss"]) > 1e-3
    for item in ("params", "opt_state"):  # Of adapters alone.
        kept = json.loads((run / "checkpoints" / "4" / item / "_METADATA").read_text())
        arrays = " ".join(kept["tree_metadata"])
        assert "'adapters', 'down', 'b'" in arrays
        assert "blocks" not in arrays and "embed" not in arrays

    # Interrupted after two of its steps, the same.
    other = tmp_path / "other"
    make = Batches.__getitem__
    calls = []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__getitem__", stop)
        with pytest.raises(KeyboardInterrupt):
            train_lib.train(config, other)
    assert train_lib.train(config, other)["final"] == done["final"]
    assert losses(other) == losses(run)

    # What the commands see of it is what it saw of itself, and its reference is the base.
    found = evaluate(run_config.load_config(run), run, "validation")
    assert found["policy/mrr"] == pytest.approx(done["final"]["policy/mrr"], abs=1e-6)
    assert found["rewards/margins"] == pytest.approx(done["final"]["rewards/margins"], abs=1e-5)
    assert abs(found["rewards/margins"]) > 1e-3
    more = run_config.load_config(run)
    more.model.lora.path = "some/adapters"
    with pytest.raises(UserError, match=r"lora\.path=some/adapters: the model is that of the run"):
        evaluate(more, run, "validation")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model.lora.rank": 0, "model.lora.base": "bfloat16"}, "model.path"),
        slow({"model.lora.base": "bfloat16"}, "model.path"),
        slow({"model.lora.base": "float32", "method": "sft"}, "model.path"),
        ({"model.lora.base": "nf4"}, "model.path"),  # Known by its weights as they are read.
        slow({"model.lora.rank": 0, "method": "sft"}, ""),  # What it began with is no longer read.
    ],
)
@pytest.mark.usefixtures("one_device")
def test_a_run_does_not_go_on_with_other_weights(
    base: Path, tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    there, run = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    config = config_of(there, tmp_path, **{"train.steps": 2, "train.eval_every": 0, **changes})
    train_lib.train(config, run)
    (run / "metrics.json").unlink()  # As if it had been cut off after step 2.
    kept = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    tensors = random_tensors(load_config(there), seed=1)
    write_weights(there, {name: 0.2 * x for name, x in tensors.items()})
    if names:
        with pytest.raises(UserError, match=f"{run}: config.{names}: its weights are not those"):
            train_lib.train(config, run)
        assert kept == {p: p.read_bytes() for p in kept}
        shutil.rmtree(there)
        shutil.copytree(base, there)
    assert train_lib.train(config, run)["finished"]


@pytest.mark.usefixtures("one_device")
def test_what_can_start_from_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = config_of(base, tmp_path), tmp_path / "run"
    config.train.update(steps=2, eval_every=0)
    train_lib.train(config, run)
    setup = prepare(config, None, ("train",))
    params = setup.policy.weights(str(base), 0, str(run))
    found = setup.score(params, "train", "")
    before = setup.score(setup.policy.weights(str(base), 0), "train", "")
    assert np.abs(found - before).max() > 0.01

    # PEFT's folder keeps the adapters, and appears whole or not at all.
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensors_lib, "save_file", full)
        with pytest.raises(
            UserError, match=rf"{peft_format.WEIGHTS}: cannot be written: .*No space"
        ):
            export(run, tmp_path / "peft", adapters=True)
    assert not list(tmp_path.glob("peft*"))
    export(run, tmp_path / "peft", adapters=True)
    from_peft = config.copy_and_resolve_references()
    from_peft.model.lora.update(path=str(tmp_path / "peft"), rank=0, targets="all")
    again = prepare(from_peft, None, ("train",))
    assert again.policy.lora == setup.policy.lora
    loaded = again.policy.weights(str(base), 1, str(tmp_path / "peft"))
    jax.tree.map(np.testing.assert_array_equal, loaded["adapters"], params["adapters"])

    # As --config.model.path it is an ordinary model: base and adapters in one.
    plain = config.copy_and_resolve_references()
    plain.model.path = str(run)
    plain.model.lora.rank = 0
    merged = prepare(plain, None, ("train",))
    weights = merged.policy.weights(str(run), 0)
    assert weights["blocks"]["query"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(merged.score(weights, "train", ""), found, rtol=2e-5, atol=2e-4)
    export(run, tmp_path / "exported", dtype="float32")
    exported = merged.policy.weights(str(tmp_path / "exported"), 0)
    jax.tree.map(np.testing.assert_array_equal, exported, weights)
    plain.train.steps = 1
    train_lib.train(plain, tmp_path / "full")
    (first,) = [line["loss"] for line in log_lines(tmp_path / "full") if "loss" in line]
    assert np.log(3) - 1e-5 <= first <= np.log(4) + 1e-5

    # A run that goes on from these adapters has the adapted model as its reference.
    on = config.copy_and_resolve_references()
    on.model.lora.update(path=str(run), rank=0)
    train_lib.train(on, tmp_path / "on")
    first = next(line for line in log_lines(tmp_path / "on") if "loss" in line)
    assert abs(first["rewards/margins"]) < 1e-5
    rows = list(score(run_config.load_config(tmp_path / "on"), tmp_path / "on", "train"))
    by_id = dict(zip(setup.tokens["train"].ids, found, strict=True))
    for row in rows:
        ours = by_id[row["id"]][: len(row["ref_logps"])]
        np.testing.assert_allclose(row["ref_logps"], ours, rtol=1e-5, atol=1e-4)


def test_the_reference_does_not_depend_on_what_was_drawn(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path)
    policy = prepare(config, None, ("train",)).policy
    params = [zero_idle_adapters(policy.weights(str(base), seed)) for seed in (0, 1)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert float(jnp.abs(policy.weights(str(base), 0)["adapters"]["query"]["a"]).max()) > 0


def test_the_scale_of_rank_stabilized_adapters() -> None:
    settings = config_lib.default().model.lora
    settings.update(rank=4, alpha=6.0, rank_stabilized=True)
    lora = read_lora(settings)
    assert lora is not None
    scaled = lora.scale_adapters({"query": {"a": np.ones(1), "b": np.ones(1)}})["query"]
    assert (scaled["a"], scaled["b"]) == (1, 6 / 4**0.5)


@pytest.mark.usefixtures("one_device")
def test_dropout_is_that_of_a_row_and_a_step(base: Path, tmp_path: Path) -> None:
    """Not of its place in a micro-batch, of what else is computed, or of the method's draws."""

    def train(name: str, **changes: Any) -> list[float]:
        settings = {"model.lora.dropout": 0.5, "train.clip": 100.0, **changes}
        train_lib.train(config_of(base, tmp_path, **settings), tmp_path / name)
        return losses(tmp_path / name)

    expected = train("run")
    settings = {
        "micro": {"train.micro_batch_size": 2},
        "chunks": {"train.responses_at_a_time": 2},
        "rectangle": {"model.layout": "rectangle"},
    }
    for name, changes in settings.items():
        assert train(name, **changes) == pytest.approx(expected, rel=1e-4), name
    without = train("without", **{"model.lora.dropout": 0.0})
    assert without != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "dropout"), [slow("nf4", 0.0), slow("bfloat16", 0.0), slow("bfloat16", 0.3)]
)
def test_eight_devices_equal_one(
    base: Path, tmp_path: Path, kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "train.learning_rate": 1e-3,
        "beta": 1.0,
        "model.lora.targets": "all",
        "model.lora.dropout": dropout,
    }
    config = config_of(base, tmp_path, **changes, **{"model.lora.base": kind})
    found = []
    make_mesh = mesh_lib.make_mesh
    for sizes in ((1, 1, 1), (2, 2, 2)):
        config = config.copy_and_resolve_references()
        config.mesh.update(dict(zip(mesh_axes.AXES, sizes, strict=True)))
        devices = jax.devices()[: int(np.prod(sizes))]
        with monkeypatch.context() as patch:
            patch.setattr(
                mesh_lib, "make_mesh", lambda c, devices=devices: make_mesh(c, devices=devices)
            )
            setup = prepare(config, None, ("train",))
        optimizer = make_optimizer(config.train, 3)
        like = abstract_state(setup, optimizer)
        params = setup.policy.weights(str(base), 0)
        reference = setup.score_reference(params)
        trained, frozen = setup.policy.split(params)
        state = first_state(like, optimizer, trained)
        batches = Batches(setup, reference)
        sets = np.tile(np.array([1, 2, 0], np.int32), (len(setup.tokens["train"]), 1))
        figures = []
        for step in range(3):
            batch = batches[step]
            chosen = batches.shard_negatives(batch.rows, sets)
            state, _, figure = setup.program.train_step(
                optimizer, state, batch.arrays, chosen, setup.key(step), batch.packed_length, frozen
            )
            figures.append({name: float(figure[name]) for name in ("loss", "grad_norm")})
        found.append((reference.logps["train"], figures))
    gate = frozen["blocks"]["gate"]["kernel"]
    for part in jax.tree.leaves(gate):
        assert part.addressable_shards[0].data.size == part.size // (4 if part.shape[1] > 1 else 2)
    a = state.opt_state[0].mu["adapters"]["gate"]["a"]
    assert a.addressable_shards[0].data.shape == (2, 16, 2)  # [layer, embed, rank]
    b = state.params["adapters"]["gate"]["b"]
    assert b.addressable_shards[0].data.shape == (2, 2, 32)  # [layer, rank, mlp]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    for one, eight in zip(found[0][1], found[1][1], strict=True):
        assert eight == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.lora.dropout": 1.0}, "model.lora.dropout=1.0: expected 0 to 1, a share"),
        ({"model.lora.targets": "(q_proj"}, r"targets='\(q_proj': no pattern: missing \)"),
        ({"model.lora.targets": ".*_head|x"}, "matches none of model.layers.0.self_attn.q_proj"),
        (
            {"model.lora.targets": r".*layers\.[0-3]\..*v_proj"},
            r"matches model\.layers\.0\.self_attn\.v_proj and not model\.layers\.4",
        ),
        ({"model.lora.targets": "q_proj,lm_head"}, "targets.*found 'lm_head', expected all or"),
        ({"model.lora.base": "fp4"}, "model.lora.base='fp4': expected one of float32, bfloat16"),
        ({"model.lora.alpha": 0.0}, "model.lora.alpha=0.0: expected a number above 0"),
        ({"model.lora.rank": -1}, "model.lora.rank=-1: expected 0 or more"),
        ({"model.path": ""}, "model.lora adapts a model: config.model.path is missing"),
        ({"model.lora.path": "nowhere"}, r"nowhere: no such folder .no adapter_config.json"),
    ],
)
def test_settings_that_are_wrong(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_lib.train(config_of(base, tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
