"""No pickle, no code of a model's folder, no file elsewhere, no network: in the source, and run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.tokenizer import load_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.weights import INDEX, load_hf
from mass_dpo_jax.training.model_paths import find_description
from mass_dpo_jax.utils.files import read_array
from tests.support.helpers import write_jsonl
from tests.support.models import hf_config
from tests.support.processes import environment, python
from tests.support.tokenizers import small

ROOT = Path(__file__).parent.parent
RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}


def breaches(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"import {name}" for name in names if name.split(".")[0] in RUN_CODE)
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "__import__"):
            yield called
        if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield f"{called} without allow_pickle=False"
        if called.endswith("from_pretrained") and given.get("trust_remote_code") != "False":
            yield f"{called} without trust_remote_code=False"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{called} with trust_remote_code"


def test_the_search_finds_what_it_looks_for() -> None:
    source = (
        "import pickle\nfrom torch import nn\neval('1')\n"
        "np.load(p)\nnp.load(p, allow_pickle=True)\n"
        "A.from_pretrained(p)\nload_dataset(p, trust_remote_code=True)"
    )
    assert len(list(breaches(source))) == 7


@pytest.mark.parametrize("folder", ["mass_dpo_jax", "configs"])
def test_nothing_in_the_source_runs_what_it_reads(folder: str) -> None:
    found = {
        f"{path}: {breach}"
        for path in (ROOT / folder).rglob("*.py")
        for breach in breaches(path.read_text())
    }
    assert not found


def audited(folder: Path, module: str, *words: str) -> list[str]:
    """What the hook of `audited.py` had to say of a command that ended well."""
    report = folder / "report"
    report.unlink(missing_ok=True)
    home = {name: str(folder / "home") for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR")}
    (folder / "home").mkdir(exist_ok=True)
    variables = environment(**home, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    variables.pop("HF_HUB_OFFLINE")
    done = python(ROOT / "tests/support/audited.py", report, folder, module, *words, env=variables)
    assert done.returncode == 0, done.stderr
    return report.read_text().splitlines()


def test_the_hook_sees_what_it_watches(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "pickled").write_bytes(pickle.dumps(Path))
    (elsewhere / "read").write_text("")
    program = tmp_path / "inside" / "program.py"
    program.write_text(
        f"import pickle, socket\npickle.load(open({str(inside / 'pickled')!r}, 'rb'))\n"
        f"open({str(elsewhere / 'read')!r})\nopen({str(elsewhere / 'written')!r}, 'w')\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n    pass\n"
    )
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r});"
        "from tests.support import audited;"
        f"audited.watch(audited.Path({str(tmp_path / 'report')!r}), [{str(inside)!r}]);"
        f"runpy.run_path({str(program)!r})"
    )
    python("-c", code, check=True, env=environment(TMPDIR=str(inside)))
    found = (tmp_path / "report").read_text()
    for words in ("pickle.find_class", "socket.connect", "read to read", "written to write"):
        assert words in found


@pytest.mark.slow(reason="three processes under an audit hook")
def test_a_run_unpickles_nothing_and_stays_in_its_folders(tmp_path: Path) -> None:
    """Trains with a checkpoint, goes on from it, evaluates: orbax, too, unpickles nothing.

    Without the report, whose matplotlib asks the system for fonts, and without TensorBoard, whose
    events go to a writer by a queue that pickles: both within this process, of nothing read.
    """
    data = write_jsonl(tmp_path / "data.jsonl")
    changes = {
        "data.path": data, "data.chat_template": "none", "train.batch_size": 8,
        "train.micro_batch_size": 8, "train.eval_every": 0, "train.steps": 2,
        "train.checkpoint_every": 1, "model.scratch.hidden_size": 32, "model.scratch.num_layers": 1,
        "model.scratch.intermediate_size": 48, "model.scratch.vocab_size": 300,
        "cache_dir": tmp_path / "cache", "data.name": "jsonl",
        "log.report": False, "log.tensorboard": False,
    }  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in changes.items()]
    run = f"--workdir={tmp_path / 'run'}"
    config = f"--config={ROOT / 'mass_dpo_jax' / 'config.py'}"
    assert audited(tmp_path, "mass_dpo_jax.train", config, *words, run) == []
    # As if interrupted after its first step.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert audited(tmp_path, "mass_dpo_jax.train", run) == []
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert audited(tmp_path, "mass_dpo_jax.evaluate", run) == []


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on the terminal"))
    small().save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass Own:\n    pass\n"
    for name in ("own.py", "tokenization_own.py", "configuration_own.py", "__init__.py"):
        (tmp_path / name).write_text(code)
    auto = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({**hf_config(), "auto_map": auto}))
    path = tmp_path / "tokenizer_config.json"
    known = json.loads(path.read_text())
    for changes in ({"auto_map": auto}, {"auto_map": auto, "tokenizer_class": "Own"}):
        path.write_text(json.dumps(known | changes))
        try:
            load_tokenizer(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
        load_config(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x", "..", "a\\x"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="expected a plain file name"):
        load_hf(tmp_path, load_config(tmp_path))


def test_links_out_of_a_model_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    (model / "copy.json").symlink_to("tokenizer.json")
    assert find_description(model) == model
    (model / "config.json").symlink_to("../secret")
    with pytest.raises(UserError, match=r"config.json: a link to .*secret"):
        find_description(model)


def test_links_in_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "4567").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    assert find_description(snapshot) == snapshot
    (snapshot / "tokenizer.json").symlink_to("../../../other")
    with pytest.raises(UserError, match=r"tokenizer.json: a link to"):
        find_description(snapshot)


def read_hub(path: Path) -> Any:
    data = default().data
    data.update(name="hub", path=str(path))
    return load_examples(data, "train", 0)


def rows() -> Dataset:
    return Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": ["b"]}] * 2)


def test_a_saved_dataset_names_files_of_its_folder_only(tmp_path: Path) -> None:
    rows().save_to_disk(tmp_path / "secret")
    DatasetDict(train=rows()).save_to_disk(tmp_path / "data")
    assert read_hub(tmp_path / "data")
    state = tmp_path / "data" / "train" / "state.json"
    whole = state.read_text()
    content = json.loads(whole)
    content["_data_files"] = [{"filename": "../../secret/data-00000-of-00001.arrow"}]
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"state.json: names '../../secret"):
        read_hub(tmp_path / "data")
    state.write_text(whole)
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    with pytest.raises(UserError, match=r"dataset_dict.json: names '../secret'"):
        read_hub(tmp_path / "data")


@pytest.mark.parametrize(
    "name", ["../secret.parquet", "https://example.org/a.parquet", "hf://datasets/a/b/c.parquet"]
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_dataset_card_names_files_of_its_folder_only(
    tmp_path: Path, name: str, card: str
) -> None:
    (tmp_path / "data").mkdir()
    rows().to_parquet(tmp_path / "data" / "train.parquet")
    rows().to_parquet(tmp_path / "secret.parquet")
    assert read_hub(tmp_path / "data")
    text = json.dumps({"configs": [{"config_name": "default", "data_files": name}]})
    text = f"---\r\n{text}\r\n---\r\n" if card == "README.md" else text
    (tmp_path / "data" / card).write_text(text)
    with pytest.raises(UserError, match=f"{card}: names '{name[:8]}"):
        read_hub(tmp_path / "data")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Path], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a.npy: not a .npy file"):
        read_array(tmp_path / "a.npy")
