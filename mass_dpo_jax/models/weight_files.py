"""The safetensors files of a Hugging Face folder: which tensor is where, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.folder import (
    CUT_SHORT,
    INDEX,
    describe_damage,
    explain_missing_weights,
    warn_once,
)
from mass_dpo_jax.models.folder import WEIGHTS as SINGLE
from mass_dpo_jax.models.tensors import check_type, open_tensors, suggest_tensor
from mass_dpo_jax.utils.files import find_home, read_json

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# How the names of a text model begin where it is part of a multimodal one, and how elsewhere.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


class WeightFiles:
    """The open files of one folder.

    Tensors are called by their names in a model of text alone. Those of a multimodal model's other
    parts are left alone, and named once.
    """

    def __init__(self, folder: Path, config: DecoderConfig):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a Hugging Face model")
        self.config = config
        index = folder / INDEX
        if (folder / SINGLE).is_file():
            self.listing = folder / SINGLE  # What messages about the whole name.
            weight_map = None
            names = [SINGLE]
        elif index.is_file():
            self.listing = index
            weight_map = _read_index(index)
            names = sorted(set(weight_map.values()))
        else:
            raise UserError(f"{folder}: {explain_missing_weights(folder)}")
        present = {path.name for path in folder.iterdir() if path.is_file()}
        if missing := [name for name in names if name not in present]:
            raise UserError(
                f"{self.listing}: names {missing[0]}, which is not in the folder ({len(missing)} "
                f"of {len(names)} files are missing); {CUT_SHORT}"
            )
        self._paths: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for name in names:
            path = folder / name
            self._open[path] = open_tensors(path)
            self._paths |= dict.fromkeys(self._open[path].keys(), path)
        for tensor, name in (weight_map or {}).items():
            if self._paths.get(tensor) != folder / name:
                raise UserError(f"{folder / name}: missing tensor {tensor}, which {INDEX} lists")
        home = find_home(folder)
        if outside := [path for path in self._open if not path.resolve().is_relative_to(home)]:
            warn_once(
                f"{folder}: {len(outside)} of {len(names)} files of weights are links to "
                f"elsewhere; {outside[0].name} is read from {outside[0].resolve()}"
            )
        self._stored = {name: name for name in self._paths}
        if config.part_of:
            self._stored = _find_text_model(self._paths)
            others = self._paths.keys() - set(self._stored.values())
            parts = {name.removeprefix("model.").partition(".")[0] for name in others}
            warn_once(
                f"{folder}: only the text model of a {config.part_of} model is read; "
                f"{len(others)} tensors of others are left alone ({', '.join(sorted(parts))})"
            )

    def find(self, name: str) -> tuple[Path, str]:
        """Returns the file that has a tensor, and its name there."""
        stored = self._stored[name]
        return self._paths[stored], stored

    def _get(self, name: str) -> Any:
        """Returns a tensor, to be sliced."""
        path, stored = self.find(name)
        return self._open[path].get_slice(stored)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError unless the files hold exactly tensors of these shapes."""
        for name, shape in shapes.items():
            if name not in self._stored:
                hint = suggest_tensor(name, sorted(self._paths))
                raise UserError(f"{self.listing}: missing tensor {name}, shape {list(shape)}{hint}")
            path, stored = self.find(name)
            if (found_shape := self._get(name).get_shape()) != list(shape):
                raise UserError(
                    f"{path}: tensor {stored}: found shape {found_shape}, expected {list(shape)}"
                )
            check_type(self._open[path], path, stored)
        # Some writers store these although the config already determines them.
        for name in sorted(self._stored.keys() - shapes.keys()):
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == HEAD and self.config.tie_embeddings:
                self._check_tied()
                continue
            path, stored = self.find(name)
            raise UserError(f"{path}: unexpected tensor {stored} for this config.json")

    def _check_tied(self) -> None:
        """Raises UserError unless a file's head equals the embeddings, as config.json says."""
        size = self.config.vocab_size
        rows = np.array_split(np.arange(size), -(-size // 4096))
        head, embed = self._get(HEAD), self._get(EMBED)
        same = head.get_shape() == embed.get_shape() and all(
            np.array_equal(*(x[r[0] : r[-1] + 1].astype(np.float32) for x in (head, embed)))
            for r in rows
        )
        if not same:
            path, stored = self.find(HEAD)
            raise UserError(
                f"{path}: {stored} differs from {self.find(EMBED)[1]}, but config.json has "
                "tie_word_embeddings true (or leaves it out), where transformers before version 5 "
                f"ignores {stored} and later ones use it; to train the model with it, set "
                '"tie_word_embeddings": false in config.json'
            )

    def read(self, name: str, index: tuple[slice, ...], transposed: bool) -> np.ndarray:
        """Reads a slice of a tensor; `transposed` if index and result are of its transpose."""
        part = self._get(name)[tuple(reversed(index)) if transposed else index]
        return part.T if transposed else part


def _find_text_model(stored: Iterable[str]) -> dict[str, str]:
    """Maps names of a text model's tensors to those that they are stored by."""
    return {
        plain + name.removeprefix(prefix): name
        for name in stored
        for prefix, plain in TEXT_PREFIXES.items()
        if name.startswith(prefix)
    }


def _read_index(index: Path) -> dict[str, str]:
    if problem := describe_damage(index):
        raise UserError(f"{index}: {problem}")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: expected a JSON object with a 'weight_map' object")
    for name in weight_map.values():
        # The index is downloaded: it must not make us open files elsewhere.
        if not isinstance(name, str) or Path(name).name != name or name == ".." or "\\" in name:
            raise UserError(f"{index}: weight_map: found {name!r}, expected a plain file name")
    return weight_map
