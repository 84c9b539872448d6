"""Negatives that a training mines by its own policy, before its first epoch and between others.

What an epoch's policy has found is a file of the run folder, `mined/epoch-N.jsonl`, with the lines
of `python -m mass_dpo_jax.mine`. A training that is resumed reads it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.config_values import parse_ranks, parse_refresh
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers.columns import parse_columns
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import origin, resume, run_folder
from mass_dpo_jax.training import mining, mining_sources
from mass_dpo_jax.training.data_checks import make_draws_error
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.model_paths import uses_lora
from mass_dpo_jax.training.open_policy import open_policy
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.prepare import open_mesh
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import write_whole

FOLDER = "mined"
_log = logging.getLogger(__name__)


class MinedNegatives(NamedTuple):
    """The negatives of a training split, of some epochs. Made by `open_mined`.

    Attributes:
        epoch: the epoch before which they were mined.
        path: the file that has them.
        rows: the lines of the file, by the ids of examples.
        corrects: whether training corrects for how they were drawn.
        digests: digests of what they were mined for and from, by what it is.
    """

    epoch: int
    path: Path
    rows: Mapping[str, Mapping[str, Any]]
    corrects: bool
    digests: dict[str, str]

    def replace(self, examples: Sequence[Example]) -> list[Example]:
        """Returns examples with these negatives; those without any keep their own."""
        replaced = []
        for example in examples:
            row = self.rows.get(example.id)
            if row is not None:
                example = mining.replace_negatives(
                    example,
                    row["rejected"],
                    f"{example.place} with negatives of {self.path}",
                    row["mined_probabilities"] if self.corrects else None,
                )
            replaced.append(example)
        if kept := len(examples) - sum(example.id in self.rows for example in examples):
            _log.warning(f"{kept} of {len(examples)} prompts keep the negatives of the data")
        return replaced

    def check_location(self, location: Mapping[str, int], notes: Mapping[str, Any]) -> None:
        """Raises UserError if a step is elsewhere in its epoch than it was when it was saved."""
        if any(notes.get(name, place) != place for name, place in location.items()):
            raise UserError(
                f"{self.path}: of so many prompts all negatives are left out as too long that an "
                "epoch has fewer steps than before; raise config.data.max_response_length in "
                "another run, or leave long texts out of the catalogue"
            )


def check_mining(config: ConfigDict) -> None:
    """Raises UserError if a training that mines cannot do so with its other settings."""
    if not config.mine.catalogue:
        return
    start = f"config.mine.catalogue={config.mine.catalogue}"
    if not config.model.path:
        raise UserError(f"{start}: mines by the features of a model; config.model.path is missing")
    if distributed.is_multiprocess():
        raise UserError(
            f"{start}: training mines in one process, on all of its devices; mine beforehand with "
            "python -m mass_dpo_jax.mine"
        )
    refresh = config.selection.refresh
    lasts = parse_refresh(refresh, 1) != 1  # A number of steps may reach beyond an epoch.
    if config.mine.every and lasts:
        raise UserError(
            f"config.selection.refresh={refresh}: with config.mine.every={config.mine.every} pools "
            "change between epochs, and with them the negatives that are chosen; expected step or "
            "epoch, or config.mine.every=0"
        )
    _check_method(config, start)


def _check_method(config: ConfigDict, start: str) -> None:
    """Raises UserError if a method cannot train on what is mined, before hours of mining."""
    method, n = make_method(config, config.mine.n), config.mine.n
    if method.is_supervised:
        raise UserError(f"{start}: config.method={method.name} sees no negatives; leave it empty")
    if method.uses_order or method.uses_scores:
        alternative = ", or config.odpo.offset=rank" if method.uses_scores else ""
        raise UserError(
            f"{start}: config.method={method.name} needs grades, which mined negatives do not "
            f"have; expected another method{alternative}"
        )
    if method.num_negatives > n:
        raise UserError(
            f"config.num_negatives={method.num_negatives}: config.mine.n={n} negatives are mined "
            f"for a prompt; expected config.mine.n={method.num_negatives} or more, or "
            f"config.num_negatives={n}"
        )
    first, last = parse_ranks(config.mine.ranks)
    are_drawn = config.mine.draw != "top" and last - first > n
    if are_drawn and _corrects(config) and not method.uses_draws_of_data:
        raise make_draws_error(method)


def _corrects(config: ConfigDict) -> bool:
    """Whether training corrects for how negatives were drawn."""
    return parse_columns(config.data.columns).get("mined_probabilities") != ""


def is_due(config: ConfigDict, epoch: int, batch_of_epoch: int) -> bool:
    """Whether a training mines before this batch of an epoch."""
    if not config.mine.catalogue or batch_of_epoch:
        return False
    return epoch == 0 or (config.mine.every > 0 and epoch % config.mine.every == 0)


def find_epoch(config: ConfigDict, notes: Mapping[str, Any]) -> int:
    """Returns the epoch N whose file, `mined/epoch-N.jsonl`, a run uses next or will write.

    Args:
        config: the run's configuration.
        notes: of its newest checkpoint; empty: there is none.
    """
    epoch, every = notes.get("epoch", 0), config.mine.every
    if epoch and not notes["batch_of_epoch"] and _is_finished(config, notes):
        epoch -= 1  # The run is finished: nothing is mined for an epoch after its last.
    return epoch - epoch % every if every else 0


def _is_finished(config: ConfigDict, notes: Mapping[str, Any]) -> bool:
    steps, epochs = config.train.steps, config.train.epochs
    return bool(notes["step"] >= steps if steps else notes["epoch"] >= epochs)


def open_mined(config: ConfigDict, workdir: Path) -> MinedNegatives | None:
    """Reads the negatives that a run is to use next, or mines and writes them.

    Args:
        config: the run's configuration, with paths that lead to the files from here.
        workdir: the run folder.

    Returns:
        The negatives; None: the run trains on those of its data.

    Raises:
        UserError: nothing can be mined, or what was mined is gone.
    """
    if not config.mine.catalogue:
        return None
    notes = run_folder.read_checkpoint_notes(workdir)
    epoch = find_epoch(config, notes)
    path = workdir / FOLDER / f"epoch-{epoch}.jsonl"
    catalogue = mining.read_catalogue(Path(config.mine.catalogue))
    rows = mining.load_rows(config, "train")
    digests = {
        "train": _digest((e.id, e.prompt, e.chosen, e.rejected) for e in rows.examples),
        "the chosen responses of all splits": _digest(
            (e.question, e.chosen, e.also_chosen) for e in rows.everything
        ),
        "the catalogue": _digest(zip(catalogue.ids, catalogue.texts, strict=True)),
    }
    # Before anything is mined: a file of other data would be taken for the epoch's ever after.
    resume.check_data(workdir, (notes.get("data") or {}) | digests)
    is_new = run_folder.latest_step(workdir) is None
    if is_new:  # Another run, with other settings, may have ended here before its first checkpoint.
        shutil.rmtree(path.parent, ignore_errors=True)
    if not path.exists():
        _check_epoch_begins(notes, path, epoch)
        policy, params = _read_policy(config, None if is_new else workdir)
        mined = _mine(config, policy, params, rows, catalogue, epoch)
        del params
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in mined))
        _log.info(f"epoch {epoch}: negatives mined from {len(catalogue.index)} items, {path}")
    with path.open(encoding="utf-8") as lines:  # Texts have separators that splitlines() cuts at.
        by_id = {row["id"]: row for row in map(json.loads, lines)}
    return MinedNegatives(epoch, path, by_id, _corrects(config), digests)


def _check_epoch_begins(notes: Mapping[str, Any], path: Path, epoch: int) -> None:
    """Raises UserError where the policy has gone on since it should have mined."""
    if notes and (notes["epoch"], notes["batch_of_epoch"]) != (epoch, 0):
        raise UserError(
            f"{path}: is missing, and the run has gone on to step {notes['step']} since it mined "
            "these negatives; restore the file, or begin another run from the weights, "
            f"--config.model.path={path.parent.parent}"
        )


def _read_policy(config: ConfigDict, workdir: Path | None) -> tuple[Policy, Any]:
    """Reads the policy that mines: what a run starts from, or its newest checkpoint.

    Args:
        config: the run's configuration.
        workdir: the run; None: it has no checkpoint yet.

    Raises:
        UserError: the base of the run's adapters is not the one it began with.
    """
    model = config.model.copy_and_resolve_references()
    if workdir is not None and uses_lora(model.lora):
        model.lora.path = str(workdir)  # Adapters stay beside their base, as they are trained.
    elif workdir is not None:
        model.path = str(workdir)
    policy = open_policy(model, open_mesh(config), workdir)
    params, digest = policy.read(model.path, config.seed, model.lora.path)
    if workdir is not None and uses_lora(model.lora):
        origin.check_weights(workdir, {"model.path": digest})
    return policy, params


def _mine(
    config: ConfigDict,
    policy: Policy,
    params: Any,
    rows: mining.Rows,
    catalogue: mining.Catalogue,
    epoch: int,
) -> list[dict[str, Any]]:
    """Mines by a policy with these weights."""
    limit, similarity = config.data.max_prompt_length, config.mine.similarity
    source = mining_sources.by_policy(
        policy, params, rows.examples, catalogue.texts, limit, similarity
    )
    return list(mining.mine_rows(config, rows, catalogue, source, (policy, params), epoch))


def take_longest(config: ConfigDict, examples: Sequence[Example]) -> list[Example]:
    """Returns examples with the longest texts of the catalogue as negatives, for `dry_run`.

    The longest by characters, so nearly the most memory that mined negatives can take.
    """
    catalogue, n = mining.read_catalogue(Path(config.mine.catalogue)), config.mine.n
    order = np.argsort([-len(text) for text in catalogue.texts], kind="stable")
    longest = order[catalogue.valid[order]][: n + 1]
    replaced = []
    for example, chosen in zip(examples, mining.chosen_index(examples, catalogue), strict=True):
        items = longest[longest != chosen][:n]
        rejected = mining.as_responses(example, catalogue, items)
        replaced.append(mining.replace_negatives(example, rejected, example.place))
    return replaced


def _digest(values: Iterable[Any]) -> str:
    """Returns SHA-256 of what Python writes for each value."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(f"{value!r}\n".encode("utf-8", "surrogatepass"))
    return sha.hexdigest()
