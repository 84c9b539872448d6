"""Which prompts an epoch trains on (`selection.prompts`): chosen once or per epoch, saved."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from mass_dpo_jax.config_values import parse_budget
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.selection import Pool
from mass_dpo_jax.selection import prompts as selection
from mass_dpo_jax.selection.prompts import PromptSelection
from mass_dpo_jax.selection.shards import make_mesh
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.method_config import uses_reference
from mass_dpo_jax.training.methods import METHODS
from mass_dpo_jax.utils import distributed

if TYPE_CHECKING:
    from mass_dpo_jax.data.batches import Batch
    from mass_dpo_jax.training.setup import Reference, Setup
    from mass_dpo_jax.training.step import Program
    from mass_dpo_jax.training.updates import Batches

# Names of `PromptSelection.values` in files.
VALUES = {"design": "prompt_gain", "uncertain": "prompt_gap"}


class PromptSettings(NamedTuple):
    """How prompts are chosen. Made by `read_settings`.

    Attributes:
        by: `selection.prompts`.
        budget: `selection.prompt_budget`.
        refresh: `selection.prompt_refresh`.
        ridge: `selection.ridge`.
    """

    by: str = "all"
    budget: float = 0.25
    refresh: str = "once"
    ridge: float = 0.1

    @property
    def needs_policy(self) -> bool:
        """Whether the choice takes a pass over the training rows."""
        return self.by in VALUES


def read_settings(config: ConfigDict) -> PromptSettings:
    """Returns how a configuration chooses prompts.

    Raises:
        UserError: settings do not go together.
    """
    section = config.selection
    settings = PromptSettings(
        section.prompts, section.prompt_budget, section.prompt_refresh, section.ridge
    )
    name, spec = f"config.selection.prompts={settings.by}", METHODS[config.method]
    if not settings.needs_policy:
        return settings
    if spec.max_negatives == 0 or not uses_reference(config):
        lacks = "negatives" if spec.max_negatives == 0 else "reference"
        raise UserError(
            f"{name} compares implicit rewards, and config.method={config.method} has no {lacks}; "
            "expected config.selection.prompts=random or all"
        )
    if settings.by == "design" and section.features == "reference":
        raise UserError(
            f"{name} reads the policy's hidden states; expected config.selection.features=policy"
        )
    if settings.refresh == "epoch" and section.refresh not in ("step", "epoch"):
        raise UserError(
            f"config.selection.prompt_refresh=epoch: with config.selection.refresh="
            f"{section.refresh} negatives are chosen for prompts of epochs to come, which are not "
            "known yet; expected config.selection.refresh=step or epoch"
        )
    return settings


def check_gaps(settings: PromptSettings, has_other_reference: bool) -> None:
    """Raises UserError where all gaps are 0 at the one time that they are compared."""
    if settings.by == "uncertain" and settings.refresh == "once" and not has_other_reference:
        raise UserError(
            "config.selection.prompts=uncertain: the policy is its own reference when prompts are "
            "chosen, so that all rewards are 0; expected config.selection.prompt_refresh=epoch, or "
            "another reference (config.model.reference_path)"
        )


def count_prompts(settings: PromptSettings, rows: int, batch_size: int = 1) -> int:
    """Returns how many prompts of a split are chosen.

    Raises:
        UserError: more than there are, or fewer than a batch.
    """
    if settings.by == "all":
        return rows
    size = parse_budget(settings.budget, rows)
    if size < batch_size:
        raise UserError(
            f"config.selection.prompt_budget={settings.budget:g}: {size} of {rows} prompts are "
            f"fewer than a batch, config.train.batch_size={batch_size}"
        )
    return size


class PromptChoice:
    """The prompts of a run's epochs.

    Attributes:
        settings: how they are chosen.
        size: prompts of an epoch.
    """

    def __init__(self, setup: Setup, reference: Reference):
        self.settings = setup.prompts
        self._setup, self._reference = setup, reference
        self._total = len(setup.tokens["train"])
        self.size = count_prompts(self.settings, self._total, setup.train.batch_size)
        self._draw, self._rows = -1, np.zeros(0, np.int32)  # The newest choice by the policy.

    def draw_of(self, epoch: int) -> int:
        """Returns the number of the choice that an epoch trains on."""
        return epoch if self.settings.refresh == "epoch" else 0

    def rows(self, epoch: int) -> np.ndarray:
        """Returns the rows of the training split that an epoch trains on.

        Raises:
            UserError: they have not been chosen yet.
        """
        draw = self.draw_of(epoch)
        if self.settings.by == "all":
            return np.arange(self._total, dtype=np.int32)
        if self.settings.by == "random":
            return selection.choose_at_random(
                self._total, self.size, self._setup.seed, draw
            ).indices
        if draw != self._draw:
            raise UserError(
                f"config.selection.prompts={self.settings.by}: the prompts of epoch {epoch} are "
                "chosen when it begins"
            )
        return self._rows

    def is_known(self, epoch: int) -> bool:
        """Whether `rows` can tell the rows of an epoch."""
        return not self.settings.needs_policy or self.draw_of(epoch) == self._draw

    def is_due(self, epoch: int, batch: int) -> bool:
        """Whether prompts are chosen before this batch of an epoch."""
        begins = batch == 0 and (epoch == 0 or self.settings.refresh == "epoch")
        return begins and self.settings.by != "all"

    def choose(
        self, epoch: int, params: Any, negatives_key: Array, is_reference: bool
    ) -> PromptSelection:
        """Chooses the prompts of an epoch, on all processes.

        Args:
            epoch: the epoch that begins.
            params: the policy as it is now.
            negatives_key: the key by which random negatives are drawn now.
            is_reference: whether the policy is the reference.

        Raises:
            UserError: nothing can be chosen by this policy.
        """
        draw = self.draw_of(epoch)
        setup = self._setup
        if not self.settings.needs_policy:
            return choose_prompts(None, self._total, self.size, self.settings, setup.seed, draw)
        scoring.check_finite(
            self._reference.logps.get("train"), setup.tokens["train"], "the reference"
        )
        batches = setup.scoring_batches(
            "train", "choosing prompts", None, self._reference.logps["train"], self._reference.grams
        )
        measure = functools.partial(_measure_batch, setup.program, self.settings.by, is_reference)
        table = scoring.compute_table(
            lambda batch: measure(params, batch, negatives_key), batches, self._total
        )
        chosen = choose_prompts(table, self._total, self.size, self.settings, setup.seed, draw)
        self._draw, self._rows = draw, chosen.indices
        return chosen

    def notes(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold, as JSON."""
        if self._draw < 0:
            return {}
        return {"prompts": {"draw": self._draw, "rows": self._rows.tolist()}}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Takes the prompts of a checkpoint's notes."""
        if self.settings.needs_policy and "prompts" in notes:
            self._draw = notes["prompts"]["draw"]
            self._rows = np.array(notes["prompts"]["rows"], np.int32)


