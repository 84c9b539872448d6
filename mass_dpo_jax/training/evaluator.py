"""Metrics of a run before, during and after training, and the rows of its report."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax.config_values import parse_cutoffs
from mass_dpo_jax.data.examples import Example, digest_examples
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.metrics import CUTOFFS, Lists, evaluate_logps, metric_names, ranking_gains
from mass_dpo_jax.runs import metrics_files, run_folder
from mass_dpo_jax.runs.loggers import Log
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.method_config import has_rewards
from mass_dpo_jax.training.setup import Setup
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import read_array

MAX_SELECTED_ROWS = 256  # Rows of the final split whose selection the report shows.

# Files in the run folder: log-probabilities; which candidates are the chosen one or below it; and,
# of graded data, the grades of all, NaN where there is no candidate.
START_LOGPS, FINAL_LOGPS, EXIST_LOGPS = "logps-start.npy", "logps-final.npy", "logps-exist.npy"
GRADES = "logps-grades.npy"
_log = logging.getLogger(__name__)


def make_lists(tokens: Tokens) -> Lists:
    """Returns what the data says of a split's candidates, for `metrics`."""
    return Lists(tokens.response_lengths > 0, tokens.relevant, tokens.grades, tokens.items)


def log_long_cutoffs(cutoffs: str, tokens: Mapping[str, Tokens]) -> None:
    """Logs which of the cutoffs no list of a split is long enough for.

    Those of the default are for lists of every length: they are left out without a word.

    Args:
        cutoffs: `config.eval.cutoffs`.
        tokens: splits that are evaluated, by name.
    """
    numbers = parse_cutoffs(cutoffs)
    if numbers == CUTOFFS:
        return
    for split, rows in tokens.items():
        longest = rows.response_lengths.shape[1]
        if long := [str(k) for k in numbers if k > longest]:
            _log.warning(
                f"config.eval.cutoffs={cutoffs}: no list of the split {split} has more than "
                f"{longest} responses; it has no metrics at {', '.join(long)}"
            )


def check_best(
    config: ConfigDict, splits: Collection[str], validation: Tokens | None = None
) -> None:
    """Checks that evaluations give the metric by which the best checkpoint is kept.

    Args:
        config: the configuration.
        splits: names of the splits that have rows.
        validation: the validation split; None before it is read: what some data would give.

    Raises:
        UserError: no evaluation gives it.
    """
    train, cutoffs = config.train, parse_cutoffs(config.eval.cutoffs)
    best = train.keep_best
    candidates, graded = max(2, *cutoffs), True
    if validation is not None:
        candidates, graded = validation.response_lengths.shape[1], validation.grades is not None
    names = metric_names(has_rewards(config), candidates, graded, cutoffs)
    if best and best not in names:
        raise UserError(
            f"config.train.keep_best={best!r}: expected a metric of the evaluations of "
            f"config.method={config.method}, one of {', '.join(names)}"
        )
    if best and not train.eval_every:
        raise UserError(
            f"config.train.keep_best={best!r}: config.train.eval_every=0 evaluates nothing; "
            "expected a number of steps, or keep_best empty"
        )
    if best and "validation" not in splits:
        raise UserError(
            f"config.train.keep_best={best!r}: there are no validation rows to evaluate; expected "
            "some, as with config.data.validation_share=0.1, or keep_best empty"
        )


@dataclasses.dataclass(frozen=True)
class EvaluatedSplit:
    """The rows of the split that a finished run is evaluated on, for its report.

    Attributes:
        examples: the M examples.
        candidate_ids: int [M, C], index of a candidate in its example's responses, 0 the chosen
            one.
        valid: bool [M, C], which of them are the chosen one or below it.
        before: float32 [M, C], log-probabilities at the start of the run.
        after: float32 [M, C], log-probabilities at its end.
        rewards_before: float32 [M, C], implicit rewards at the start; None where there are none.
        rewards_after: likewise at the end.
        selected: bool [K, C], what the final policy selects in the first K rows; None where the
            method selects nothing.
    """

    examples: Sequence[Example]
    candidate_ids: np.ndarray
    valid: np.ndarray
    before: np.ndarray
    after: np.ndarray
    rewards_before: np.ndarray | None
    rewards_after: np.ndarray | None
    selected: np.ndarray | None


