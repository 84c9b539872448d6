"""`config.loss`: what a method's loss is made of, from the settings to a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks, selection
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.export import export
from mass_dpo_jax.train import train
from mass_dpo_jax.training import method_config, methods
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.methods import Responses
from tests.support.helpers import slow, tiny_config, write_jsonl

POOL = 5
LEADS = ("mass_dpo", "pl_all", "sdpo", "dpo_k", "dmpo", "dpo")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


def method_of(name: str, **changes: Any) -> methods.Method:
    config = config_lib.default()
    config.update_from_flattened_dict({"method": name, "num_negatives": POOL, **changes})
    return make_method(config_checks.validate(config), largest_pool=POOL)


def make_responses(negatives: int = POOL) -> Responses:
    """Made-up responses of 7 prompts, some missing."""
    rng = np.random.default_rng(0)
    shape = 7, 1 + negatives
    valid = rng.random(shape) < 0.8
    valid[:, :2] = True
    logps, refs = -np.abs(rng.normal(0, 4, (2, *shape)))
    grades = np.sort(rng.random(shape), axis=1)[:, ::-1] * 5
    return Responses(
        logps=jnp.asarray(logps, jnp.float32),
        log_ratios=jnp.asarray(np.where(valid, logps - refs, 0), jnp.float32),
        lengths=jnp.asarray(np.where(valid, rng.integers(1, 9, shape), 0)),
        valid=jnp.asarray(valid),
        grades=jnp.asarray(grades, jnp.float32),
        weights=None,
        pool_loss=None,
    )


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


LINKS = {
    "sigmoid": softplus,
    "sigmoid_norm": softplus,
    "hinge": lambda s: np.maximum(0, 1 + s),
    "ipo": lambda s: ((s + 0.5) / 0.3) ** 2,
    "robust": lambda s: (0.9 * softplus(s) - 0.1 * softplus(-s)) / 0.8,
    "cpo": softplus,
    "simpo": lambda s: softplus(s + 0.7),
}


@pytest.mark.parametrize("loss_type", list(config_lib.LOSS_TYPES))
@pytest.mark.parametrize("name", LEADS)
def test_a_method_with_a_loss_of_trl_is_its_formula(name: str, loss_type: str) -> None:
    smoothing = 0.1 if loss_type == "robust" else 0.0
    changes = {"loss.type": loss_type, "loss.label_smoothing": smoothing, "loss.gamma": 0.7}
    method = method_of(name, beta=0.3, **changes)
    x = make_responses(1 if name == "dpo" else POOL)
    per_token, reference = loss_type in ("sigmoid_norm", "ipo", "simpo"), "po" not in loss_type
    reference |= loss_type == "ipo"
    values = np.asarray(x.log_ratios if reference else x.logps, np.float64)
    if per_token:
        values = values / np.maximum(x.lengths, 1)
    link = LINKS[loss_type]
    want = []
    for row, valid in zip(0.3 * values, np.asarray(x.valid), strict=True):
        scores = row[1:][valid[1:]] - row[0]
        if name in ("mass_dpo", "pl_all", "sdpo"):
            scores = np.logaddexp.reduce(scores)
        want.append(np.mean(link(scores.mean() if name == "dmpo" else scores)))
    np.testing.assert_allclose(method.loss(x), want, rtol=1e-4, atol=1e-5)
    assert method.uses_reference == reference


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.type": "sigmoid_norm"},
        {"loss.type": "simpo", "loss.gamma": 1.5},
        {"loss.margin": "grade", "odpo.alpha": 0.5},
    ],
)
def test_when_all_are_drawn_the_draw_has_the_gradient_of_the_pool(changes: dict[str, Any]) -> None:
    """Margins and lengths reach the drawn negatives through their weights."""
    x = make_responses()
    drawn, whole = method_of("pl_sampled", **changes), method_of("pl_all", **changes)
    scores, mask = drawn.scores(x), x.valid[:, 1:]
    pool_loss = jax.vmap(selection.pool_loss)(scores, mask)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    complete = x._replace(weights=weights, pool_loss=pool_loss)

    def gradient(method: methods.Method, x: Responses) -> list[np.ndarray]:
        def loss(logps: jax.Array) -> jax.Array:
            ratios = x.log_ratios + jnp.where(x.valid, logps - x.logps, 0.0)
            return method.loss(x._replace(logps=logps, log_ratios=ratios)).sum()

        return [np.asarray(found) for found in jax.value_and_grad(loss)(x.logps)]

    for found, want in zip(gradient(drawn, complete), gradient(whole, x), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_rewards_are_those_of_the_loss() -> None:
    x = make_responses()
    logps, refs = np.asarray(x.logps), np.asarray(x.logps - x.log_ratios)
    for loss_type in ("sigmoid", "ipo", "simpo"):
        method = method_of("sdpo", **{"loss.type": loss_type})
        has_reference = loss_type != "simpo"
        found = method.implicit_rewards(logps, refs if has_reference else None, x.lengths)
        wanted = np.where(x.valid, method.rewards(x), 0)
        np.testing.assert_allclose(np.where(x.valid, found, 0), wanted, rtol=1e-5, atol=1e-6)
        at_start = method.implicit_rewards(logps, None, x.lengths)
        assert (at_start is None) == has_reference
    assert (
        method_of("sdpo", **{"loss.type": "cpo"}).implicit_rewards(logps, None, x.lengths) is None
    )


def test_margins_by_grade_are_those_of_odpo() -> None:
    x = make_responses()
    odpo = method_of("odpo", **{"odpo.alpha": 0.5})
    same = method_of("dpo_k", **{"loss.margin": "grade", "odpo.alpha": 0.5})
    np.testing.assert_array_equal(odpo.loss(x), same.loss(x))
    assert same.uses_scores and odpo.margin == "grade"


def test_lists_take_rewards_per_token_and_without_a_reference() -> None:
    x = make_responses()
    for name in config_lib.LIST_METHODS:
        method = method_of(name, **{"loss.reward": "per_token", "loss.reference": False})
        plain = x._replace(log_ratios=x.logps / jnp.maximum(x.lengths, 1))
        expected = dataclasses.replace(method, per_token=False, uses_reference=True).loss(plain)
        np.testing.assert_allclose(method.loss(x), expected, rtol=1e-6)


def test_a_type_sets_what_is_not_set_itself() -> None:
    config = config_lib.default()
    config.loss.margin = "grade"
    config.loss.type = "simpo"
    found = config.loss.reward, config.loss.reference, config.loss.margin, config.loss.link
    assert found == ("per_token", False, "grade", "logistic")
    config.loss.link = "hinge"
    config.loss.type = "ipo"
    assert (config.loss.link, config.loss.reference) == ("hinge", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.type": "kto"}, "config.loss.type='kto': expected one of sigmoid"),
        ({"loss.link": "ipo"}, "config.loss.link='ipo': expected one of logistic"),
        ({"loss.label_smoothing": 0.5}, "label_smoothing=0.5: expected 0 to 0.5"),
        ({"loss.gamma": -1.0}, "config.loss.gamma=-1.0: expected 0 or more"),
        (
            {"method": "pl_sampled", "loss.type": "hinge"},
            "link=hinge: .*pl_sampled takes no such .* logistic, or",
        ),
        (
            {"method": "pl_rank", "loss.type": "simpo"},
            "margin=constant: .*pl_rank takes no .* none, or",
        ),
        ({"method": "mppo", "loss.type": "cpo"}, "reference=False: .*mppo takes no .* True, or"),
        ({"method": "odpo", "loss.margin": "constant"}, "margin=constant: config.method=odpo"),
        ({"loss.type": "cpo", "selection.features": "reference"}, "there is no reference"),
        ({"loss.type": "cpo", "selection.prompts": "design"}, "has no reference"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(data, **changes), tmp_path / "run")


def test_the_supervised_method_has_no_such_loss() -> None:
    config = config_lib.default()
    config.update_from_flattened_dict({"method": "sft", "loss.type": "simpo"})
    assert make_method(config, POOL).is_supervised
    assert "loss.margin" in method_config.find_unread(config)
    assert not method_config.has_rewards(config)
    x = make_responses()
    logps = np.asarray(x.logps)
    assert make_method(config, POOL).implicit_rewards(logps, None, x.lengths) is None


@pytest.mark.parametrize("loss_type", ["simpo", slow("ipo"), slow("hinge")])
def test_a_run_lowers_its_loss_and_goes_on(tmp_path: Path, data: Path, loss_type: str) -> None:
    steps = {"train.steps": 24, "train.eval_every": 0, "train.clip": 1.0, "beta": 1.0}
    config = tiny_config(data, method="sdpo", **{"loss.type": loss_type}, **steps)
    done = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(found[-3:]) < 0.9 * np.mean(found[:3])
    assert "reward/accuracy" in done["final"]  # By log-probabilities per token, with simpo.
    has_reference = loss_type != "simpo"
    assert ("reward/accuracy" in done["start"]) != has_reference
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["loss"]
    assert stored["type"] == loss_type and stored["reference"] == has_reference
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text().replace("\n", " ")
    expected = {
        "simpo": ["under this model), averaged over its tokens", "by a margin of 0.5."],
        "ipo": ["under the reference), averaged over its tokens", "enters squared"],
        "hinge": ["under the reference), summed over its tokens", "by a hinge"],
    }[loss_type]
    assert all(part in card for part in expected)
