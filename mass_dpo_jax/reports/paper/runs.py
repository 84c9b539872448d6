"""Run folders: found, read, and called what the paper calls them.

Nothing that was started is dropped: a run that is not finished, or whose files cannot be read, is
found too, and its `state` says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.config import PREFERENCES
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs.metrics_files import read_complete_lines, read_metrics_json
from mass_dpo_jax.runs.resume import NOT_COMPUTED, ROUNDING_ONLY
from mass_dpo_jax.utils import hub
from mass_dpo_jax.utils.files import read_json
from mass_dpo_jax.utils.run_paths import explain_non_run

FINISHED = "finished"
LOG = "log.txt"  # A run's output, kept by launch/paper.sh.
# Settings that do not make another experiment: where files are, and how often a run reports.
SAME_EXPERIMENT = (
    "seed", "model.path", "model.reference_path", "data.path", "train.eval_every", *NOT_COMPUTED,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: its path.
        settings: settings by name, such as "train.steps"; empty where config.json cannot be read.
        model: the name of the model that training first started from, or "scratch".
        start: the method of the run whose weights this one started from; "" if they were no run's.
        dataset: the dataset.
        method: its name, with what tells its variants apart.
        n: negatives of a prompt; None where the method has none.
        beta: the factor from log-ratios to rewards; None where the method has none.
        seed: the seed.
        state: "finished", or what is wrong or missing.
        metrics: the content of metrics.json.
    """

    folder: Path
    settings: Mapping[str, Any]
    model: str = "?"
    start: str = ""
    dataset: str = "?"
    method: str = "?"
    n: int | str | None = None
    beta: float | None = None
    seed: int = 0
    state: str = FINISHED
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it has final metrics."""
        return self.state == FINISHED

    def final(self, metric: str) -> float | None:
        """Returns a metric at the end of the run; None where there is none."""
        return _finite(self.metrics.get("final"), metric)

    def at_start(self, metric: str) -> float | None:
        """Returns a metric before the first update; None where there is none."""
        return _finite(self.metrics.get("start"), metric)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads every run in or below the folders, in the order of their paths.

    Raises:
        UserError: a folder does not exist, or none has a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: {explain_non_run(folder)}")
    paths: dict[Path, Path] = {}
    for folder in folders:
        for path in _runs_below(folder):
            paths.setdefault(path.resolve(), path)
    if not paths:
        raise UserError(f"{', '.join(map(str, folders))}: no runs (folders with config.json) here")
    configs = {path: _read_settings(path) for path in sorted(paths.values())}
    return [_read_run(path, configs) for path in configs]


def _runs_below(folder: Path) -> Iterable[Path]:
    """Yields the run folders in a folder, itself included; a run has no runs in it."""
    started = any((folder / name).exists() for name in ("metrics.jsonl", "metrics.json"))
    if started or isinstance(_read_settings(folder), dict):
        yield folder
        return
    if (folder / LOG).exists():
        yield folder  # It failed before it wrote anything else.
    for below in sorted(p for p in folder.iterdir() if p.is_dir()):
        yield from _runs_below(below)


def _read_settings(folder: Path) -> dict[str, Any] | str | None:
    """Reads a run's settings by name; or says what is wrong, None where no run is there.

    A Hugging Face folder has a config.json too, with other fields.
    """
    if not (folder / "config.json").exists():
        return None
    try:
        stored = read_json(folder / "config.json")
    except UserError:
        return "unreadable: config.json is no valid JSON"
    settings = dict(config_lib.flatten(config_lib.default()))
    if not isinstance(stored, dict) or not {"method", "data", "train"} <= set(stored):
        return None
    settings.update(config_lib.flatten(stored))
    try:
        config_checks.check_types(settings)
    except UserError as error:
        return f"unreadable: config.json: {error}"
    return settings


def _read_run(folder: Path, configs: Mapping[Path, Any]) -> Run:
    settings = configs[folder]
    if not isinstance(settings, dict):
        return Run(folder, {}, state=settings or _explain_missing_config(folder))
    metrics, state = _read_metrics(folder)
    method, n, beta = describe_method(settings)
    model, start = _origin(str(settings["model.path"]), configs)
    dataset = settings["data.name"]
    if dataset in PREFERENCES:  # The path names the data.
        dataset = f"{dataset} {Path(str(settings['data.path'])).name}"
    return Run(
        folder, settings, model, start, dataset, method, n, beta, settings["seed"], state, metrics
    )


def _read_metrics(folder: Path) -> tuple[dict[str, Any], str]:
    """Reads a run's metrics.json, and its state."""
    try:
        metrics = read_metrics_json(folder) or {}
    except UserError as error:
        return {}, f"unreadable: {str(error).removeprefix(f'{folder}/')}"
    if not metrics.get("finished"):
        lines = read_complete_lines(folder)
        step = f", step {lines[-1]['step']:.0f}" if lines else ""
        return metrics, f"unfinished{step}"
    return metrics, FINISHED if metrics.get("final") else "finished, without a test split"


