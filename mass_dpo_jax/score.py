r"""Writes log-probabilities and rewards of every response, one JSON line per example.

    python -m mass_dpo_jax.score --config=llama3 --config.model.path=DIR \
        --config.data.path=pairs.jsonl --output=scores.jsonl
    python -m mass_dpo_jax.score --workdir=runs/lastfm --split=test --output=scores.jsonl
    python -m mass_dpo_jax.score --workdir=runs/lastfm --config=llama3 \
        --config.data.path=others.jsonl --output=scores.jsonl

Each line has `id`; `logps` of the chosen response, then of each rejected one in the row's order (or
by rank, where rows have ranks), then of those as good as the chosen one;
with a reference (--config.model.reference_path, or that of the run in --workdir) `ref_logps` and
`rewards`; and `response_tokens`, end of sequence included. A response that is left out as too long
(config.data.long_response=drop) has null in each. Lines are in the order of the input, and all rows
are scored: config.data.max_* is not applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, config_checks
from mass_dpo_jax.utils.run_paths import resolve_run

FLAGS = flags.FLAGS


def score(config: ConfigDict, workdir: Path | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Yields one object per example, in the order of the input.

    Raises:
        UserError: something in the configuration, the data or the model folder is wrong.
    """
    from mass_dpo_jax.training import scoring
    from mass_dpo_jax.training.scored_model import prepare_scoring
    from mass_dpo_jax.utils import distributed

    config = config_checks.resolve(config)
    workdir = None if workdir is None else resolve_run(workdir)
    config.data.update(max_train=0, max_validation=0, max_test=0)
    setup, split, params, reference = prepare_scoring(config, workdir, split, ties=True)
    tokens, refs = setup.tokens[split], reference.logps.get(split)
    logps = setup.score(params, split, "scoring")
    scoring.check_finite(logps, tokens, str(workdir or config.model.path))
    scoring.check_finite(refs, tokens, "the reference")
    if not distributed.is_primary():  # It has no texts, and writes nothing.
        return
    rewards = setup.method.implicit_rewards(logps, refs, tokens.response_lengths)
    sizes = {example.id: len(example.responses) for example in setup.examples[split]}
    for row, example_id in enumerate(tokens.ids):
        mask = tokens.response_lengths[row] > 0
        values_by_name = {"logps": logps[row, mask]}
        if refs is not None:
            values_by_name["ref_logps"] = refs[row, mask]
        if rewards is not None:
            values_by_name["rewards"] = rewards[row, mask]
        values_by_name["response_tokens"] = tokens.response_lengths[row, mask]
        line: dict[str, Any] = {"id": example_id}
        for name, values in values_by_name.items():
            line[name] = [None] * sizes[example_id]
            for candidate_id, value in zip(
                tokens.candidate_ids[row, mask], values.tolist(), strict=True
            ):
                line[name][candidate_id] = value
        yield line


def main() -> None:
    """Writes the scores that the flags ask for."""
    config = cli.read_config()
    output = cli.check_output(FLAGS.output, "JSON-lines or Parquet", config.data.path)
    count = cli.write_rows(output, score(config, FLAGS.workdir, FLAGS.split))
    print(f"{count} examples written to {output}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    cli.define_path("workdir", "A run's folder.")
    cli.define_split()
    cli.define_path("output", "The file to write: JSON lines, or .parquet.")
    cli.run(main, unread=[*cli.TRAINING, *cli.CHOOSING, *cli.LIMITS, *cli.RANKING, *cli.MINING])
