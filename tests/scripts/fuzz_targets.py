"""Everything that reads files, each with small valid ones to spoil: what `fuzz.py` runs.

A target writes its files into a folder and reads them again as the commands do. Whatever becomes of
the files, reading must end well or in a `UserError` that says where; `read_spoilt` checks that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import transformers
from flax import nnx
from safetensors.numpy import save_file

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.compare import compare
from mass_dpo_jax.data import load_examples, token_cache
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.peft_format import load_peft, load_peft_settings, save_peft
from mass_dpo_jax.models.weights import load_hf
from mass_dpo_jax.report import make_report
from mass_dpo_jax.runs import metrics_files, run_config, run_folder
from mass_dpo_jax.runs.metrics_files import read_metrics_log
from mass_dpo_jax.runs.run_folder import latest_step
from mass_dpo_jax.train import train
from mass_dpo_jax.training import mesh
from mass_dpo_jax.training.checkpoint import Checkpoints
from mass_dpo_jax.training.loop import SPLITS
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.offline_selection import select_with_features
from mass_dpo_jax.training.optimizer import learning_rate, make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import abstract_state
from mass_dpo_jax.utils import cache
from tests.data import test_calls
from tests.data.formats.cases import CASES, UNPAIRED, label_rows
from tests.data.readers import test_medmcqa, test_qasc, test_sequences
from tests.support.data import write_lines
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.models import hf_config, random_tensors, write_weights
from tests.support.tokenizers import settings, small

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("content", "missing", "folder", "dangling link")


@dataclasses.dataclass(frozen=True)
class Target:
    """Attributes:
    make: writes valid files into an empty folder.
    read: reads them; a generator's every step is a reading of its own.
    files: patterns of the files to spoil.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Iterator[Callable[[], Any]]]
    files: tuple[str, ...] = ("**/*",)


def read_spoilt(target: Target, folder: Path) -> int:
    """Reads a folder; how many of the readings were refused.

    Raises:
      Exception: any but a UserError that is one line and says where.
    """
    refused = 0
    for read in target.read(folder):
        try:
            read()
        except UserError as error:
            check_message(str(error), folder)
            refused += 1
    return refused


def check_message(message: str, folder: Path) -> None:
    places = (str(folder), "config.", "--")
    if not any(place in message for place in places):
        raise AssertionError(f"says nothing of where: {message!r}")
    if not message.isprintable() or len(message) > 2000:
        raise AssertionError(f"is not one short line: {message[:3000]!r}")


# Data.


def _data(name: str, **changes: Any) -> Callable[[Path], Iterator[Callable[[], Any]]]:
    def load(folder: Path, split: str, on_bad_row: str) -> None:
        template = "none" if split == "train" else str(folder.parent / "chatml.jinja")
        data = settings(template, {"num_candidates": 5, "long_response": "drop", **changes})
        data.update(name=name, path=str(folder), on_bad_row=on_bad_row)
        tokenize(load_examples(data, split, 0), small(), data, progress=False)

    def read(folder: Path) -> Iterator[Callable[[], Any]]:
        (folder.parent / "chatml.jinja").write_text(CHATML)
        for split in ("train", "test"):
            for on_bad_row in ("error", "skip"):
                yield functools.partial(load, folder, split, on_bad_row)

    return read


