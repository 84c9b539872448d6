"""A model or a run's checkpoint, for commands that score, evaluate and select."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import origin, run_config, run_folder
from mass_dpo_jax.training.methods import METHODS
from mass_dpo_jax.training.policy import uses_lora
from mass_dpo_jax.training.setup import Reference, Setup, prepare
from mass_dpo_jax.utils import distributed

_log = logging.getLogger(__name__)


def prepare_scoring(
    config: ConfigDict, workdir: Path | None, split: str | None, choosing: bool = False
) -> tuple[Setup, str, Any, Reference]:
    """For commands that only score: a run in `workdir`, or the model at `config.model.path`.

    A run's reference is what it was trained against; that of another model is
    `config.model.reference_path`, if given.

    Args:
      split: None is the test split or, of a single file without splits, all of it.
      choosing: negatives are to be chosen from it.

    Returns:
      The setup with one split, that split's name, the weights, and what is needed of the reference,
      if there is one.

    Raises:
      UserError: as `prepare`; a run and another model are given; or what a run needs of its start
        is not what it was.
    """
    config = config.copy_and_resolve_references()  # The caller's may serve for another run.
    if split is None:
        split = "all" if Path(config.data.path).is_file() else "test"
    if workdir is not None:
        return _prepare_run(config, workdir, split, split if choosing else None)
    if not config.model.path:
        raise UserError("no model: give --workdir=RUN, or --config.model.path=FOLDER")
    setup = prepare(config, None, (split,), training=False)
    known = Reference({})
    if config.model.reference_path:
        params = setup.policy.weights(config.model.reference_path, config.seed)
        known = setup.reference(params, split if choosing else None)
    params = setup.policy.weights(config.model.path, config.seed, config.model.lora.path)
    return setup, split, params, known


def _prepare_run(
    config: ConfigDict, workdir: Path, split: str, choosing: str | None
) -> tuple[Setup, str, Any, Reference]:
    """`prepare_scoring` of a run's newest checkpoint.

    `config.model.path` may say where the model that it began from lies now.
    """
    if distributed.run_on_primary(lambda: run_folder.latest_step(workdir)) is None:
        raise UserError(f"{workdir}: {run_folder.NO_CHECKPOINT}")
    own = run_config.locate_files(run_config.load_config(workdir), workdir)
    lora = uses_lora(own.model.lora)
    base = own.model.path
    other = config.model.reference_path or own.model.reference_path
    read_again = lora or (METHODS[own.method].uses_reference and not other)
    if read_again and "model.path" in origin.read(workdir)["weights"]:
        if config.model.path and not origin.is_same(Path(config.model.path), workdir):
            base = config.model.path
    else:
        _check_own("model.path", config, own, workdir)
    _check_own("model.lora.path", config, own, workdir)
    if run_config.is_own_file(config, workdir, "data.chat_template"):
        config.data.chat_template = "tokenizer"
    reference, adapters = (other, "") if other else (base, own.model.lora.path)
    config.model.path = base
    config.model.lora.update(own.model.lora)
    if lora:  # Beside their base, as they were trained.
        config.model.lora.path = str(workdir)
    setup = prepare(config, workdir, (split,), training=False)
    known = Reference({})
    if METHODS[own.method].uses_reference or config.model.reference_path:
        params, digest = setup.policy.read(reference, own.seed, adapters)
        _check_reference(config, own, workdir, reference, digest)
        known = setup.reference(params, choosing)
        del params
    params, digest = setup.policy.read(
        base if lora else str(workdir), own.seed, config.model.lora.path
    )
    if lora:
        origin.check_weights(workdir, {"model.path": digest})
    return setup, split, params, known


def _check_reference(
    config: ConfigDict, own: ConfigDict, workdir: Path, reference: str, digest: str
) -> None:
    """Raises UserError where a run's reference is not what it was; one that was asked for may
    differ, which is said."""
    name = "model.reference_path" if own.model.reference_path else "model.path"
    try:
        origin.check_weights(workdir, {name: digest})
    except UserError:
        if config.model.reference_path == own.model.reference_path:
            raise
        _log.warning(f"rewards are against {reference}, which the run was not trained against")


def _check_own(name: str, config: ConfigDict, own: ConfigDict, workdir: Path) -> None:
    """A run is scored with its own weights: others beside it would be ignored."""
    given, known = (dict(config_lib.flatten(c))[name] for c in (config, own))
    same = any(origin.is_same(Path(given), Path(path)) for path in (known, workdir) if path)
    if given and not same and not run_config.is_own_file(config, workdir, name):
        raise UserError(
            f"config.{name}={given}: the model is that of the run in --workdir={workdir}; "
            "expected one of them, not both"
        )
