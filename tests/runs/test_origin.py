"""What a run keeps of its start: nothing outside of it that changes can change it silently."""

from __future__ import annotations

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
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from mass_dpo_jax.training.offline_selection import select_with_model
from mass_dpo_jax.training.prepare import prepare
from tests.support.helpers import losses, tiny_config, write_jsonl
from tests.support.run_homes import (
    HARMLESS,
    TEMPLATE,
    edit_json,
    interrupted,
    of_run,
    remove,
    settings,
    write_adapters,
    write_base,
)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("home", ["full", "lora"], indirect=True)
def test_what_a_run_has_itself_may_change_outside(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # Not where it was started.
    before = of_run(home / "run")
    for change in HARMLESS.values():
        change(home)
    assert of_run(home / "run") == before


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
        "base: its architecture differs from the policy's: rope",
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