def _jsonl(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", examples=4)
    user = {"role": "user", "content": "q"}
    answers = [[{"role": "assistant", "content": c}] for c in "abc"]
    rows = [
        {"id": 1, "prompt": [user], "chosen": answers[0], "rejected": answers[1:]},
        {"chosen": [user, *answers[0]], "rejected": [user, *answers[1]]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 0.5},
    ]
    write_lines(folder / "test.jsonl", rows)


def _written(folder: Path) -> None:
    """Rows that went through CSV: lists and messages are text, as JSON and as Python prints it."""
    user = {"role": "user", "content": "it's q"}
    answers = [[{"role": "assistant", "content": c}] for c in "abc"]
    rows = [
        {"prompt": str([user]), "chosen": json.dumps(answers[0]), "rejected": str(answers[1:])},
        {"prompt": "p", "chosen": "a", "rejected": "['b', \"it's c\"]", "tools": [None]},
        {"prompt": user, "chosen": answers[0][0], "rejected": [None, answers[1][0]], "system": "s"},
    ]
    write_lines(folder / "eval.jsonl", rows)
    write_lines(folder / "train.jsonl", [rows[1]] * 2)


@functools.cache
def _format_files() -> dict[str, list[dict[str, Any]]]:
    """A file of each format of other programs, and of rows with calls and tools, by its name."""
    files = {name: [make(i) for i in range(3)] for name, (_, make, _) in CASES.items()}
    files |= {f"labels, {name}": label_rows(name, 0) for name in UNPAIRED}
    files |= {f"calls {i}": [row] for i, row in enumerate(test_calls.list_rows())}
    return files


def _formats(folder: Path) -> None:
    for name, rows in _format_files().items():
        write_lines(folder / f"{name}.jsonl", rows)


def _read_formats(folder: Path) -> Iterator[Callable[[], Any]]:
    """Reads the files that are not as they were, or all, with a template and as text."""
    template = folder.parent / "calls.jinja"
    template.write_text(test_calls.CALLS_AND_TOOLS)

    def load(path: Path, on_bad_row: str) -> None:
        data = settings(str(template), {"long_response": "drop", "on_bad_row": on_bad_row})
        group = "prompt" if path.name.startswith("labels") else "none"
        data.update(name="preferences", path=str(path), group=group, max_response_length=1000)
        tokenize(load_examples(data, "all", 0), small(), data, progress=False)

    files = [folder / f"{name}.jsonl" for name in _format_files()]
    spoilt = [path for path in files if not path.is_file() or not _is_whole(path)]
    for path in spoilt or files:
        for on_bad_row in ("error", "skip"):
            yield functools.partial(load, path, on_bad_row)


def _is_whole(path: Path) -> bool:
    rows = _format_files()[path.stem]
    return path.read_bytes() == "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _qasc(folder: Path) -> None:
    row = test_qasc.row
    write_lines(folder / "train.jsonl", [row(i, "A") for i in range(3)])
    write_lines(folder / "test.jsonl", [row(i, None) for i in range(2)])
    hub = [{**test_qasc.on_the_hub(row(i, "B")), "id": i} for i in range(3)]
    write_lines(folder / "dev.jsonl", hub)


def _lastfm(folder: Path) -> None:
    row = {"historyList": "A::B, C::D", "itemList": ["x", "y", "z; w", "v"], "trueSelection": "y"}
    for split in ("train", "test"):
        (folder / f"lastfm-{split}.json").write_text(json.dumps([row, row], indent=1))


def _hetrec(folder: Path) -> None:
    test_sequences.hetrec(folder)


def _medmcqa(folder: Path) -> None:
    for split, count in (("train", 6), ("dev", 2)):
        rows = [test_medmcqa.row(i, 1 + i % 4) for i in range(count)]
        write_lines(folder / f"{split}.json", [*rows, test_medmcqa.row(9, 4)])


def _table(count: int) -> datasets.Dataset:
    row = {"chosen": "a", "rejected": ["b", "c"], "score_chosen": 1.0, "score_rejected": [0.0, 0.5]}
    return datasets.Dataset.from_list([{"prompt": f"p{i}", **row} for i in range(count)])


def _saved(folder: Path) -> None:
    datasets.DatasetDict(train=_table(4), test=_table(2)).save_to_disk(folder)


def _parquet(folder: Path) -> None:
    (folder / "data").mkdir()
    for split in ("train", "test"):
        _table(3).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    files = [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test")]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# Rows\n")


# Tokenizers and what they are used for.


def _tokenizer(folder: Path) -> None:
    words = ["amber basil cedar delta"] * 3
    train_tokenizer(words, 264, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    alone = folder / "alone"
    train_tokenizer(words, 262, alone)
    (alone / "tokenizer_config.json").unlink()
    (alone / "chat_template.jinja").write_text(CHATML)
    (alone / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2]}')


def _read_tokenizer(folder: Path) -> Iterator[Callable[[], Any]]:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answers = [[{"role": "assistant", "content": c}] for c in "ab"]
    texts = Example("0", "amber", "a", ("b",), f"{folder} row 0")
    messages = Example("1", chat, answers[0], (answers[1],), f"{folder} row 1")

    def use(place: Path, template: str, example: Example) -> None:
        tokenize([example], load_tokenizer(place), settings(template), progress=False)

    for place in (folder, folder / "alone"):
        yield functools.partial(use, place, "none", texts)
        yield functools.partial(use, place, "tokenizer", texts)
        yield functools.partial(use, place, "tokenizer", messages)


# Caches.


@functools.cache
def _examples() -> list[Example]:
    return [Example(f"{i}", f"p{i}", "a", ("b", "cc"), f"f:{i}", (2.0, 1.0, 0.0)) for i in range(3)]


def _cached_tokens(folder: Path) -> Any:
    least, token_cache.MIN_RESPONSES = token_cache.MIN_RESPONSES, 0
    try:
        data = settings("none")
        return token_cache.tokenize_once(folder, _examples(), small(), data, progress=False)
    finally:
        token_cache.MIN_RESPONSES = least


def _read_caches(folder: Path) -> Iterator[Callable[[], Any]]:
    logps = np.arange(6, dtype=np.float32).reshape(2, 3)

    def tokens() -> None:
        found, want = _cached_tokens(folder), tokenize(_examples(), small(), settings("none"),
                                                       progress=False)  # fmt: skip
        assert found.ids == want.ids and found.cut == want.cut
        for field in dataclasses.fields(want):
            value = getattr(want, field.name)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(found, field.name), value, field.name)

    def reference() -> None:
        found = cache.load_or_compute(folder, "ref_logps", "key", lambda: logps)
        np.testing.assert_array_equal(found, logps)

    yield tokens
    yield reference


