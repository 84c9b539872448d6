r"""Does it matter where negatives come from? Random, mined and drawn ones of LastFM, and weights.

    python -m benchmarks.mined_negatives --data=DIR --output=runs/mined
    python -m benchmarks.mined_negatives --output=runs/mined --report

Per seed, a small random model is trained (supervised) on LastFM's rows. For each training row, the
artists that listeners of its history hear most often, by counts in the training rows, are a
shortlist, which that model ranks by its log-probabilities. All arms train from that model, on the
same rows, with the Plackett-Luce loss of the same number of negatives:

    random           from the whole catalogue, all alike
    random-weighted  the same ones; each counts as the inverse of its probability
    top              the most probable of the shortlist
    drawn            from the shortlist, by the softmax of the log-probabilities
    drawn-weighted   the same ones; each counts as the inverse of its probability

Tested on LastFM's lists of 20 random artists, and on lists of the true artist and the 19 best of
its shortlist by the model before. Errors are of paired differences over test rows and seeds, as in
`evidence`. *False negatives* are artists that the user has elsewhere in the training rows, whose
windows are put together again as in `ranked_lists`. A finished run is a line in
OUTPUT/results.jsonl and is not run again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

import mass_dpo_jax as mdj
from benchmarks.evidence import difference
from benchmarks.evidence_runs import pack, unpack
from benchmarks.evidence_worlds import as_row
from benchmarks.ranked_lists import join_windows
from configs import tiny
from mass_dpo_jax import cli, metrics
from mass_dpo_jax.data import batches, load_examples, splits
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection.mining import Limits
from mass_dpo_jax.train import train
from mass_dpo_jax.training import mining, mining_sources

# By arm: the rows that it trains on, and whether with weights.
ARMS = {
    "random": ("random", False),
    "random-weighted": ("random", True),
    "top": ("top", False),
    "drawn": ("drawn", False),
    "drawn-weighted": ("drawn", True),
}
LISTS = ("given", "mined")  # Of test rows.
FALSE_NEGATIVES = "false_negatives.jsonl"  # Shares, by file of training rows.
NEGATIVES, SHORTLIST, START_STEPS = 8, 64, 300
SETTINGS: dict[str, Any] = {
    "beta": 1.0,
    "method": "pl_all",
    "data.validation_share": 0.0,
    "data.max_train": 1600,
    "data.max_test": 500,
    "data.max_validation": 1,  # Not used.
    "data.max_prompt_length": 64,  # The last artists of a history.
    "model.scratch.hidden_size": 64,
    "model.scratch.intermediate_size": 192,
    "model.scratch.num_layers": 2,
    "model.scratch.vocab_size": 4096,
    "train.steps": 120,
    "train.learning_rate": 1e-3,
    "train.eval_every": 0,
    "train.keep_checkpoints": 1,
    "eval.batch_size": 128,
    "log.report": False,
}


def make_config(output: Path, seed: int, steps: int) -> ConfigDict:
    config = tiny.get_config()
    config.update_from_flattened_dict(SETTINGS)
    config.seed, config.cache_dir = seed, str(output / "cache")
    config.train.update(steps=steps, checkpoint_every=steps)
    return config


def train_start(config: ConfigDict, data: str, folder: Path, steps: int) -> Path:
    """Trains the model that all arms of a seed start from, on LastFM's rows as they are."""
    config = config.copy_and_resolve_references()
    config.method = "sft"
    rows = steps * config.train.batch_size
    config.data.update(name="lastfm", path=data, max_train=rows, max_validation=1, max_test=1)
    config.train.update(steps=steps, checkpoint_every=steps, learning_rate=3e-3)
    train(config, folder)
    return folder


def count_together(examples: Sequence[Example], catalogue: mining.Catalogue) -> np.ndarray:
    """Counts in how many rows two artists are, float32 [N, N]."""
    counts = np.zeros((len(catalogue.texts),) * 2, np.float32)
    for example in examples:
        items = [
            catalogue.index[mining.normalize(t)] for t in (*_items(example), str(example.chosen))
        ]
        counts[np.ix_(items, items)] += 1
    return counts


def _items(example: Example) -> tuple[str, ...]:
    assert isinstance(example.prompt, History)
    return example.prompt.items


