"""A training that mines its negatives: by which policy, what it trains on, and after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mass_dpo_jax as mdj
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate.dry_run import prepare_dry_run
from mass_dpo_jax.selection.mining import Limits
from mass_dpo_jax.train import train
from mass_dpo_jax.training import mined_negatives, mining
from tests.support.helpers import losses, tiny_config, write_jsonl
from tests.support.processes import command
from tests.support.run_homes import interrupted, remove, write_base
from tests.support.runs import SAVED_ALL, assert_same_run, on_one_device

STEPS = 3  # Of an epoch.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a catalogue, a base model and the run `whole`, of two epochs."""
    home = tmp_path_factory.mktemp("mined")
    data = write_jsonl(home / "data.jsonl", examples=24)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = dict.fromkeys(text for row in rows for text in (row["chosen"], *row["rejected"]))
    (home / "items.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (home / "base").mkdir()
    write_base(home / "base")
    with on_one_device():
        train(settings(home), home / "whole")
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A folder whose run has stopped: in its second epoch, unless a test removes more of it."""
    shutil.copytree(home / "whole", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    for step in (5, 6):
        remove(tmp_path / "run" / "checkpoints" / str(step))
    return tmp_path / "run"


def settings(home: Path, **changes: Any) -> Any:
    asked = {
        "model.path": str(home / "base"), "cache_dir": str(home / "cache"), "method": "pl_all",
        "mine.catalogue": str(home / "items.jsonl"), "mine.n": 4, "mine.ranks": "0:12",
        "train.steps": 0, "train.epochs": 2, "train.eval_every": 0, "train.learning_rate": 0.03,
        "data.long_response": "drop",
    }  # fmt: skip
    return tiny_config(home / "data.jsonl", **{**asked, **SAVED_ALL, **changes})


def mined(run: Path, epoch: int) -> list[dict[str, Any]]:
    file = run / "mined" / f"epoch-{epoch}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("epoch", "model", "how"),
    [(0, "base", ["--n=4"]), (1, f"whole/checkpoints/{STEPS}", ["--n=12", "--draw=top"])],
)
def test_each_epoch_has_what_the_command_mines_by_the_policy_before_it(
    home: Path, tmp_path: Path, epoch: int, model: str, how: list[str]
) -> None:
    """Later ones have a draw of their own, so the whole pool is looked at there."""
    assert sorted(path.name for path in (home / "whole" / "mined").iterdir()) == [
        "epoch-0.jsonl", "epoch-1.jsonl"
    ]  # fmt: skip
    words = [f"--config.model.path={home / model}", f"--config.data.path={home / 'data.jsonl'}"]
    words += ["--config.data.chat_template=none", "--split=train", *how]
    words += [f"--output={tmp_path / 'm.jsonl'}"]
    words += [f"--catalogue={home / 'items.jsonl'}", "--ranks=0:12"]
    config = Path(mdj.__file__).parents[0] / "config.py"
    done = command("mass_dpo_jax.mine", f"--config={config}", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    ours = mined(home / "whole", epoch)
    assert len(ours) == 22
    for row, other in zip(ours, rows, strict=True):
        scores = dict(zip(other["mined_ids"], other["mined_scores"], strict=True))
        texts = dict(zip(other["mined_ids"], other["rejected"], strict=True))
        assert row["id"] == other["id"] and len(set(row["mined_ids"])) == 4
        assert row["rejected"] == [texts[item] for item in row["mined_ids"]]
        expected = [scores[item] for item in row["mined_ids"]]
        np.testing.assert_allclose(row["mined_scores"], expected, atol=1e-5)


def test_minings_of_other_epochs_are_other_draws() -> None:
    """From the same scores: the pools are larger than what is drawn."""
    scores = np.broadcast_to(np.linspace(1, 0, 12, dtype=np.float32), (40, 12))
    catalogue = mining.Catalogue(
        list(range(12)), [f"t{i}" for i in range(12)], {}, np.ones(12, bool)
    )
    examples = [Example(f"{i}", "p", "c", ("r",), "") for i in range(40)]
    ranked = [mining.Ranked(np.arange(40), np.tile(np.arange(12), (40, 1)), scores, np.zeros(40))]
    how = Limits(0, 12), 4, "softmax", 1.0, 0
    one, same, other = (
        [row["mined_ids"] for row in mining.mine(ranked, examples, catalogue, *how, number)]
        for number in (0, 0, 1)
    )
    assert one == same
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


@pytest.mark.usefixtures("one_device")
def test_an_epoch_is_trained_on_its_file(home: Path, tmp_path: Path) -> None:
    """The losses are those of a training on the lines of the file, as data."""
    shutil.copy(home / "whole" / "mined" / "epoch-0.jsonl", tmp_path / "mined.jsonl")
    data = {"data.path": str(tmp_path / "mined.jsonl"), "data.validation_share": 0.0}
    train(settings(home, **data, **{"mine.catalogue": ""}), tmp_path / "run")
    found, expected = losses(home / "whole"), losses(tmp_path / "run")
    assert found[:STEPS] == expected[:STEPS] and found[STEPS:] != expected[STEPS:]
    assert found[0] == pytest.approx(np.log(1 + 12), rel=0.05)  # Corrected for 4 drawn of 12.


@pytest.mark.usefixtures("one_device")
def test_without_correction_the_drawn_negatives_are_the_pool(home: Path, tmp_path: Path) -> None:
    asked = {"data.columns": "mined_probabilities=", "train.steps": 1}
    train(settings(home, **asked), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(np.log(1 + 4), rel=1e-5)


def keep_all(run: Path) -> None:
    del run


def lose_epoch(run: Path) -> None:
    """It stopped when the second epoch began, before its negatives were mined."""
    remove(run / "checkpoints" / str(STEPS + 1))
    remove(run / "mined" / "epoch-1.jsonl")


def damage_epoch(run: Path) -> None:
    """Its newest checkpoints are those of the second epoch, and cannot be read."""
    for step in (STEPS, STEPS + 1):
        remove(run / "checkpoints" / str(step) / "params")


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("change", [keep_all, lose_epoch, damage_epoch])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    home: Path, run: Path, change: Callable[[Path], None]
) -> None:
    change(run)
    train(settings(home), run)
    assert_same_run(settings(home), run, home / "whole")
    assert mined(run, 1) == mined(home / "whole", 1)


@pytest.mark.usefixtures("one_device")
def test_an_interruption_before_the_first_checkpoint_leaves_nothing_to_trust(
    home: Path, tmp_path: Path
) -> None:
    """The next training, with other settings, mines for itself."""
    interrupted(settings(home), tmp_path / "run", at=0)
    assert len(mined(tmp_path / "run", 0)[0]["rejected"]) == 4
    train(settings(home, **{"mine.n": 2, "mine.every": 0, "train.steps": 1}), tmp_path / "run")
    assert len(mined(tmp_path / "run", 0)[0]["rejected"]) == 2


@pytest.mark.usefixtures("one_device")
def test_a_finished_run_is_not_mined_for_again(home: Path, run: Path) -> None:
    """Nor one that stopped in its last evaluation."""
    shutil.rmtree(run)
    shutil.copytree(home / "whole", run)
    (run / "metrics.json").unlink()
    train(settings(home), run)
    assert len(list((run / "mined").iterdir())) == 2


@pytest.mark.usefixtures("one_device")
def test_what_was_mined_is_gone(home: Path, run: Path) -> None:
    remove(run / "mined" / "epoch-1.jsonl")
    with pytest.raises(UserError, match="is missing, and the run has gone on to step 4"):
        train(settings(home), run)


@pytest.mark.usefixtures("one_device")
def test_another_catalogue(home: Path, run: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text((home / "items.jsonl").read_text() + '"one more"\n')
    with pytest.raises(UserError, match="saved with other data: the catalogue has other rows"):
        train(settings(home, **{"mine.catalogue": str(items)}), run)


@pytest.mark.usefixtures("one_device")
def test_an_epoch_that_has_lost_most_of_its_prompts(home: Path, run: Path) -> None:
    rows = [row | {"rejected": ["red " * 300] * 4} for row in mined(run, 1)]
    file = run / "mined" / "epoch-1.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*mined(run, 1)[:8], *rows[8:]]))
    with pytest.raises(UserError, match="an epoch has fewer steps than before"):
        train(settings(home), run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mine.ranks": "9:3"}, "config.mine.ranks='9:3': expected FIRST:LAST"),
        ({"mine.ranks": "-1:3"}, "config.mine.ranks='-1:3': expected FIRST:LAST"),
        ({"mine.shortlist": 5}, "config.mine.shortlist=5: config.mine.ranks=0:12 are ranks within"),
        ({"mine.margin": "much"}, "config.mine.margin='much': expected a number, or nothing"),
        ({"mine.max_score": "inf"}, "config.mine.max_score='inf': expected a number, or nothing"),
        ({"mine.n": 0}, "config.mine.n=0: expected a number above 0"),
        ({"mine.temperature": 1e-9}, "config.mine.temperature=1e-09: expected 1e-6 or more"),
        ({"mine.draw": "best"}, "config.mine.draw='best': expected one of softmax, uniform, top"),
        ({"mine.catalogue": "no.jsonl"}, "no.jsonl: no such file"),
        ({"data.name": "synthetic", "data.path": ""}, "prompts of config.data.name=synthetic list"),
        ({"mine.max_score": "-2"}, "no item of the catalogue is left for any of 22 prompts"),
        ({"model.path": ""}, "mines by the features of a model; config.model.path is missing"),
        ({"selection.refresh": "once"}, "config.selection.refresh=once: with config.mine.every=1"),
        ({"selection.refresh": "9"}, "config.selection.refresh=9: with config.mine.every=1"),
        ({"method": "dpo"}, "the training data's negatives were drawn with the probabilities"),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_mistakes(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(settings(home, **changes), tmp_path / "run")
    assert message in str(error.value)


def test_prompts_without_items_keep_their_negatives(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = mining.load_rows(settings(home), "train").examples
    rows = {row["id"]: row for row in mined(home / "whole", 0)[1:]}
    found = mined_negatives.MinedNegatives(0, tmp_path, rows, True, {}).replace(examples)
    assert found[0] is examples[0] and "1 of 22 prompts keep the negatives" in caplog.text
    assert all(len(x.rejected) == len(x.probabilities or ()) == 4 for x in found[1:])
    assert "data.jsonl" in found[1].place and str(tmp_path) in found[1].place


def test_a_dry_run_counts_the_longest_items(home: Path) -> None:
    setup = prepare_dry_run(settings(home), None, ("train",))
    lengths = setup.tokens["train"].response_lengths
    assert lengths.shape[1] == 1 + 4
    own = prepare_dry_run(settings(home, **{"mine.catalogue": ""}), None, ("train",))
    assert lengths.max() == own.tokens["train"].response_lengths.max()


def test_the_library_trains_on_the_rows_it_is_given(home: Path) -> None:
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    model = mdj.load_model(home / "base", settings(home))
    with pytest.raises(UserError, match="mines while it trains, batches do not"):
        mdj.batches(model, rows)
    assert mdj.load_model(home / "whole").score(rows).logps.shape[0] == 24
