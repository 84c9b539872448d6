"""Models named on the hub, against a stand-in of it on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from ml_collections import ConfigDict

import mass_dpo_jax as mdj
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate.dry_run import dry_run
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.export import export
from mass_dpo_jax.reports.describe_data import describe
from mass_dpo_jax.train import train
from mass_dpo_jax.utils import hub as hub_lib
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.hub_server import Hub, serve_hub
from tests.support.processes import command, environment

NAME = "someone/Tiny-0.1B"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, made by a short run and `export`."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(write_jsonl(folder / "data.jsonl"), **{"train.steps": 1})
    train(config, folder / "run")
    export(folder / "run", folder / "exported", dtype="float32")
    return folder / "exported"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as served:
        set_hub(monkeypatch, served.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        monkeypatch.chdir(tmp_path)
        yield served


def set_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Does what HF_ENDPOINT does before the first import."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def load(path: str | Path) -> mdj.Model:
    config = mdj.default_config()
    config.data.chat_template = "none"
    return mdj.load_model(path, config)


def config_of(tmp_path: Path, **changes: Any) -> ConfigDict:
    data = tmp_path / "data.jsonl"
    fields = {"model.path": NAME, "train.steps": 2, "cache_dir": str(tmp_path / "cache")}
    return tiny_config(data if data.exists() else write_jsonl(data), **{**fields, **changes})


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("Qwen/Qwen2.5-0.5B-Instruct", "a/b@main", "a/b@refs/pr/1", "0-hero/x_y.z"):
        assert hub_lib.is_name(path), path
    for path in (
        *("", "model", "./a/b", "/a/b", "~/a/b", "a/b/c", "../a", "a/", "a/b@", "a b/c"),
        *("runs/mine", "-a/b", "a/.b", "a\\b", "hf://a/b", str(tmp_path / "runs")),
    ):
        assert not hub_lib.is_name(path), path


def test_a_model_by_its_name(hub: Hub, model: Path) -> None:
    repository = hub.add_folder(NAME, model, tags=("v1",))
    repository.files["original/consolidated.safetensors"] = b"not for us"
    repository.files["pytorch_model.bin"] = b"not for us either"
    by_name, by_folder = load(NAME), load(model)
    rows = [{"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}]
    np.testing.assert_array_equal(by_name.score(rows).logps, by_folder.score(rows).logps)
    asked = [
        request for request in hub.requests if request.startswith("GET") and "resolve" in request
    ]
    assert len(asked) == len({*asked}) and not any("not for us" in x or "bin" in x for x in asked)
    assert not any("original" in request for request in asked)
    hub.requests.clear()
    load(f"{NAME}@v1")
    assert not any(
        "safetensors" in x and x.startswith("GET") for x in hub.requests
    )  # In the cache.


def test_training_knows_the_name_and_goes_on_without_the_hub(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps the name as typed, and what it was when it began."""
    repository = hub.add_folder(NAME, model)
    lora = {"model.lora.rank": 2, "model.lora.base": "float32", "train.checkpoint_every": 1}
    config = config_of(tmp_path, **lora)
    run = tmp_path / "run"
    train(config, run)
    assert json.loads((run / "config.json").read_text())["model"]["path"] == NAME
    folder = json.loads((run / "origin.json").read_text())["paths"]["model.path"]
    assert Path(folder).name == repository.sha
    assert config.model.path == NAME
    repository.files["README.md"] = b"main has moved on"
    (run / "metrics.json").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    train(config, run)
    evaluate(config_of(tmp_path, **{"model.path": ""}), run, "all")
    assert not hub.requests
    export(run, tmp_path / "adapters", adapters=True)
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == NAME
    export(run, tmp_path / "merged")
    assert f'base_model: "{NAME}"' in (tmp_path / "merged" / "README.md").read_text()


def test_no_weights_are_fetched_where_none_are_read(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add_folder(NAME, model)
    config = config_of(tmp_path)
    assert "GB" in dry_run(config, None, ("train",))
    assert any("tokens" in line for line in describe(config, 1))
    assert any("config.json" in request for request in hub.requests)
    assert not any("safetensors" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ("", "someone/Other", "no such folder here, and no such model on the hub"),
        ("", f"{NAME}@v9", "no branch, tag or commit"),
        ("gated", NAME, "gated.*ask for access.*hf auth login"),
        ("offline", NAME, "cannot be reached"),
        ("down", NAME, f"config.model.path={NAME}: "),
        ("no weights", NAME, "no weights"),
    ],
)
def test_what_goes_wrong_is_said(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, change: str, name: str, said: str
) -> None:
    repository = hub.add_folder(NAME, model, gated=change == "gated")
    if change == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if change == "down":
        set_hub(monkeypatch, "http://127.0.0.1:9")
    if change == "no weights":
        del repository.files["model.safetensors"]
        repository.files["pytorch_model.bin"] = b"a pickle"
    with pytest.raises(UserError, match=said) as error:
        load(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_nothing_is_asked_for_a_path(hub: Hub, model: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "./someone/Tiny", "model", str(tmp_path / "no")):
        with pytest.raises(UserError, match="no such folder"):
            load(path)
    load(model)
    assert not hub.requests


def test_push(hub: Hub, model: Path) -> None:
    said = "\n".join(hub_lib.describe_push(model, "me/new", public=False))
    assert "me/new on the hub, private" in said and "model.safetensors" in said
    assert not hub.requests
    address = hub_lib.push_folder(model, "me/new", public=False, message="first")
    new = hub.repositories["me/new"]
    assert address == f"{hub.endpoint}/me/new/commit/{new.sha}"
    assert new.private and new.commits == ["first"]
    assert new.files == {path.name: path.read_bytes() for path in model.iterdir()}
    new.files["model-00002-of-00002.safetensors"] = b"of an earlier model"
    new.files["notes.txt"] = b"somebody's"
    hub_lib.push_folder(model, "me/new", public=True, message="second")
    assert {*new.files} == {path.name for path in model.iterdir()} | {"notes.txt"}
    assert new.private  # It was there.
    load("me/new")


def test_the_command_sends_what_it_writes(hub: Hub, model: Path, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_stand_in", "HF_HUB_OFFLINE": "0"}

    def run(*flags: str) -> str:
        words = (f"--workdir={model.parent / 'run'}", *flags)
        done = command("mass_dpo_jax.export", *words, env={**environment(), **settings})
        return done.stdout + done.stderr

    output = tmp_path / "exported"
    said = run(f"--output={output}", "--push=me/new", "--dry_run")
    assert "me/new on the hub, private if it is new" in said and "model.safetensors" in said
    assert output.exists() and not hub.requests
    assert "--push=OWNER/NAME, which is missing" in run(
        f"--output={tmp_path / 'other'}", "--public"
    )
    assert not (tmp_path / "other").exists()
    said = run(f"--output={tmp_path / 'again'}", "--push=me/new", "--public")
    assert f"sent to {hub.endpoint}/me/new/commit/" in said
    assert not hub.repositories["me/new"].private and not (tmp_path / "other").exists()
    assert "Trained with mass_dpo_jax" in hub.repositories["me/new"].commits[0]


def test_push_of_no_name(hub: Hub, model: Path) -> None:
    for name in ("me", "me/new@v1", "a/b/c", ""):
        with pytest.raises(UserError, match="OWNER/NAME"):
            hub_lib.push_folder(model, name, public=False, message="first")
    assert not hub.requests
