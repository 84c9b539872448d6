"""Run folders: found, read, and called what the paper calls them.

Nothing that was started is dropped: a run that is not finished, or whose files cannot be read, is
found too and says so in its `state`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs.metrics_files import read_complete_lines
from mass_dpo_jax.runs.resume import NOT_COMPUTED
from mass_dpo_jax.utils.files import read_json
from mass_dpo_jax.utils.run_paths import explain_non_run

FINISHED = "finished"
LOG = "log.txt"  # What launch/paper.sh keeps of a run's output.

# Settings that do not make another experiment: where things lie, how often a run reports.
ELSEWHERE = (
    "seed",
    "model.path",
    "model.reference_path",
    "data.path",
    "train.eval_every",
    *NOT_COMPUTED,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
      settings: by name, such as "train.steps"; empty where config.json cannot be read.
      model: the name of the folder that training first started from, or "scratch".
      start: the method of the run that this one goes on from; "" for a model that is no run.
      method: its name with what tells its variants apart.
      n, beta: None where the method has none.
      state: "finished", or what is the matter.
      metrics: of metrics.json.
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
        return self.state == FINISHED

    def final(self, metric: str) -> float | None:
        """A metric at the end of the run; None where there is none."""
        return _number(self.metrics.get("final"), metric)

    def at_start(self, metric: str) -> float | None:
        """A metric before the first update; None where there is none."""
        return _number(self.metrics.get("start"), metric)


def find(folders: Sequence[Path]) -> list[Run]:
    """Every run in or below the folders, in the order of their paths.

    Raises:
      UserError: a folder does not exist, or none has a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: {explain_non_run(folder)}")
    places: dict[Path, Path] = {}
    for folder in folders:
        for place in _below(folder):
            places.setdefault(place.resolve(), place)
    if not places:
        raise UserError(f"{', '.join(map(str, folders))}: no runs (folders with config.json) here")
    found = sorted(places.values())
    configs = {place: _config(place) for place in found}
    return [_read(place, configs) for place in found]


def _below(folder: Path) -> Iterable[Path]:
    """The run folders in a folder, itself included. A run's own folders hold no further runs."""
    written = any((folder / name).exists() for name in ("metrics.jsonl", "metrics.json"))
    if written or isinstance(_config(folder), dict):
        yield folder
        return
    if (folder / LOG).exists():
        yield folder  # Of a run that failed before it wrote anything.
    for below in sorted(p for p in folder.iterdir() if p.is_dir()):
        yield from _below(below)


def _config(folder: Path) -> dict[str, Any] | str | None:
    """A run's settings by name, or what is wrong; None where no run's config.json is there.

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
        config_lib.check_types(settings)
    except UserError as error:
        return f"unreadable: config.json: {error}"
    return settings


def _read(folder: Path, configs: Mapping[Path, Any]) -> Run:
    settings = configs[folder]
    if not isinstance(settings, dict):
        return Run(folder, {}, state=settings or _never_started(folder))
    metrics, state = _metrics(folder)
    method, n, beta = label(settings)
    model, start = _origin(str(settings["model.path"]), configs)
    dataset = settings["data.name"]
    if dataset in ("jsonl", "hub"):  # Names of formats; the data are in the path.
        dataset = f"{dataset} {Path(str(settings['data.path'])).name}"
    return Run(
        folder, settings, model, start, dataset, method, n, beta, settings["seed"], state, metrics
    )


def _metrics(folder: Path) -> tuple[dict[str, Any], str]:
    if not (folder / "metrics.json").exists():
        return {}, f"unfinished{_last_step(folder)}"
    try:
        metrics = read_json(folder / "metrics.json")
    except UserError:
        return {}, "unreadable: metrics.json is no valid JSON"
    if not isinstance(metrics, dict) or "finished" not in metrics:
        return {}, "unreadable: metrics.json has no field 'finished'"
    if not metrics["finished"]:
        return metrics, f"unfinished{_last_step(folder)}"
    if not isinstance(metrics.get("final"), dict):
        return metrics, "finished, without a test split"
    return metrics, FINISHED


def _never_started(folder: Path) -> str:
    if (folder / LOG).exists():
        lines = (folder / LOG).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"failed at its start: {last[-200:]}" if last else "did not start"
    return "unreadable: it has no config.json"


def _last_step(folder: Path) -> str:
    rows = read_complete_lines(folder)
    return f", step {rows[-1]['step']:.0f}" if rows else ""


def _origin(path: str, configs: Mapping[Path, Any]) -> tuple[str, str]:
    """The model that a chain of runs began with, and the method of the run just before."""
    start, seen = "", set()
    while path and path not in seen:
        seen.add(path)
        settings = _run_at(Path(path), configs)
        if settings is None:
            return Path(path).name, start
        start = start or label(settings)[0]
        path = str(settings["model.path"])
    return "scratch", start


def _run_at(path: Path, configs: Mapping[Path, Any]) -> dict[str, Any] | None:
    """The settings of the run at a path, as written on the machine and in the folder it ran in."""
    here = _config(path)
    if isinstance(here, dict):
        return here
    # Moved since, perhaps: the one run here whose path ends alike, with more than its name.
    for length in range(len(path.parts), 1, -1):
        tail = path.parts[-length:]
        alike = [c for p, c in configs.items() if p.resolve().parts[-length:] == tail]
        if len(alike) == 1 and isinstance(alike[0], dict):
            return alike[0]
    return None


def label(settings: Mapping[str, Any]) -> tuple[str, int | str | None, float | None]:
    """What a run's method is called, its n and its beta."""
    method = settings["method"]
    refresh = settings["selection.refresh"]
    words = {"step": "redrawn", "once": "fixed"}
    n, beta = settings["num_negatives"], settings["beta"]
    if method == "sft":
        return method, None, None
    if method == "dpo":
        n = 1
    if method == "pl_all" or (method, settings["selection.criterion"]) == ("mass_dpo", "all"):
        n = "all"
    if method == "mass_dpo":
        method = f"mass_dpo ({settings['selection.criterion']}, {refresh})"
    if method == "sdpo":
        method = f"sdpo ({words.get(str(refresh), refresh)})"
    return method, n, beta


def experiment(run: Run) -> dict[str, Any]:
    """The settings that make a run's experiment and are not in its model, method, n and beta."""
    method = str(run.settings["method"])
    # What stands in the label, and what this method does not read.
    unused = ["method", "num_negatives", "beta", "data.name", *ELSEWHERE]
    if method == "mass_dpo":
        unused += ["selection.criterion", "selection.refresh", "selection.replacement"]
    elif method == "sdpo":
        unused.append("selection.")
    else:
        read = {"pl_sampled": ("refresh", "replacement"), "sft": ()}.get(method, ("refresh",))
        unused += [
            name
            for name in run.settings
            if name.startswith("selection.") and name.partition(".")[2] not in read
        ]
    if method != "odpo":
        unused.append("odpo.")
    if run.model != "scratch":
        unused.append("model.scratch.")
    chosen = {k: v for k, v in run.settings.items() if not k.startswith(tuple(unused))}
    return {**chosen, "start": run.start or "model"}


def _number(values: Any, name: str) -> float | None:
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None