class Evaluator:
    """Evaluates a run at its start, during training, and at its end.

    The start and the end are measured on the test split, or on the validation split where there is
    no test split. Their log-probabilities [M, C] are kept as `.npy` files, for comparisons row by
    row; two more files say which candidates exist, and what grades they have.

    Args:
        setup: the run's setup.
        refs: the reference's log-probabilities, by split; empty where there is no reference.
        workdir: the run folder.
        log: the logs that the validation split's metrics are written to.
        write_report: a function that writes the run's report from the final metrics and the rows
            that they were measured on, if any; called on the primary process.
    """

    def __init__(
        self,
        setup: Setup,
        refs: Mapping[str, np.ndarray],
        workdir: Path,
        log: Log,
        write_report: Callable[[Mapping[str, Any], EvaluatedSplit | None], None] | None = None,
    ):
        self._setup, self._refs, self._workdir, self._log = setup, refs, workdir, log
        self._write_report = write_report
        self._final = next((s for s in ("test", "validation") if s in setup.tokens), None)

    def evaluate_start(self, params: Any) -> None:
        """Writes the policy's ranking before the first update into metrics.json."""
        start_metrics = None
        # The same order on every process, since all of them score together.
        for split in dict.fromkeys(("validation", self._final)):
            if split is None or split not in self._setup.tokens:
                continue
            if self._setup.model.reference_path or split not in self._refs:
                logps = self._setup.score(params, split, "start")
            else:
                logps = self._refs[split]  # The policy still is the reference.
            values = self._measure(logps, None, split)
            if split == "validation":
                self._log.write(0, {f"eval/{name}": value for name, value in values.items()})
            if split == self._final:
                start_metrics = values
                self._keep(START_LOGPS, split, logps)
        content = self._metrics_json(finished=False, step=0, start=start_metrics)
        run_folder.write_json(self._workdir / metrics_files.SUMMARY, content)

    def evaluate_step(self, params: Any, step: int) -> tuple[str, dict[str, float]]:
        """Writes metrics of the validation split into metrics.jsonl.

        Returns:
            The headline as a line of text, and all metrics by their names in the file.
        """
        if "validation" not in self._setup.tokens:
            return f"step {step}: no validation split", {}
        values, _ = self._evaluate(params, "validation")
        logged = {f"eval/{name}": value for name, value in values.items()}
        self._log.write(step, logged)
        return f"step {step}, validation: {format_headline(values)}", logged

    def evaluate_end(self, params: Any, step: int) -> dict[str, Any]:
        """Writes the final metrics into report.html and metrics.json, and returns the latter."""
        read = functools.partial(metrics_files.read_metrics_json, self._workdir)
        earlier_metrics = distributed.run_on_primary(read) or {}
        final = gain = evaluated = None
        if self._final:
            final, logps = self._evaluate(params, self._final)
            start_logps = distributed.broadcast_array(
                read_array(self._workdir / START_LOGPS) if distributed.is_primary() else None
            )
            assert start_logps is not None
            lists = self._lists(self._final)
            gain = ranking_gains(logps, start_logps, lists, self._setup.cutoffs)
            self._keep(FINAL_LOGPS, self._final, logps)
            if self._write_report is not None:
                evaluated = self._evaluated_split(self._final, params, start_logps, logps)
        content = self._metrics_json(
            finished=True, step=step, start=earlier_metrics.get("start"), final=final, gain=gain
        )
        if self._write_report is not None and distributed.is_primary():
            self._write_report(content, evaluated)
        # Last: a run that says it is finished is never evaluated again.
        run_folder.write_json(self._workdir / metrics_files.SUMMARY, content)
        return content

    def _evaluated_split(
        self, split: str, params: Any, before: np.ndarray, after: np.ndarray
    ) -> EvaluatedSplit | None:
        """Returns what the report shows of a split, on the primary process; all must call this."""
        tokens = self._setup.tokens[split]
        selected = self._select(split, params)
        if not distributed.is_primary():
            return None
        by_id = {example.id: example for example in self._setup.examples[split]}
        return EvaluatedSplit(
            [by_id[name] for name in tokens.ids],
            tokens.candidate_ids,
            self._lists(split).compared,
            before,
            after,
            self._rewards(before, self._refs.get(split), split),
            self._rewards(after, self._refs.get(split), split),
            selected,
        )

    def _select(self, split: str, params: Any) -> np.ndarray | None:
        """Marks what the method would train on in the first K rows of a split, bool [K, C]."""
        setup, method = self._setup, self._setup.method
        tokens = setup.tokens[split]
        width = tokens.response_lengths.shape[1]
        # Frozen features are kept of the training split only.
        if method.is_supervised or method.frozen_features:
            return None
        rows = np.arange(min(len(tokens), MAX_SELECTED_ROWS))
        if method.uses_whole_pool:  # n is that of the training split; pools here may be larger.
            return self._lists(split).compared[rows] & (np.arange(width) > 0)
        selected = np.zeros((len(rows), width), bool)
        # What is as good as the chosen response stands last, and is never selected.
        pools, refs = tokens.without_ties(), self._refs.get(split)
        if refs is not None:
            refs = refs[:, : pools.response_lengths.shape[1]]
        batches = dataclasses.replace(setup, tokens={split: pools}).scoring_batches(
            split, "selecting", rows, refs
        )
        key = setup.key(0)
        for batch_rows, candidate_ids in scoring.compute_each(
            lambda batch: setup.program.choose_batch(params, batch, key)[0].candidate_ids, batches
        ):
            selected[batch_rows[:, None], candidate_ids] = True
        selected[:, 0] = False  # 0 stands for no negative, too.
        return selected

    def _keep(self, name: str, split: str, logps: np.ndarray) -> None:
        run_folder.write_table(self._workdir / name, logps)
        lists = self._lists(split)
        run_folder.write_table(self._workdir / EXIST_LOGPS, lists.compared)
        if lists.grades is not None:
            grades = np.where(lists.valid, lists.grades, np.nan).astype(np.float32)
            run_folder.write_table(self._workdir / GRADES, grades)

    def _lists(self, split: str) -> Lists:
        return make_lists(self._setup.tokens[split])

    def _describe_final_split(self) -> dict[str, Any]:
        """Returns how many examples the final split has, and their digest."""
        if not self._final:
            return {"examples": 0, "digest": ""}
        split, setup = self._final, self._setup

        def describe() -> dict[str, Any]:
            ids = set(setup.tokens[split].ids)
            rows = [example for example in setup.examples[split] if example.id in ids]
            return {"examples": len(rows), "digest": digest_examples(rows)}

        return dict(distributed.run_on_primary(describe))

    def _evaluate(self, params: Any, split: str) -> tuple[dict[str, float], np.ndarray]:
        logps = self._setup.score(params, split, "evaluation")
        return self._measure(logps, self._refs.get(split), split), logps

    def _measure(self, logps: np.ndarray, refs: np.ndarray | None, split: str) -> dict[str, float]:
        rewards = self._rewards(logps, refs, split)
        return evaluate_logps(logps, rewards, self._lists(split), self._setup.cutoffs)

    def _rewards(self, logps: np.ndarray, refs: np.ndarray | None, split: str) -> np.ndarray | None:
        lengths = self._setup.tokens[split].response_lengths
        return self._setup.method.implicit_rewards(logps, refs, lengths)

    def _metrics_json(self, **fields: Any) -> dict[str, Any]:
        about = {"version": mass_dpo_jax.__version__, "split": self._final}
        return {**about, **self._describe_final_split(), **fields}


def format_headline(values: Mapping[str, float]) -> str:
    """Formats the headline metrics of `metrics.evaluate_logps` as one line of text."""
    parts = []
    for prefix in ("policy", "reward"):
        if f"{prefix}/accuracy" in values:
            parts.append(
                f"{prefix} accuracy {100 * values[f'{prefix}/accuracy']:.1f} "
                f"± {100 * values[f'{prefix}/accuracy_se']:.1f}%, mrr {values[f'{prefix}/mrr']:.3f}"
            )
    if "rewards/margins" in values:
        parts.append(f"margin {values['rewards/margins']:.3f}")
    return "; ".join(parts)