def write_rows(config: ConfigDict, data: str, folder: Path, start: Path) -> None:
    """Writes what the arms of a seed train on, and the test rows, whole or not at all."""
    if (folder / FALSE_NEGATIVES).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    reader = config.data.copy_and_resolve_references()
    reader.update(name="lastfm", path=data)
    everything = load_examples(_unlimited(reader), "train", config.seed)
    texts = sorted({str(t) for e in everything for t in (*e.responses, *_items(e))})
    (folder / "items.txt").write_text("".join(f"{text}\n" for text in texts))
    catalogue = mining.read_catalogue(folder / "items.txt")
    counts = count_together(everything, catalogue)
    model = mdj.load_model(start)

    def score(examples: Sequence[Example]) -> tuple[list[str], np.ndarray, np.ndarray]:
        found = model.score(examples)
        return found.ids, found.logps, found.valid

    for split in ("train", "test"):
        if split == "train":
            examples = splits.limit(everything, reader, "train", config.seed)
        else:
            examples = load_examples(reader, "test", 0)  # The same rows for all seeds.
        positives = mining.find_positives(examples, [*everything, *examples])
        source = _by_counts(examples, catalogue, counts)
        ranked = mining.rank(source, catalogue, positives, SHORTLIST)
        shortlists = list(mining.rescore(ranked, examples, catalogue, SHORTLIST, score))
        draw = functools.partial(
            mining.mine, examples=examples, catalogue=catalogue, temperature=1.0, seed=config.seed
        )
        within = Limits(0, SHORTLIST)
        if split == "train":
            rows = {
                "random": _draw_random(examples, catalogue, positives, config.seed),
                "top": draw(shortlists, limits=within, n=NEGATIVES, draw="top"),
                "drawn": draw(shortlists, limits=within, n=NEGATIVES, draw="softmax"),
            }
        else:
            rows = {
                "given": map(as_row, examples),
                "mined": draw(shortlists, limits=within, n=19, draw="top"),
            }
        for name, lines in rows.items():
            cli.write_lines(folder / f"{name}.jsonl", lines)
    joined, owners = join_windows(everything)
    of_user = [frozenset(artists) for artists in joined]
    lists = {e.id: of_user[owner] for e, owner in zip(everything, owners, strict=True)}
    shares = {
        name: count_false(folder / f"{name}.jsonl", lists) for name in ("random", "top", "drawn")
    }
    cli.write_lines(folder / FALSE_NEGATIVES, [shares])


def count_false(rows: Path, lists: Mapping[str, frozenset[str]]) -> float:
    """Returns the share of a file's negatives that their users have elsewhere.

    Args:
        rows: the file.
        lists: all artists of a user, by the ids of the user's rows.
    """
    lines = map(json.loads, rows.read_text().splitlines())
    is_false = [text in lists[line["id"]] for line in lines for text in line["rejected"]]
    return float(np.mean(is_false))


