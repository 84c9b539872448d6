"""Active negative selection for multi-negative preference optimization, in JAX and Flax.

The names below are public. Each is imported when it is first used: `import mass_dpo_jax` costs next
to nothing, and commands import what they need.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mass_dpo_jax import losses, metrics, selection
    from mass_dpo_jax.api import Model, Scores, batches, load_model, make_train_step
    from mass_dpo_jax.config import default as default_config
    from mass_dpo_jax.data import load_examples
    from mass_dpo_jax.data.examples import Example
    from mass_dpo_jax.errors import UserError
    from mass_dpo_jax.selection import select_negatives
    from mass_dpo_jax.selection.catalogue import select_from_catalogue
    from mass_dpo_jax.selection.prompts import select_prompts
    from mass_dpo_jax.training.step import TrainState
    from mass_dpo_jax.training.updates import Batches, StepBatch, TrainStep

__version__ = "0.2.0"
__all__ = [
    "Batches",
    "Example",
    "Model",
    "Scores",
    "StepBatch",
    "TrainState",
    "TrainStep",
    "UserError",
    "batches",
    "default_config",
    "load_examples",
    "load_model",
    "losses",
    "make_train_step",
    "metrics",
    "select_from_catalogue",
    "select_negatives",
    "select_prompts",
    "selection",
]

# One of our commands, before it has imported anything.
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
    if sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith("mass_dpo_jax"):
        from mass_dpo_jax.utils import signals

        signals.watch()

# Only tokenizers are used, so silence transformers' advice to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The module that has a public name, and the name's own name in that module if they differ.
_MODULES = {
    "Batches": "training.updates",
    "Example": "data.examples",
    "Model": "api",
    "Scores": "api",
    "StepBatch": "training.updates",
    "TrainState": "training.step",
    "TrainStep": "training.updates",
    "UserError": "errors",
    "batches": "api",
    "default_config": "config:default",
    "load_examples": "data",
    "load_model": "api",
    "make_train_step": "api",
    "select_from_catalogue": "selection.catalogue",
    "select_negatives": "selection",
    "select_prompts": "selection.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    module, _, attribute = _MODULES[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
