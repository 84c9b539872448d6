"""What a run keeps of its start: nothing outside of it that changes can change it in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mass_dpo_jax as mdj
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.export import export
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from mass_dpo_jax.training.offline_selection import select_with_model
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import Batches
from tests.support.helpers import WORDS, losses, tiny_config, write_jsonl
from tests.support.models import hf_config, random_tensors, write_weights

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}{% if m.role == 'assistant' %}<eos>"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
LORA = Lora(2, 8.0, ("query", "down"))
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
pytestmark = pytest.mark.usefixtures("one_device")


def write_base(folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights."""
    train_tokenizer([" ".join(WORDS)], 300, folder)
    (folder / "config.json").write_text(json.dumps(hf_config(**SIZES, tie_word_embeddings=True)))
    tensors = random_tensors(load_config(folder), seed=seed)
    write_weights(folder, {name: 0.2 * x for name, x in tensors.items()})
    return folder


def write_adapters(folder: Path, base: Path, alpha: float = 8.0) -> Path:
    """Adapters in PEFT's format that add something."""
    rng = np.random.default_rng(0)
    products = load_config(base).projections
    tensors = {
        name: {
            "a": rng.normal(0, 0.3, (2, products[name][0][0], 2)).astype(np.float32),
            "b": rng.normal(0, 0.3, (2, 2, products[name][0][1])).astype(np.float32),
        }
        for name in LORA.targets
    }
    peft_format.save_peft(folder, tensors, Lora(2, alpha, LORA.targets), str(base))
    return folder


def settings(home: Path, **changes: Any) -> Any:
    """A run of two steps of everything in the folder `home`, by relative paths."""
    paths = {
        "model.path": "base",
        "data.chat_template": "t.jinja",
        "cache_dir": str(home / "cache"),
    }
    steps = {"train.steps": 2, "train.eval_every": 0, "train.learning_rate": 0.03}
    return tiny_config(Path("data.jsonl"), **{**paths, **steps, **changes})


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a base, data, a template, adapters and a run that was started there: of all
    weights ("full"), and of adapters in nf4 that began from others ("lora")."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("full", "lora"):
            home = found[kind] = tmp_path_factory.mktemp(kind)
            write_base(home / "base")
            write_adapters(home / "adapters", home / "base")
            write_jsonl(home / "data.jsonl", examples=40)
            (home / "t.jinja").write_text(TEMPLATE)
            patch.chdir(home)
            lora = {"model.lora.path": "adapters", "model.lora.base": "nf4"}
            train(settings(home, **(lora if kind == "lora" else {})), Path("run"))
    return found


@pytest.fixture
def home(request: pytest.FixtureRequest, homes: dict[str, Path], tmp_path: Path) -> Path:
    """One of them, in its own place; a copy of what it was is beside it."""
    there = homes[request.param]
    shutil.copytree(there, tmp_path / "kept")
    request.addfinalizer(lambda: restore(there, tmp_path / "kept"))
    return there


def restore(there: Path, kept: Path) -> None:
    shutil.rmtree(there)
    shutil.copytree(kept, there)


def of_run(run: Path) -> dict[str, Any]:
    """What every command says of a run."""
    here = run_config.get_config(str(run))
    selected = [row["selected"] for row in select_with_model(here, run, "train")]
    export(run, run.parent / "exported", dtype="float32")
    exported = (run.parent / "exported" / "model.safetensors").read_bytes()
    shutil.rmtree(run.parent / "exported")
    rows = [{"prompt": "red blue", "chosen": "green", "rejected": ["red", "blue"]}]
    return {
        "evaluate": evaluate(here, run, "test"),
        "score": list(score(here, run, "test")),
        "select": selected,
        "export": exported,
        "load_model": mdj.load_model(run).score(rows).logps.tolist(),
    }


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


