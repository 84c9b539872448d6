"""The library against the commands, transformers (PyTorch) and optax; its names are documented."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from datasets import Dataset, DatasetDict
from ml_collections import ConfigDict
from pandas import DataFrame
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import mass_dpo_jax as mdj
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from tests.support.helpers import WORDS, log_lines, slow, tiny_config, write_jsonl
from tests.support.models import hf_config
from tests.support.processes import python

LORA = {"model.lora.rank": 2, "model.lora.targets": "q_proj,down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, torch: ModuleType) -> Path:
    """A random model of transformers with a tokenizer of ours."""
    path = tmp_path_factory.mktemp("model")
    train_tokenizer([" ".join(WORDS)], 300, path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = hf_config("qwen3", vocab_size=320, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"].from_dict(config)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(path)
    return path


def config_of(folder: Path, tmp_path: Path, **changes: Any) -> ConfigDict:
    data = tmp_path / "data.jsonl"
    settings = {"model.path": str(folder), "cache_dir": str(tmp_path / "cache"), **changes}
    return tiny_config(data if data.exists() else write_jsonl(data), **settings)


@pytest.mark.usefixtures("one_device")
def test_scores_are_those_of_transformers_and_of_the_command(
    tmp_path: Path, folder: Path, torch: ModuleType
) -> None:
    config = config_of(folder, tmp_path)
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    model = mdj.load_model(folder, config)
    found = model.score(rows, features=True)
    written = list(score(config.copy_and_resolve_references(), None, "all"))
    assert found.ids == [row["id"] for row in written] == [row["id"] for row in rows]
    assert found.logps.shape == found.lengths.shape == found.valid.shape == (24, 7)
    assert found.features is not None and found.features.shape == (24, 7, 32)
    for i, row in enumerate(written):
        np.testing.assert_array_equal(found.lengths[i, found.valid[i]], row["response_tokens"])
        # The same pass, but one that also makes features is another program.
        np.testing.assert_allclose(found.logps[i, found.valid[i]], row["logps"], rtol=1e-6)
        assert not found.logps[i, ~found.valid[i]].any()
    alone = model.score(mdj.load_examples(config.data, "all", 0))
    assert alone.features is None
    for i, row in enumerate(written):  # That one is the same program.
        np.testing.assert_array_equal(alone.logps[i, alone.valid[i]], np.float32(row["logps"]))

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    for i, row in enumerate(rows[:6]):
        prompt = model.tokenizer(row["prompt"]).input_ids
        for c, response in enumerate([row["chosen"], *row["rejected"]]):
            answer = model.tokenizer(response, add_special_tokens=False).input_ids
            ids = torch.tensor([*prompt, *answer, 2])
            with torch.no_grad():
                out = theirs(ids[None], output_hidden_states=True)
            start = len(prompt)
            each = torch.log_softmax(out.logits[0, start - 1 : -1].double(), -1)
            expected = each.gather(1, ids[start:, None]).sum().item()
            assert found.logps[i, c] == pytest.approx(expected, abs=1e-4)
            hidden = out.hidden_states[-1][0, start:].mean(0).numpy()
            np.testing.assert_allclose(found.features[i, c], hidden, atol=1e-4)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "changes",
    [
        slow({"selection.criterion": "contrast"}),
        {**LORA, "selection.refresh": "2", "train.micro_batch_size": 4, "beta": 1.0},
    ],
    ids=["all weights", "LoRA, windows"],
)
def test_a_loop_of_ones_own_is_the_command(
    tmp_path: Path, folder: Path, changes: dict[str, Any]
) -> None:
    config = config_of(folder, tmp_path, **changes, **{"train.eval_every": 0})
    done = train(config, tmp_path / "run")
    model = mdj.load_model(folder, config)
    examples = mdj.load_examples(config.data, "train", config.seed)
    batches = mdj.batches(model, examples, config)
    step = mdj.make_train_step(model, batches)
    state = step.init(model.params)
    figures = []
    for batch in batches:
        state, metrics = step(state, batch)
        figures.append({name: float(x) for name, x in metrics.items()})
    assert len(batches) == len(figures) == 4 == int(state.step)
    logged = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    for name in ("loss", "grad_norm", "rewards/margins"):
        # Bit for bit: the log has the shortest decimal of each float32.
        assert [np.float32(x[name]) for x in figures] == [np.float32(x[name]) for x in logged]

    # The state has copies: the model is what it was, and its update is what the run became.
    rows = mdj.load_examples(config.data, "test", config.seed)
    found = model.updated(state).score(rows)
    ranks = mdj.metrics.ranking(found.logps, found.valid, "policy")
    assert ranks == {name: done["final"][name] for name in ranks}
    run = mdj.load_model(tmp_path / "run")  # With LoRA the base in 16 bits, adapters added.
    tolerance = 0.1 if "model.lora.rank" in changes else 1e-5
    np.testing.assert_allclose(run.score(rows).logps, found.logps, atol=tolerance)
    if "model.lora.rank" not in changes:
        model.updated(state).save(tmp_path / "saved")
        saved = mdj.load_model(tmp_path / "saved", config)
        np.testing.assert_array_equal(saved.score(rows).logps, found.logps)
        with pytest.raises(mdj.UserError, match=f"^{tmp_path}/saved: exists and is not empty"):
            model.save(tmp_path / "saved")
    with pytest.raises(mdj.UserError, match="dtype='int8': expected bfloat16 or float32"):
        model.save(tmp_path / "small", "int8")
    assert not (tmp_path / "small").exists()
    untouched = mdj.load_model(folder, config).score(rows).logps
    np.testing.assert_array_equal(model.score(rows).logps, untouched)
    assert np.abs(untouched - found.logps).max() > 0.2


@pytest.mark.usefixtures("one_device")
def test_kept_sets_are_of_the_batches_that_a_step_was_made_for(
    tmp_path: Path, folder: Path
) -> None:
    config = config_of(folder, tmp_path, **{"selection.refresh": "once"})
    model = mdj.load_model(folder, config)
    rows = mdj.load_examples(config.data, "train", 0)
    batches = mdj.batches(model, rows)
    step = mdj.make_train_step(model, batches)
    config.seed = 1  # Another order.
    with pytest.raises(mdj.UserError, match=r"^batch: of other batches than"):
        step(step.init(model.params), mdj.batches(model, rows, config)[0])
    step(step.init(model.params), batches[1])  # In another order they may come.


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("refresh", ["3", slow("once"), slow("epoch")])
def test_another_step_function_goes_on_inside_a_window(
    tmp_path: Path, folder: Path, refresh: str, said: Callable[[], str]
) -> None:
    """As a new process with a saved state would, or two functions that take turns."""
    changes = {"train.learning_rate": 3e-2, "train.clip": 10.0, "beta": 1.0, "num_negatives": 2}
    config = config_of(folder, tmp_path, **changes, **{"selection.refresh": refresh})
    model = mdj.load_model(folder, config)
    batches = mdj.batches(model, mdj.load_examples(config.data, "train", 0))

    def losses_of(functions: int, keep: bool = True) -> list[float]:
        steps = [mdj.make_train_step(model, batches) for _ in range(functions)]
        state, found = steps[0].init(model.params), []
        for batch in batches:
            state, metrics = steps[batch.step % functions](state, batch)
            assert float(metrics["loss"]) > 0 and float(metrics["grad_norm"]) > 0
            assert np.isfinite(float(metrics["rewards/margins_hard"]))
            found.append(float(metrics["loss"]))
            # All that a state is goes through a file.
            leaves, tree = jax.tree.flatten(state if keep else state._replace(sets=None))
            state = jax.tree.unflatten(tree, [jnp.asarray(np.asarray(x)) for x in leaves])
        return found

    whole = losses_of(1)
    assert losses_of(2) == whole
    assert "no sets" not in said()
    assert losses_of(2, keep=False) != whole
    assert "step 1: the state has no sets of negatives of its window, which began at st" in said()


@pytest.mark.usefixtures("one_device", "own_criteria")
def test_a_criterion_that_is_registered_again_needs_batches_of_its_own(
    tmp_path: Path, folder: Path
) -> None:
    changes = {"selection.criterion": "place", "num_negatives": 1}

    def register(place: int) -> None:
        @mdj.selection.criterion("place", needs_scoring=False)
        def at_place(pool: Any, n: int, settings: Any) -> Any:
            order = jnp.argsort(jnp.where(pool.mask, jnp.arange(pool.mask.shape[0]) != place, 2))
            return mdj.selection.in_order(order, pool.mask, n)

    register(0)
    config = config_of(folder, tmp_path, **changes)
    model = mdj.load_model(folder, config)
    examples = mdj.load_examples(config.data, "train", 0)

    def chosen() -> tuple[Any, Any, Any]:
        batches = mdj.batches(model, examples)
        step = mdj.make_train_step(model, batches)
        state, used, _ = step.update(step.init(model.params), batches[0])
        return np.unique(used.candidate_ids), step, (state, batches[1])

    found, step, following = chosen()
    assert found.tolist() == [1]
    register(1)
    with pytest.raises(mdj.UserError, match=r"^criterion 'place' was registered again .*: make"):
        step(*following)
    assert chosen()[0].tolist() == [2]


@pytest.mark.usefixtures("one_device")
def test_any_optimizer_of_optax(tmp_path: Path, folder: Path) -> None:
    """Plain gradient descent, against the update written out; and one that is not finite."""
    config = config_of(folder, tmp_path, num_negatives=2, beta=1.0, **{"train.steps": 2})
    model = mdj.load_model(folder, config)
    batches = mdj.batches(model, mdj.load_examples(config.data, "train", 0))
    step = mdj.make_train_step(model, batches, optax.sgd(0.1))
    state, metrics = step(step.init(model.params), batches[0])
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, model.params))
    assert float(moved) == pytest.approx(0.1 * float(metrics["grad_norm"]), rel=1e-4)

    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
    after, metrics = step(state._replace(params=broken), batches[1])
    assert float(metrics["skipped"]) == 1 and int(after.step) == 2


def test_an_optimizer_with_other_shapes(tmp_path: Path, folder: Path) -> None:
    """Adafactor keeps rows and columns, which lie on every device."""
    config = config_of(folder, tmp_path, num_negatives=2, **{"mesh.fsdp": 4, "mesh.data": 2})
    model = mdj.load_model(folder, config)
    batches = mdj.batches(model, mdj.load_examples(config.data, "train", 0))
    step = mdj.make_train_step(model, batches, optax.adafactor(1e-3, min_dim_size_to_factor=16))
    state, metrics = step(step.init(model.params), batches[0])
    assert float(metrics["update_ratio"]) > 0
    factored = [
        x
        for path, x in jax.tree.leaves_with_path(state.opt_state)
        if "v_row" in jax.tree_util.keystr(path) and x.ndim > 1 and x.shape[1] > 1
    ]
    assert factored and all(x.sharding.is_fully_replicated for x in factored)


@pytest.mark.usefixtures("one_device")
def test_mistakes(tmp_path: Path, folder: Path) -> None:
    config = config_of(folder, tmp_path)
    with pytest.raises(mdj.UserError, match="no such folder"):
        mdj.load_model(tmp_path / "none")
    with pytest.raises(mdj.UserError, match="path: expected a path, found an empty string"):
        mdj.load_model("")
    model = mdj.load_model(folder, config)
    row = {"prompt": "a", "chosen": "b", "rejected": ["c", "d", "e"]}
    with pytest.raises(mdj.UserError, match=r"examples\[1\]: field 'chosen' is missing.*skip leav"):
        model.score([row, {"prompt": "a"}])
    containers = [
        (DataFrame([row]), r"a table: give its rows, df.to_dict\('records'\)"),
        (DatasetDict(train=Dataset.from_list([row])), r"give one, as in dataset\['train'\]"),
        ("rows.jsonl", "a path: load_examples reads files"),
        (tmp_path, "a path: load_examples reads files"),
        (row, "one row: give a list of it"),
        ({name: [value] for name, value in row.items()}, "columns: give rows"),
        (3, "int$"),
    ]
    for container, message in containers:
        with pytest.raises(mdj.UserError, match=f"examples: expected rows, found .*{message}"):
            model.score(container)  # type: ignore[arg-type]
    skipping = dataclasses.replace(model, config=model.config.copy_and_resolve_references())
    skipping.config.data.on_bad_row = "skip"
    assert skipping.score([row, {"prompt": "a"}, row, 3]).ids == ["0", "2"]
    with pytest.raises(mdj.UserError, match=r"examples\[1\]: id 'x' is taken by examples\[0\]"):
        model.score([{**row, "id": "x"}, {**row, "id": "x"}])
    with pytest.raises(mdj.UserError, match="examples: is empty"):
        model.score([])
    with pytest.raises(mdj.UserError, match="num_negatives=4"):
        mdj.batches(model, [row], config_of(folder, tmp_path, num_negatives=4))
    replaced, unlocked = mdj.default_config(), mdj.default_config().unlock()
    replaced.data = {"path": "pairs.jsonl"}
    unlocked.train.lr = 1e-3
    wrong: list[tuple[Any, str]] = [
        ({}, r"^config: found a dict, expected what default_config\(\) returns"),
        (ConfigDict(), r"^config\.[a-z_.]+ is missing: take default_config\(\)"),
        (replaced, r"^config\.data\.[a-z_]+ is missing: .*update"),
        (
            unlocked,
            r"^config\.train\.lr: no such setting; did you mean config\.train\.learning_rate",
        ),
        (tmp_path / "config.py", "^config: found a PosixPath"),
    ]
    for settings, message in wrong:
        with pytest.raises(mdj.UserError, match=message):
            mdj.load_model(folder, settings)
        with pytest.raises(mdj.UserError, match=message):
            mdj.batches(model, [row], settings)
    batches = mdj.batches(model, [row])
    with pytest.raises(IndexError):
        batches[4]
    assert batches[-1].step == 3
    step = mdj.make_train_step(model, batches)
    state = step.init(model.params)
    mixed_up: list[tuple[Callable[[], Any], str]] = [
        (lambda: mdj.load_model(model), "path: found a Model, expected a path"),  # type: ignore
        (lambda: mdj.batches([row], model), "model: found a list, expected what load_model"),  # type: ignore
        (lambda: mdj.batches(model, [row], reference=folder), "reference: found a PosixPath"),  # type: ignore
        (lambda: mdj.make_train_step(model, list(batches)), "batches: found a list, exp"),  # type: ignore
        (lambda: mdj.make_train_step(model, batches, optax.adam), "optimizer: found a function"),  # type: ignore
        (lambda: step.init(model), "params: a Model with other entries"),
        (lambda: step(model.params, batches[0]), "state: found a dict, expected that of init"),
        (lambda: step(state, [row]), "batch: found a list"),  # type: ignore
        (lambda: model.updated(model.params), "state: found a dict"),
        (lambda: model.save(None), "folder: found a NoneType, expected a path"),  # type: ignore
    ]
    for call, message in mixed_up:
        with pytest.raises(mdj.UserError, match=f"^{message}"):
            call()
    with pytest.raises(TypeError, match="slice"):
        batches[1:3]  # type: ignore
    step(state, batches[0])
    with pytest.raises(mdj.UserError, match=r"^state: its arrays went into an"):
        step(state, batches[1])


def test_importing_the_package_imports_no_jax() -> None:
    code = (
        "import sys, mass_dpo_jax as mdj; names = dir(mdj);"
        "assert 'load_model' in names and 'jax' not in sys.modules and 'numpy' not in sys.modules;"
        "mdj.UserError; assert 'jax' not in sys.modules"
    )
    python("-c", code, check=True)
    with pytest.raises(AttributeError, match="has no attribute"):
        mdj.nothing  # noqa: B018


def public() -> dict[str, Any]:
    """Every public name, with its module for those of a module."""
    found: dict[str, Any] = {}
    for name in mdj.__all__:
        thing = getattr(mdj, name)
        found[name] = thing
        if inspect.ismodule(thing):
            found |= {f"{name}.{inner}": getattr(thing, inner) for inner in thing.__all__}
    return found


@pytest.mark.parametrize("name", public())
def test_public_names_have_docstrings_and_type_hints(name: str) -> None:
    thing = public()[name]
    functions = {name: thing} if inspect.isfunction(thing) else {}
    if inspect.isclass(thing):
        assert thing.__doc__ and not thing.__doc__.startswith(f"{thing.__name__}(")
        for inner, member in vars(thing).items():
            member = member.fget if isinstance(member, property) else member
            if inspect.isfunction(member) and not inner.startswith("_"):
                functions[f"{name}.{inner}"] = member
    elif inspect.ismodule(thing):
        assert thing.__doc__
    for place, function in functions.items():
        if not function.__module__.startswith("mass_dpo_jax"):
            continue  # A NamedTuple's own.
        assert function.__doc__, place
        hints = typing.get_type_hints(function)
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        assert set(hints) == {*parameters, "return"}, place
