"""README.md of an exported model: what it is, how it was trained, how good it is, how to use it.

model_card.md is the text, with the values that are computed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.config import PREFERENCES
from mass_dpo_jax.data import hf_datasets
from mass_dpo_jax.data.render import read_template_arguments
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.reports import templates
from mass_dpo_jax.reports.format import format_metric, list_headline_metrics, markdown_table
from mass_dpo_jax.runs import origin, run_config, run_folder
from mass_dpo_jax.runs.metrics_files import read_metrics_json, read_metrics_log
from mass_dpo_jax.selection.registry import CRITERIA
from mass_dpo_jax.training.method_config import SMOOTHED
from mass_dpo_jax.training.methods import METHODS

REWARD = (
    "The reward of a response is r = beta * ({value}), {over} its tokens, with beta = {beta:g}."
)
LINKS = {
    "hinge": "The lead z enters by a hinge, max(0, 1 - z), in place of -log sigmoid(z).",
    "squared": "The lead z enters squared, ((z - 1/2) / beta)^2, in place of -log sigmoid(z).",
    "robust": "In place of -log sigmoid(z) stands its unbiased estimate where each preference is "
    "the wrong way round with probability {epsilon:g}.",
    "logistic": "Each preference is taken to be the wrong way round with probability {epsilon:g}.",
}
MARGINS = {
    "constant": "Rewards of rejected responses are raised by a margin of {gamma:g}.",
    "grade": "Rewards of rejected responses are raised by a margin of {alpha:g} * log of how much "
    "better the chosen response was graded.",
}


def write(
    workdir: Path,
    config: ConfigDict,
    decoder: DecoderConfig,
    step: int,
    dtype: str,
    base_model: str,
) -> str:
    """Returns the text of the card.

    Args:
        workdir: the run's folder, whose metrics are quoted.
        config: the run's configuration.
        decoder: the model's sizes.
        step: the update that the weights are from.
        dtype: the type of the stored weights.
        base_model: name of the model that training started from; "": the name of its folder.
    """
    config = config.copy_and_resolve_references()
    paths = origin.read(workdir)["paths"]
    config.update_from_flattened_dict({n: paths[n] for n in origin.PATHS if n in paths})
    base = base_model or base_name(config.model.path)
    model = base.rpartition("/")[2] or f"A small {config.model.scratch.model_type}"
    data, arguments = config.data, read_template_arguments(config.data)
    call = ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) else repr(value)}"
        for name, value in arguments.items()
    )
    return templates.render(
        "model_card.md",
        json=json.dumps,
        version=mass_dpo_jax.__version__,
        title=f"{model}, {config.method.replace('_', '-').upper()}",
        config=config,
        decoder=decoder,
        step=step,
        dtype=dtype,
        base=base,
        method=_describe_method(config),
        hub_dataset=data.path if data.name in PREFERENCES and _is_on_hub(data.path) else "",
        data_path="" if data.name == "synthetic" else _without_folders(data.path),
        template_arguments=arguments,
        template_call=call,
        settings=_settings(config),
        **_metrics(workdir, step),
    )


def base_name(path: str) -> str:
    """Returns the name of the model that a chain of runs started from; "" for random weights.

    A folder of the hub's cache is called by its repository, any other by its own name.
    """
    seen = set()
    while path and path not in seen and (run := run_folder.find_run(Path(path))):
        seen.add(path)
        path = run_config.locate_files(run_config.load_config(run[0]), run[0]).model.path
    if not path:
        return ""
    for part in reversed(Path(path).parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return Path(path).resolve().name


def _describe_method(config: ConfigDict) -> str:
    method = METHODS[config.method]
    sentences = [method.description]
    if method.takes:
        sentences = [_describe_reward(config), method.description, *_describe_loss(config)]
    if config.method == "odpo":
        sentences.append(f"alpha = {config.odpo.alpha:g}.")
    if config.method == "pl_rank" and config.pl_rank.top:
        sentences.append(f"Of each list, the first {config.pl_rank.top} places count.")
    if method.criterion != "all" and method.max_negatives is None:
        n = f"n = {config.num_negatives} negatives of each prompt's pool"
        if config.method == "mass_dpo":
            name = config.selection.criterion
            summary = CRITERIA[name].summary if name in CRITERIA else ""
            summary = summary or f"chosen by the criterion `{name}`"
            ridge = f"; ridge = {config.selection.ridge:g}" if "ridge" in summary else ""
            sentences.append(f"The {n} are {summary}{ridge}.")
        else:
            sentences.append(f"There are {n}.")
        sentences.append(f"How often they are chosen again: `{config.selection.refresh}`.")
    if config.sft_weight:
        sentences.append(
            "A supervised term, the chosen response's negative log-likelihood per token, is added "
            f"with weight {config.sft_weight:g}."
        )
    return " ".join(sentences)


def _describe_reward(config: ConfigDict) -> str:
    value = "log-probability of the response under this model"
    if config.loss.reference:
        value += " - that under the reference"
    over = "averaged over" if config.loss.reward == "per_token" else "summed over"
    return REWARD.format(value=value, over=over, beta=config.beta)


def _describe_loss(config: ConfigDict) -> list[str]:
    """Returns a sentence for each part of the loss that is not DPO's."""
    loss, takes = config.loss, METHODS[config.method].takes
    sentences = []
    smoothed = loss.label_smoothing and loss.link in SMOOTHED
    if "link" in takes and (loss.link not in SMOOTHED or smoothed):
        sentences.append(LINKS[loss.link].format(epsilon=loss.label_smoothing))
    if "margin" in takes and loss.margin != "none":
        sentences.append(MARGINS[loss.margin].format(gamma=loss.gamma, alpha=config.odpo.alpha))
    return sentences


