"""The command `mine`: what it writes can be trained on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mass_dpo_jax import cli
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.train import train
from tests.support.helpers import losses, tiny_config, write_jsonl
from tests.support.processes import command
from tests.support.run_homes import write_base

WORDS = (
    "--config.data.name=preferences",
    "--config.data.chat_template=none",
    "--config.data.validation_share=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    data = write_jsonl(folder / "data.jsonl", examples=6)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [row["chosen"] for row in rows] + [f"more {i}" for i in range(20)]
    (folder / "items.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    np.save(folder / "scores.npy", np.random.default_rng(0).normal(size=(6, len(texts))))
    return folder


def mine(folder: Path, *words: str) -> tuple[int, str]:
    given = [f"--config.data.path={folder}/data.jsonl", f"--catalogue={folder}/items.jsonl"]
    done = command("mass_dpo_jax.mine", "--config=tiny", *WORDS, *given, *words)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("chat", [False, True])
def test_every_format_has_the_same_rows_and_can_be_trained_on(
    folder: Path, tmp_path: Path, chat: bool
) -> None:
    """At the reference, the corrected loss on 3 drawn of 8 is that of all 8, whichever they are."""
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows if chat else ():
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["chosen"] = [{"role": "assistant", "content": row["chosen"]}]
        row["rejected"] = [[{"role": "assistant", "content": text}] for text in row["rejected"]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"--scores={folder}/scores.npy", "--ranks=1:9", "--n=3", "--draw=uniform")
    files = [tmp_path / "mined.jsonl", tmp_path / "mined.parquet"]
    for file in files:
        code, text = mine(folder, f"--config.data.path={data}", *words, f"--output={file}")
        assert code == 0, text
    lines, parquet = (load_examples(tiny_config(file).data, "all", 0) for file in files)
    assert [dataclasses.replace(example, place="") for example in parquet] == [
        dataclasses.replace(example, place="") for example in lines
    ]
    assert {example.probabilities for example in parquet} == {(0.375,) * 3}
    if chat:
        return
    train(tiny_config(files[1], method="pl_all", **{"train.steps": 1}), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(np.log(1 + 8), rel=1e-5)


def test_values_of_several_kinds_are_no_column_of_parquet(tmp_path: Path) -> None:
    rows = [{"id": "a", "mined_ids": [1]}, {"id": "b", "mined_ids": ["x"]}]
    with pytest.raises(UserError, match="'mined_ids' has values of several kinds"):
        cli.write_rows(tmp_path / "a.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_what_is_mined_can_be_read_as_data(folder: Path) -> None:
    output = folder / "mined.jsonl"
    words = (f"--scores={folder}/scores.npy", "--ranks=1:9", "--n=3", f"--output={output}")
    code, text = mine(folder, *words)
    assert code == 0, text
    assert "6 rows written" in text
    examples = load_examples(tiny_config(output).data, "all", 0)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    given = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert [example.id for example in examples] == [row["id"] for row in given]
    for example, row, old in zip(examples, rows, given, strict=True):
        assert example.chosen == old["chosen"] and example.prompt == old["prompt"]
        assert list(example.rejected) == row["rejected"] and len(example.rejected) == 3
        assert len(row["mined_weights"]) == len(row["mined_probabilities"]) == 3


def test_rows_without_rejected_responses_are_mined_for(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for name, kept in (("bare", ()), ("scored", ("score_chosen", "score_rejected"))):
        bare = [{k: row[k] for k in ("id", "prompt", "chosen", *kept) if k in row} for row in rows]
        data, output = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-mined.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in bare))
        words = [f"--config.data.path={data}", f"--scores={folder}/scores.npy", "--n=3"]
        words += ["--split=all", f"--output={output}"]
        code, text = mine(folder, *words)
        assert code == 2 and "'rejected' is missing" in text
        assert "mine takes rows without, --config.data.columns=rejected=" in text
        code, text = mine(folder, *words, "--config.data.columns=rejected=")
        assert code == 0, text
        examples = load_examples(tiny_config(output).data, "all", 0)
        assert [(x.id, x.prompt, x.chosen) for x in examples] == [
            (row["id"], row["prompt"], row["chosen"]) for row in rows
        ]
        assert {len(x.rejected) for x in examples} == {3}
    changes = {"data.columns": "rejected=", "data.validation_share": 0.0}
    with pytest.raises(UserError, match=r"bare.jsonl:1: has no rejected response .*only python -m"):
        train(tiny_config(tmp_path / "bare.jsonl", **changes), tmp_path / "run")


def test_a_shortlist_has_the_scores_that_the_command_score_gives(
    folder: Path, tmp_path: Path
) -> None:
    output, scored, base = tmp_path / "mined.jsonl", tmp_path / "scored.jsonl", tmp_path / "base"
    base.mkdir()
    model = f"--config.model.path={write_base(base)}"
    words = (f"--scores={folder}/scores.npy", "--shortlist=6", "--ranks=0:6", "--draw=top", "--n=6")
    code, text = mine(folder, model, *words, f"--output={output}")
    assert code == 0, text
    given = [f"--config.data.path={output}", f"--output={scored}", "--split=all"]
    done = command("mass_dpo_jax.score", "--config=tiny", *WORDS, *given, model)
    assert done.returncode == 0, done.stderr
    rows, scores = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in (output, scored)
    )
    table = np.load(folder / "scores.npy")
    for i, (row, line) in enumerate(zip(rows, scores, strict=True)):
        np.testing.assert_allclose(row["mined_scores"], line["logps"][1:], rtol=1e-4)
        assert row["mined_scores"] == sorted(row["mined_scores"], reverse=True)
        best = [int(j) for j in np.argsort(-table[i]) if j != i][:6]  # Item i is the chosen one.
        assert sorted(row["mined_ids"]) == sorted(best)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output=mined.csv"], "expected a name with .jsonl, or .parquet"),
        (["--ranks=9:3"], "config.mine.ranks='9:3': expected FIRST:LAST"),
        (["--config.mine.n=0"], "config.mine.n=0: expected a number above 0"),
        (["--negative_number=9"], "--negative_number: no such flag; did you mean --config.mine.n="),
        (["--item_features=x.npy"], "expected --scores, or --prompt_features with"),
        ([], "no model: give --workdir=RUN"),
        (["--shortlist=20"], "config.mine.shortlist=20: config.mine.ranks=0:100 are ranks"),
        (["--scores=/no/such.npy"], "/no/such.npy: no such file"),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], message: str) -> None:
    code, text = mine(folder, f"--output={folder}/other.jsonl", *words)
    assert code == 2 and message in text and "Traceback" not in text
    assert not (folder / "other.jsonl").exists()


def test_an_input_is_not_replaced(folder: Path) -> None:
    code, text = mine(folder, f"--output={folder}/items.jsonl")
    assert code == 2 and "would replace the input" in text
