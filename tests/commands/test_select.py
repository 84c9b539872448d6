"""Offline selection: from a model, from features, and what other programs read of it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import mass_dpo_jax as mdj
from mass_dpo_jax import config as config_lib
from mass_dpo_jax import selection, theory
from mass_dpo_jax.data.formats.writing import convert_rows
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.train import train
from mass_dpo_jax.training import offline_selection
from mass_dpo_jax.training.offline_selection import (
    select_with_features,
    select_with_model,
)
from mass_dpo_jax.training.scored_model import prepare_scoring
from tests.support.helpers import slow, tiny_config, write_jsonl
from tests.support.processes import command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("select")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_jsonl(folder / "data.jsonl", examples=12)


@pytest.fixture(scope="module")
def run(folder: Path, data: Path) -> Path:
    changes = {"train.steps": 6, "train.learning_rate": 3e-2, "train.eval_every": 0, "beta": 1.0}
    train(tiny_config(data, **changes), folder / "run")
    return folder / "run"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("criterion", ["contrast", "set_fisher"])
def test_a_run_selects_against_its_own_reference(run: Path, data: Path, criterion: str) -> None:
    changes = {"beta": 1.0, "num_negatives": 2, "selection.criterion": criterion}
    found = list(select_with_model(tiny_config(data, **changes), run, None))
    given = rows_of(data)
    assert [row["id"] for row in found] == [row["id"] for row in given]
    # The same by hand: features and scores of one example at a time, then the float64 form.
    config = tiny_config(data, **changes)
    config.data.validation_share = 0.0
    setup, split, params, reference = prepare_scoring(config, run, "all")
    refs = reference.logps.get(split)
    assert refs is not None
    logps = setup.score(params, split, "by hand")
    disagreements = 0
    for row, (mine, example) in enumerate(zip(found, given, strict=True)):
        assert mine["prompt"] == example["prompt"] and mine["chosen"] == example["chosen"]
        assert mine["rejected"] == [example["rejected"][i] for i in mine["selected"]]
        features = features_of(setup, params, row)
        scores = (logps - refs)[row, 1 : len(features)] - (logps - refs)[row, 0]
        scores = scores.astype(np.float64)
        if criterion == "contrast":
            vectors = theory.contrast_vectors(features, scores)
            want, _ = theory.greedy(vectors, 2, ridge=0.1)
        else:
            want, _ = theory.set_fisher(features, scores, 2, ridge=0.1)
        disagreements += mine["selected"] != want
        assert len(mine["gains"]) == len(mine["selected"]) == 2
    assert disagreements <= 1  # Near ties.


@pytest.mark.parametrize("criterion", ["pool_fisher", "contrast", "set_fisher"])
@pytest.mark.parametrize("split", ["train", slow("all")])
def test_a_run_on_frozen_features_selects_by_those_of_its_reference(
    run: Path, data: Path, criterion: str, split: str
) -> None:
    """Features of the reference, scores of the run: both by hand, in the float64 form."""
    changes = {"beta": 1.0, "num_negatives": 2, "selection.criterion": criterion}
    config = tiny_config(data, **changes, **{"selection.features": "reference"})
    found = list(select_with_model(config, run, split))
    given = {row["id"]: row for row in rows_of(data)}
    setup, _, params, reference = prepare_scoring(config, run, "all")
    logps, refs = setup.score(params, "all", "by hand"), reference.logps["all"]
    frozen = setup.policy.weights("", config.seed)  # The random weights that the run began from.
    disagreements, moved = 0, 0
    for mine in found:
        row = setup.tokens["all"].ids.index(mine["id"])
        features = features_of(setup, frozen, row)
        scores = (logps - refs)[row, 1 : len(features)] - (logps - refs)[row, 0]

        def chosen(features: np.ndarray, scores: Any) -> list[int]:
            if criterion == "set_fisher":
                return theory.set_fisher(features, scores, 2, ridge=0.1)[0]
            if criterion == "contrast":
                vectors = theory.contrast_vectors(features, scores)
            else:
                vectors = theory.pool_fisher_vectors(features[1:], scores)
            return theory.greedy(vectors, 2, ridge=0.1)[0]

        scores = scores.astype(np.float64)
        want = chosen(features, scores)
        disagreements += mine["selected"] != want
        moved += want != chosen(features_of(setup, params, row), scores)
        assert mine["rejected"] == [given[mine["id"]]["rejected"][i] for i in mine["selected"]]
    assert disagreements <= 1  # Near ties.
    assert moved  # Else it could as well have read the run's own features.


@pytest.mark.parametrize("criterion", ["boundary", "topk"])
def test_baselines_that_rank_as_the_policy_does(run: Path, data: Path, criterion: str) -> None:
    """By log-probability: the run's rewards have another order, a model's own are all 0."""
    changes = {"selection.criterion": criterion, "selection.top": 1, "num_negatives": 1}
    orders = 0
    for origin in ({"workdir": run}, {"model.path": str(run)}):
        workdir = origin.pop("workdir", None)
        config = tiny_config(data, beta=1.0, **changes, **origin)
        found = list(select_with_model(config, workdir, None))
        setup, split, params, reference = prepare_scoring(config, workdir, "all")
        logps = setup.score(params, split, "by hand")
        refs = reference.logps.get(split, logps)
        for row, mine in enumerate(found):
            size = int((setup.tokens["all"].response_lengths[row] > 0).sum())
            negatives = logps[row, 1:size]
            best = int(negatives.argmax())
            if criterion == "boundary" and negatives[best] >= logps[row, 0]:
                assert all(negatives[i] >= logps[row, 0] for i in mine["selected"])
            elif criterion == "topk":
                assert mine["selected"] == [best]
            orders += best != int((logps - refs)[row, 1:size].argmax())
    assert orders > 3


def test_a_model_without_a_reference_is_its_own(run: Path, data: Path) -> None:
    """So its frozen features are those that it has."""
    found = [
        list(select_with_model(tiny_config(data, **changes), None, None))
        for features in ("policy", "reference")
        for changes in [{"model.path": str(run), "selection.features": features}]
    ]
    assert found[0] == found[1]


def test_pools_smaller_than_n_are_said_once(
    run: Path, data: Path, folder: Path, said: Callable[[], str]
) -> None:
    sizes = [len(row["rejected"]) for row in rows_of(data)]
    config = tiny_config(data, num_negatives=9, **{"model.path": str(run)})
    found = list(select_with_model(config, None, None))
    assert [len(row["selected"]) for row in found] == sizes
    message = "config.num_negatives=9: 12 of 12 pools have fewer (the smallest 2); of those all"
    assert said().count(message) == 1
    few = sum(size < 4 for size in sizes)
    mask = np.arange(6)[None, :] < np.array(sizes)[:, None]
    features, _ = make_features(rows=12)
    save_file({"features": features, "mask": mask}, folder / "few.safetensors")
    config = config_lib.default()
    config.num_negatives = 4
    list(select_with_features(config, folder / "few.safetensors", None))
    message = f"config.num_negatives=4: {few} of 12 pools have fewer (the smallest 2)"
    assert said().count(message) == 1
    before = said()
    for changes in ({"method": "pl_all"}, {"num_negatives": 2}):  # Here n is no more than there is.
        list(
            select_with_model(tiny_config(data, **changes, **{"model.path": str(run)}), None, None)
        )
    assert "have fewer" not in said()[len(before) :]


def test_other_rows_of_a_file_draw_otherwise_than_those_of_another_seed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 0's second batch once drew as the first one of seed 2."""
    monkeypatch.setattr(offline_selection, "ROWS_AT_A_TIME", 2)
    features = np.zeros((40, 20, 3), np.float32)
    np.save(folder / "same.npy", features)

    def drawn(seed: int) -> list[list[int]]:
        config = config_lib.default()
        config.seed, config.selection.criterion = seed, "random"
        return [row["selected"] for row in select_with_features(config, folder / "same.npy", None)]

    first, other = drawn(0), drawn(2)
    assert first == drawn(0)
    assert first[2:] != other[:-2]
    assert len({tuple(row) for row in first + other}) > 70  # Of 80 draws of 3 of 19.


