"""Which prompts an epoch trains on: chosen by the policy of its start, kept, and written down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mass_dpo_jax as mdj
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.train import train
from mass_dpo_jax.training import prompts
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Reference
from mass_dpo_jax.training.updates import Batches
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.runs import SAVED_ALL, assert_same_run

pytestmark = pytest.mark.usefixtures("one_device", "strict_jax")

ROWS, BUDGET, STEPS = 22, 12, 5  # Two steps of 8 rows an epoch.


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


def config_of(data: Path, by: str, refresh: str = "epoch", **changes: Any) -> Any:
    chosen = {"selection.prompts": by, "selection.prompt_budget": BUDGET}
    changes = {"selection.prompt_refresh": refresh, "train.steps": STEPS, **changes}
    return tiny_config(data, **{"train.learning_rate": 1e-2, **chosen, **changes})


def choices(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()]


def train_noting_rows(config: Any, run: Path) -> list[np.ndarray]:
    """Trains; returns the rows of each step."""
    trained: list[np.ndarray] = []
    get = Batches.__getitem__

    def note(self: Batches, step: int) -> Any:
        batch = get(self, step)
        trained.append(batch.rows)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__getitem__", note)
        train(config, run)
    return trained


@pytest.mark.parametrize(
    ("by", "refresh"), [("design", "epoch"), ("uncertain", "epoch"), ("random", "once")]
)
def test_epochs_train_on_the_prompts_that_are_written_down(
    tmp_path: Path, data: Path, by: str, refresh: str
) -> None:
    config, run = config_of(data, by, refresh), tmp_path / "run"
    trained = train_noting_rows(config, run)
    ids = prepare(config, tmp_path / "other", ("train",)).tokens["train"].ids
    assert len(ids) == ROWS and len(trained) == STEPS
    lines = choices(run)
    epochs = [0, 1, 2] if refresh == "epoch" else [0]
    assert [(line["epoch"], line["step"]) for line in lines] == [(e, 2 * e) for e in epochs]
    for line in lines:
        assert len({*line["ids"]}) == BUDGET
        step = line["step"]
        rows = np.concatenate(trained[step : step + 2] if refresh == "epoch" else trained)
        seen = {ids[row] for row in rows}
        assert seen <= {*line["ids"]}
        assert seen == {*line["ids"]} or step + 2 > STEPS  # The last epoch is cut short.
    if by == "design":
        assert (np.diff(lines[0]["prompt_gain"]) <= 1e-5).all() and lines[0]["prompt_gain"][-1] > 0
    if by == "uncertain":
        assert not np.any(lines[0]["prompt_gap"])  # The policy is the reference.
        assert (np.diff(lines[1]["prompt_gap"]) >= 0).all() and lines[1]["prompt_gap"][-1] > 0


@pytest.mark.parametrize("by", ["design", "uncertain"])
def test_a_run_goes_on_with_the_prompts_of_its_checkpoint(
    tmp_path: Path, data: Path, by: str
) -> None:
    config = config_of(data, by, **SAVED_ALL)
    train(config, tmp_path / "whole")
    for step in range(1, STEPS):  # Also between two epochs.
        copy = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", copy)
        (copy / "metrics.json").unlink()
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(copy / "checkpoints" / str(later))
        train(config, copy)
        assert_same_run(config, tmp_path / "whole", copy)
        assert choices(copy) == choices(tmp_path / "whole")


def test_prompts_once_are_kept_for_all_epochs_of_a_resumed_run(tmp_path: Path, data: Path) -> None:
    config = config_of(data, "design", "once", **SAVED_ALL)
    train(config, tmp_path / "whole")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "whole", copy)
    (copy / "metrics.json").unlink()
    for later in (4, 5):
        shutil.rmtree(copy / "checkpoints" / str(later))
    (copy / "prompts.jsonl").unlink()  # A log: the checkpoint has what is needed.
    train(config, copy)
    assert_same_run(config, tmp_path / "whole", copy)


def test_the_library_chooses_what_a_run_does(tmp_path: Path, data: Path) -> None:
    config = config_of(data, "design", "once")
    train(config_of(data, "all", **{"train.steps": 1}), tmp_path / "start")
    config.model.path = str(tmp_path / "start")
    train(config, tmp_path / "run")
    examples = load_examples(config.data, "train", config.seed)
    model = mdj.load_model(tmp_path / "start", config)
    batches = mdj.batches(model, examples, config)
    ids = batches.setup.tokens["train"].ids
    assert [ids[row] for row in batches.prompts.rows(0)] == choices(tmp_path / "run")[0]["ids"]
    assert {ids[row] for batch in batches for row in batch.rows} == {
        *choices(tmp_path / "run")[0]["ids"]
    }
    with pytest.raises(UserError, match=r"prompt_refresh=epoch .*; expected once"):
        mdj.batches(model, examples, config_of(data, "design"))
    with pytest.raises(UserError, match="the policy is its own reference"):
        mdj.batches(model, examples, config_of(data, "uncertain", "once"))


def test_information_is_that_of_the_set_that_is_trained_on(tmp_path: Path, data: Path) -> None:
    """By hand, in float64, from the program's own features: the picks' covariance of q."""
    config = config_of(data, "design", beta=1.0, **{"selection.refresh": "epoch"})
    setup = prepare(config, tmp_path / "run", ("train",))
    params = setup.policy.weights("", config.seed)
    rng = np.random.default_rng(0)
    refs = setup.score(params, "train", "by hand")
    refs = np.where(refs < 0, refs + rng.normal(size=refs.shape).astype(np.float32), 0)
    batches = setup.scoring_batches("train", "by hand", None, refs)
    key = setup.key(0)
    for rows, batch in batches:
        got = np.asarray(prompts._measure_batch(setup.program, "design", False, params, batch, key))
        ids = np.asarray(setup.program.choose_batch(params, batch, key)[0].candidate_ids)
        logps, features = map(np.asarray, setup.program.scorer.logps_and_features(params, batch))
        for b in np.flatnonzero(rows >= 0):
            members = [0, *ids[b][ids[b] > 0]]
            rewards = (logps[b] - refs[rows[b]])[members].astype(float)
            q = np.exp(rewards - np.logaddexp.reduce(rewards))
            h = features[b][members].astype(float)
            centred = h - q @ h
            want = np.einsum("c,cd,ce->de", q, centred, centred)
            vectors = got[b].astype(float)
            np.testing.assert_allclose(vectors.T @ vectors, want, atol=1e-4 * abs(want).max())


def test_the_reference_itself_has_no_gaps(tmp_path: Path, data: Path) -> None:
    setup = prepare(config_of(data, "uncertain"), tmp_path / "run", ("train",))
    params = setup.policy.weights("", 0)
    refs = setup.score(params, "train", "by hand") + np.float32(1e-6)  # As rounding may.
    _, batch = next(setup.scoring_batches("train", "by hand", None, refs))
    args = params, batch, setup.key(0)
    gaps = [
        np.asarray(prompts._measure_batch(setup.program, "uncertain", x, *args)) for x in (0, 1)
    ]
    assert gaps[0].any() and not gaps[1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"selection.prompts": "uncertain", "selection.prompt_refresh": "once"},
            "all rewards are 0",
        ),
        ({"method": "sft"}, "config.method=sft has no negatives; expected .*=random or all"),
        ({"method": "mppo"}, "config.method=mppo has no reference; expected"),
        ({"selection.features": "reference"}, "expected config.selection.features=policy"),
        ({"selection.refresh": "once"}, "expected config.selection.refresh=step or epoch"),
        ({"selection.refresh": "3"}, "expected config.selection.refresh=step or epoch"),
        ({"selection.prompt_budget": 23}, "=23: expected at most 22"),
        ({"selection.prompt_budget": 7}, "7 of 22 prompts are fewer than a batch"),
        ({"selection.prompt_budget": 0.1}, "=0.1: 2 of 22 prompts are fewer than a batch"),
        ({"selection.prompt_budget": 1.0}, "=1: expected a share .* below 1, or a num"),
        ({"selection.prompt_budget": 8.5}, "=8.5: expected a share"),
        ({"selection.prompt_budget": 0.0}, "=0: expected a share"),
        ({"selection.prompts": "best"}, "expected one of all, design, uncertain, random"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(config_of(data, "design", **changes), tmp_path / "run")
    # The budget is known to be too large or small once the rows have been counted.
    assert (tmp_path / "run").exists() == (" 22" in message)
    assert not (tmp_path / "run" / "config.json").exists()


def test_random_prompts_need_no_reference_and_no_negatives(tmp_path: Path, data: Path) -> None:
    for method in ("sft", "mppo"):
        train(config_of(data, "random", method=method), tmp_path / method)
        assert len(choices(tmp_path / method)) == 3


def test_the_noise_of_a_draw_is_measured_on_prompts_that_are_known(
    tmp_path: Path, data: Path
) -> None:
    config = config_of(data, "design", method="pl_sampled", **{"log.draw_noise_every": 1})
    config.update_from_flattened_dict({"selection.prompt_budget": 8})  # One step an epoch.
    train(config, tmp_path / "run")
    batches = Batches(prepare(config, tmp_path / "other", ("train",)), Reference({}))
    batches.prompts.restore({"prompts": {"draw": 2, "rows": list(range(8))}})
    assert batches.find_other(2) is None
    config.selection.prompts = "all"
    batches = Batches(prepare(config, tmp_path / "all", ("train",)), Reference({}))
    assert [batches.find_other(step) for step in range(STEPS)] == [1, 2, 3, 4, 3]


def test_prompts_do_not_depend_on_the_devices(tmp_path: Path) -> None:
    assert len(jax.devices()) == 8
    table = np.random.default_rng(0).normal(size=(50, 3, 8)).astype(np.float32)
    settings = prompts.PromptSettings("design", 20, "once", 0.1)
    eight = prompts.choose_prompts(table, 50, 20, settings, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        one = prompts.choose_prompts(table, 50, 20, settings, 0)
    np.testing.assert_array_equal(eight.indices, one.indices)