def choose_for_step(
    batches: Batches, step: int, params: Any, window: int, workdir: Path
) -> str | None:
    """Chooses the prompts of an epoch that begins at a step, and notes them in the run folder.

    Args:
        batches: the batches of the run.
        step: counted from 0.
        params: the policy before the step.
        window: the refresh interval of negatives, in steps.
        workdir: the run folder.

    Returns:
        A line that says what was chosen; None: nothing.
    """
    prompts, setup = batches.prompts, batches.setup
    position = batches.order.locate(step)
    epoch = position["epoch"]
    if not prompts.is_due(epoch, position["batch_of_epoch"]):
        return None
    is_reference = step == 0 and not setup.model.reference_path
    chosen = prompts.choose(epoch, params, setup.key(step // window), is_reference)
    ids, by = setup.tokens["train"].ids, prompts.settings.by
    line = {"epoch": epoch, "step": step, "ids": [ids[row] for row in chosen.indices]}
    if chosen.values is not None:
        line[VALUES[by]] = chosen.values.tolist()
    run_folder.add_prompts(workdir, line)
    return f"epoch {epoch}: {len(chosen.indices)} of {len(ids)} prompts, selection.prompts={by}"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure_batch(
    program: Program, by: str, is_reference: bool, params: Any, batch: Batch, key: Array
) -> Array:
    """Computes what prompts are chosen by, [B, ...]; see `measure_sets`."""
    pools, scored = program.score_pools(params, batch, key, always=True, at_reference=is_reference)
    assert scored is not None and scored.features is not None
    candidate_ids = program.choose(pools)[0].candidate_ids
    feature_norm = program.method.selection.feature_norm
    return measure_sets(by, pools, scored.features, candidate_ids, feature_norm)


def measure_sets(
    by: str, pools: Pool, features: Array, candidate_ids: Array, feature_norm: str
) -> Array:
    """Computes what prompts are chosen by.

    Args:
        by: `design` or `uncertain`.
        pools: the pools with their scores.
        features: [B, C, D].
        candidate_ids: int32 [B, n], the negatives of each prompt's set, as in `Choice`.
        feature_norm: as in `Settings`.

    Returns:
        `information_vectors` [B, n, D] of the sets, or the gaps [B] of the whole pools.
    """
    assert pools.scores is not None
    if by == "uncertain":
        return selection.measure_gaps(pools.scores, pools.mask)
    members = jnp.pad(candidate_ids, ((0, 0), (1, 0)))
    scores = jnp.take_along_axis(pools.scores, jnp.maximum(candidate_ids - 1, 0), axis=1)
    return selection.information_vectors(
        jnp.take_along_axis(features, members[..., None], axis=1),
        scores,
        candidate_ids > 0,
        feature_norm,
    )


def choose_prompts(
    table: np.ndarray | None,
    total: int,
    k: int,
    settings: PromptSettings,
    seed: int,
    draw: int = 0,
) -> PromptSelection:
    """Chooses k of all prompts, on the primary process's devices for all processes.

    Args:
        table: what `measure_sets` returns, of all prompts; None for `random`.
        total: how many there are.
        k: number of prompts to choose.
        settings: how.
        seed: the run's seed.
        draw: number of the choice, for what goes by chance.
    """
    if table is None:
        return selection.choose_at_random(total, k, seed, draw)

    def choose() -> list[list[Any]]:
        if settings.by == "uncertain":
            chosen = selection.choose_uncertain(table, k, seed, draw)
        else:
            mesh = make_mesh(jax.local_devices())
            chosen = selection.choose_by_design(table, k, settings.ridge, mesh)
        assert chosen.values is not None
        return [chosen.indices.tolist(), chosen.values.tolist()]

    indices, values = distributed.run_on_primary(choose)
    return PromptSelection(np.array(indices, np.int32), np.array(values, np.float32))