def test_a_run_and_another_model_are_one_too_many(run: Path, data: Path) -> None:
    config = tiny_config(data, **{"model.path": "some/model"})
    with pytest.raises(UserError, match=rf"model\.path=some/model: .*--workdir={run}; .*not both"):
        list(select_with_model(config, run, None))
    for path in ("", str(run)):
        config.model.path = path
        for _ in range(2):  # It leaves the configuration as it is.
            prepare_scoring(config, run, "all")
        assert config.model.path == path


def test_a_split_without_rows(run: Path, data: Path) -> None:
    for config in (tiny_config(data), tiny_config(data, **{"data.validation_share": 0.0})):
        with pytest.raises(UserError, match=rf"{data}: split 'test' has no rows .*share=0.0 none"):
            list(select_with_model(config, run, "test"))
    with pytest.raises(UserError, match="split 'validation' has no rows"):
        evaluate(config, run, "validation")


def features_of(setup: Any, params: Any, row: int) -> np.ndarray:
    """float64 [C, D] of one example."""
    from mass_dpo_jax.data.batches import make_batch

    tokens = setup.tokens["all"]
    rows = np.full(jax.device_count(), row)  # Rows split evenly over devices.
    batch = make_batch(tokens, rows, setup.buckets["all"].shapes[-1], None)
    found = scored(setup.program.scorer, params, jax.tree.map(np.asarray, batch))
    return np.asarray(found.features[0, tokens.response_lengths[row] > 0], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def scored(scorer: Any, params: Any, batch: Any) -> Any:
    return scorer(params, batch, features=True)


@pytest.mark.parametrize("criterion", ["pool_fisher", "hardest"])
@pytest.mark.parametrize("reference", [False, True])
def test_a_diverged_model_chooses_nothing(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, criterion: str, reference: bool
) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        model = prepare_scoring(*args, **more)
        return model._replace(params=jax.tree.map(lambda x: x * jnp.nan, model.params))

    monkeypatch.setattr(offline_selection, "prepare_scoring", broken)
    changes = {"model.path": str(run), "selection.criterion": criterion, "num_negatives": 2}
    config = tiny_config(data, **changes)
    with pytest.raises(UserError, match=rf"^{run}: example 'row\d+': .* not finite"):
        list(select_with_model(config, run if reference else None, None))


def test_without_a_reference_all_scores_are_zero(run: Path, data: Path) -> None:
    config = tiny_config(data, num_negatives=3, **{"model.path": str(run)})
    found = list(select_with_model(config, None, None))
    config = tiny_config(data, num_negatives=3, beta=7.0, **{"model.path": str(run)})
    assert list(select_with_model(config, None, None)) == found  # No score, no beta.
    assert len(found) == 12


def test_too_long_responses_leave_the_numbers_of_the_others(run: Path, folder: Path) -> None:
    data = folder / "long.jsonl"
    row = {"prompt": "after amber comes ", "chosen": "basil",
           "rejected": ["delta " * 40, "cedar", "fjord " * 40, "ember"]}  # fmt: skip
    data.write_text(json.dumps(row) + "\n")
    changes = {"data.long_response": "drop", "data.max_response_length": 20, "num_negatives": 2}
    config = tiny_config(data, **changes, **{"model.path": str(run)})
    (found,) = select_with_model(config, None, None)
    assert sorted(found["selected"]) == [1, 3]
    assert sorted(found["rejected"]) == ["cedar", "ember"]


def make_features(rows: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 7, 16)).astype(np.float32)
    return features, rng.normal(size=(rows, 6)).astype(np.float32)


