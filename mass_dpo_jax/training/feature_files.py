"""Reads features of responses from a file, to select negatives without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import read_array


def read_features(path: Path) -> Mapping[str, np.ndarray]:
    """Reads `features` [M, C, D] and, if the file has them, `scores` and `mask` [M, N].

    Raises:
        UserError: there is no such file, or its arrays have other names, shapes or types.
    """
    if not path.is_file():
        raise UserError(f"--features={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            arrays = {"features": read_array(path)}
    except (UserError, OSError, SafetensorError, TypeError) as error:
        raise UserError(f"--features={path}: not a .npy or .safetensors file: {error}") from None
    if "features" not in arrays:
        raise UserError(f"{path}: no tensor 'features'; found {', '.join(arrays) or 'none'}")
    features = arrays["features"]
    has_shape = features.ndim == 3 and features.shape[1] >= 2 and 0 not in features.shape
    if not has_shape or features.dtype.kind not in "fiu":
        raise UserError(
            f"{path}: features {features.dtype}{list(features.shape)}, expected numbers [M, C, D] "
            "with M >= 1, C >= 2 and D >= 1, the chosen response first"
        )
    for name, kinds, words in (("scores", "fiu", "numbers"), ("mask", "bui", "true or false")):
        if name not in arrays:
            continue
        array, shape = arrays[name], (features.shape[0], features.shape[1] - 1)
        if array.shape != shape:
            raise UserError(
                f"{path}: {name} {list(array.shape)}, expected {list(shape)} for features "
                f"{list(features.shape)}"
            )
        if array.dtype.kind not in kinds or (name == "mask" and (array > 1).any()):
            raise UserError(f"{path}: {name} {array.dtype}, expected {words}")
    return arrays


def to_float32(
    path: Path, start: int, name: str, array: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Converts rows of an array of the file to float32.

    Args:
        path: the file.
        start: the first row's index.
        name: the array's name.
        array: the rows.
        mask: bool, True where there is a value.

    Raises:
        UserError: a value that is not masked is not finite.
    """
    with np.errstate(over="ignore"):
        converted = np.asarray(array, np.float32)
    bad = ~np.isfinite(converted) & mask
    if bad.any():
        row, *index = np.argwhere(bad)[0].tolist()
        raise UserError(
            f"{path}: row {start + row}: {name}{index} is {array[row, *index]}, expected a finite "
            "number that float32 can hold"
        )
    return converted


def mask_of_examples(path: Path, examples: Sequence[Example], negatives: int) -> np.ndarray:
    """Returns which negatives each example has, bool [M, N].

    Raises:
        UserError: an example has more negatives than the file.
    """
    sizes = np.array([len(example.rejected) for example in examples])
    if sizes.max() > negatives:
        row = int(sizes.argmax())
        raise UserError(
            f"{examples[row].place}: {sizes[row]} rejected responses, but {path} has features of "
            f"{negatives}"
        )
    return np.arange(negatives)[None, :] < sizes[:, None]
