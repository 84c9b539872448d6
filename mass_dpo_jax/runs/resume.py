"""Which settings and data a run may be resumed with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import origin, run_config
from mass_dpo_jax.runs.run_folder import has_description, latest_step, read_checkpoint_notes
from mass_dpo_jax.utils.run_paths import check_new_run

# Settings that may change because they do not change what is computed. Both tuples hold names and
# beginnings of names.
NOT_COMPUTED = (
    "cache_dir",
    "dry_run",
    "device_memory_gb",
    "log.",
    "train.checkpoint_every",
    "train.keep_",
    "train.max_skipped",
    "train.moments_dtype",
    "train.offload_moments",
)
# Settings that may change because the updates stay the same, but for the rounding of sums that are
# added up in another order.
ROUNDING_ONLY = (
    "mesh.",
    "eval.batch_size",
    "train.micro_batch_size",
    "train.reuse_scoring",
    "train.responses_at_a_time",
    "model.remat",
    "model.attention",
    "model.layout",
    "data.max_shapes",
)
_log = logging.getLogger(__name__)


def check_settings(workdir: Path, config: ConfigDict) -> None:
    """Raises UserError, naming the settings, if the folder holds a run with others, or no run.

    A run without a checkpoint has nothing to lose: its folder may be taken over. Files may have
    other names: whether they are the same shows when they are read.
    """
    check_new_run(workdir)
    if not (workdir / "config.json").exists():
        if has_description(workdir):  # A run writes it after its own config.json.
            raise UserError(
                f"{workdir}: has a folder model/ that is no run's; choose another --workdir"
            )
        return
    try:
        stored = run_config.load_config(workdir)
    except UserError as error:  # Not ours to overwrite.
        raise UserError(f"{error}. Choose another --workdir") from None
    if latest_step(workdir) is None:
        return
    ours, theirs = dict(config_lib.flatten(config)), dict(config_lib.flatten(stored))
    differ = [
        name
        for name in ours
        if ours[name] != theirs[name]
        and not name.startswith((*NOT_COMPUTED, *ROUNDING_ONLY))
        and not _may_be_same_file(name, ours[name], theirs[name], workdir)
    ]
    if differ:
        changes = ", ".join(f"{k} (there {theirs[k]!r}, here {ours[k]!r})" for k in differ[:5])
        raise UserError(
            f"{workdir} belongs to a run with other settings: {changes}. To go on with it, "
            f"give the same settings (--workdir={workdir} alone has them); to train its weights "
            f"further, choose another --workdir with --config.model.path={workdir}"
        )


def _may_be_same_file(name: str, ours: str, theirs: str, workdir: Path) -> bool:
    """Whether a setting with another value may name the same file.

    `check_data` and `origin.check_weights` compare data and weights; of chat template and adapters
    the run has copies.
    """
    if name not in origin.PATHS or not ours or not theirs or not origin.read(workdir)["files"]:
        return False
    return name not in origin.COPIES or run_config.is_own_file(ours, workdir, name)


def log_changed_settings(workdir: Path, config: ConfigDict) -> None:
    """Logs the settings that change how the sums of a run's updates are rounded."""
    ours, theirs = (dict(config_lib.flatten(c)) for c in (config, run_config.load_config(workdir)))
    changed = [n for n in ours if ours[n] != theirs[n] and n.startswith(ROUNDING_ONLY)]
    if changed:
        text = ", ".join(f"{name}={ours[name]} (was {theirs[name]})" for name in changed)
        _log.info(f"{workdir}: going on with {text}: the same updates, whose sums round otherwise")
    if "data.max_shapes" in changed:
        _log.warning(
            "config.data.max_shapes: batches are put together otherwise, so that in the epoch at "
            "work some rows may come twice and others not at all"
        )


def check_data(workdir: Path, digests: Mapping[str, str]) -> None:
    """Raises UserError if the run in the folder was saved with other data, and names the split.

    The data of evaluations count too: a run's figures are compared with each other, at its end row
    by row.

    Args:
        workdir: the run folder.
        digests: digest of each split, see `Setup.digests`.
    """
    saved = read_checkpoint_notes(workdir).get("data")
    if not isinstance(saved, dict):
        return  # There is no checkpoint that can be read.
    differ = sorted(n for n in {*saved, *digests} if saved.get(n) != digests.get(n))
    if differ:
        raise UserError(
            f"{workdir}: the run was saved with other data: {', '.join(differ)} has other rows or "
            "other tokens now. Nothing is lost: go on with the data (and the tokenizer) of before, "
            f"or begin another run from its weights, --config.model.path={workdir}"
        )