def test_features_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, scores = make_features()
    np.save(folder / "features.npy", features)
    config = config_lib.default()
    monkeypatch.setattr(offline_selection, "ROWS_AT_A_TIME", 2)
    config.selection.criterion = "contrast"
    found = list(select_with_features(config, folder / "features.npy", None))
    want = selection.select_negatives(features, n=3, criterion="contrast")
    assert [row["id"] for row in found] == list(range(5))
    assert [row["selected"] for row in found] == np.asarray(want.indices).tolist()
    np.testing.assert_allclose([row["gains"] for row in found], want.gains, rtol=1e-5)
    assert set(found[0]) == {"id", "selected", "gains"}

    mask = np.ones((5, 6), bool)
    mask[0, 3:] = False
    arrays = {"features": features, "scores": scores, "mask": mask}
    save_file(arrays, folder / "features.safetensors")
    found = list(select_with_features(config, folder / "features.safetensors", None))
    want = selection.select_negatives(features, scores, mask, n=3, criterion="contrast")
    assert [row["selected"] for row in found] == np.asarray(want.indices).tolist()
    assert set(found[0]["selected"]) == {0, 1, 2}


def test_features_with_their_data(folder: Path) -> None:
    data = write_jsonl(folder / "pools.jsonl", examples=5)
    features, _ = make_features()
    np.save(folder / "features.npy", features)
    config = config_lib.default()
    config.num_negatives = 6
    config.data.path = str(data)
    found = list(select_with_features(config, folder / "features.npy", None))
    for row, example in zip(found, rows_of(data), strict=True):
        assert sorted(row["selected"]) == list(range(len(example["rejected"])))
        assert row["rejected"] == [example["rejected"][i] for i in row["selected"]]
    pairs = list(convert_rows(found, "pairs", chat=False))
    assert len(pairs) == sum(len(example["rejected"]) for example in rows_of(data))
    assert pairs[0] == {
        "id": "row0-0", "prompt": found[0]["prompt"], "chosen": found[0]["chosen"],
        "rejected": found[0]["rejected"][0], "selected": found[0]["selected"][0],
        "gain": found[0]["gains"][0],
    }  # fmt: skip

    np.save(folder / "features.npy", features[:4])
    with pytest.raises(UserError, match="features of 4 rows; the data has 5 examples"):
        list(select_with_features(config, folder / "features.npy", None))
    np.save(folder / "features.npy", features[:, :4])
    config.num_negatives = 3
    with pytest.raises(UserError, match=r"pools.jsonl:1: 6 rejected responses, .* of 3"):
        list(select_with_features(config, folder / "features.npy", None))


