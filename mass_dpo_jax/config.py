"""Every setting of a run, with its default. Files in `configs/` change what they need.

The defaults are the paper's. Names are stable: scripts set them as `--config.train.steps=100`.
A setting's comment, at the end of its line or on lines before it, is what --help says of it.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import parse_targets
from mass_dpo_jax.utils import suggestions
from mass_dpo_jax.utils.files import expand


class Settings(ConfigDict):
    """A ConfigDict that says what was meant where a field does not exist, and takes NumPy's
    numbers and paths of pathlib as Python's own numbers and strings."""

    def __setitem__(self, key: str, value: Any) -> None:
        kind = type(value)
        if kind is not bool and issubclass(kind, numbers.Real):
            value = int(value) if issubclass(kind, numbers.Integral) else float(value)
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.is_locked and key not in self:
            # What ml_collections itself says lists all fields there are, and no other group's.
            raise KeyError(f"{key}: no such setting{_meant(key)}")
        super().__setitem__(key, value)


def default() -> ConfigDict:
    """The complete configuration, locked: a field that is not here does not exist."""
    c = Settings()
    c.seed = 0  # Of everything that is drawn: weights, order, candidates, random negatives.
    c.method = "mass_dpo"  # Negatives that are trained on, and the loss.
    c.beta = 0.1  # Strength of the pull towards the reference; rewards are beta * log-ratios.
    c.num_negatives = 3  # n: how many negatives of the pool a step trains on (dpo: 1, pl_all: all).
    c.sft_weight = 0.0  # Of a supervised term on the chosen response, nats per token, in the loss.
    # Where the reference's log-probs, large splits' tokens and compiled programs are kept; empty:
    # ~/.cache/mass_dpo_jax.
    c.cache_dir = ""
    c.dry_run = False  # Print what a step needs of memory and arithmetic, and do not train.
    c.device_memory_gb = 0.0  # Of one device, in 10^9 bytes, for dry_run; 0: not compared.

    c.model = Settings()
    c.model.path = ""  # Hugging Face folder or run folder; empty: random weights (model.scratch).
    c.model.reference_path = ""  # The reference policy; empty: the weights training starts from.
    c.model.dtype = "float32"  # Of the computation: float32 | bfloat16. Weights stay float32.
    c.model.remat = "full"  # What the backward pass computes again: dots (attention) | full (all).
    # auto: a fused kernel on GPUs with bfloat16, where it agrees with plain | plain | fused.
    c.model.attention = "auto"
    c.model.layout = "packed"  # Responses behind their prompt: packed | rectangle (long ones).

    c.model.lora = Settings()  # Train adapters beside frozen weights; model.path is the base.
    c.model.lora.rank = 0  # Columns of A; 0: no LoRA, all weights are trained.
    c.model.lora.alpha = 16.0  # What adapters add is multiplied by alpha / rank.
    # all, or names with commas: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj.
    c.model.lora.targets = "all"
    # How the base's matrices are kept: float32 | bfloat16 | int8 | nf4 (QLoRA; 4.5 bits a weight).
    c.model.lora.base = "bfloat16"
    # Adapters to start from, PEFT's folder or a run with LoRA; they decide rank, alpha, targets.
    c.model.lora.path = ""

    c.model.scratch = Settings()  # The model and tokenizer made when model.path is empty.
    c.model.scratch.model_type = "llama"  # llama | qwen3 | smollm3.
    c.model.scratch.hidden_size = 128  # Width of the residual stream.
    c.model.scratch.intermediate_size = 384  # Hidden units of a block's MLP.
    c.model.scratch.num_layers = 3  # Blocks.
    c.model.scratch.num_heads = 4  # Of queries; they share hidden_size.
    c.model.scratch.num_kv_heads = 2  # Of keys and values; divides num_heads.
    c.model.scratch.vocab_size = 1024  # The tokenizer is trained on the training split.

    c.data = Settings()
    c.data.name = "jsonl"  # jsonl | hub | lastfm | movielens | medmcqa | qasc | synthetic.
    # File, or folder with the splits; hub: name or saved folder; synthetic: plain, clusters, long.
    c.data.path = ""
    c.data.chat_template = "tokenizer"  # tokenizer | none | path of a template file.
    c.data.date = "26 Jul 2024"  # What templates that print today's date print instead.
    # More that the chat template is given, a JSON object, e.g. {"enable_thinking": true}.
    c.data.chat_template_kwargs = ""
    # Other names of jsonl's and hub's columns, e.g. prompt=question,rejected=wrong_answers; id= :
    # ids are not read, and rows numbered.
    c.data.columns = ""
    c.data.max_prompt_length = 1024  # Tokens, those of the template included.
    # A longer prompt is cut (its oldest history or turns go, then the start of its text) | drop
    # (its row goes, counted) | error.
    c.data.long_prompt = "cut"
    c.data.max_response_length = 256  # Tokens, end of sequence included.
    c.data.long_response = "error"  # A longer one is an error | drop (leaves its pool, counted).
    c.data.list_candidates = True  # Does the prompt list the candidates? (Not for jsonl, hub.)
    c.data.num_candidates = 20  # Of a row where they are drawn: movielens, medmcqa, raw lastfm.
    c.data.native_eval = True  # medmcqa: evaluate on a question's own 4 options, not on the drawn.
    # Sizes that batches are padded to: fewer compile sooner, more leave less padding.
    c.data.max_shapes = 4
    c.data.on_bad_row = "error"  # A row that cannot be used is an error | skip (counted).
    # Held out of the training rows where no other split is found, all rows of a prompt together;
    # movielens and raw lastfm are split by user instead, 8 : 1 : 1.
    c.data.validation_share = 0.1
    # Rows used of each split, drawn by seed; 0: all. --config=llama3, qwen3, smollm3 and qlora use
    # 20,000 to train on lastfm, movielens, medmcqa and qasc, as the paper.
    c.data.max_train = 0
    c.data.max_validation = 200  # Likewise.
    c.data.max_test = 2000  # Likewise.

    c.selection = Settings()
    c.selection.criterion = "pool_fisher"  # How mass_dpo chooses the negatives it trains on.
    c.selection.search = "greedy"  # For a large determinant: greedy | exchange | exhaustive.
    c.selection.ridge = 0.1  # The paper's gamma: H_0 = ridge * I.
    c.selection.refresh = "step"  # When sets are chosen: step | epoch | once | every k steps (k).
    c.selection.feature_norm = "none"  # Of hidden states before centring: none | l2.
    c.selection.pooling = "response"  # Features are the mean over: response | all (with prompt).
    c.selection.features = "policy"  # Hidden states of the current policy | reference (read once).
    c.selection.fisher_scale = False  # Multiply by Eq. 11's beta^2 (1 - sigma(Z)).
    c.selection.replacement = False  # pl_sampled: draw negatives with replacement.

    c.odpo = Settings()
    c.odpo.offset = "score"  # A pair's margin grows with the difference in: score (columns) | rank.
    c.odpo.alpha = 1.0  # Margin = alpha * log(difference).

    c.train = Settings()
    c.train.epochs = 3  # Passes over the training rows.
    c.train.steps = 0  # Updates in all; 0: as many as the epochs need.
    c.train.batch_size = 128  # Prompts per update, all devices together.
    c.train.micro_batch_size = 16  # Prompts per accumulation step, all devices together.
    c.train.learning_rate = 1e-5  # Peak; cosine decay to zero.
    c.train.warmup_ratio = 0.05  # Share of the steps with linearly growing learning rate.
    c.train.clip = 0.3  # Global norm the gradient is clipped to.
    c.train.weight_decay = 0.0  # Of AdamW, times the learning rate.
    # Where pools are scored at a step, is that the forward pass on the sets too? False: their own
    # pass, which takes longer and needs less memory if pools are much longer than sets.
    c.train.reuse_scoring = True
    c.train.moments_dtype = "float32"  # Of Adam's moments as stored: float32 | bfloat16.
    c.train.offload_moments = False  # Keep Adam's moments in the host's memory between updates.
    c.train.eval_every = 100  # Steps between evaluations on the validation split; 0: never.
    c.train.checkpoint_every = 100  # Steps between checkpoints; the last step always saves.
    c.train.keep_checkpoints = 2  # So many of the newest.
    # And the best by a metric of evaluations, e.g. policy/mrr; then each evaluation saves. Empty:
    # not.
    c.train.keep_best = ""
    c.train.max_skipped = 10  # Updates skipped in a row, for NaN or infinity, that end the run.

    c.eval = Settings()
    c.eval.batch_size = 32  # Prompts per scoring batch: reference pass, evaluation, score.

    c.log = Settings()  # metrics.jsonl gets the same figures always.
    c.log.tensorboard = True  # Event files for TensorBoard, in the run folder.
    c.log.report = True  # report.html and figures/ in the run folder, when training ends.
    c.log.wandb_project = ""  # Weights & Biases project, if the package is there; empty: none.

    c.mesh = Settings()  # Devices along each axis; -1: all that are left.
    c.mesh.data = -1  # Copies of the model, each on its share of the batch.
    c.mesh.fsdp = 1  # Weights, gradients and Adam's moments split; batches too.
    c.mesh.tensor = 1  # Heads, hidden units and vocabulary split.
    return c.lock()