def _metrics(workdir: Path, step: int) -> dict[str, Any]:
    """Reads the final metrics of the step or, without those, its evaluation during training."""
    content = read_metrics_json(workdir) or {}
    final = content.get("final") if content.get("finished") and content["step"] == step else None
    if final:
        columns = {
            "before training": content.get("start") or {},
            "after": final,
            "difference (same examples)": content.get("gain") or {},
        }
    else:
        columns = {"at this step": _evaluation(workdir, step)}
    return {
        "final": final,
        "examples": content.get("examples"),
        "split": content.get("split"),
        "metrics_table": _metrics_table({k: v for k, v in columns.items() if v}),
    }


def _evaluation(workdir: Path, step: int) -> dict[str, float]:
    """Reads metrics of the validation split at a step of training, without "eval/"."""
    path = workdir / "metrics.jsonl"
    log = read_metrics_log(path) if path.exists() else {}
    return {
        name.removeprefix("eval/"): float(values[steps == step][-1])
        for name, (steps, values) in log.items()
        if name.startswith("eval/") and step in steps
    }


def _metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Formats the headline metrics that a column has, in Markdown; "" without columns."""
    rows = []
    for ranking in ("policy", "reward"):
        for name, title in list_headline_metrics(columns.values()).items():
            cells = [format_metric(values, f"{ranking}/{name}") for values in columns.values()]
            if any(cells):
                rows.append([f"{title}, by {ranking}", *cells])
    return markdown_table(["", *columns], rows) if columns else ""


def _settings(config: ConfigDict) -> str:
    """Formats the configuration as JSON; paths of the machine lose their folders."""
    settings: dict[str, Any] = dict(config_lib.flatten(config))
    settings.pop("cache_dir")
    settings |= {name: _without_folders(settings[name]) for name in origin.PATHS}
    return json.dumps(settings, indent=2)


def _without_folders(path: str) -> str:
    """Returns paths without the folders above them, and a name of the hub as it is."""
    if not path or _is_on_hub(path):
        return path
    return ",".join(Path(part).name for part in path.split(","))


def _is_on_hub(path: str) -> bool:
    return hf_datasets.is_name(path) and not Path(path).exists()