def test_pairs_are_messages_where_a_template_or_a_message_is() -> None:
    row = {"id": "a", "prompt": "Why?", "chosen": "So.", "rejected": ["No.", "Yes."],
           "selected": [3, 1], "gains": [2.0, 1.0]}  # fmt: skip
    plain = list(convert_rows([row], "pairs", chat=False))
    assert [pair["id"] for pair in plain] == ["a-0", "a-1"]
    assert [(pair["rejected"], pair["selected"], pair["gain"]) for pair in plain] == [
        ("No.", 3, 2.0), ("Yes.", 1, 1.0),
    ]  # fmt: skip
    mixed = row | {"chosen": [{"role": "assistant", "content": "So."}]}
    for pairs in (
        convert_rows([row], "pairs", chat=True),
        convert_rows([mixed], "pairs", chat=False),
    ):
        first = next(pairs)
        assert first["prompt"] == [{"role": "user", "content": "Why?"}]
        assert first["chosen"] == [{"role": "assistant", "content": "So."}]
        assert first["rejected"] == [{"role": "assistant", "content": "No."}]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_numbers_that_nothing_can_be_chosen_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """They once gave the first n negatives, with gains of 0."""
    features, scores = (array.astype(np.float64) for array in make_features())
    mask = np.ones((5, 6), bool)
    mask[3, 4] = False
    config, path = config_lib.default(), folder / "numbers.safetensors"
    monkeypatch.setattr(offline_selection, "ROWS_AT_A_TIME", 2)

    def chosen() -> list[Any]:
        save_file({"features": features, "scores": scores, "mask": mask}, path)
        return [row["selected"] for row in select_with_features(config, path, None)]

    want = chosen()
    features[3, 5], scores[3, 4] = value, value
    assert chosen() == want  # What is masked may hold anything.
    for array, place in ((features, (3, 0, 7)), (features, (3, 2, 1)), (scores, (3, 5))):
        before, array[place] = array[place], value
        name = "scores" if array is scores else "features"
        shown = f"{path}: row 3: {name}{list(place[1:])} is {value}, expected a finite number"
        with pytest.raises(UserError, match=re.escape(shown)):
            chosen()
        array[place] = before


def test_big_endian_and_whole_numbers(folder: Path) -> None:
    features = np.round(make_features()[0] * 9)
    want = None
    for kind in ("<f4", ">f4", ">f8", ">i8", "<i2"):
        np.save(folder / "kind.npy", features.astype(kind))
        found = list(select_with_features(config_lib.default(), folder / "kind.npy", None))
        want = want or found
        assert found == want


@pytest.mark.parametrize(
    ("criterion", "norm", "factor"),
    [
        ("pool_fisher", "none", 1e10),
        ("contrast", "none", 1e10),
        ("set_fisher", "none", 1e3),
        ("pool_fisher", "l2", 1e20),
    ],
)
def test_features_too_far_apart_for_float32(
    folder: Path, criterion: str, norm: str, factor: float
) -> None:
    features, _ = make_features()
    config, path = config_lib.default(), folder / "far.npy"
    config.selection.update(criterion=criterion, feature_norm=norm)
    np.save(path, features)
    assert len(list(select_with_features(config, path, None))) == 5
    features[3] *= factor
    np.save(path, features)
    with pytest.raises(UserError, match=r"far.npy: row 3: features (too far apart|or scores)"):
        list(select_with_features(config, path, None))