def _draw_random(
    examples: Sequence[Example],
    catalogue: mining.Catalogue,
    positives: Sequence[set[str]],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yields rows of negatives from the whole catalogue, all alike: the top of random scores."""
    table = np.random.default_rng(seed).random((len(examples), len(catalogue.texts)), np.float32)
    source = mining_sources.by_scores(table, np.full(len(examples), -1))
    ranked = mining.rank(source, catalogue, positives, NEGATIVES)
    limits = Limits(0, NEGATIVES)
    rows = mining.mine(ranked, examples, catalogue, limits, NEGATIVES, "top", 1.0, seed)
    for row, never in zip(rows, positives, strict=True):
        others = len(catalogue.index) - len(never & catalogue.index.keys())
        yield {**row, "mined_probabilities": [NEGATIVES / others] * NEGATIVES}


def _unlimited(data: ConfigDict) -> ConfigDict:
    data = data.copy_and_resolve_references()
    data.update(max_train=0)
    return data


def _by_counts(
    examples: Sequence[Example], catalogue: mining.Catalogue, counts: np.ndarray
) -> mining_sources.Source:
    """Scores items by how often they are in rows with those of a history; then by popularity."""
    popularity = counts.diagonal() / (1 + counts.diagonal().max())
    table = np.stack([popularity] * len(examples))
    for row, example in zip(table, examples, strict=True):
        keys = (mining.normalize(item) for item in _items(example))
        row += counts[[catalogue.index[key] for key in keys if key in catalogue.index]].sum(0)
    return mining_sources.by_scores(table, np.full(len(examples), -1))


def run_arm(config: ConfigDict, rows: Path, start: Path, arm: str, folder: Path) -> dict[str, Any]:
    """Trains an arm, and ranks the candidates of both lists of test rows."""
    file, weighted = ARMS[arm]
    config = config.copy_and_resolve_references()
    config.data.update(name="preferences", path=str(rows / f"{file}.jsonl"))
    config.data.columns = "" if weighted else "mined_probabilities="
    config.model.path = str(start)
    began = time.perf_counter()
    train(config, folder)
    seconds = time.perf_counter() - began
    model, ranks = mdj.load_model(folder), {}
    for name in LISTS:
        given = [json.loads(line) for line in (rows / f"{name}.jsonl").read_text().splitlines()]
        found = model.score(given)
        ranks[name] = pack(metrics.per_example_rank(found.logps, found.valid))
    false = json.loads((rows / FALSE_NEGATIVES).read_text())[file]
    line = {"arm": arm, "seed": config.seed, "seconds": round(seconds, 1), "ranks": ranks}
    return {**line, "false_negatives": false}


def read_results(output: Path) -> list[dict[str, Any]]:
    file = output / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def report(results: Sequence[dict[str, Any]]) -> str:
    """Returns a table: R@1 and MRR of each arm on both lists, and R@1 minus that of `random`."""
    heads = "arm | seeds | false negatives, %"
    lines = [f"| {heads} | {' | '.join(f'{x}: R@1 | MRR | R@1 - random' for x in LISTS)} |"]
    lines.append("|---" * (3 + 3 * len(LISTS)) + "|")
    for arm in ARMS:
        rows = {line["seed"]: line for line in results if line["arm"] == arm}
        random = {line["seed"]: line for line in results if line["arm"] == "random"}
        shown = []
        for name in LISTS:
            ranks = {seed: unpack(line["ranks"][name]) for seed, line in rows.items()}
            both = sorted(set(rows) & set(random))
            shown += [_percent([r == 1 for r in ranks.values()])]
            shown += [_percent([1 / r for r in ranks.values()])]
            if arm == "random" or not both:
                shown.append("")
                continue
            ours = np.stack([ranks[seed] == 1 for seed in both]).astype(float)
            theirs = [unpack(random[seed]["ranks"][name]) == 1 for seed in both]
            found = difference(ours, np.stack(theirs).astype(float))
            error = found.error(found.seeds or 0.0)
            shown.append(f"{100 * found.mean:+.1f} ± {100 * error:.1f}")
        if rows:
            false = _percent([np.array(line["false_negatives"]) for line in rows.values()])
            lines.append(f"| {arm} | {len(rows)} | {false} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _percent(values: Sequence[np.ndarray]) -> str:
    return f"{100 * np.mean(np.stack(values)):.1f}" if len(values) else ""


def main() -> None:
    if not _OUTPUT.value:
        raise UserError("--output is missing: a folder for the runs and their results")
    output = Path(_OUTPUT.value)
    if not _REPORT.value:
        if not _DATA.value:
            raise UserError("--data is missing: the folder with LastFM's files")
        # One shape of batches: models this small compile for longer than padding costs.
        batches.MIN_GAIN = 1.0
        done = {(line["arm"], line["seed"]) for line in read_results(output)}
        for seed in map(int, _SEEDS.value):
            if all((arm, seed) in done for arm in ARMS):
                continue
            config = make_config(output, seed, _STEPS.value)
            if _ROWS.value:
                config.data.update(max_train=_ROWS.value, max_test=_ROWS.value)
            start = train_start(config, _DATA.value, output / f"start-{seed}", _START_STEPS.value)
            write_rows(config, _DATA.value, output / f"rows-{seed}", start)
            for arm in ARMS:
                if (arm, seed) in done:
                    continue
                folder = output / f"{arm}-{seed}"
                line = run_arm(config, output / f"rows-{seed}", start, arm, folder)
                with (output / "results.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{arm}, seed {seed}: {line['seconds']} s", flush=True)
    print(report(read_results(output)))


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "", "Folder for runs, rows and results.")
    _DATA = flags.DEFINE_string("data", "", "Folder with LastFM's files.")
    _SEEDS = flags.DEFINE_list("seeds", "0,1,2", "Seeds, in the order they run.")
    _STEPS = flags.DEFINE_integer("steps", SETTINGS["train.steps"], "Updates of an arm.")
    _START_STEPS = flags.DEFINE_integer("start_steps", START_STEPS, "Supervised updates before.")
    _ROWS = flags.DEFINE_integer("rows", 0, "Rows to train on and to test; 0: as many as here.")
    _REPORT = flags.DEFINE_bool("report", False, "Print the table of --output and run nothing.")
    cli.run(main)