def _explain_missing_config(folder: Path) -> str:
    if (folder / LOG).exists():
        lines = (folder / LOG).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"failed at its start: {last[-200:]}" if last else "did not start"
    return "unreadable: it has no config.json"


def _origin(path: str, configs: Mapping[Path, Any]) -> tuple[str, str]:
    """Finds the model that a chain of runs began with, and the method of the run at `path`."""
    start, seen = "", set()
    while path and path not in seen:
        seen.add(path)
        settings = _settings_at(Path(path), configs)
        if settings is None:
            return Path(hub.without_revision(path)).name, start
        start = start or describe_method(settings)[0]
        path = str(settings["model.path"])
    return "scratch", start


def _settings_at(path: Path, configs: Mapping[Path, Any]) -> dict[str, Any] | None:
    """Finds the settings of a run by its path, which may be from another machine."""
    settings = _read_settings(path)
    if isinstance(settings, dict):
        return settings
    # The run may have been moved: accept the only one whose path ends in the same way, by more
    # than its name.
    for length in range(len(path.parts), 1, -1):
        end = path.parts[-length:]
        matches = [c for p, c in configs.items() if p.resolve().parts[-length:] == end]
        if len(matches) == 1 and isinstance(matches[0], dict):
            return matches[0]
    return None


def describe_method(settings: Mapping[str, Any]) -> tuple[str, int | str | None, float | None]:
    """Returns what a run's method is called, its n and its beta."""
    method = settings["method"]
    refresh = settings["selection.refresh"]
    n, beta = settings["num_negatives"], settings["beta"]
    if method == "sft":
        return method, None, None
    if method == "dpo":
        n = 1
    whole = method == "pl_all" or method in config_lib.LIST_METHODS
    if whole or (method, settings["selection.criterion"]) == ("mass_dpo", "all"):
        n = "all"
    if method == "mass_dpo":
        method = f"mass_dpo ({settings['selection.criterion']}, {refresh})"
    if method == "sdpo":
        drawn = {"step": "redrawn", "once": "fixed"}
        method = f"sdpo ({drawn.get(refresh, refresh)})"
    return method, n, beta


def experiment_settings(run: Run) -> dict[str, Any]:
    """Returns the settings that make a run's experiment, beside its model, method, n and beta."""
    method = str(run.settings["method"])
    # Those that the label has, and those that this method does not read.
    unused = ["method", "num_negatives", "beta", "data.name", *SAME_EXPERIMENT]
    if method == "mass_dpo":
        unused += ["selection.criterion", "selection.refresh", "selection.draw"]
    elif method == "sdpo":
        unused.append("selection.")
    else:
        read = {"pl_sampled": ("refresh", "draw"), "sft": ()}.get(method, ("refresh",))
        unused += [
            name
            for name in run.settings
            if name.startswith("selection.") and name.partition(".")[2] not in read
        ]
    unused += [f"{other}." for other in ("odpo", "pl_rank") if other != method]
    if run.model != "scratch":
        unused.append("model.scratch.")
    settings = {k: v for k, v in run.settings.items() if not k.startswith(tuple(unused))}
    return {**settings, "start": run.start or "model"}


def paper_differences(run: Run) -> dict[str, Any]:
    """Returns the settings of a run's experiment that are not the paper's, with its values.

    A setting that other versions of this program had, and this one has not, is among them.
    """
    paper = {**_paper_settings(run.settings["data.name"]), "start": "model"}
    return {
        name: value
        for name, value in experiment_settings(run).items()
        if not name.startswith(ROUNDING_ONLY) and value != paper.get(name)
    }


@functools.cache
def _paper_settings(dataset: str) -> dict[str, Any]:
    config = config_lib.paper()
    config.data.name = dataset
    return dict(config_lib.flatten(config))


def _finite(values: Any, name: str) -> float | None:
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None
