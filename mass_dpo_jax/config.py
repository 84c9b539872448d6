"""Every setting of a run, with its default and what it does.

The defaults are the paper's; files in `configs/` change what they need, and flags such as
`--config.train.steps=100` override both. Names are stable. A setting's comment, at the end of its
line or on the lines before it, is its text in --help; a comment with dashes describes a group.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from mass_dpo_jax.utils import suggestions

# What each method trains on and its loss, for --help and the docs; training/methods.py is the code.
METHOD_SUMMARIES = {
    "mass_dpo": "n negatives chosen by selection.criterion, Plackett-Luce loss",
    "pl_sampled": "n drawn from the pool weights, unbiased Plackett-Luce gradient of the pool",
    "pl_all": "the whole pool, Plackett-Luce loss",
    "sdpo": "n random negatives, Plackett-Luce loss (S-DPO, Softmax DPO)",
    "dpo": "one random negative, DPO loss",
    "dpo_k": "n random negatives, mean DPO loss over the pairs",
    "dmpo": "n random negatives, DPO loss against their average (DMPO)",
    "odpo": "n random negatives, DPO loss with a margin for each pair (ODPO)",
    "mppo": "n random negatives, likelihoods per token, no reference (MPPO)",
    "pl_rank": "whole ranked lists, Plackett-Luce loss of the first pl_rank.top places (KPO)",
    "lipo_lambda": "whole graded lists, DPO over pairs weighted by their effect on DCG (LiPO)",
    "tree_po": "the same averaged over pairs, for trees (Tree Preference Optimization)",
    "sft": "no negatives, likelihood of the chosen response, no reference",
}
LIST_METHODS = ("pl_rank", "lipo_lambda", "tree_po")  # Those of graded lists, on whole pools.
# How each criterion chooses; `add_criterion` adds those that are registered elsewhere.
CRITERION_SUMMARIES = {
    "pool_fisher": "largest determinant of the pool's Fisher information (D-optimal, Algorithm 1)",
    "contrast": "the same around the chosen response instead of the pool's mean",
    "set_fisher": "largest determinant of the exact Hessian of the loss on the selected set",
    "hardest": "the largest scores",
    "random": "uniformly at random",
    "all": "the whole pool",
    "topk": "uniformly from the selection.top that the policy ranks highest (RoDPO)",
    "boundary": "ranked no lower than the chosen response, or the highest cluster (DynamicPO)",
    "kmedoids": "medoids of the pool's features (AMPO)",
}
# Losses by their names in TRL, and what each sets of the section `loss`.
LOSS_TYPES = {
    name: {"link": link, "reward": reward, "reference": reference, "margin": margin}
    for name, link, reward, reference, margin in (
        ("sigmoid", "logistic", "sum", True, "none"),
        ("sigmoid_norm", "logistic", "per_token", True, "none"),
        ("hinge", "hinge", "sum", True, "none"),
        ("ipo", "squared", "per_token", True, "none"),
        ("robust", "robust", "sum", True, "none"),
        ("cpo", "logistic", "sum", False, "none"),
        ("simpo", "logistic", "per_token", False, "constant"),
    )
}
# Names of the reader of preference rows: the first, and what it was called by kinds of files.
PREFERENCES = ("preferences", "jsonl", "hub")
# The values that a setting can have. Tests hold them equal to the code that reads them, which is
# not imported here: --help should be quick.
CHOICES = {
    "method": tuple(METHOD_SUMMARIES),
    "loss.type": tuple(LOSS_TYPES),
    "loss.link": ("logistic", "hinge", "squared", "robust"),
    "loss.reward": ("sum", "per_token"),
    "loss.margin": ("none", "constant", "grade"),
    "odpo.offset": ("score", "rank"),
    "model.dtype": ("float32", "bfloat16"),
    "train.moments_dtype": ("float32", "bfloat16"),
    "model.remat": ("dots", "full"),
    "model.layout": ("packed", "rectangle"),
    "model.attention": ("auto", "plain", "fused"),
    "model.lora.base": ("float32", "bfloat16", "int8", "nf4"),
    "model.scratch.model_type": (
        *("llama", "qwen2", "qwen3", "smollm3", "mistral"),
        *("phi3", "olmo2", "gemma2", "gemma3_text"),
    ),
    "data.name": (
        "preferences",
        "lastfm",
        "movielens",
        "medmcqa",
        "qasc",
        "synthetic",
        *PREFERENCES[1:],
    ),
    "data.format": (
        *("auto", "trl", "alpaca", "sharegpt", "ms-swift", "openai", "axolotl", "numbered"),
        *("nemo", "ultrafeedback", "nectar", "helpsteer", "rewardbench2", "objects", "responses"),
        *("flagembedding", "sentence-transformers", "unpaired"),
    ),
    "data.group": ("none", "prompt"),
    "data.on_bad_row": ("error", "skip"),
    "data.long_prompt": ("cut", "drop", "error"),
    "data.long_response": ("error", "drop"),
    "selection.criterion": tuple(CRITERION_SUMMARIES),
    "selection.draw": ("pivotal", "local", "partition", "independent"),
    "selection.features": ("policy", "reference"),
    "selection.feature_norm": ("none", "l2"),
    "selection.pooling": ("response", "all"),
    "selection.prompts": ("all", "design", "uncertain", "random"),
    "selection.prompt_refresh": ("once", "epoch"),
    "mine.similarity": ("cosine", "dot"),
    "mine.draw": ("softmax", "uniform", "top"),
}
# Formats of the rows that `select` and `mine` write; data/formats/writing.py is the code.
WRITTEN_FORMATS = ("lists", "pairs", "ms-swift", "flagembedding", "sentence-transformers")
FEATURE_DRAWS = ("local", "partition")  # Values of `selection.draw` that read features.
MODEL_PATHS = ("model.path", "model.reference_path", "model.lora.path")
PATHS = (*MODEL_PATHS, "cache_dir", "data.path", "data.chat_template", "mine.catalogue")


def default() -> ConfigDict:
    """Returns the complete configuration with its defaults, locked: no other settings exist."""
    c = Settings()
    # Seed of all random draws: initial weights, data order, drawn candidates, random negatives.
    c.seed = 0
    c.method = "mass_dpo"  # Which negatives are trained on, and with which loss.
    c.beta = 0.1  # Strength of the pull towards the reference; a reward is beta * log-ratio.
    # n, how many negatives of a pool each step trains on. dpo needs 1; pl_all takes the whole pool.
    c.num_negatives = 3
    # Weight, in the loss, of a supervised term on the chosen response (nats per token); 0: none.
    c.sft_weight = 0.0
    # Folder for the reference's log-probs, the tokens of large splits and compiled programs. Empty:
    # ~/.cache/mass_dpo_jax.
    c.cache_dir = ""
    c.dry_run = False  # Print the memory and arithmetic that a step needs, and do not train.
    # Memory of one device in 10^9 bytes, to which dry_run compares what a step needs; 0: unknown.
    c.device_memory_gb = 0.0

    # ---- Weights to start from, precision and memory.
    c.model = Settings()
    # Folder of a Hugging Face model or of a run, or a model's name on the hub, OWNER/NAME or
    # OWNER/NAME@REVISION. Empty: random weights, as model.scratch describes.
    c.model.path = ""
    # The reference policy, likewise. Empty: the weights that training starts from.
    c.model.reference_path = ""
    c.model.dtype = "float32"  # Type of the computation. The trained weights stay in float32.
    # What the backward pass recomputes: dots (only attention) | full (everything).
    c.model.remat = "full"
    # Attention kernel: auto (fused on GPUs with bfloat16, if its results agree with plain) | plain
    # | fused.
    c.model.attention = "auto"
    # How prompt and responses are arranged in a batch: packed | rectangle (for long responses).
    c.model.layout = "packed"

    # ---- LoRA: adapters trained beside frozen weights, those of model.path.
    c.model.lora = Settings()
    c.model.lora.rank = 0  # Rank of the adapters; 0: no LoRA, train all weights.
    c.model.lora.alpha = 16.0  # The adapters' output is scaled by alpha / rank.
    # Scale by alpha / sqrt(rank) instead (rsLoRA).
    c.model.lora.rank_stabilized = False
    # Share of the adapters' inputs that is zero, drawn anew for every token of a step. Pools are
    # scored without, by a pass of their own.
    c.model.lora.dropout = 0.0
    # Matrices that get adapters: all; some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    # down_proj, with commas between them; or a pattern of their whole names: .*(q|v)_proj
    c.model.lora.targets = "all"
    # Storage of the frozen matrices: float32 | bfloat16 | int8 | nf4 (QLoRA, 4.5 bits a weight).
    c.model.lora.base = "bfloat16"
    # Adapters to start from: a folder in PEFT's format, a name on the hub or a run with LoRA. Their
    # rank, scale and targets replace those above.
    c.model.lora.path = ""

    # ---- The model and tokenizer that are made when model.path is empty.
    c.model.scratch = Settings()
    c.model.scratch.model_type = "llama"  # Architecture of the model.
    c.model.scratch.hidden_size = 128  # Width of the residual stream.
    c.model.scratch.intermediate_size = 384  # Hidden units of each MLP.
    c.model.scratch.num_layers = 3  # Number of blocks.
    c.model.scratch.num_heads = 4  # Query heads; hidden_size is divided among them.
    c.model.scratch.num_kv_heads = 2  # Key and value heads; must divide num_heads.
    c.model.scratch.vocab_size = 1024  # Tokens of the tokenizer trained on the training split.

    # ---- Where the examples come from, and how they become prompts.
    c.data = Settings()
    # Which data: preferences (in files of any kind, or a dataset of the Hugging Face hub) or one of
    # the others. jsonl and hub are former names of preferences.
    c.data.name = "preferences"
    # A file; several, as a.jsonl,b.jsonl or pairs/*.parquet; a folder with the splits; or a dataset
    # on the hub, OWNER/NAME or OWNER/NAME@REVISION. For synthetic, one of plain, clusters, long.
    c.data.path = ""
    # Subset of a dataset, or folder of data.path, that has the splits.
    c.data.subset = ""
    # What the data calls its splits, where that is not train, validation and test:
    # train:train_prefs,test:test_prefs. For a folder, names of files or patterns; + joins several.
    c.data.splits = ""
    # How a prompt becomes text: tokenizer (the chat template that comes with it) | none | the path
    # of a template file.
    c.data.chat_template = "tokenizer"
    c.data.date = "26 Jul 2024"  # Date given to chat templates that ask for today's.
    # Further arguments of the chat template, as a JSON object: {"enable_thinking": true}.
    c.data.chat_template_kwargs = ""
    # Names of the columns of preferences where they differ from ours, for example
    # prompt=question,rejected=wrong_answers. An empty id= numbers the rows instead of reading ids,
    # and mined_probabilities= does not correct for how negatives were drawn.
    c.data.columns = ""
    # How rows of preferences are written: auto (told by the columns of the first rows) | trl |
    # alpaca | sharegpt | ms-swift | openai | axolotl | numbered | nemo | ultrafeedback | nectar |
    # helpsteer | rewardbench2 | objects | responses | flagembedding | sentence-transformers |
    # unpaired (answers with labels; needs data.group=prompt).
    c.data.format = "auto"
    # What becomes one pool: none (each row) | prompt (all rows of preferences with one prompt).
    c.data.group = "none"
    c.data.max_prompt_length = 1024  # Maximum tokens of a prompt, those of its template included.
    # What to do with a longer prompt: cut (its oldest history or turns, then the start of its text)
    # | drop (leave the row out and count it) | error.
    c.data.long_prompt = "cut"
    c.data.max_response_length = 256  # Maximum tokens of a response, end of sequence included.
    # What to do with a longer response: error | drop (remove it from its pool and count it).
    c.data.long_response = "error"
    c.data.list_candidates = True  # List the candidates in the prompt (not for preferences).
    # Candidates of an example where they are drawn: movielens, medmcqa and raw lastfm.
    c.data.num_candidates = 20
    # For medmcqa: evaluate on a question's own 4 options instead of drawn candidates.
    c.data.native_eval = True
    # Number of shapes that batches are padded to. Fewer shapes compile faster; more reduce padding.
    c.data.max_shapes = 4
    c.data.on_bad_row = "error"  # What to do with an unusable row: error | skip (and count it).
    # Share of the training rows to hold out where no other split is found; rows of a prompt stay
    # together. movielens and raw lastfm are split 8 : 1 : 1 by user instead.
    c.data.validation_share = 0.1
    # Training rows to use, drawn by seed; 0: all. --config=llama3, qwen3, smollm3 and qlora use
    # 20,000 of lastfm, movielens, medmcqa and qasc, as the paper does.
    c.data.max_train = 0
    c.data.max_validation = 200  # Validation rows to use, drawn by seed; 0: all.
    c.data.max_test = 2000  # Test rows to use, drawn by seed; 0: all.

    # ---- How negatives are chosen, and when.
    c.selection = Settings()
    c.selection.criterion = "pool_fisher"  # How mass_dpo chooses the negatives it trains on.
    # Added to the diagonal of the information matrix, which keeps it invertible: the paper's gamma,
    # H_0 = gamma * I.
    c.selection.ridge = 0.1
    # How often negatives are chosen: step (at every step) | epoch | once | a number of steps.
    c.selection.refresh = "step"
    c.selection.feature_norm = "none"  # How hidden states are normalized before centring.
    # Tokens whose hidden states are averaged into features: response | all (the prompt's as well).
    c.selection.pooling = "response"
    # Model whose hidden states are used: policy (as it is now) | reference (computed once).
    c.selection.features = "policy"
    # Weight each pool's information by beta^2 (1 - sigma(Z)), which is small if the loss is small
    # (the paper's Eq. 11).
    c.selection.fisher_scale = False
    # How pl_sampled draws its negatives: pivotal (all different, the large weights always) | local
    # (likewise, neighbours in feature space seldom together) | partition (one from each of n cells
    # of features) | independent (with replacement).
    c.selection.draw = "pivotal"

    c.selection.top = 10  # For the criterion topk: how many it draws from.
    # Which prompts are trained on: all | design (the largest information of prompt and set) |
    # uncertain (the smallest gap between the rewards of the chosen response and of the hardest
    # negative) | random.
    c.selection.prompts = "all"
    # How many: a share of the training rows if below 1, else a number. An epoch is a pass over
    # them.
    c.selection.prompt_budget = 0.25
    # When they are chosen: once (before the first update, the same for all epochs) | epoch (anew,
    # by the policy as it is then).
    c.selection.prompt_refresh = "once"

    # ---- Negatives from a catalogue. The command mine takes each as a flag: --ranks, --n, ...
    c.mine = Settings()
    # File of the texts that negatives are taken from, one per row. Given one, training mines by its
    # own policy and replaces the data's negatives. Empty: training keeps the data's.
    c.mine.catalogue = ""
    # Training mines before every so many epochs; 0: only before the first.
    c.mine.every = 1
    # How features are compared: cosine | dot (inner product).
    c.mine.similarity = "cosine"
    # Number of best items that the model's log-probabilities rank anew; ranks, margins and draws
    # are then by these. 0: features alone rank.
    c.mine.shortlist = 0
    c.mine.ranks = "0:100"  # Ranks to draw from, FIRST:LAST, counted from 0; LAST is not included.
    # Leave out items that score above c - margin, c the chosen response's score. Empty: none.
    c.mine.margin = ""
    # Leave out items that score above c - relative_margin * |c|. Empty: none.
    c.mine.relative_margin = ""
    c.mine.max_score = ""  # Leave out items that score above this. Empty: none.
    c.mine.n = 8  # Negatives of a prompt, at most.
    # How they are drawn, all different: softmax (likelier the higher they score) | uniform | top
    # (the best, no draw).
    c.mine.draw = "softmax"
    c.mine.temperature = 1.0  # Divides the scores of mine.draw=softmax: lower is closer to top.

    # ---- What a loss takes of the responses' rewards; the method says how it sums over negatives.
    c.loss = Settings()
    # A loss by its name in TRL, which sets the four settings after it where they are not set
    # themselves: sigmoid | sigmoid_norm | hinge | ipo | robust | cpo | simpo.
    c.loss.type = "sigmoid"
    # Loss of the chosen response's lead: logistic | hinge | squared | robust (to wrong labels).
    c.loss.link = _set_by_type(c, "link")
    # What beta is multiplied with: sum (a response's log-ratio) | per_token (over its length).
    c.loss.reward = _set_by_type(c, "reward")
    # Whether log-ratios to the reference are taken. False: log-probabilities.
    c.loss.reference = _set_by_type(c, "reference")
    # By how much the chosen response should lead: none | constant | grade (grows with the
    # difference in grade, see odpo).
    c.loss.margin = _set_by_type(c, "margin")
    c.loss.gamma = 0.5  # The constant margin, in rewards: beta is multiplied already.
    # Probability that a preference is the wrong way round, for the links logistic (conservative
    # DPO) and robust.
    c.loss.label_smoothing = 0.0

    # ---- Margins by grade, of the method odpo and of loss.margin=grade.
    c.odpo = Settings()
    # What the margin of a pair grows with: the difference in score (columns of the data) | in rank.
    c.odpo.offset = "score"
    c.odpo.alpha = 1.0  # Margin = alpha * log(difference).

    c.pl_rank = Settings()
    c.pl_rank.top = 0  # For the method pl_rank: places of a list that count, from the best; 0: all.

    # ---- Optimization, evaluation and checkpoints.
    c.train = Settings()
    c.train.epochs = 3  # Passes over the training rows.
    c.train.steps = 0  # Number of updates; 0: as many as the epochs need.
    c.train.batch_size = 128  # Prompts per update, over all devices.
    c.train.micro_batch_size = 16  # Prompts per accumulation step, over all devices.
    c.train.learning_rate = 1e-5  # Peak learning rate; a cosine takes it to zero.
    c.train.warmup_ratio = 0.05  # Share of the steps in which the learning rate grows linearly.
    c.train.clip = 0.3  # Global norm that gradients are clipped to.
    c.train.weight_decay = 0.0  # AdamW's weight decay, which is multiplied by the learning rate.
    # Where a step scores pools, use that pass as the forward pass of training. False: train with a
    # pass of its own, slower but with less memory if pools are much longer than the picks.
    c.train.reuse_scoring = True
    # Responses of a prompt that are scored and differentiated at a time, so that memory does not
    # grow with their number: the gradient stays that of all. 0: all at once. Takes one more forward
    # pass over the responses of a loss whose pool is not scored; scoring is not reused.
    c.train.responses_at_a_time = 0
    c.train.moments_dtype = "float32"  # Type in which Adam's moments are stored.
    c.train.offload_moments = False  # Keep Adam's moments in the host's memory between updates.
    c.train.eval_every = 100  # Steps between evaluations on the validation split; 0: never.
    c.train.checkpoint_every = 100  # Steps between checkpoints; the last step is always saved.
    c.train.keep_checkpoints = 2  # Number of most recent checkpoints to keep.
    # Metric of evaluations, such as policy/mrr, by which the best checkpoint is kept as well; every
    # evaluation then saves one. Empty: keep only the most recent.
    c.train.keep_best = ""
    # End the run after this many skipped updates in a row (NaN or infinity in the gradient).
    c.train.max_skipped = 10

    # ---- Passes without gradients.
    c.eval = Settings()
    c.eval.batch_size = 32  # Prompts per batch in the reference pass, in evaluation and in score.
    # The k of recall@k, ndcg@k and gain_ndcg@k, with commas between them. Those that are longer
    # than every list of a split are left out.
    c.eval.cutoffs = "1,3,5,10"

    # ---- Logs besides metrics.jsonl, which is always written.
    c.log = Settings()
    c.log.tensorboard = True  # Write event files for TensorBoard to the run folder.
    c.log.report = True  # Write report.html and figures/ to the run folder when training ends.
    # Steps between two measurements of the share of the gradient's noise that the draw of negatives
    # makes (selection/draw_noise); each takes three gradients of a micro-batch. 0: none.
    c.log.draw_noise_every = 0
    # Project of Weights & Biases, whose package must be installed; empty: none.
    c.log.wandb_project = ""

    # ---- Devices along each axis of the mesh; -1 means all that remain.
    c.mesh = Settings()
    c.mesh.data = -1  # Copies of the model, each working on its share of the batch.
    c.mesh.fsdp = 1  # Parts into which weights, gradients, Adam's moments and batches are split.
    c.mesh.tensor = 1  # Parts into which heads, hidden units and the vocabulary are split.
    return c.lock()


def paper() -> ConfigDict:
    """Returns the paper's settings, for models of billions of weights on accelerators.

    The defaults in bfloat16, with at most 20,000 training rows of the paper's own datasets.
    Weights, gradients and Adam's moments are split over all devices; for 3B weights they take
    51 GB in all. `--config.dry_run=True` prints what a step needs on given devices.
    """
    c = default()
    c.model.dtype = "bfloat16"
    rows = _Computed(_paper_rows, [c.data.get_ref("name")])
    c.data.max_train = FieldReference(0, field_type=int, op=rows)
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c


PAPER_DATA = ("lastfm", "movielens", "medmcqa", "qasc")


class _Computed(NamedTuple):
    """How a setting follows from others, `fn(0, *args)`, until it is set itself."""

    fn: Callable[..., Any]
    args: list[FieldReference]


def _paper_rows(_: int, name: str) -> int:
    """Returns how many training rows the paper draws from a dataset; 0, meaning all, for others."""
    return 20_000 if name in PAPER_DATA else 0


def _set_by_type(config: ConfigDict, name: str) -> FieldReference:
    """Returns a setting of the section `loss` that follows from `loss.type` until it is set."""
    default_value = LOSS_TYPES[config.loss.type][name]

    def look_up(_: Any, loss_type: str) -> Any:
        # An unknown name is refused later, with all names there are.
        return LOSS_TYPES.get(loss_type, {}).get(name, default_value)

    op = _Computed(look_up, [config.loss.get_ref("type")])
    return FieldReference(default_value, field_type=type(default_value), op=op)


def get_config() -> ConfigDict:
    """Returns the defaults, for `--config=.../config.py`."""
    return default()


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every setting by its dotted name, as `("train.steps", 100)`."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def set_field(config: ConfigDict, name: str, value: Any) -> None:
    """Sets a field by its dotted name, such as `train.steps`."""
    *parents, leaf = name.split(".")
    for parent in parents:
        config = config[parent]
    config[leaf] = value


def add_criterion(name: str, summary: str) -> None:
    """Lets `selection.criterion` name a criterion that is registered elsewhere."""
    CRITERION_SUMMARIES[name] = summary
    CHOICES["selection.criterion"] = tuple(CRITERION_SUMMARIES)


class Settings(ConfigDict):
    """A ConfigDict that suggests a name if a setting does not exist.

    NumPy's numbers and pathlib's paths are stored as Python's own numbers and strings.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        value_type = type(value)
        if value_type is not bool and issubclass(value_type, numbers.Real):
            value = int(value) if issubclass(value_type, numbers.Integral) else float(value)
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.is_locked and key not in self:
            # ml_collections' own message lists all fields of this group and none of the others.
            raise KeyError(f"{key}: no such setting{suggest_setting(key)}")
        super().__setitem__(key, value)


def suggest_setting(name: str) -> str:
    """Returns "; did you mean ...?" for a name that is no setting, or nothing."""
    return suggestions.did_you_mean(suggestions.suggest_names(f"config.{name}", NAMES))


NAMES = tuple(name for name, _ in flatten(default()))