def _caches(folder: Path) -> None:
    for read in _read_caches(folder):
        read()


# Models.


def _model(folder: Path) -> None:
    for family in ("llama", "smollm3"):
        place = folder / family
        place.mkdir()
        described = hf_config(
            family, num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=2,
            head_dim=4, vocab_size=11, architectures=None, layer_types=["full_attention"] * 2,
        )  # fmt: skip
        described |= {"no_rope_layers": [1, 0], "rope_scaling": None, "quantization_config": None}
        (place / "config.json").write_text(json.dumps(described))
        tensors = random_tensors(DecoderConfig.from_hf(described, "config.json"))
        if family == "llama":
            write_weights(place, tensors)
            continue
        names = list(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for name, part in parts.items():
            save_file({n: np.ascontiguousarray(tensors[n]) for n in part}, place / name)
        weight_map = {tensor: name for name, part in parts.items() for tensor in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _read_model(folder: Path) -> Iterator[Callable[[], Any]]:
    for family in ("llama", "smollm3"):
        yield lambda place=folder / family: load_hf(place, load_config(place))


def _adapters(folder: Path) -> None:
    _model(folder)
    config = load_config(folder / "llama")
    sizes = {name: config.projections[name][0] for name in ("query", "down")}
    adapters = {
        name: {"a": np.ones((2, shape[0], 3), "f4"), "b": np.ones((2, 3, shape[1]), "f4")}
        for name, shape in sizes.items()
    }
    save_peft(folder, adapters, Lora(3, 6.0, ("query", "down")), "base")


def _read_adapters(folder: Path) -> Iterator[Callable[[], Any]]:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read() -> Any:
        lora = load_peft_settings(folder)
        config = load_config(folder / "llama")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            nnx.to_pure_dict(nnx.state(abstract_decoder(config, lora=lora), nnx.Param))["adapters"],
        )
        return load_peft(folder, config, like)

    yield read


# Run folders.


@functools.cache
def _trained() -> Path:
    """Two small runs on the same data, trained once for all targets."""
    folder = Path(tempfile.mkdtemp(prefix="mass_dpo_jax_fuzz_"))
    data = write_jsonl(folder / "data.jsonl", examples=30)
    one_device = jax.devices()[:1]
    make_mesh = mesh.make_mesh
    mesh.make_mesh = lambda config: make_mesh(config, devices=one_device)
    try:
        for name in ("first", "second"):
            train(tiny_config(data, cache_dir=str(folder / "cache")), folder / name)
    finally:
        mesh.make_mesh = make_mesh
    shutil.rmtree(folder / "cache")
    return folder


def _runs(folder: Path) -> None:
    shutil.copytree(_trained(), folder, dirs_exist_ok=True)
    for name in ("first", "second"):
        path = folder / name / "config.json"
        path.write_text(path.read_text().replace(str(_trained()), str(folder)))


def _read_runs(folder: Path) -> Iterator[Callable[[], Any]]:
    run = folder / "second"

    def again() -> None:
        config = run_config.load_config(run)
        config_checks.check(config)
        if latest_step(run) is not None and (run / "metrics.json").exists():
            train(config, run)  # Finished: there is nothing to do.

    def log() -> None:
        with tempfile.TemporaryDirectory() as copy:
            if (run / "metrics.jsonl").is_file():
                shutil.copy(run / "metrics.jsonl", copy)
            metrics_files.MetricsLog(Path(copy), 2).close()

    yield again
    yield log
    yield lambda: read_metrics_log(run / "metrics.jsonl")
    yield lambda: compare([folder / "first", run])


def _read_report(folder: Path) -> Iterator[Callable[[], Any]]:
    with tempfile.TemporaryDirectory() as output:
        yield lambda: make_report([folder], Path(output))


def _read_checkpoint(folder: Path) -> Iterator[Callable[[], Any]]:
    run = folder / "second"
    config = run_config.load_config(run)
    yield lambda: restore(run, config)


def restore(run: Path, config: Any) -> None:
    """The run's newest state and, as other commands do, its weights alone."""
    setup = prepare(config, run, SPLITS)
    setup.policy.weights(str(run), 0)
    with contextlib.closing(Checkpoints(run)) as saved:
        if saved.latest() is not None:
            saved.restore(abstract_state(setup, make_optimizer(config.train, 4)))


def _settings(folder: Path) -> None:
    run_folder.write_json(folder / "config.json", config_lib.default().to_dict())


def _read_settings(folder: Path) -> Iterator[Callable[[], Any]]:
    def use() -> None:
        config = run_config.load_config(folder)
        mesh.make_mesh(config.mesh, devices=jax.devices()[:1])
        make_method(config, largest_pool=5)
        make_optimizer(config.train, 10)
        learning_rate(config.train, 10)(3)

    yield use


def _features(folder: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 4, 3)).astype(np.float32)
    np.save(folder / "features.npy", features)
    scores, mask = np.zeros((2, 3), np.float32), np.ones((2, 3), bool)
    save_file(
        {"features": features, "scores": scores, "mask": mask}, folder / "features.safetensors"
    )


