"""Folders with a base, data, a template, adapters, and runs that were started there."""

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
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.export import export
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from mass_dpo_jax.training.offline_selection import select_with_model
from mass_dpo_jax.training.updates import Batches
from tests.support.helpers import WORDS, tiny_config
from tests.support.models import hf_config, random_tensors, write_weights

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}{% if m.role == 'assistant' %}<eos>"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


LORA = Lora(2, 8.0, ("query", "down"))


SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def write_base(folder: Path, seed: int = 0) -> Path:
    """Writes a Hugging Face folder with random weights."""
    train_tokenizer([" ".join(WORDS)], 300, folder)
    (folder / "config.json").write_text(json.dumps(hf_config(**SIZES, tie_word_embeddings=True)))
    tensors = random_tensors(load_config(folder), seed=seed)
    write_weights(folder, {name: 0.2 * x for name, x in tensors.items()})
    return folder


def write_adapters(folder: Path, base: Path, alpha: float = 8.0) -> Path:
    """Writes adapters in PEFT's format that add something."""
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
    """Returns the settings of a run of two steps in the folder `home`, by relative paths."""
    paths = {
        "model.path": "base",
        "data.chat_template": "t.jinja",
        "cache_dir": str(home / "cache"),
    }
    steps = {"train.steps": 2, "train.eval_every": 0, "train.learning_rate": 0.03}
    return tiny_config(Path("data.jsonl"), **{**paths, **steps, **changes})


def of_run(run: Path) -> dict[str, Any]:
    """Returns what every command says of a run."""
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


def interrupted(config: Any, run: Path, at: int = 2) -> None:
    """Trains until Ctrl-C comes, just before update `at`."""
    make = Batches.__getitem__

    def stop(self: Batches, step: int) -> Any:
        if step == at:
            raise KeyboardInterrupt
        return make(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__getitem__", stop)
        train(config, run)


# Changes outside of a run's folder that change nothing in it.
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