def test_files_that_are_no_features(folder: Path) -> None:
    config = config_lib.default()

    def refused(name: str) -> str:
        with pytest.raises(UserError) as error:
            list(select_with_features(config, folder / name, None))
        return str(error.value)

    assert "no such file" in refused("missing.npy")
    (folder / "text.npy").write_text("features")
    assert "not a .npy" in refused("text.npy")
    (folder / "text.safetensors").write_text("features")
    assert "not a .npy or .safetensors" in refused("text.safetensors")
    np.save(folder / "flat.npy", np.zeros((4, 5)))
    assert "features float64[4, 5], expected numbers [M, C, D]" in refused("flat.npy")
    save_file({"hidden": np.zeros(3)}, folder / "other.safetensors")
    assert "no tensor 'features'; found hidden" in refused("other.safetensors")
    features, scores = make_features()
    save_file({"features": features, "scores": scores[:, :2]}, folder / "bad.safetensors")
    assert "scores [5, 2], expected [5, 6]" in refused("bad.safetensors")
    for shape in ((0, 3, 4), (2, 1, 4), (2, 3, 0)):
        np.save(folder / "empty.npy", np.zeros(shape))
        assert "with M >= 1, C >= 2 and D >= 1" in refused("empty.npy")
    for name, array in (("scores", scores > 0), ("mask", scores)):
        save_file({"features": features, name: array}, folder / "kind.safetensors")
        assert f"{name} {array.dtype}, expected" in refused("kind.safetensors")
    np.save(folder / "pickled.npy", np.array([{}]), allow_pickle=True)
    assert "not a .npy" in refused("pickled.npy")
    config.num_negatives = 9
    np.save(folder / "few.npy", features)
    assert "num_negatives=9" in refused("few.npy")


# --- Prompts.


def test_prompts_are_chosen_from_a_file_as_the_library_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6, 8)).astype(np.float32)
    scores = rng.normal(size=(300, 5)).astype(np.float32)
    save_file({"features": features, "scores": scores}, tmp_path / "x.safetensors")
    config = config_lib.default()
    config.update(num_negatives=2)
    path = tmp_path / "x.safetensors"
    whole = list(select_with_features(config, path, None))
    picks = np.array([row["selected"] for row in whole])
    rows = np.arange(300)[:, None]
    sets = features[rows, np.pad(picks + 1, ((0, 0), (1, 0)))], scores[rows, picks]
    for by in ("design", "uncertain", "random"):
        config.selection.prompts = "all" if by == "design" else by
        found = list(select_with_features(config, path, None, 0.2))
        want = mdj.select_prompts(*sets, k=60, by=by)
        if by == "uncertain":  # The hardest of the whole pool, trained on or not.
            want = mdj.select_prompts(None, scores, k=60, by=by)
        assert [row["id"] for row in found] == want.indices.tolist()
        for row in found:
            assert row["selected"] == whole[row["id"]]["selected"]
        name = {"design": "prompt_gain", "uncertain": "prompt_gap"}.get(by)
        if name is not None:
            np.testing.assert_allclose([row[name] for row in found], want.values, rtol=1e-5)


def test_a_model_chooses_prompts_with_their_texts(run: Path, data: Path) -> None:
    config = tiny_config(data, beta=1.0, num_negatives=2)
    whole = {row["id"]: row for row in select_with_model(config, run, None)}
    found = list(select_with_model(config, run, None, 5))
    gains = [row.pop("prompt_gain") for row in found]
    assert len(found) == 5 and gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert all(row == whole[row["id"]] for row in found)
    config.selection.prompts = "uncertain"
    gaps = [row["prompt_gap"] for row in select_with_model(config, run, None, 5)]
    assert gaps == sorted(gaps) and gaps[-1] > 0
    # A model that is its own reference.
    config.model.path = str(run)
    with pytest.raises(UserError, match="rewards, which are all 0 without a reference"):
        list(select_with_model(config, None, None, 5))
    config.selection.prompts = "design"
    found = list(select_with_model(config, None, None, 5))
    assert len({row["id"] for row in found}) == 5


def test_numbers_of_prompts_that_cannot_be(run: Path, data: Path) -> None:
    config = tiny_config(data, num_negatives=2)
    for budget, message in (
        (13, "--prompts=13: expected at most 12"),
        (0, "--prompts=0: expected a share"),
        (2.5, "--prompts=2.5: expected a share"),
    ):
        with pytest.raises(UserError, match=message):
            list(select_with_model(config, run, None, budget))


def test_the_command_chooses_prompts(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 4, 3)))
    output = tmp_path / "out.jsonl"
    words = [f"--features={tmp_path / 'x.npy'}", "--config.num_negatives=2"]
    done = command("mass_dpo_jax.select", *words, "--prompts=7", f"--output={output}")
    assert done.returncode == 0 and "7 rows written" in done.stdout
    assert len({row["id"] for row in rows_of(output)}) == 7
    done = command(
        "mass_dpo_jax.select", *words, "--config.selection.prompts=random", f"--output={output}"
    )
    said = done.stdout + done.stderr
    assert "no effect on select without --prompts: --config.selection.prompts" in said
    assert len(rows_of(output)) == 20
