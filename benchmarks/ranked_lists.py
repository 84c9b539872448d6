"""Is it worth training on whole rankings? LastFM users' artists in their order, one table.

    python -m benchmarks.ranked_lists --data=DIR --output=runs/ranked_lists
    python -m benchmarks.ranked_lists --report

The files of LastFM that S-DPO publishes have windows of each user's list of artists. Put together
again they are the lists, in the order in which a user came to the artists. How often one was
listened to is not in these files: lists of up to 974 artists are those of HetRec's tags, which have
a time; its counts are of 50 artists a user. A row has ten artists of a user as its prompt, and as
responses the next five of the list, graded 5 to 1 by how soon they follow, and fourteen artists
that the user does not have, graded 0. Users of S-DPO's validation and test files are tested on, the
others trained on.

A cell is a loss and a seed. All of a seed train from the same start, a supervised training on the
best response, on the same rows in the same order. It is tested by NDCG with linear gains.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.evidence import Difference, difference, pooled
from benchmarks.evidence_runs import read_results, settings_of
from benchmarks.evidence_worlds import START_RATE, START_STEPS, base_config
from mass_dpo_jax import cli, metrics
from mass_dpo_jax.data import batches, load_examples
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.reports.comparison import read_logps
from mass_dpo_jax.train import train
from mass_dpo_jax.training.evaluator import FINAL_LOGPS, START_LOGPS

LOSSES: dict[str, dict[str, Any]] = {
    "best": {"method": "pl_all"},  # The best response against all others.
    "first three": {"method": "pl_rank", "pl_rank.top": 3},
    "whole ranking": {"method": "pl_rank"},
    "LiPO-lambda": {"method": "lipo_lambda"},
}
HISTORY, RANKED, OTHERS = 10, 5, 14
GRADES = np.array([*range(RANKED, 0, -1), *[0] * OTHERS], np.float32)
WINDOWS = 12  # Rows of a user, at most: a few users have lists of hundreds.
CUTOFFS = (1, 3, 5, 10)
RESULTS = Path("docs/results/ranked_lists")


def join_windows(examples: Iterable[Example]) -> tuple[list[list[str]], list[int]]:
    """Returns the lists of artists that rows of LastFM are windows of, and the list of each row.

    The rows of a user follow one another, each with one artist more.
    """
    lists: list[list[str]] = []
    owners = []
    for example in examples:
        assert isinstance(example.prompt, History)
        history = list(example.prompt.items)
        if not lists or lists[-1][-len(history) :] != history:
            lists.append(history)
        lists[-1].append(str(example.chosen))
        owners.append(len(lists) - 1)
    return lists, owners


def make_rows(
    lists: Sequence[Sequence[str]], names: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """Yields preference rows with grades, from windows of the lists; `names` are all artists."""
    rng = np.random.default_rng(seed)
    for user, artists in enumerate(lists):
        starts = range(0, len(artists) - HISTORY - RANKED + 1, RANKED)
        own = set(artists)
        for start in itertools.islice(starts, WINDOWS):
            end = start + HISTORY
            drawn = (names[i] for i in rng.permutation(len(names)) if names[i] not in own)
            responses = [*artists[end : end + RANKED], *itertools.islice(drawn, OTHERS)]
            yield {
                "id": f"{user}-{start}",
                # Not what the order is; but a model from scratch knows no words, and the results
                # that we keep are of these.
                "prompt": f"A user listens most to: {', '.join(artists[start:end])}. Next come:",
                "chosen": responses[0],
                "rejected": responses[1:],
                "score_chosen": float(GRADES[0]),
                "score_rejected": GRADES[1:].tolist(),
            }


def write_data(folder: Path, data: str) -> None:
    """Writes the training and test rows to a folder that has none."""
    if (folder / "test.jsonl").exists():
        return
    config = base_config("lastfm", data)
    config.data.update(max_train=0, max_validation=0, max_test=0)
    lists = {
        split: join_windows(load_examples(config.data, split, 0))[0]
        for split in ("train", "validation", "test")
    }
    names = sorted({artist for artists in lists["train"] for artist in artists})
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_lines(folder / "train.jsonl", make_rows(lists["train"], names, 0))
    held_out = [*lists["validation"], *lists["test"]]
    cli.write_lines(folder / "test.jsonl", make_rows(held_out, names, 1))


def make_config(output: Path, seed: int) -> ConfigDict:
    """Returns what all cells of a seed share."""
    config = base_config("lastfm", "")
    config.seed = seed
    config.cache_dir = str(output / "cache")
    config.data.update(name="preferences", path=str(output / "data"), validation_share=0.0)
    config.data.max_test = 0
    config.train.checkpoint_every = config.train.steps
    return config


def measure(output: Path, loss: str, seed: int) -> dict[str, Any]:
    """Trains a cell, and its start where that is missing; returns a line of the results file."""
    start = output / f"start-{seed}"
    config = make_config(output, seed)
    steps = START_STEPS["cold"]
    config.update(method="sft")
    config.train.update(steps=steps, checkpoint_every=steps, learning_rate=START_RATE)
    train(config, start)
    config = make_config(output, seed)
    config.update_from_flattened_dict({**LOSSES[loss], "model.path": str(start)})
    folder = output / f"{loss.replace(' ', '_')}-{seed}"
    done = train(config, folder)
    after, valid = read_logps(folder / FINAL_LOGPS)
    before, _ = read_logps(folder / START_LOGPS)
    grades = np.broadcast_to(GRADES, after.shape)
    scores = {"start": before, "policy": after, "reward": after - before}
    return {
        "loss": loss,
        "seed": seed,
        "settings": settings_of(config),
        "final": done["final"],
        "gains": {
            by: {
                name: pack(values)
                for name, values in metrics.per_example_gain_ndcg(
                    values_of, valid, grades, CUTOFFS
                ).items()
            }
            for by, values_of in scores.items()
        },
    }


def pack(values: np.ndarray) -> str:
    """Returns values of [0, 1] as text, two bytes each, so accurate to 1 / 131070."""
    return base64.b64encode(np.round(values * 65535).astype("<u2").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Returns what `pack` was given."""
    return np.frombuffer(base64.b64decode(text), "<u2") / 65535


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes a table for each ranking: means in percent, and paired differences to `best`."""
    cells = {(row["loss"], row["seed"]): row for row in rows}
    names = [f"gain_ndcg@{k}" for k in CUTOFFS]
    parts = []
    for by in ("policy", "reward"):
        head = f"| by {by} | seeds | {' | '.join(f'{n}, % | minus best' for n in names)} |"
        lines = [head, "|---" * (2 + 2 * len(names)) + "|"]
        found = {
            (loss, name): {
                seed: unpack(row["gains"][by][name])
                for (own, seed), row in cells.items()
                if own == loss
            }
            for loss in LOSSES
            for name in names
        }
        between = {
            name: pooled([_compare(found, loss, name) for loss in LOSSES if loss != "best"])
            for name in names
        }
        if by == "policy":  # The start's rewards are 0.
            starts = {row["seed"]: row["gains"]["start"] for row in rows}
            means = [np.mean([unpack(gains[name]) for gains in starts.values()]) for name in names]
            lines.append(
                f"| before | {len(starts)} | {' | '.join(f'{100 * x:.1f} | ' for x in means)} |"
            )
        for loss in LOSSES:
            line = [loss, str(len(found[loss, names[0]]))]
            for name in names:
                line.append(f"{100 * np.mean(list(found[loss, name].values())):.1f}")
                compared = _compare(found, loss, name)
                error = 100 * compared.error(between[name])
                line.append("" if loss == "best" else f"{100 * compared.mean:+.1f} ± {error:.1f}")
            lines.append(f"| {' | '.join(line)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _compare(
    found: Mapping[tuple[str, str], Mapping[int, np.ndarray]], loss: str, name: str
) -> Difference:
    """Compares a loss with `best`, by a metric's values [M] of each seed that both have."""
    ours, theirs = found[loss, name], found["best", name]
    seeds = sorted(set(ours) & set(theirs))
    return difference(*(np.stack([runs[s] for s in seeds]) for runs in (ours, theirs)))


def main(args: Sequence[str]) -> None:
    """Runs the cells that the results do not hold yet, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with LastFM's files, as S-DPO publishes them")
    parser.add_argument("--output", type=Path, default=Path("runs/ranked_lists"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--report", action="store_true", help="print the tables and train nothing")
    options = parser.parse_args(args)
    if options.report:
        print(report(read_results(options.results)))
        return
    if options.data is None:
        parser.error("--data is missing: the folder with LastFM's files")
    batches.MIN_GAIN = 1.0  # One shape of batches, as in benchmarks.evidence.
    write_data(options.output / "data", options.data)
    done = {(row["loss"], row["seed"]) for row in read_results(options.results)}
    options.results.mkdir(parents=True, exist_ok=True)
    for seed, loss in itertools.product(range(options.seeds), LOSSES):
        if (loss, seed) in done:
            continue
        row = measure(options.output, loss, seed)
        with (options.results / "lastfm.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {by: float(unpack(g["gain_ndcg@5"]).mean()) for by, g in row["gains"].items()}
        print(seed, loss, {by: round(value, 3) for by, value in shown.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
