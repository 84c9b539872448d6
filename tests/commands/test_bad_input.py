"""Files that once ended in a traceback, or in wrong numbers: one small case for each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.render import make_renderer
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.reports.comparison import read_logps
from mass_dpo_jax.reports.paper import runs
from mass_dpo_jax.runs import metrics_files, run_config, run_folder
from mass_dpo_jax.training.checkpoint import Checkpoints
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.utils.cache import load_or_compute
from mass_dpo_jax.utils.files import parse_json, read_array
from tests.support.data import load, write_lines
from tests.support.models import hf_config
from tests.support.tokenizers import settings, small

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested too deeply"),  # Python reads it, and fails to print it.
        (LONG, "too many digits"),
        ('{"a": }', "Expecting value at column 7"),
        ("", "Expecting value"),
    ],
)
def test_json(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^file:3: invalid JSON: .*{message}"):
        parse_json(text, Path("file"), 3)


@pytest.mark.parametrize("text", [DEEP, LONG])
def test_json_in_every_reader(tmp_path: Path, text: str) -> None:
    readers: dict[str, Callable[[Path], Any]] = {
        "train.jsonl": lambda path: load("jsonl", path, "train"),
        "train.json": lambda path: load("lastfm", path, "train"),
        "config.json": lambda path: load_config(path.parent),
        "metrics.json": lambda path: metrics_files.read_metrics_json(path.parent),
    }
    for name, read in readers.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}:1: invalid JSON"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"config.json:1: invalid JSON"):
        run_config.load_config(tmp_path)


_QUESTION = {"role": "user", "content": "q"}
_CALL = {"id": "1", "function": {"name": "f", "arguments": {"a": "b"}}}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "\ud800", "content": "p"}, r"prompt\[0\].role' has half a surrogate pair"),
        ({"role": "user", "content": "\ud800"}, r"prompt\[0\].content' has half a surrogate pair"),
        ({"id": "\ud800"}, r"prompt\[0\].tool_calls\[0\]' is not for JSON.*surrogates"),
        ({"function": {"name": "\ud800"}}, r"tool_calls\[0\].function.name' has half a surrogate"),
        (
            {"function": {"name": "f", "arguments": {"\ud800": 1}}},
            r"prompt\[0\].tool_calls\[0\]' is not for JSON.*surrogates",
        ),
    ],
)
def test_half_a_surrogate_pair_in_a_message(
    tmp_path: Path, message: dict[str, Any], error: str
) -> None:
    if "role" not in message:
        message = {"role": "assistant", "content": "", "tool_calls": [_CALL | message]}
    row = {"prompt": [message, _QUESTION], "chosen": "a", "rejected": ["b"]}
    with pytest.raises(UserError, match=error):
        load("jsonl", write_lines(tmp_path / "file.jsonl", [row]))


def test_half_a_surrogate_pair_in_a_tool(tmp_path: Path) -> None:
    tools = [{"name": "f", "description": "\ud800"}]
    row = {"prompt": "p", "chosen": "a", "rejected": ["b"], "tools": tools}
    with pytest.raises(UserError, match=r"file.jsonl:1: field 'tools\[0\]' is not for JSON"):
        load("jsonl", write_lines(tmp_path / "file.jsonl", [row]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", ["llama"]),
        ("architectures", 3),
        ("layer_types", 1.5),
        ("eos_token_id", {"a": 1}),
        ("eos_token_id", [1, "a"]),
        ("bos_token_id", "a"),
        ("num_hidden_layers", 10**9),
        ("hidden_size", 2**31),
        ("rms_norm_eps", 10**400),
        ("rms_norm_eps", float("nan")),
    ],
)
def test_a_decoder_of_wrong_types(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^config.json: {field}: found "):
        DecoderConfig.from_hf(hf_config() | {field: value}, "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", None),
        ("beta", float("inf")),
        ("beta", 10**400),
        ("seed", True),
        ("seed", 2**31),
        ("train.steps", "4"),
        ("train.steps", 1.5),
        ("model.scratch.num_heads", 0),
        ("selection.refresh", LONG),
    ],
)
def test_settings_of_a_run(tmp_path: Path, name: str, value: Any) -> None:
    config: Any = config_lib.default().to_dict()
    *parents, leaf = name.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[leaf] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: config.{name}="):
        run_config.load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.micro_batch_size", 48, "batch_size=128 is no multiple of .*micro_batch_size=48"),
        ("train.micro_batch_size", 0, "micro_batch_size=0: expected a number above 0"),
        ("train.epochs", 0, "nothing to train"),
        ("train.eval_every", -1, "eval_every=-1: expected 0 or more"),
        ("data.validation_share", 1.0, "validation_share=1.0: expected 0 to 1"),
        ("selection.refresh", "0", "refresh='0': expected step, epoch, once or a number"),
        ("model.lora.rank", 8, "model.path is missing"),
    ],
)
def test_settings_that_no_run_could_use(name: str, value: Any, message: str) -> None:
    config = config_lib.default()
    config_checks.check(config)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        config_checks.check(config)


def test_the_report_says_which_settings_are_unreadable(tmp_path: Path) -> None:
    config: Any = config_lib.default().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"method": 7}))
    (tmp_path / "metrics.jsonl").write_text("")
    [run] = runs.find_runs([tmp_path])
    assert run.state == "unreadable: config.json: config.method=7: expected a string"


def test_metrics_of_a_run(tmp_path: Path) -> None:
    whole = {"finished": True, "step": 1, "split": "test", "examples": 1, "digest": "", "start": {}}
    wrong: list[Any] = [[], {**whole, "finished": 1}, {**whole, "start": {"a": None}}]
    for content in wrong:
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"metrics.json: "):
            metrics_files.read_metrics_json(tmp_path)


def test_a_file_that_cannot_be_put_in_place_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_text("of somebody else")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json: cannot be written"):
        run_folder.write_json(tmp_path / "a.json", {})
    run_folder.write_json(tmp_path / "a.jsonl", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.tmp", "a.json", "a.jsonl"}
    assert (tmp_path / "a.tmp").read_text() == "of somebody else"


def test_a_log_with_other_lines_is_cut_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[]\n{"step": 2}\n')
    metrics_files.MetricsLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape':} (2, 3), }",
        "{'descr': '<04', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, %s), }" % ("9" * 30),
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<M8', 'fortran_order': False, 'shape': (2, 3), }",
    ],
)
def test_arrays(tmp_path: Path, header: str) -> None:
    text = header.ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"a.npy: "):
        read_array(tmp_path / "a.npy")


def test_log_probs_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (np.zeros(3), np.zeros((0, 3))):
        np.save(path, array)
        with pytest.raises(UserError, match=r"a.npy: "):
            read_logps(path)


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    train_tokenizer(["amber"], 260, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(content))
    example = Example("0", "amber", "a", ("b",), "row")
    with pytest.raises(UserError, match=f"^{tmp_path}: the tokenizer "):
        tokenize([example], load_tokenizer(tmp_path), settings("none"), progress=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].role - 1 }}",
        "{{ '%s' % (1, 2) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(10**9) %}a{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ '\\ud800' }}",
        "{{ (",
    ],
)
def test_a_template_that_fails(tmp_path: Path, template: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    renderer = make_renderer(small(), settings(str(file)))
    with pytest.raises(UserError, match=r"^row 7: the chat template fails on "):
        renderer.render_prompt("p", "row 7")


def test_several_templates_without_a_default(tmp_path: Path) -> None:
    train_tokenizer(["amber"], 260, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": name, "template": "a"} for name in ("tool_use", "rag")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    with pytest.raises(UserError, match=r"config.data.chat_template='tokenizer': .*tool_use"):
        make_renderer(load_tokenizer(tmp_path), settings("tokenizer"))


def test_a_changed_number_in_the_cache_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert load_or_compute(tmp_path, "refs", "key", lambda: want) is want
    [file] = tmp_path.iterdir()
    assert np.array_equal(
        load_or_compute(tmp_path, "refs", "key", lambda: pytest.fail("made again")), want
    )
    whole = file.read_bytes()
    for at in (0, 60, len(whole) - 40, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with caplog.at_level(logging.WARNING, "mass_dpo_jax"):
            assert load_or_compute(tmp_path, "refs", "key", lambda: want) is want
        assert f"{file}: not what was written" in caplog.text
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "mass_dpo_jax"):
        assert load_or_compute(tmp_path / "file" / "a", "refs", "key", lambda: np.ones(3)).all()
    assert "is not kept" in caplog.text


def test_a_broken_checkpoint(tmp_path: Path) -> None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = jax.device_put(np.int32(1), here)
    state = TrainState(step, {"w": jax.numpy.ones((4, 4))}, {"mu": jax.numpy.ones(3)})
    saved = Checkpoints(tmp_path)
    saved.save(state, None, {})
    saved.close()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    saved = Checkpoints(tmp_path)
    found = saved.restore(like)
    assert np.array_equal(found.state.params["w"], state.params["w"])
    for file in (tmp_path / "checkpoints" / "1" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"none of its checkpoints can be read \(step 1\)"):
        saved.restore(like)
    saved.close()
    metadata = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"performance_metrics": "a"}))
    with pytest.raises(UserError, match="checkpoints: not a readable checkpoint"):
        Checkpoints(tmp_path).save(state._replace(step=step + 1), None, {})
