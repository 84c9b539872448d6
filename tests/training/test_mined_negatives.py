"""A training that mines its negatives: by which policy, what it trains on, and after a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mass_dpo_jax as mdj
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.estimate.dry_run import prepare_dry_run
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.selection.mining import Limits
from mass_dpo_jax.train import train
from mass_dpo_jax.training import interruption, mined_negatives, mining, policy
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


@pytest.mark.usefixtures("one_device")
def test_rows_need_no_rejected_responses(home: Path, tmp_path: Path) -> None:
    """Unless they are tested on: without any held out the losses are the same."""
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("rejected")
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"data.validation_share": 0.0, "train.steps": 1}
    train(settings(home, **asked), tmp_path / "whole")
    bare = {"data.path": str(tmp_path / "bare.jsonl"), "data.columns": "rejected="}
    train(settings(home, **asked, **bare), tmp_path / "run")
    assert mined(tmp_path / "run", 0) == mined(tmp_path / "whole", 0)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="has no rejected response"):
        train(settings(home, **bare), tmp_path / "other")


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


def add_item(home: Path, folder: Path) -> dict[str, str]:
    items = folder / "items.jsonl"
    items.write_text((home / "items.jsonl").read_text() + '"one more"\n')
    return {"mine.catalogue": str(items)}


def change_validation(home: Path, folder: Path) -> dict[str, str]:
    """Its chosen responses are no negatives of rows with the same prompt."""
    held_out = mining.load_rows(settings(home), "validation").examples[0].id
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    rows = [row | {"chosen": "another"} if row["id"] == held_out else row for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.path": str(folder / "data.jsonl")}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("stop", [keep_all, lose_epoch])
@pytest.mark.parametrize(
    ("change", "name"),
    [(add_item, "the catalogue"), (change_validation, "the chosen responses of all splits")],
)
def test_other_texts(
    home: Path, run: Path, tmp_path: Path, stop: Callable[[Path], None], change: Any, name: str
) -> None:
    """Nothing is mined from them, which would later be taken for the negatives of the run."""
    stop(run)
    before = sorted((run / "mined").iterdir())
    with pytest.raises(UserError, match=f"saved with other data: .*{name}.* has other rows"):
        train(settings(home, **change(home, tmp_path)), run)
    assert sorted((run / "mined").iterdir()) == before


@pytest.mark.usefixtures("one_device")
def test_texts_with_line_separators(home: Path, run: Path) -> None:
    """JSON has them as they are, and Python's splitlines would cut there."""
    texts = ["red\u2028blue", "green\x85", "a\x0bb", "c\x0cd"]
    rows = [row | {"rejected": texts} for row in mined(run, 1)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (run / "mined" / "epoch-1.jsonl").write_text("".join(lines))
    found = mined_negatives.open_mined(settings(home), run)
    assert found is not None and len(found.rows) == 22
    assert all(row["rejected"] == texts for row in found.rows.values())


@pytest.mark.usefixtures("one_device")
def test_adapters_mine_beside_their_base_wherever_it_is(home: Path, tmp_path: Path) -> None:
    """As on a device that holds the base in four bits, and not the sum in float32."""
    shutil.copytree(home / "base", tmp_path / "base")
    asked = {"model.lora.rank": 2, "model.lora.base": "nf4", "train.steps": STEPS + 1}
    run = tmp_path / "run"
    train(settings(home, **asked, **{"model.path": str(tmp_path / "base")}), run)
    remove(run / "checkpoints" / str(STEPS + 1))
    expected = mined(run, 1)
    remove(run / "mined" / "epoch-1.jsonl")
    (tmp_path / "base").rename(tmp_path / "moved")
    there = settings(home, **asked, **{"model.path": str(tmp_path / "moved")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "merge_adapters", None)
        mined_negatives.open_mined(there, run)
    assert mined(run, 1) == expected != mined(run, 0)

    remove(run / "mined" / "epoch-1.jsonl")
    write_base(tmp_path / "moved", seed=1)
    with pytest.raises(UserError, match=r"config\.model\.path: its weights are not those"):
        mined_negatives.open_mined(there, run)
    assert not (run / "mined" / "epoch-1.jsonl").exists()


@pytest.mark.usefixtures("one_device")
def test_a_signal_ends_a_later_mining_at_once(
    home: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_epoch(run)
    remove(run / "checkpoints" / str(STEPS))

    def mine(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it has gone on")

    monkeypatch.setattr(mined_negatives, "_mine", mine)
    with pytest.raises(interruption.Stopped, match="SIGTERM"), interruption.handle_signals():
        train(settings(home), run)
    assert run_folder.latest_step(run) == STEPS


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
        ({"method": "dpo"}, "the training data's negatives are drawn with the probabilities"),
        ({"method": "sft"}, "config.method=sft sees no negatives; leave it empty"),
        ({"method": "pl_rank"}, "config.method=pl_rank needs grades, which mined negatives do not"),
        ({"method": "odpo"}, "expected another method, or config.odpo.offset=rank"),
        ({"method": "sdpo", "num_negatives": 5}, "expected config.mine.n=5 or more, or"),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_mistakes(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(settings(home, **changes), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()  # Before anything is mined.


def test_a_dry_run_refuses_what_training_would(home: Path) -> None:
    with pytest.raises(UserError, match="negatives are drawn with the probabilities"):
        prepare_dry_run(settings(home, method="dpo"), None, ("train",))


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
