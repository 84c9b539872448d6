"""The whole of training: what a step computes, and that a run can stop anywhere."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import metrics_files
from mass_dpo_jax.train import train
from mass_dpo_jax.training import loop
from mass_dpo_jax.training.methods import METHODS
from mass_dpo_jax.training.negatives import NOT_CHOSEN, NegativeSets
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Reference
from mass_dpo_jax.training.step import (
    Choice,
    Program,
    TrainState,
    WindowNegatives,
    _describe_responses,
)
from mass_dpo_jax.training.updates import Batches, TrainStep
from tests.support.helpers import log_lines, losses, slow, tiny_config, write_jsonl
from tests.support.runs import on_one_device

pytestmark = pytest.mark.usefixtures("one_device", "strict_jax")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


@pytest.mark.parametrize("n", [slow(1), 3, slow(5)])
def test_loss_is_log_of_one_plus_n_at_the_reference(tmp_path: Path, n: int) -> None:
    # Policy = reference: every log-ratio is 0, whatever the data. Pools here hold at least n.
    data = write_jsonl(tmp_path / "data.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows if len(r["rejected"]) >= n))
    train(tiny_config(data, num_negatives=n, **{"train.steps": 1}), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(1 + n), abs=1e-5)


@pytest.mark.parametrize("changes", [{"num_negatives": 6}, {"selection.criterion": "all"}])
def test_pools_smaller_than_n_use_what_they_have(tmp_path: Path, data: Path, changes: dict) -> None:
    lines = data.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:8]]
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[:8]))
    (folder / "test.jsonl").write_text("".join(lines[8:]))
    train(tiny_config(folder, **changes, **{"train.steps": 1}), tmp_path / "run")
    expected = np.mean([math.log(1 + len(row["rejected"])) for row in rows])
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("held_out", [5, 8, slow(2)])
@pytest.mark.parametrize("changes", [{"method": "pl_all"}, {"selection.criterion": "all"}])
def test_the_whole_pool_is_that_of_the_training_rows(
    tmp_path: Path, data: Path, changes: dict, held_out: int
) -> None:
    """Whatever pools the rows have that it is evaluated on, and whatever config.num_negatives."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    more = [f"{word} jetty maple" for word in ("amber", "basil", "cedar", "delta", "ember")]
    folder = tmp_path / "splits"
    folder.mkdir()
    for split, some, size in (("train", rows[:8], 3), ("test", rows[8:12], held_out)):
        for row in some:
            row["rejected"] = (row["rejected"] + more)[:size]
            del row["score_chosen"], row["score_rejected"]
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{split}.jsonl").write_text(text)
    some = {"train.steps": 1, "log.report": True, "num_negatives": 99}
    config = tiny_config(folder, **changes, **some)
    assert prepare(config, tmp_path / "none", ("train", "test")).method.num_negatives == 3
    train(config, tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(4), abs=1e-5)


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ([1], "the largest has 1 rejected response); set config.num_negatives=1, or config.method"),
        ([1, 2], "the largest has 2 rejected responses); set config.num_negatives=2 or fewer"),
    ],
)
def test_pools_that_are_all_too_small(
    tmp_path: Path, data: Path, pools: list[int], message: str
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["rejected"] = row["rejected"][: pools[i % len(pools)]]
        del row["score_chosen"], row["score_rejected"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("mass_dpo", "pl_sampled", "sdpo", "dmpo"):
        with pytest.raises(UserError, match="=3: larger than every pool") as error:
            prepare(tiny_config(data, method=method), tmp_path / "run", ("train",))
        assert message in str(error.value)
    # A message that names the setting comes from methods that read it only.
    for method, n in {"dpo": 1, "pl_all": max(pools), "sft": 0}.items():
        setup = prepare(tiny_config(data, method=method), tmp_path / "run", ("train",))
        assert setup.method.num_negatives == n


def test_ranks_are_those_of_the_data_where_responses_are_left_out(
    tmp_path: Path, data: Path
) -> None:
    long = "delta " * 40
    rows = [json.loads(line) for line in data.read_text().splitlines()][:8]
    pools = [[long, "cedar"], ["cedar", long + "ember", long, "fjord"], ["amber", "ember", long]]
    for i, row in enumerate(rows):
        row["rejected"] = pools[i % 3]
        del row["score_chosen"], row["score_rejected"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranks = [[2], [1, 4], [1, 2]]  # Counted from 1, of those that are left.
    changes = {
        "data.long_response": "drop", "data.max_response_length": 20, "num_negatives": 2,
        "method": "odpo", "odpo.offset": "rank", "data.validation_share": 0.0,
    }  # fmt: skip
    want = [np.logaddexp(0, np.log(ranks[i % 3])).mean() for i in range(8)]
    assert first_loss(tmp_path, data, **changes) == pytest.approx(np.mean(want), abs=1e-5)
    # The data's own scores, where it has any, are not what is asked for.
    for row in rows:
        row |= {"score_chosen": 1, "score_rejected": [1] * len(row["rejected"])}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert first_loss(tmp_path, data, **changes) == pytest.approx(np.mean(want), abs=1e-5)


@pytest.mark.parametrize("method", [name if name == "mass_dpo" else slow(name) for name in METHODS])
def test_every_method_lowers_its_loss(tmp_path: Path, data: Path, method: str) -> None:
    changes = {"train.steps": 24, "train.eval_every": 0, "train.clip": 1.0, "beta": 1.0}
    done = train(tiny_config(data, method=method, **changes), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 24
    # MPPO's likelihoods move the slower the smaller they are: here they start at some 1/300.
    assert np.mean(found[-3:]) < (0.9 if method == "mppo" else 0.8) * np.mean(found[:3])
    assert done["finished"] and done["final"] is not None
    rewards = any(name.startswith("reward/") for name in done["final"])
    assert rewards == (method not in ("sft", "mppo"))  # Without a reference there is no reward.


def first_loss(tmp_path: Path, data: Path, **changes: Any) -> float:
    """The loss of the first step, without its gradient."""
    setup = prepare(tiny_config(data, **changes), tmp_path / "run", ("train",))
    params = setup.policy.weights("", 0)
    reference = setup.score_reference(params) if setup.method.uses_reference else Reference({})
    first = Batches(setup, reference)[0]
    batch, size = first.arrays, first.packed_length

    @jax.jit
    def loss(params: Any, batch: Any) -> Any:
        choice = Choice(jnp.zeros((len(batch.index), 0), jnp.int32))
        if not setup.method.is_supervised:
            choice, _ = setup.program.choose_batch(params, batch, setup.key(0))
        return setup.program.loss(params, batch, choice, size)[0]

    parts = [loss(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(len(batch[0]))]
    return float(np.mean(parts))


def test_losses_at_the_reference(tmp_path: Path, data: Path) -> None:
    """Where every log-ratio is 0 a loss is a number that needs no model."""
    some = {"num_negatives": 2}
    for method, want in {"dpo": 2, "dpo_k": 2, "dmpo": 2, "sdpo": 3, "mass_dpo": 3}.items():
        found = first_loss(tmp_path, data, method=method, **some)
        assert found == pytest.approx(math.log(want), abs=1e-5)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    whole = {"train.batch_size": 24, "train.micro_batch_size": 8, "data.validation_share": 0.0}
    everyone = np.log1p([len(row["rejected"]) for row in rows]).mean()
    for method in ("pl_all", "pl_sampled"):
        found = first_loss(tmp_path, data, method=method, **some, **whole)
        assert found == pytest.approx(everyone, abs=1e-5)
    # Lists: every response against the worse ones; or every pair of them, by its weight.
    grades = [np.array([row["score_chosen"], *row["score_rejected"]]) for row in rows]
    worse = [(g[:, None] > g).sum(1) for g in grades]
    want = np.mean([np.log1p(count).sum() for count in worse])
    assert first_loss(tmp_path, data, method="pl_rank", **whole) == pytest.approx(want, abs=1e-5)
    want = np.mean([np.log1p(count.max()) for count in worse])
    found = first_loss(tmp_path, data, method="pl_rank", **{"pl_rank.top": 1}, **whole)
    assert found == pytest.approx(want, abs=1e-5)
    low, high = min(map(np.min, grades)), max(map(np.max, grades))
    lists, trees = [], []
    for g in grades:
        order = np.lexsort((np.arange(len(g)), g))  # All rewards are 0: the worst is first.
        discount = np.empty(len(g))
        discount[order] = 1 / np.log2(2 + np.arange(len(g)))
        gain = 2 ** ((g - low) / (high - low))
        change = np.abs(np.subtract.outer(gain, gain) * np.subtract.outer(discount, discount))
        lists.append(math.log(2) * change[g[:, None] > g].sum())
        trees.append(lists[-1] / max(math.comb(len(g), 2), 1))
    for method, sums in {"lipo_lambda": lists, "tree_po": trees}.items():
        found = first_loss(tmp_path, data, method=method, **some, **whole)
        assert found == pytest.approx(np.mean(sums), abs=1e-5)
    # One negative: its margin is alpha log(9 - its score), or of its rank, 1 for the only one.
    for row in rows:
        row["rejected"], row["score_rejected"] = row["rejected"][:1], row["score_rejected"][:1]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    margins = 0.5 * np.log([9 - row["score_rejected"][0] for row in rows])
    odpo = {"method": "odpo", "odpo.alpha": 0.5, "num_negatives": 1, **whole}
    by_score = first_loss(tmp_path, data, **odpo)
    assert by_score == pytest.approx(np.logaddexp(0, margins).mean(), abs=1e-5)
    by_rank = first_loss(tmp_path, data, **odpo, **{"odpo.offset": "rank"})
    assert by_rank == pytest.approx(math.log(2), abs=1e-5)


def test_a_supervised_term_adds_its_weight(tmp_path: Path, data: Path) -> None:
    alone = first_loss(tmp_path, data, method="sft")
    both = first_loss(tmp_path, data, method="dpo", sft_weight=0.5)
    assert both == pytest.approx(math.log(2) + 0.5 * alone, abs=1e-4)


def test_odpo_needs_scores_that_prefer_the_chosen_response(tmp_path: Path, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["score_rejected"][0] = 9
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(data, method="odpo", **{"data.validation_share": 0.0})
    with pytest.raises(UserError, match=r"example 'row3': score_chosen 9.0 is not above .* 9.0"):
        train(config, tmp_path / "run")
    for row in rows:
        del row["score_chosen"], row["score_rejected"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"no scores; .*odpo.offset=rank"):
        train(config, tmp_path / "run")


def test_pl_sampled_draws_at_every_step(tmp_path: Path, data: Path) -> None:
    config = tiny_config(data, method="pl_sampled", **{"selection.refresh": "once"})
    with pytest.raises(UserError, match=r"refresh=once: config\.method=pl_sampled draws at every"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("criterion", ["contrast", slow("hardest")])
def test_frozen_features_are_those_of_the_reference(
    tmp_path: Path, data: Path, criterion: str
) -> None:
    changes = {
        "selection.criterion": criterion, "train.steps": 6, "train.learning_rate": 3e-2,
        "beta": 1.0, "train.clip": 10.0, "train.eval_every": 0, "num_negatives": 2,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    runs = {}
    for features in ("policy", "reference"):
        train(tiny_config(data, **changes, **{"selection.features": features}), tmp_path / features)
        runs[features] = log_lines(tmp_path / features)
    assert all(line["loss"] > 0 for lines in runs.values() for line in lines if "loss" in line)
    live, frozen = ([line for line in runs[f] if "loss" in line] for f in runs)
    # At the first step the policy is the reference; later only the features' own change differs.
    assert frozen[0]["loss"] == pytest.approx(live[0]["loss"], abs=1e-6)
    kept = list((tmp_path / "cache").glob("ref_grams-*.npy"))
    if criterion == "hardest":
        assert losses(tmp_path / "policy") == losses(tmp_path / "reference") and not kept
        return
    (file,) = kept
    assert np.load(file).shape == (22, 7, 7)
    logdets = [[line["selection/logdet"] for line in lines] for lines in (live, frozen)]
    assert logdets[0][0] == pytest.approx(logdets[1][0], rel=1e-4)
    assert logdets[0][-1] != pytest.approx(logdets[1][-1], rel=1e-3)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Makes a run for each `refresh`, and returns what it logged of its six steps.

    A batch is an epoch, so that every step sees every example.
    """
    folder = tmp_path_factory.mktemp("windows")
    changes = {
        "train.batch_size": 22, "train.micro_batch_size": 22, "train.steps": 6, "beta": 1.0,
        "train.learning_rate": 3e-2, "train.clip": 10.0, "train.eval_every": 0,
        "num_negatives": 2,
    }  # fmt: skip
    found = {}
    for refresh in ("step", "once", "3"):
        config = tiny_config(write_jsonl(folder / "data.jsonl"), **changes)
        config.selection.refresh = refresh
        with on_one_device():
            train(config, folder / refresh)
        found[refresh] = [line for line in log_lines(folder / refresh) if "loss" in line]
    return found


def test_the_log_says_how_many_sets_changed(windows: dict[str, list[dict[str, Any]]]) -> None:
    changed = {
        refresh: [line.get("selection/changed") for line in lines]
        for refresh, lines in windows.items()
    }
    step = changed["step"]
    assert step[0] is None and all(0 <= share <= 1 for share in step[1:]) and max(step[1:]) > 0
    assert changed["once"] == [None] * 6
    assert [share is None for share in changed["3"]] == [True] * 3 + [False] + [True] * 2
    assert changed["3"][3] > 0


def test_sets_are_kept_within_a_window(windows: dict[str, list[dict[str, Any]]]) -> None:
    """`once` trains on the same sets throughout while `step` moves on: their first losses agree,
    later ones do not."""
    losses = {refresh: [line["loss"] for line in lines] for refresh, lines in windows.items()}
    assert losses["once"][0] == pytest.approx(losses["step"][0], abs=1e-6)
    assert losses["once"][:3] == pytest.approx(losses["3"][:3], abs=1e-6)
    assert losses["once"] != pytest.approx(losses["step"], abs=1e-6)
    assert losses["once"] != pytest.approx(losses["3"], abs=1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("refresh", "criterion"),
    [("step", "pool_fisher"), slow("3", "pool_fisher"), slow("epoch", "pool_fisher"),
     slow("once", "pool_fisher"), ("2", "random"), slow("step", "sampled"), ("once", "frozen")],
)  # fmt: skip
def test_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, refresh: str, criterion: str
) -> None:
    changes = {
        "train.steps": 8, "train.checkpoint_every": 2, "train.micro_batch_size": 4,
        "selection.refresh": refresh,
    }  # fmt: skip
    if criterion == "sampled":
        changes["method"] = "pl_sampled"
    elif criterion == "frozen":
        changes |= {"selection.criterion": "set_fisher", "selection.features": "reference"}
    else:
        changes["selection.criterion"] = criterion
    config = tiny_config(data, **changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(config, whole)

    write = metrics_files.MetricsLog.write

    def write_and_stop(self: metrics_files.MetricsLog, step: int, figures: dict) -> None:
        if "loss" in figures and step == stop_at[0]:
            raise Stop
        write(self, step, figures)

    stop_at = [0]
    for stop_at[0] in (6, 8):  # Checkpoints 4 and 6: each in the middle of some window above.
        with monkeypatch.context() as patch:
            patch.setattr(metrics_files.MetricsLog, "write", write_and_stop)
            with pytest.raises(Stop):
                train(config, parts)
    found = train(config, parts)
    assert losses(parts) == losses(whole)
    for line, same in zip(log_lines(parts), log_lines(whole), strict=True):
        times = ("examples_per_second",)
        assert {k: v for k, v in line.items() if k not in times} == {
            k: v for k, v in same.items() if k not in times
        }
    assert found == expected
    assert np.array_equal(np.load(parts / "logps-final.npy"), np.load(whole / "logps-final.npy"))


def test_random_sets_are_each_prompts_own_and_last_a_window(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.batch_size": 22, "train.micro_batch_size": 22, "train.steps": 3}
    config = tiny_config(data, method="sdpo", **changes, **{"selection.refresh": "2"})
    setup = prepare(config, tmp_path / "run", ("train",))
    batches = Batches(setup, Reference({}))
    sets = np.zeros((3, 22, 3), np.int32)

    def choose(self: Program, _: Any, state: Any, arrays: Any, given: Any, key: Any, *rest: Any):
        assert given is None  # They are chosen inside of the step.
        micro_batch = jax.tree.map(lambda x: x[0], arrays)
        return state, self.choose_batch(state.params, micro_batch, key)[0].candidate_ids, {}

    monkeypatch.setattr(Program, "train_step", choose)  # Its choice without its gradient.
    step = TrainStep(batches, make_optimizer(config.train, 3), {})
    for batch in batches:
        _, sets[batch.step, batch.rows], _ = step.update(TrainState(batch.step, {}, None), batch)
    np.testing.assert_array_equal(sets[0], sets[1])
    assert (sets[1] != sets[2]).any(-1).mean() > 0.5
    pools = (setup.tokens["train"].response_lengths[:, 1:] > 0).sum(1)
    for size in (4, 5, 6):
        of_size = sets[0, pools == size]
        assert len({tuple(row) for row in of_size.tolist()}) > 1, of_size


def test_a_step_moves_nothing_between_host_and_device(tmp_path: Path, data: Path) -> None:
    """All that it takes lies on the device already. A transfer that nobody wrote would wait for the
    device at every step."""
    config = tiny_config(data)
    setup = prepare(config, tmp_path / "run", ("train",))
    logps = np.zeros(setup.tokens["train"].response_lengths.shape, np.float32)
    batches, optimizer = (
        Batches(setup, Reference({"train": logps})),
        make_optimizer(config.train, 4),
    )
    state = TrainStep(batches, optimizer, {}).init(setup.policy.weights("", 0))
    batch, key = batches[0], setup.key(0)
    for guard in ("allow", "disallow"):  # Compiled at the first call.
        with jax.transfer_guard(guard):
            state, *_ = setup.program.train_step(
                optimizer, state, batch.arrays, None, key, batch.packed_length, {}
            )
    assert int(state.step) == 2
    # The guard works on this device, too.
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(RuntimeError, match="Disallowed host-to-dev"),
    ):
        setup.program.scorer.logps(
            state.params, jax.tree.map(lambda x: np.asarray(x[0]), batch.arrays)
        )


def test_a_window_chooses_for_every_row_it_trains_on_with_the_policy_at_its_start(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, **{"train.steps": 5, "selection.refresh": "2"})
    setup = prepare(config, tmp_path / "run", ("train",))
    order = Batches(setup, Reference({})).order

    def choose(self: Program, policy: int, batch: Any, key: Any) -> Any:
        return Choice(np.full((len(batch.index), 3), policy)), {}

    monkeypatch.setattr(Program, "choose_batch", choose)
    sets = NegativeSets(setup, order, 5, Reference({}), None)
    for step, start in enumerate((10, 10, 12, 12, 14)):
        found = sets.for_step(step, 10 + step)  # A number in the place of weights.
        assert found is not None and (found.candidate_ids[order(step)[0]] == start).all()


def test_sets_that_are_not_there_are_chosen_with_a_warning(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    config = tiny_config(data, **{"train.steps": 7, "selection.refresh": "3"})
    setup = prepare(config, tmp_path / "run", ("train",))
    order = Batches(setup, Reference({})).order

    def choose(self: Program, policy: int, batch: Any, key: Any) -> Any:
        return Choice(np.full((len(batch.index), 3), policy)), {}

    monkeypatch.setattr(Program, "choose_batch", choose)

    def sets(restored: np.ndarray | None = None) -> NegativeSets:
        return NegativeSets(setup, order, 7, Reference({}), restored)

    def at(
        sets: NegativeSets, step: int, policy: int, given: WindowNegatives | None = None
    ) -> WindowNegatives:
        found = sets.for_step(step, policy, given)  # A number in the place of weights.
        assert found is not None and found.window == step // 3
        assert (found.candidate_ids != NOT_CHOSEN).all(1)[order(step)[0]].all()
        return found

    def policy_of(found: WindowNegatives, step: int) -> int:
        (policy,) = np.unique(found.candidate_ids[order(step)[0]])
        return int(policy)

    first = at(sets(), 0, 1)
    before = first.candidate_ids.copy()
    assert "no sets" not in said()
    # Handed on: with the state, as arrays of JAX too, or with a checkpoint.
    for given in (first, jax.tree.map(jnp.asarray, first)):
        assert policy_of(at(sets(), 1, 2, given), 1) == 1
    assert policy_of(at(sets(first.candidate_ids), 2, 2), 2) == 1
    assert "no sets" not in said()
    # A window of its own begins: nothing is missing.
    assert policy_of(at(sets(), 3, 4, first), 3) == 4
    np.testing.assert_array_equal(first.candidate_ids, before)  # A state is not changed afterwards.
    assert "no sets" not in said()
    # Entered in the middle: without sets, with those of another window, with some rows' only.
    partial = first.candidate_ids.copy()
    partial[order(2)[0][3]] = NOT_CHOSEN
    for step, given in ((1, None), (4, first), (5, first), (2, WindowNegatives(0, partial))):
        assert policy_of(at(sets(), step, 9, given), step) == 9
        assert f"step {step}: the state has no sets of negatives of its window" in said()
    assert said().count("they are chosen now") == 4
    with pytest.raises(UserError, match=r"sets of negatives are \[22, 2\], expected \[22, 3\]"):
        sets().for_step(1, 1, WindowNegatives(0, np.ones((22, 2), np.int32)))


def test_a_set_in_another_order_has_not_changed(tmp_path: Path, data: Path) -> None:
    setup = prepare(tiny_config(data), tmp_path / "run", ("train",))
    sets = NegativeSets(setup, Batches(setup, Reference({})).order, 4, Reference({}), None)
    shares = []
    for numbers in ([[1, 2, 3], [4, 5, 6]], [[3, 1, 2], [4, 5, 1]]):
        shares.append(sets.fraction_changed(np.array([7, 2]), np.array([numbers]))())
    assert shares == [None, 0.5]


def test_a_row_without_negatives_has_no_margin() -> None:
    logps, rewards = jnp.array([[-1.0, -2.0, -3.0]] * 3), jnp.array([[3.0, 1.0, 2.0]] * 3)
    valid = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
    found = _describe_responses(logps, rewards, valid)
    assert all(np.isfinite(value) for value in found.values())
    assert found["rewards/margins_hard"] == pytest.approx((1 + 2 + 0) / 3)


def test_draws_have_other_keys_than_random_weights(tmp_path: Path, data: Path) -> None:
    setup = prepare(tiny_config(data, seed=3), tmp_path / "run", ("train",))
    draws = [tuple(jax.random.key_data(setup.key(i)).tolist()) for i in range(50)]
    weights = [
        tuple(jax.random.key_data(jax.random.fold_in(jax.random.key(3), i)).tolist())
        for i in range(50)
    ]
    assert len({*draws, *weights}) == 100


def test_micro_batches_change_nothing_but_memory(tmp_path: Path, data: Path) -> None:
    train(tiny_config(data, **{"train.micro_batch_size": 8}), tmp_path / "one")
    train(tiny_config(data, **{"train.micro_batch_size": 2}), tmp_path / "four")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_rectangle_trains_as_packed(tmp_path: Path, data: Path) -> None:
    for layout in ("packed", "rectangle"):
        train(tiny_config(data, **{"model.layout": layout}), tmp_path / layout)
    assert losses(tmp_path / "rectangle") == pytest.approx(losses(tmp_path / "packed"), abs=1e-5)


def test_reference_is_read_again_and_only_while_nothing_changed(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mass_dpo_jax")

    def runs(name: str, **changes: object) -> bool:
        """Does a run read its reference from the cache?"""
        config = tiny_config(data, cache_dir=str(tmp_path / "cache"), **changes)
        caplog.clear()
        setup = prepare(config, tmp_path / name, ("train", "validation", "test"))
        setup.score_reference(setup.policy.weights("", config.seed))
        # Validation and test are the same rows here, so the one always reads the other's.
        return caplog.text.count("reference: read") == 3

    assert not runs("first")
    assert runs("same")
    assert runs("other method", method="sdpo", beta=0.5)
    assert not runs("other weights", seed=1)
    assert not runs("other compute type", **{"model.dtype": "bfloat16"})
    assert not runs("other tokens", **{"data.max_prompt_length": 8})
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert not runs("damaged file")
    assert runs("mended file")


def test_a_run_is_a_model_for_the_next(tmp_path: Path, data: Path) -> None:
    first = train(tiny_config(data, method="sft", **{"train.steps": 6}), tmp_path / "sft")
    config = tiny_config(data, **{"model.path": str(tmp_path / "sft"), "train.steps": 2})
    second = train(config, tmp_path / "dpo")
    final = {k: v for k, v in first["final"].items() if k.startswith("policy/")}
    assert second["start"] == pytest.approx(final, abs=1e-5)


def test_a_reference_with_other_special_tokens(tmp_path: Path, data: Path) -> None:
    """As an instruction-tuned model and its base: the same decoder, another end of text."""
    first, other = tmp_path / "sft", tmp_path / "other"
    train(tiny_config(data, method="sft", **{"train.steps": 1}), first)
    shutil.copytree(first, other)
    path = other / "model" / "config.json"
    described = json.loads(path.read_text())
    described |= {"eos_token_id": [0, 1], "bos_token_id": None, "max_position_embeddings": 77}
    path.write_text(json.dumps(described))
    models = {"model.path": str(first), "model.reference_path": str(other), "train.steps": 1}
    train(tiny_config(data, num_negatives=1, **models), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-5)
    path.write_text(json.dumps(described | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=f"{path}: not what the run began with"):
        train(tiny_config(data, **models), tmp_path / "run2")
    (other / "origin.json").unlink()  # As of a version that did not keep it.
    with pytest.raises(UserError, match=f"{other}: its architecture .*policy's: rms_norm_eps$"):
        train(tiny_config(data, **models), tmp_path / "refused")


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("link", "link is a link to {0}/gone, which is not there"),
        ("link/runs/first", "link is a link to {0}/gone, which is not there"),
        ("chain", "chain is a link to {0}/link, which is not there"),
        ("data.jsonl", "a file stands where a folder is expected"),
        ("data.jsonl/run", "data.jsonl is a file, expected a folder"),
        ("system/run", "cannot be written: "),
    ],
)
def test_a_workdir_that_cannot_be_written_is_refused_before_data_are_read(
    tmp_path: Path, data: Path, workdir: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    (tmp_path / "system").symlink_to("/proc")  # Where not even root can write.
    monkeypatch.setattr(loop, "prepare", None)
    with pytest.raises(UserError, match=f"--workdir=.*{message.format(tmp_path)}"):
        train(tiny_config(data), tmp_path / workdir)


def test_workdir_of_another_run_is_refused_and_kept(tmp_path: Path, data: Path) -> None:
    train(tiny_config(data, **{"train.steps": 2}), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"belongs to .*beta \(there 0.1, here 0.2\)"):
        train(tiny_config(data, beta=0.2, **{"train.steps": 2}), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llama", "hidden_size": 32}, r"a model's description.*model\.path takes"),
        ({"name": "something"}, "unknown setting 'name'"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_kept(
    tmp_path: Path, data: Path, content: dict, message: str
) -> None:
    path = tmp_path / "folder" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{path}.*{message}.*another --workdir"):
        train(tiny_config(data), path.parent)
    assert [*path.parent.iterdir()] == [path] and json.loads(path.read_text()) == content


def test_a_folder_beside_a_model_is_refused_and_the_model_kept(tmp_path: Path, data: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "config.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}: has a folder model/ that is no run's"):
        train(tiny_config(data), tmp_path)
    assert [*path.parent.iterdir()] == [path] and path.read_text() == "{}"


def test_the_folder_of_a_run_that_saved_nothing_is_taken_over(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(data, **{"train.steps": 1}), run)
    shutil.rmtree(run / "checkpoints")
    config = tiny_config(data, beta=0.2, **{"train.steps": 1, "model.scratch.vocab_size": 280})
    train(config, run)
    assert json.loads((run / "config.json").read_text()) == config.to_dict()
    assert json.loads((run / "model" / "config.json").read_text())["vocab_size"] == 280


def test_n_larger_than_every_pool(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"num_negatives=7.*the largest has 6"):
        train(tiny_config(data, num_negatives=7), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
