"""A run is resumed and used from any folder, by its own configuration and copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mass_dpo_jax as mdj
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.export import export
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from mass_dpo_jax.training.offline_selection import select_with_model
from mass_dpo_jax.training.prepare import prepare
from tests.support.helpers import losses, tiny_config, write_jsonl
from tests.support.run_homes import (
    HARMLESS,
    interrupted,
    of_run,
    remove,
    settings,
    write_adapters,
    write_base,
)

pytestmark = pytest.mark.usefixtures("one_device")


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
        "train.responses_at_a_time": 2,
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