def _read_features(folder: Path) -> Iterator[Callable[[], Any]]:
    def select(name: str) -> None:
        config = config_lib.default()
        config.num_negatives = 2
        list(select_with_features(config, folder / name, None))

    for name in ("features.npy", "features.safetensors"):
        yield functools.partial(select, name)


TARGETS: Mapping[str, Target] = {
    "jsonl": Target(_jsonl, _data("jsonl")),
    "written": Target(_written, _data("jsonl")),
    "formats": Target(_formats, _read_formats),
    "qasc": Target(_qasc, _data("qasc")),
    "lastfm": Target(_lastfm, _data("lastfm")),
    "movielens": Target(test_sequences.ml_100k, _data("movielens")),
    "hetrec": Target(_hetrec, _data("lastfm")),
    "medmcqa": Target(_medmcqa, _data("medmcqa")),
    "saved": Target(_saved, _data("hub")),
    "parquet": Target(_parquet, _data("hub")),
    "tokenizer": Target(_tokenizer, _read_tokenizer),
    "caches": Target(_caches, _read_caches),
    "model": Target(_model, _read_model),
    "adapters": Target(_adapters, _read_adapters, ("adapter_*",)),
    "features": Target(_features, _read_features),
    "runs": Target(_runs, _read_runs, ("second/*.json*", "second/*.npy")),
    "report": Target(_runs, _read_report, ("second/*.json*", "second/*.npy")),
    "checkpoint": Target(_runs, _read_checkpoint, ("second/checkpoints/**/*",)),
    "settings": Target(_settings, _read_settings),
}


class Spoiler:
    """A target's folder, of which one file at a time is spoilt and made whole again."""

    def __init__(self, name: str, folder: Path):
        self.target, self.folder = TARGETS[name], folder / "files"
        self.folder.mkdir()
        self.target.make(self.folder)
        found = {path for pattern in self.target.files for path in self.folder.glob(pattern)}
        self.files = sorted(path for path in found if path.is_file())
        self.whole = [path.read_bytes() for path in self.files]
        refused = read_spoilt(self.target, self.folder)
        assert not refused, f"{name}: valid files were refused"

    def read(self, number: int, kind: str, content: bytes) -> None:
        """Reads the folder with file `number` spoilt.

        Raises:
          Exception: see `read_spoilt`.
        """
        path = self.files[number]
        _remove(path)
        if kind == "content":
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "dangling link":
            path.symlink_to("nowhere")
        try:
            read_spoilt(self.target, self.folder)
        finally:
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.whole[number])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def quiet() -> None:
    """What the libraries say about broken files is not what is tested."""
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
