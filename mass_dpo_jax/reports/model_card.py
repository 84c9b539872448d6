"""The README.md of an exported model: what it is, how it was trained, how good it is, its use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.render import read_template_arguments
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.runs import metrics_files, origin, run_config, run_folder
from mass_dpo_jax.runs.metrics_files import read_metrics_log
from mass_dpo_jax.selection.registry import CRITERIA
from mass_dpo_jax.training.methods import METHODS

REWARD = (
    "The reward of a response is r = beta * (log-probability of the response under this model - "
    "that under the reference), summed over its tokens, with beta = {beta:g}."
)
METRICS = {
    "accuracy": "Accuracy (R@1)",
    "recall@3": "Recall@3",
    "mrr": "MRR",
    "ndcg@3": "NDCG@3",
}


def write(
    workdir: Path,
    config: ConfigDict,
    decoder: DecoderConfig,
    step: int,
    dtype: str,
    base_model: str,
) -> str:
    """The text of the card.

    Args:
      workdir: the run's folder, whose metrics are quoted.
      config: the run's.
      decoder: the model's.
      step: of the weights.
      dtype: of the stored weights.
      base_model: what to call the model that training started from; empty: by its folder.
    """
    config = config.copy_and_resolve_references()
    known = origin.read(workdir)["paths"]
    config.update_from_flattened_dict({n: known[n] for n in origin.PATHS if n in known})
    base = base_model or base_name(config.model.path)
    parts = [
        _front_matter(config, base),
        f"# {_title(config, base)}\n\n{_summary(config, base, decoder, step, dtype)}",
        f"## Method\n\n{_method(config)}",
        f"## Data\n\n{_data(config)}",
        f"## Metrics\n\n{_metrics(workdir, step)}",
        f"## Use\n\n{_use(config)}",
        f"## Training\n\n{_training(config, step)}",
    ]
    return "\n\n".join(parts) + "\n"


def base_name(path: str) -> str:
    """What the model that a chain of runs started from is called; empty: random weights.

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


