r"""What training takes for models of published sizes: the account, from their shapes alone.

    python -m benchmarks.models                                        # the table of docs/models.md
    python -m benchmarks.models --write=DIR --model=Qwen2.5-3B-Instruct

The account is that of `train --config.dry_run=True` with configs/qlora.py on one device, for rows
of the synthetic dataset and a small tokenizer; the last column trains all weights instead
(bfloat16, micro-batches of 8). --write makes a folder with config.json and that tokenizer, without
weights, for the command itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks import machine
from mass_dpo_jax import cli
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate.dry_run import estimate_run, prepare_dry_run
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.training.mesh import abstract_mesh, param_shapes
from mass_dpo_jax.training.setup import Setup

QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768}
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 256}
# Fields of the published config.json files that sizes and computations follow from.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B-Instruct": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "Llama-3.2-3B-Instruct": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "num_hidden_layers": 28,
        "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "Qwen2.5-0.5B-Instruct": QWEN2 | {
        "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B-Instruct": QWEN2 | {
        "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28,
        "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-3B-Instruct": QWEN2 | {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 36,
        "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B-Instruct": QWEN2 | {
        "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
        "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "Qwen3-4B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36,
        "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048,
        "num_hidden_layers": 36, "intermediate_size": 11008, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 65536,
    },
    "Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "sliding_window": None, "max_position_embeddings": 32768,
    },
    "Phi-3-mini-4k-instruct": {"model_type": "phi3", "sliding_window": 2047},
    "phi-4": {
        "model_type": "phi3", "vocab_size": 100352, "hidden_size": 5120, "num_hidden_layers": 40,
        "intermediate_size": 17920, "num_attention_heads": 40, "num_key_value_heads": 10,
        "rope_theta": 250000.0, "max_position_embeddings": 16384,
    },
    "OLMo-2-0425-1B-Instruct": {
        "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 2048, "num_hidden_layers": 16,
        "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
    },
    "OLMo-2-1124-7B-Instruct": {
        "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "gemma-2-2b-it": {"model_type": "gemma2"},
    "gemma-2-9b-it": {
        "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42,
        "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8,
    },
    "gemma-3-270m-it": GEMMA3 | {
        "vocab_size": 262144, "hidden_size": 640, "num_hidden_layers": 18,
        "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1,
        "sliding_window": 512,
    },
    "gemma-3-1b-it": GEMMA3 | {
        "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26,
        "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
        "sliding_window": 512,
    },
    "gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34,
            "intermediate_size": 10240, "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
}  # fmt: skip
BASES = ("nf4", "int8", "bfloat16")
COLUMNS = ["model", "weights, 10^9", "nf4", "int8", "bfloat16", "all weights"]
CARD_GB = 24


@dataclasses.dataclass(frozen=True)
class Account:
    """What training a model takes.

    Attributes:
        name: its name on the hub, without its maker's.
        weights: how many it has.
        peaks: bytes of one device at most, by the type of the frozen weights beside adapters.
        whole: the same where all weights are trained.
    """

    name: str
    weights: int
    peaks: dict[str, int]
    whole: int

    @property
    def row(self) -> list[str]:
        """The cells of `COLUMNS`: GB of 10^9 bytes."""
        peaks = [self.peaks[base] for base in BASES]
        return [
            self.name,
            f"{self.weights / 1e9:.2f}",
            *(f"{x / 1e9:.1f}" for x in (*peaks, self.whole)),
        ]


def make_config(folder: Path) -> ConfigDict:
    """Returns configs/qlora.py with rows of the synthetic dataset."""
    path = Path(config_lib.__file__).parents[1] / "configs/qlora.py"
    spec = importlib.util.spec_from_file_location("qlora", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config: ConfigDict = module.get_config()
    config.model.path = str(folder)
    config.data.update(name="synthetic", chat_template="none", max_train=200)
    config.device_memory_gb = float(CARD_GB)
    return config


def write_folder(name: str, folder: Path) -> None:
    """Writes a model's config.json and a small tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(f"{color} {thing}" for color in ("red", "blue") for thing in ("lake", "hill"))
    train_tokenizer([words], 300, folder)
    (folder / "config.json").write_text(json.dumps(MODELS[name], indent=2) + "\n")


def account(setup: Setup, name: str) -> Account:
    """Computes a model's account with the rows and settings of a setup."""
    decoder = DecoderConfig.from_hf(MODELS[name], name)
    mesh = abstract_mesh(config_lib.default().mesh, 1)

    def estimate(**changes: Any) -> int:
        policy = dataclasses.replace(setup.policy, config=decoder, **changes)
        return estimate_run(dataclasses.replace(setup, policy=policy), mesh).peak

    shapes = jax.tree.leaves(param_shapes(decoder, mesh))
    return Account(
        name,
        sum(math.prod(x.shape) for x in shapes),
        {base: estimate(base_dtype=base) for base in BASES},
        estimate(lora=None),
    )


def accounts() -> list[Account]:
    """Computes the accounts of all `MODELS`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder("Qwen2.5-3B-Instruct", folder)
        setup = prepare_dry_run(make_config(folder), None, ("train",))
        return [account(setup, name) for name in MODELS]


def main() -> None:
    if _WRITE.value is None:
        print(machine.table(COLUMNS, [account.row for account in accounts()]))
        return
    if _MODEL.value not in MODELS:
        raise UserError(f"--model={_MODEL.value}: expected one of {', '.join(MODELS)}")
    write_folder(_MODEL.value, Path(_WRITE.value))


if __name__ == "__main__":
    _WRITE = flags.DEFINE_string("write", None, "A folder to write, for a dry run.")
    _MODEL = flags.DEFINE_string("model", "", "The model whose shape it gets.")
    cli.run(main)