def paper() -> ConfigDict:
    """The defaults, for models of billions of weights on accelerators."""
    c = default()
    c.model.dtype = "bfloat16"  # Compute; the trained weights are float32.
    rows = _Computed(_paper_rows, [c.data.get_ref("name")])
    c.data.max_train = FieldReference(0, field_type=int, op=rows)
    c.mesh.data = 1
    c.mesh.fsdp = -1  # All devices share the weights: 3B with Adam is 51 GB of state.
    return c


PAPER_DATA = ("lastfm", "movielens", "medmcqa", "qasc")


class _Computed(NamedTuple):
    """How a setting follows from others until it is set itself: `fn(0, *args)`."""

    fn: Callable[..., Any]
    args: list[FieldReference]


def _paper_rows(_: int, name: str) -> int:
    """How many training rows the paper draws from its data sets; 0, all, of others."""
    return 20_000 if name in PAPER_DATA else 0


def get_config() -> ConfigDict:
    """Returns the defaults, for `--config=.../config.py`."""
    return default()


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("train.steps", 100)` and so on, for every leaf."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy to change, whose paths have `~` and variables replaced.

    Raises:
      UserError: it is no configuration, lacks settings or has others, or a path is none.
    """
    _check_kind(config)
    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    copy = config.copy_and_resolve_references()
    fields = dict(flatten(copy))
    check_types(fields)
    _check_known(fields)
    for name in PATHS:
        set_field(copy, name, expand(fields[name], f"config.{name}"))
    return copy


def validate(config: ConfigDict) -> ConfigDict:
    """Returns `resolve(config)`; raises UserError also for what `check` refuses."""
    copy = resolve(config)
    check(copy)
    return copy


def set_field(config: ConfigDict, name: str, value: Any) -> None:
    """Sets a field by its dotted name, such as `train.steps`."""
    *parents, leaf = name.split(".")
    for parent in parents:
        config = config[parent]
    config[leaf] = value


# Negatives and loss of each method, for --help and documentation. training/methods.py has the code.
METHOD_SUMMARIES = {
    "mass_dpo": "n negatives chosen by selection.criterion, Plackett-Luce loss",
    "pl_sampled": "n drawn from the pool weights, unbiased Plackett-Luce gradient of the pool",
    "pl_all": "the whole pool, Plackett-Luce loss",
    "sdpo": "n random negatives, Plackett-Luce loss (S-DPO)",
    "dpo": "one random negative, DPO loss",
    "dpo_k": "n random negatives, mean DPO loss over the pairs",
    "dmpo": "n random negatives, DPO loss against their average (DMPO)",
    "odpo": "n random negatives, DPO loss with a margin for each pair (ODPO)",
    "mppo": "n random negatives, likelihoods per token, no reference (MPPO)",
    "sft": "no negatives, likelihood of the chosen response, no reference",
}
# Registering a criterion of one's own adds it, by `add_criterion`.
CRITERION_SUMMARIES = {
    "pool_fisher": "D-optimal design on the pool's Fisher information (Algorithm 1)",
    "contrast": "the same around the chosen response instead of the pool's mean",
    "set_fisher": "D-optimal design on the exact Hessian of the loss on the selected set",
    "hardest": "the largest scores",
    "random": "uniformly at random",
    "all": "the whole pool",
}
CHOICES = {
    "method": tuple(METHOD_SUMMARIES),
    "odpo.offset": ("score", "rank"),
    "model.dtype": ("float32", "bfloat16"),
    "train.moments_dtype": ("float32", "bfloat16"),
    "model.remat": ("dots", "full"),
    "model.layout": ("packed", "rectangle"),
    "model.attention": ("auto", "plain", "fused"),
    "model.lora.base": ("float32", "bfloat16", "int8", "nf4"),
    "model.scratch.model_type": ("llama", "qwen3", "smollm3"),
    "data.name": ("jsonl", "hub", "lastfm", "movielens", "medmcqa", "qasc", "synthetic"),
    "data.on_bad_row": ("error", "skip"),
    "data.long_prompt": ("cut", "drop", "error"),
    "data.long_response": ("error", "drop"),
    "selection.criterion": tuple(CRITERION_SUMMARIES),
    "selection.search": ("greedy", "exchange", "exhaustive"),
    "selection.features": ("policy", "reference"),
    "selection.feature_norm": ("none", "l2"),
    "selection.pooling": ("response", "all"),
}
NAMES = tuple(name for name, _ in flatten(default()))
PATHS = (
    "cache_dir model.path model.reference_path model.lora.path data.path data.chat_template"
).split()
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
LARGEST = 2**31  # Of any number: what XLA counts with.
POSITIVE = (
    "beta num_negatives model.scratch.hidden_size model.scratch.num_heads selection.ridge "
    "train.batch_size train.micro_batch_size train.learning_rate train.clip "
    "train.checkpoint_every train.keep_checkpoints train.max_skipped eval.batch_size "
    "data.max_prompt_length data.max_response_length data.max_shapes odpo.alpha model.lora.alpha"
).split()
NOT_NEGATIVE = (
    "seed train.steps train.epochs train.weight_decay train.eval_every "
    "data.max_train data.max_validation data.max_test sft_weight device_memory_gb "
    "model.lora.rank"
).split()
SHARES = ("data.validation_share", "train.warmup_ratio")


def add_criterion(name: str, summary: str) -> None:
    """Lets `selection.criterion` name a criterion that is registered elsewhere."""
    CRITERION_SUMMARIES[name] = summary
    CHOICES["selection.criterion"] = tuple(CRITERION_SUMMARIES)


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that no run could use, naming field, value and choices."""
    _check_kind(config)
    fields = dict(flatten(config))
    check_types(fields)
    _check_known(fields)
    for name, known in CHOICES.items():
        if (value := fields[name]) not in known:
            raise UserError(
                f"config.{name}={value!r}: expected one of {', '.join(known)}"
                + suggestions.suggest_choice(value, known)
            )
    for name in POSITIVE:
        if not fields[name] > 0:
            raise UserError(f"config.{name}={fields[name]!r}: expected a number above 0")
    for name in NOT_NEGATIVE:
        if not fields[name] >= 0:
            raise UserError(f"config.{name}={fields[name]!r}: expected 0 or more")
    for name in SHARES:
        if not 0 <= fields[name] < 1:
            raise UserError(
                f"config.{name}={fields[name]!r}: expected 0 to 1, a share: 0.1 is a tenth"
            )
    if fields["train.learning_rate"] > 1:
        raise UserError(
            f"config.train.learning_rate={fields['train.learning_rate']!r}: expected at most 1: "
            "AdamW changes every weight by about as much at each step"
        )
    _check_batch(fields["train.batch_size"], fields["train.micro_batch_size"])
    if not config.train.steps and not config.train.epochs:
        raise UserError("config.train.steps and config.train.epochs are both 0: nothing to train")
    parse_refresh(config.selection.refresh, steps_per_epoch=1)
    parse_targets(config.model.lora.targets)
    if (config.model.lora.rank or config.model.lora.path) and not config.model.path:
        raise UserError("config.model.lora adapts a model: config.model.path is missing")


def _check_kind(config: Any) -> None:
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config: found a {type(config).__name__}, expected what default_config() returns; its "
            "update() takes a dict"
        )


def _check_known(fields: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that there is not, which somebody unlocked the configuration
    for: it would change nothing, and the run could not be loaded again."""
    for name in fields:
        if name not in NAMES:
            raise UserError(f"config.{name}: no such setting{_meant(name)}")


def _meant(name: str) -> str:
    return suggestions.did_you_mean(suggestions.suggest_names(f"config.{name}", NAMES))


def _check_batch(batch: int, micro: int) -> None:
    if batch % micro:
        divisor = max(size for size in range(1, micro + 1) if batch % size == 0)
        raise UserError(
            f"config.train.batch_size={batch} is no multiple of config.train.micro_batch_size="
            f"{micro}; set config.train.micro_batch_size={divisor}, too"
        )


def check_types(fields: Mapping[str, Any]) -> None:
    """Raises UserError where a setting, by its dotted name, is missing or is of another type than
    its default, or a number is too large for anything that counts with it."""
    for name, value in flatten(default()):
        if name not in fields:
            raise UserError(
                f"config.{name} is missing: take default_config(), and change a group by its "
                "update(...), which keeps the other settings"
            )
        found, kind = fields[name], type(value)
        if type(found) is not kind and not (kind is float and type(found) is int):
            raise UserError(f"config.{name}={found!r}: expected {_KINDS[kind]}")
        if found != found:  # NaN.
            raise UserError(f"config.{name}={found!r}: expected a number")
        if isinstance(found, (int, float)) and not -LARGEST < found < LARGEST:
            raise UserError(f"config.{name}={found!r}: expected a number below {LARGEST}")


def parse_refresh(refresh: str, steps_per_epoch: int) -> int:
    """How many steps a choice of negatives lasts; 0: for the whole run (`once`)."""
    named = {"step": 1, "epoch": steps_per_epoch, "once": 0}
    if refresh in named:
        return named[refresh]
    if str(refresh).isdecimal() and len(str(refresh)) < 10 and int(refresh) > 0:
        return int(refresh)
    raise UserError(
        f"config.selection.refresh={refresh!r}: expected step, epoch, once or a number of steps"
    )