def _front_matter(config: ConfigDict, base: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base:
        lines += [f"base_model: {json.dumps(base)}"]
    if config.data.name == "hub" and not _is_local(config.data.path):
        lines += ["datasets:", f"- {json.dumps(config.data.path)}"]
    tags = ["mass_dpo_jax", "jax", config.method.replace("_", "-")]
    if config.method != "sft":
        tags.append("preference-optimization")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _title(config: ConfigDict, base: str) -> str:
    name = config.method.replace("_", "-").upper()
    return f"{base.rpartition('/')[2] or f'A small {config.model.scratch.model_type}'}, {name}"


def _summary(config: ConfigDict, base: str, decoder: DecoderConfig, step: int, dtype: str) -> str:
    start = f"`{base}`" if base else "random weights"
    return (
        f"A {decoder.model_type} decoder ({decoder.num_layers} layers of width "
        f"{decoder.hidden_size}, {dtype} weights), trained from {start} on preferences with one "
        f"chosen and several rejected responses by `{config.method}`: the weights after update "
        f"{step}."
    )


def _method(config: ConfigDict) -> str:
    words = [METHODS[config.method].description]
    if METHODS[config.method].uses_reference:
        words.insert(0, REWARD.format(beta=config.beta))
    if config.method == "odpo":
        words.append(f"alpha = {config.odpo.alpha:g}.")
    if config.method not in ("sft", "pl_all", "dpo"):
        n = f"n = {config.num_negatives} negatives of each prompt's pool"
        if config.method == "mass_dpo":
            name = config.selection.criterion
            summary = CRITERIA[name].summary if name in CRITERIA else ""
            summary = summary or f"chosen by the criterion `{name}`"
            ridge = f"; ridge = {config.selection.ridge:g}." if "ridge" in summary else "."
            words.append(f"The {n} are {summary}{ridge}")
        else:
            words.append(f"There are {n}.")
        words.append(f"Sets are chosen anew: `{config.selection.refresh}`.")
    if config.sft_weight:
        words.append(
            f"A supervised term, the chosen response's negative log-likelihood per token, is added "
            f"with weight {config.sft_weight:g}."
        )
    return " ".join(words)


def _data(config: ConfigDict) -> str:
    name, template = config.data.name, config.data.chat_template
    where = f" `{_last(config.data.path)}`" if config.data.path and name != "synthetic" else ""
    lines = [f"Data set: `{name}`{where}."]
    if template == "none":
        lines.append(
            "Prompts are plain text, without a chat template; a response ends with the "
            "end-of-sequence token."
        )
    else:
        lines.append(
            f"Prompts were rendered by the tokenizer's chat template, with `{_arguments(config)}` "
            "where the template asks for them: render them alike."
        )
    return " ".join(lines)


def _metrics(workdir: Path, step: int) -> str:
    found = metrics_files.read_metrics_json(workdir) or {}
    if found.get("finished") and found.get("step") == step and found.get("final"):
        start, final, gain = found.get("start") or {}, found["final"], found.get("gain") or {}
        head = (
            f"Ranking of the chosen response among all candidates, {found['examples']} examples "
            f"of the {found['split']} split, in % ± standard error."
        )
        columns: dict[str, Mapping[str, float]] = {"before training": start, "after": final}
        columns |= {"difference (same examples)": gain}
        notes = ["*By policy*: ranked by the response's log-probability under the model alone."]
        if any(name.startswith("reward/") for name in final):
            notes.append("*By reward*: by the log-ratio to the reference.")
        return "\n\n".join([head, _table(columns), " ".join(notes)])
    values = _validation(workdir, step)
    if values:
        head = "On the validation split, in % ± standard error."
        return f"{head}\n\n{_table({'at this step': values})}"
    return "This checkpoint was not evaluated."


def _validation(workdir: Path, step: int) -> dict[str, float]:
    path = workdir / "metrics.jsonl"
    found = {}
    for name, (steps, values) in (read_metrics_log(path) if path.exists() else {}).items():
        if name.startswith("eval/") and step in steps:
            found[name.removeprefix("eval/")] = float(values[steps == step][-1])
    return found


def _table(columns: Mapping[str, Mapping[str, float]]) -> str:
    columns = {name: values for name, values in columns.items() if values}
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    for ranking in ("policy", "reward"):
        for key, words in METRICS.items():
            name = f"{ranking}/{key}"
            if any(name in values for values in columns.values()):
                cells = [
                    f"{100 * values[name]:.1f} ± {100 * values[f'{name}_se']:.1f}"
                    if name in values
                    else ""
                    for values in columns.values()
                ]
                rows.append([f"{words}, by {ranking}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _use(config: ConfigDict) -> str:
    if config.data.chat_template == "none":
        inputs = 'inputs = tokenizer("PROMPT", return_tensors="pt")'
        request = "/v1/completions -H 'Content-Type: application/json' \\\n    -d " + (
            """'{"model": "FOLDER", "prompt": "PROMPT"}'"""
        )
    else:
        inputs = (
            'messages = [{"role": "user", "content": "PROMPT"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            "    messages, add_generation_prompt=True, "
            'return_dict=True, return_tensors="pt",\n'
            f"    {_arguments(config)},\n"
            ")"
        )
        asked = read_template_arguments(config.data)
        request = "/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d " + (
            """'{"model": "FOLDER", "messages": [{"role": "user", "content": "PROMPT"}], """
            f""""chat_template_kwargs": {json.dumps(asked)}}}'"""
        )
    return f"""With transformers, where FOLDER is this one:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
{inputs}
outputs = model.generate(**inputs, max_new_tokens={config.data.max_response_length})
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

With vLLM:

```bash
vllm serve FOLDER
curl http://localhost:8000{request}
```"""


def _arguments(config: ConfigDict) -> str:
    """What the chat template was given beside the messages, as in a Python call."""
    values = read_template_arguments(config.data).items()
    return ", ".join(
        f"{name}={json.dumps(v) if isinstance(v, str) else repr(v)}" for name, v in values
    )


def _training(config: ConfigDict, step: int) -> str:
    """The configuration; of paths of the machine it ran on, only the last part."""
    settings: dict[str, Any] = dict(config_lib.flatten(config))
    settings.pop("cache_dir")
    for name in origin.PATHS:
        settings[name] = _last(settings[name])
    return (
        f"Trained with mass_dpo_jax {mass_dpo_jax.__version__}, {step} updates of "
        f"{config.train.batch_size} prompts, float32 weights and {config.model.dtype} "
        "computation. All settings:\n\n"
        f"```json\n{json.dumps(settings, indent=2)}\n```"
    )


def _last(path: str) -> str:
    """A path without the folders above it; a name of the hub stays as it is."""
    return Path(path).name if _is_local(path) else path


def _is_local(path: str) -> bool:
    return Path(path).is_absolute() or Path(path).exists()