HARMLESS: dict[str, Callable[[Path], None]] = {
    "the template is edited": lambda home: (home / "t.jinja").write_text("{{ 1 / 0 }}") and None,
    "the template is deleted": lambda home: remove(home / "t.jinja"),
    "the adapters' alpha is edited": lambda home: edit_json(
        home / "adapters" / "adapter_config.json", lora_alpha=32
    ),
    "the adapters are deleted": lambda home: remove(home / "adapters"),
    "the base's tokenizer is another": lambda home: train_tokenizer(
        ["zebra yellow xylophone"], 300, home / "base"
    ),
    "the base says that it ends otherwise": lambda home: edit_json(
        home / "base" / "config.json", eos_token_id=7, max_position_embeddings=99
    ),
}


@pytest.mark.parametrize("home", ["full", "lora"], indirect=True)
def test_what_a_run_has_itself_may_change_outside(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # Not where it was started.
    before = of_run(home / "run")
    for change in HARMLESS.values():
        change(home)
    assert of_run(home / "run") == before


def interrupted(config: Any, run: Path, at: int = 2) -> None:
    """Trains until before update `at`; Ctrl-C comes then."""
    make = Batches.__getitem__

    def stop(self: Batches, step: int) -> Any:
        if step == at:
            raise KeyboardInterrupt
        return make(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__getitem__", stop)
        train(config, run)


@pytest.mark.parametrize("home", ["full", "lora"], indirect=True)
def test_a_run_goes_on_as_it_began(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(home)
    changes = {"train.steps": 3, "train.checkpoint_every": 1}
    if home.name.startswith("lora"):
        changes |= {"model.lora.path": "adapters", "model.lora.base": "nf4"}
    config = settings(home, **changes)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, whole)
    for cut in (run, tmp_path / "again"):
        interrupted(config, cut)
    for change in HARMLESS.values():
        change(home)
    # By its folder alone, from elsewhere.
    monkeypatch.chdir(tmp_path)
    train(run_config.get_config(str(run)), run)
    assert losses(run) == losses(whole)
    typed = json.loads((run / "config.json").read_text())
    assert typed == json.loads((whole / "config.json").read_text())
    assert typed["data"]["path"] == "data.jsonl"
    # By the command that began it; what has changed since is said.
    monkeypatch.chdir(home)
    write_adapters(home / "adapters", home / "base", alpha=32.0)
    (home / "t.jinja").write_text("edited")
    caplog.clear()
    train(config, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(whole)
    assert "config.data.chat_template: t.jinja is not what the run began with" in caplog.text
    if home.name.startswith("lora"):
        assert "config.model.lora.path: adapters is not what the run began with" in caplog.text


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_a_run_goes_on_with_what_has_moved(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    config = settings(home, **{"train.steps": 3, "train.checkpoint_every": 1})
    train(config, tmp_path / "whole")
    for name in ("begun", "by absolute paths", "moved", "from beside"):
        interrupted(config, tmp_path / name)
    wanted = losses(tmp_path / "whole")
    absolute = config.copy_and_resolve_references()
    absolute.data.path = str(home / "data.jsonl")
    absolute.model.path = str(home / "base")
    monkeypatch.chdir(tmp_path)
    train(absolute, tmp_path / "by absolute paths")
    assert losses(tmp_path / "by absolute paths") == wanted

    # The run, its data and its model are elsewhere now: each is named once.
    shutil.move(tmp_path / "moved", tmp_path / "there")
    (home / "base").rename(home / "base2")
    (home / "data.jsonl").rename(home / "data2.jsonl")
    for wrong in ("data.path", "model.path"):
        gone = run_config.get_config(str(tmp_path / "there"))
        right = "model.path" if wrong == "data.path" else "data.path"
        place = {"data.path": home / "data2.jsonl", "model.path": home / "base2"}[right]
        gone.update_from_flattened_dict({right: str(place)})
        with pytest.raises(UserError, match=rf"no such (file|folder).*config\.{wrong}"):
            train(gone, tmp_path / "there")
    moved = run_config.get_config(str(tmp_path / "there"))
    moved.model.path, moved.data.path = str(home / "base2"), str(home / "data2.jsonl")
    train(moved, tmp_path / "there")
    assert losses(tmp_path / "there") == wanted
    here = run_config.get_config(str(tmp_path / "there"))  # It knows the new places.
    assert here.model.path == str(home / "base2")
    (tmp_path / "there" / "metrics.json").unlink()
    train(here, tmp_path / "there")

    # Other content under a new name is refused, before anything is written.
    write_base(home / "base3", seed=1)
    write_jsonl(home / "data3.jsonl", examples=40, seed=1)
    kept = (tmp_path / "begun" / "config.json").read_bytes()
    for changes, message in (
        ({"data.path": str(home / "data3.jsonl")}, "saved with other data"),
        ({"model.path": str(home / "base3")}, r"config\.model\.path: its weights are not those"),
    ):
        other = moved.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=message):
            train(other, tmp_path / "begun")
        assert (tmp_path / "begun" / "config.json").read_bytes() == kept


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_settings_that_only_split_an_update_may_change(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(home)
    config = settings(home, **{"train.steps": 3, "train.checkpoint_every": 1})
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "run")
    changes = {
        "train.micro_batch_size": 2,
        "train.reuse_scoring": False,
        "model.remat": "dots",
        "model.layout": "rectangle",
        "eval.batch_size": 4,
    }
    config.update_from_flattened_dict(changes)
    caplog.set_level("INFO")
    train(config, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-4)
    (line,) = [line for line in caplog.messages if "going on with" in line]
    for name, value in changes.items():
        assert f"{name}={value} (was " in line
    assert "round otherwise" in line

    (tmp_path / "run" / "metrics.json").unlink()
    config.train.epochs = 7
    with pytest.raises(UserError, match=r"train\.epochs .* --config\.model\.path="):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("home", ["lora"], indirect=True)
def test_a_base_that_has_moved_is_named_by_one_flag(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = home / "run"
    before = of_run(run)
    (home / "base").rename(home / "base2")
    here = run_config.get_config(str(run))
    with pytest.raises(UserError, match=r"no such folder.*--config\.model\.path="):
        evaluate(here, run, "test")
    here.model.path = str(home / "base2")
    assert evaluate(here, run, "test") == before["evaluate"]
    assert list(score(here, run, "test")) == before["score"]
    with pytest.raises(UserError, match=r"base is gone.*--base_path="):
        export(run, tmp_path / "exported", dtype="float32")
    export(run, tmp_path / "exported", dtype="float32", base_path=str(home / "base2"))
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == before["export"]
    write_base(home / "base3", seed=1)
    with pytest.raises(UserError, match="its weights are not those"):
        export(run, tmp_path / "other", base_path=str(home / "base3"))


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_a_run_is_known_from_another_folder_in_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A project that was copied whole to another machine has its files where they were typed."""
    shutil.copytree(home, tmp_path / "copied")
    before = evaluate(run_config.get_config(str(home / "run")), home / "run", "test")
    shutil.move(home, tmp_path / "elsewhere")
    try:
        monkeypatch.chdir(tmp_path / "copied")
        here = run_config.get_config("run")
        assert f"{home}/data.jsonl is gone; taking {tmp_path}/copied/data.jsonl" in caplog.text
        found = evaluate(here, Path("run"), "test")
        assert found == pytest.approx(before, abs=1e-5)
    finally:
        shutil.move(tmp_path / "elsewhere", home)


def test_a_scratch_run_keeps_the_reference_that_was_drawn_for_it(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    train(tiny_config(data, seed=5, **{"train.steps": 2, "train.eval_every": 0}), run)
    own = list(score(run_config.get_config(str(run)), run, "train"))
    known = {row["id"]: row["ref_logps"] for row in own}
    rows = [row for row in score(tiny_config(data), run, "train") if row["id"] in known]
    assert len(rows) > 10  # Of seed 0, which holds out others.
    for row in rows:
        np.testing.assert_allclose(row["ref_logps"], known[row["id"]], rtol=1e-5)


def test_commands_leave_the_callers_configuration_as_it_is(tmp_path: Path) -> None:
    data, run = write_jsonl(tmp_path / "data.jsonl"), tmp_path / "run"
    train(tiny_config(data, **{"train.steps": 1, "train.eval_every": 0}), run)
    config = run_config.get_config(str(run))
    before = config.to_json()
    list(score(config, run, "test"))
    list(select_with_model(config, run, "train"))
    evaluate(config, run, "test")
    assert config.to_json() == before


def test_the_reference_in_the_cache_is_that_of_these_adapters(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl")
    found = []
    for alpha in (8.0, 32.0, 8.0):
        adapters = write_adapters(tmp_path / "adapters", base, alpha)
        paths = {"model.path": str(base), "model.lora.path": str(adapters)}
        config = tiny_config(data, cache_dir=str(tmp_path / "cache"), **paths)
        setup = prepare(config, None, ("train",))
        params = setup.policy.weights(str(base), 0, str(adapters))
        found.append(setup.score_reference(params).logps["train"])
        np.testing.assert_array_equal(found[-1], setup.score(params, "train", ""))
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 0.1


HARMFUL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the base's weights are others": (
        lambda home: write_base(home / "base", seed=1),
        "config.model.path: its weights are not those that the run began with.*"
        "(--config.model.path=|--base_path=|put those of before)",
    ),
    "the base computes otherwise": (
        lambda home: edit_json(
            home / "base" / "config.json",
            rope_parameters={"rope_type": "default", "rope_theta": 123.0},
            rope_theta=123.0,
        ),
        "base: its architecture differs from the policy's: rope_theta",
    ),
    "the base is deleted": (lambda home: remove(home / "base"), "base.*(is gone|no such folder)"),
    "its tokenizer is edited": (
        lambda home: train_tokenizer(["zebra yellow"], 280, home / "run" / "model"),
        "run/model/tokenizer.json: not what the run began with",
    ),
    "its template is edited": (
        lambda home: (home / "run" / "model" / "chat_template.jinja").write_text("x"),
        "chat_template.jinja: not what the run began with",
    ),
    "its description is edited": (
        lambda home: edit_json(home / "run" / "model" / "config.json", rms_norm_eps=0.1),
        "run/model/config.json: not what the run began with",
    ),
}


@pytest.mark.parametrize("what", HARMFUL)
@pytest.mark.parametrize("home", ["full", "lora"], indirect=True)
def test_what_a_run_reads_again_is_refused_where_it_has_changed(
    home: Path, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = home / "run"
    here = run_config.get_config(str(run))
    change, message = HARMFUL[what]
    change(home)
    (run / "metrics.json").unlink()  # As if it had been cut off before its end.
    commands = {
        "train": lambda: train(here, run),
        "evaluate": lambda: evaluate(here, run, "test"),
        "score": lambda: list(score(here, run, "test")),
        "select": lambda: list(select_with_model(here, run, "train")),
    }
    if home.name.startswith("lora") or what.startswith("its "):  # Else it has all weights.
        commands |= {
            "export": lambda: export(run, tmp_path / "exported"),
            "load_model": lambda: mdj.load_model(run),
        }
    for command in commands.values():
        with pytest.raises(UserError, match=message):
            command()
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("home", ["lora"], indirect=True)
def test_the_adapters_that_a_run_keeps_are_those_it_began_from(home: Path, tmp_path: Path) -> None:
    run = home / "run"
    here = run_config.get_config(str(run))
    edit_json(run / "adapters" / "adapter_config.json", lora_alpha=32)
    (run / "metrics.json").unlink()  # As if it had been cut off before its end.
    for command in (
        lambda: train(here, run),
        lambda: evaluate(here, run, "test"),
        lambda: list(score(here, run, "test")),
        lambda: list(select_with_model(here, run, "train")),
        lambda: export(run, tmp_path / "exported"),
        lambda: export(run, tmp_path / "exported", adapters=True),
        lambda: mdj.load_model(run),
    ):
        with pytest.raises(UserError, match=r"run/adapters/adapter_config\.json: not what the run"):
            command()


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_a_run_without_a_reference_needs_no_base_once_it_has_begun(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    config = settings(home, method="sft", **{"train.steps": 3, "train.checkpoint_every": 1})
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "run")
    remove(home / "base")
    train(config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("home", ["lora"], indirect=True)
def test_a_run_without_a_checkpoint_begins_again_by_its_own_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    lora = {"model.lora.path": "adapters", "model.lora.base": "nf4"}
    for name in ("cut", "other"):
        interrupted(settings(home, **lora), tmp_path / name, at=0)
    remove(home / "adapters")
    train(run_config.get_config(str(tmp_path / "cut")), tmp_path / "cut")
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(home / "run"), rtol=1e-5)
    # Adapters that an earlier start left are none of a run that asks for none.
    monkeypatch.setattr("mass_dpo_jax.training.loop.save_description", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(settings(home), tmp_path / "other")
    assert run_config.get_config(str(tmp_path / "other")).model.lora.path == ""


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_line_ends_of_a_template_are_no_change(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(home)
    text = "\n" + TEMPLATE + "{# a #}\n\n"
    template = home / "lines.jinja"
    template.write_bytes(text.replace("\n", "\r\n").encode())
    config = settings(home, **{"data.chat_template": "lines.jinja", "train.checkpoint_every": 1})
    interrupted(config, tmp_path / "run", at=1)
    for ends in ("\r\n", "\n", "\r"):
        template.write_bytes(text.replace("\n", ends).encode())
        run_config.use_own_files(config, tmp_path / "run")
    template.rename(home / "copy.jinja")
    config.data.chat_template = "copy.jinja"
    train(config, tmp_path / "run")
    assert "is not what the run began with" not in caplog.text
    (home / "lines.jinja").write_text(text + "x")
    config.data.chat_template = "lines.jinja"
    run_config.use_own_files(config, tmp_path / "run")
    assert "lines.jinja is not what the run began with" in caplog.text


@pytest.mark.parametrize("home", ["lora"], indirect=True)
def test_adapters_are_not_added_to_weights_that_have_them(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    (home / "link").symlink_to("run")
    again = {"model.path": "run", "model.lora.path": "adapters"}
    # What a run with other settings is advised to do: its command with another model and folder.
    for changes in (
        again,
        again | {"model.path": "link/checkpoints/2"},
        again | {"model.lora.path": "link/adapters"},
        again | {"model.lora.path": "run"},
        again | {"model.lora.path": "link/checkpoints/2"},
    ):
        with pytest.raises(UserError, match=r"these adapters .* already.*lora\.path= "):
            train(settings(home, **changes), tmp_path / "next")
    own = run_config.get_config("run")
    with pytest.raises(UserError, match="already"):
        mdj.load_model("run", own)
    own.model.path = "run"
    with pytest.raises(UserError, match="already"):
        list(score(own, None, "test"))
    assert not (tmp_path / "next").exists()

    # Of a run that was begun by a version without these files.
    older = shutil.copytree("run", tmp_path / "older")
    (older / "origin.json").unlink()
    remove(older / "adapters")
    with pytest.raises(UserError, match="already"):
        train(settings(home, **again | {"model.path": str(older)}), tmp_path / "next")

    # What the message says to do.
    own.model.lora.path = ""
    found, wanted = list(score(own, None, "test")), list(score(own, home / "run", "test"))
    for row, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(row["logps"], other["logps"], rtol=1e-5)
    write_adapters(home / "others", home / "base", alpha=4.0)
    for changes in (
        {"model.path": "run", "model.lora.rank": 2},
        {"model.lora.path": "run"},
        again | {"model.lora.path": "others"},
    ):
        prepare(settings(home, **changes), None, ("train",))


def in_model(name: str) -> Callable[[Path], Any]:
    """Writes a file into a run's `model/`."""
    return lambda home: (home / "run" / "model" / name).write_text("{}")


INTO_MODEL = {
    ".DS_Store": True,
    "._tokenizer.json": True,
    "README.md": True,
    "chat_template.jinja~": True,
    "generation_config.json": True,
    "added_tokens.json": False,
    "chat_template.json": False,
    "merges.txt": False,
    "tokenizer.model": False,
}


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_only_files_that_are_read_are_missed_or_too_many(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    before = evaluate(run_config.get_config("run"), Path("run"), "test")
    for name, harmless in INTO_MODEL.items():
        in_model(name)(home)
        if harmless:
            assert evaluate(run_config.get_config("run"), Path("run"), "test") == before
        else:
            with pytest.raises(UserError, match=f"{name}: not what the run began with"):
                evaluate(run_config.get_config("run"), Path("run"), "test")
        remove(home / "run" / "model" / name)
    description = home / "run" / "model" / "config.json"
    edit_json(description, eos_token_id=[2, 7], max_position_embeddings=9999)
    found = evaluate(run_config.get_config("run"), Path("run"), "test")
    assert found == pytest.approx(before, abs=1e-5)
    description.unlink()
    with pytest.raises(UserError):
        evaluate(run_config.get_config("run"), Path("run"), "test")


@pytest.mark.parametrize("home", ["lora"], indirect=True)
def test_a_base_of_a_run_that_is_a_base_is_put_back_where_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its path would be another model's for the run that began from it."""
    monkeypatch.chdir(home)
    train(settings(home, **{"model.path": "run"}), tmp_path / "next")
    here = run_config.get_config(str(tmp_path / "next"))
    before = evaluate(here, tmp_path / "next", "test")
    (home / "base").rename(home / "base2")
    commands: list[Callable[[], Any]] = [
        lambda: evaluate(here, tmp_path / "next", "test"),
        lambda: train(settings(home, **{"model.path": "run"}), tmp_path / "new"),
        lambda: mdj.load_model(home / "run"),
    ]
    for command in commands:
        with pytest.raises(UserError, match="base is gone; put it, or a link to it, at") as caught:
            command()
        assert "--config.model.path=" not in str(caught.value)
    write_base(home / "base", seed=1)
    for command in commands:
        with pytest.raises(UserError, match="put those of before, or a link to them, at") as caught:
            command()
        assert "--config.model.path=" not in str(caught.value)
    remove(home / "base")
    (home / "base").symlink_to("base2")
    assert evaluate(here, tmp_path / "next", "test") == before


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_a_reference_that_is_gone_is_named_by_its_own_flag(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(
        UserError, match=r"nowhere: no such folder.*--config\.model\.reference_path="
    ):
        train(settings(home, **{"model.reference_path": "nowhere"}), tmp_path / "run")


@pytest.mark.parametrize("home", ["full"], indirect=True)
def test_a_card_shows_no_folder_of_the_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    paths = {
        "data.path": str(home / "data.jsonl"),
        "data.chat_template": str(home / "t.jinja"),
        "model.lora.path": str(home / "adapters"),
        "model.path": "run/checkpoints/2",
    }
    train(settings(home, **paths), tmp_path / "next")
    monkeypatch.chdir(tmp_path)  # Not where paths count from.
    export(tmp_path / "next", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert str(home.parent) not in card and "checkpoints/" not in card
    assert 'base_model: "base"' in card

    export(tmp_path / "next", tmp_path / "adapters", adapters=True, base_model="org/base")
    adapters = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == "org/base"
    with pytest.raises(UserError, match="--dtype=bfloat16: adapters are written in float32"):
        export(tmp_path / "next", tmp_path / "other", adapters=True, dtype="bfloat16")


@pytest.mark.parametrize("home", ["lora"], indirect=True)
def test_a_part_of_a_run_that_is_no_model_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    parts = {
        "run/checkpoints": "a part of the run run: give that, or run/checkpoints/STEP",
        "run/model": "a part of the run run: give that, or run/checkpoints/STEP",
        "run/checkpoints/99": "run: no checkpoint of step 99; found 2",
    }
    for path, message in parts.items():
        with pytest.raises(UserError, match=message):
            mdj.load_model(path)
    with pytest.raises(UserError, match="run: no checkpoint of step 1; found 2"):
        prepare(settings(home, **{"model.lora.path": "run/checkpoints/1"}), None, ("train",))
