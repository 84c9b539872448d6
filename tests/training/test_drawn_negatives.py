"""Training on negatives that were drawn with known probabilities, which the loss corrects for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mass_dpo_jax as mdj
from mass_dpo_jax.training.updates import Batches
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.run_homes import write_base

BETA = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[mdj.Model, mdj.Model]:
    """A policy and a reference with other weights."""
    folder = write_base(tmp_path_factory.mktemp("base"))
    policy = mdj.load_model(folder, tiny_config(Path("none")))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), policy.params
    )
    return policy, mdj.Model(policy.policy, moved, policy.config)


def read(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in write_jsonl(folder / "a.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(1)
    for row in rows:
        row["mined_probabilities"] = rng.uniform(0.05, 1.0, len(row["rejected"])).tolist()
    return rows


def make(
    models: tuple[mdj.Model, mdj.Model], rows: list[dict[str, Any]], method: str, **changes: Any
) -> Batches:
    policy, reference = models
    settings = {"method": method, "beta": BETA, "num_negatives": 6}
    config = tiny_config(Path("none"), **{**settings, **changes})
    config.model = policy.config.model
    return mdj.batches(policy, rows, config, reference)


def first_update(models: tuple[mdj.Model, mdj.Model], made: Batches) -> tuple[Any, dict[str, Any]]:
    step = mdj.make_train_step(models[0], made)
    return step(step.init(jax.tree.map(np.array, models[0].params)), made[0])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("pl_all", {}),
        ("pl_all", {"train.responses_at_a_time": 2}),
        ("sdpo", {}),
        ("mass_dpo", {"selection.refresh": "2"}),
        ("pl_sampled", {"num_negatives": 2}),
    ],
)
def test_the_loss_of_a_step_has_the_weights_of_its_negatives(
    tmp_path: Path, models: tuple[mdj.Model, mdj.Model], method: str, changes: dict[str, Any]
) -> None:
    """Every pool is taken whole, so that the loss is known whatever a method chooses."""
    rows = read(tmp_path)
    made = make(models, rows, method, **changes)
    policy, reference = (model.score(rows).logps.astype(np.float64) for model in models)
    losses = []
    for index in np.ravel(made[0].rows):
        pi = np.array(rows[index]["mined_probabilities"])
        rewards = BETA * (policy[index] - reference[index])[: 1 + len(pi)]
        losses.append(np.log1p((np.exp(rewards[1:] - rewards[0]) / pi).sum()))
    metrics = first_update(models, made)[1]
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_probabilities_of_one_change_nothing_bit_for_bit(
    tmp_path: Path, models: tuple[mdj.Model, mdj.Model]
) -> None:
    rows = read(tmp_path)
    ones = [{**row, "mined_probabilities": [1.0] * len(row["rejected"])} for row in rows]
    plain = [{k: v for k, v in row.items() if k != "mined_probabilities"} for row in rows]
    states = [first_update(models, make(models, each, "sdpo"))[0] for each in (ones, plain, rows)]
    same = [
        all(jax.tree.leaves(jax.tree.map(np.array_equal, states[0].params, state.params)))
        for state in states[1:]
    ]
    assert same == [True, False]


def test_another_draw_is_other_data(tmp_path: Path, models: tuple[mdj.Model, mdj.Model]) -> None:
    rows = read(tmp_path)
    digests = [make(models, rows, "sdpo").setup.digests()["train"]]
    rows[3]["mined_probabilities"][0] /= 2
    digests.append(make(models, rows, "sdpo").setup.digests()["train"])
    assert digests[0] != digests[1]


def test_weights_go_with_their_responses(
    tmp_path: Path, models: tuple[mdj.Model, mdj.Model]
) -> None:
    """Also where a response before them is left out as too long."""
    rows = read(tmp_path)
    limits = {"data.max_response_length": 4, "data.long_response": "drop"}
    tokens = make(models, rows, "pl_all", **limits).setup.tokens["train"]
    assert tokens.log_weights is not None and tokens.cut["responses_too_long"]
    places = {row["id"]: row for row in rows}
    for i, name in enumerate(tokens.ids):
        pi = [1.0, *places[name]["mined_probabilities"]]
        present = tokens.response_lengths[i] > 0
        want = -np.log([pi[c] for c in tokens.candidate_ids[i, present]])
        np.testing.assert_allclose(tokens.log_weights[i, present], want, rtol=1e-6)
        assert not tokens.log_weights[i, ~present].any()
