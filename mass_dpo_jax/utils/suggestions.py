"""Suggestions for a setting, flag or choice that does not exist."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable, Sequence

# Our name, then what other programs (and people) call it. A name with -- is a flag, which not every
# command has; commas separate settings that share the work of one elsewhere. Nothing is suggested
# for names behind an empty one: the nearest would mislead.
_FOREIGN_NAMES = """
train.learning_rate: lr peak_lr max_lr base_lr step_size
train.batch_size: batch batch_size bs bsz train_batch_size global_batch_size total_batch_size
train.micro_batch_size: micro_batch microbatch microbatch_size mbs device_batch_size
    per_device_batch_size per_device_train_batch_size per_gpu_train_batch_size
train.batch_size,train.micro_batch_size: gradient_accumulation_steps gradient_accumulation
    grad_accum accumulation_steps accumulate_grad_batches
eval.batch_size: eval_batch_size per_device_eval_batch_size test_batch_size
train.epochs: epoch num_epochs n_epochs max_epochs num_train_epochs
train.steps: max_steps num_steps total_steps train_steps num_train_steps iterations max_iters
train.warmup_ratio: warmup warmup_steps num_warmup_steps
train.clip: max_grad_norm grad_clip clip_grad gradient_clipping gradient_clip_val grad_norm_clip
train.weight_decay: wd
train.eval_every: eval_steps eval_strategy evaluation_strategy eval_interval eval_freq
train.checkpoint_every: save_steps save_strategy save_every save_interval save_freq
train.keep_checkpoints: save_total_limit keep_last max_checkpoints
train.keep_best: load_best_model_at_end metric_for_best_model
model.path: model model_name model_name_or_path model_id model_path base_model pretrained
    pretrained_model_name_or_path tokenizer tokenizer_name tokenizer_name_or_path hf_model
model.reference_path: ref ref_model ref_path reference reference_model ref_model_path
    ref_model_name_or_path reference_model_path
model.dtype: bf16 fp16 fp32 tf32 torch_dtype precision mixed_precision half compute_dtype
model.remat: gradient_checkpointing activation_checkpointing recompute checkpoint_activations
model.attention: flash_attention flash_attn use_flash_attention_2 attn_implementation
model.lora.rank: lora_r r lora_rank use_lora use_peft finetuning_type peft
model.lora.alpha: lora_alpha
model.lora.dropout: lora_dropout
model.lora.rank_stabilized: use_rslora rslora
model.lora.targets: lora_target lora_targets target_modules lora_target_modules
model.lora.base: load_in_4bit load_in_8bit quantization_bit quantization qlora
model.lora.path: adapter adapters adapter_path adapter_name_or_path peft_path
data.path: data dataset datasets dataset_name dataset_path dataset_dir data_path data_dir data_file
    data_files train_file train_data train_path input input_file file
data.chat_template: template chat_format
data.validation_share: val_size validation_split val_split test_size eval_split_ratio
data.max_prompt_length,data.max_response_length: max_length max_len max_seq_length max_seq_len
    seq_len sequence_len sequence_length cutoff_len context_length model_max_length
data.max_response_length: max_completion_length max_target_length max_new_tokens response_length
data.max_train: max_samples max_train_samples num_samples num_train_samples
data.columns: column_mapping field_mapping columns_map
data.subset: dataset_config dataset_config_name config_name hf_name subset_name
data.splits: dataset_split dataset_train_split dataset_test_split hf_split split_names
data.on_bad_row: skip_errors ignore_errors skip_bad_rows
mine.catalogue: corpus candidate_pool corpus_path
mine.n: negative_number num_hard_negatives
mine.ranks: range_for_sampling range_min range_max
mine.margin: absolute_margin
mine.draw: sampling_strategy
beta: dpo_beta pref_beta kl_coef
method: loss loss_type algorithm algo objective pref_loss
num_negatives: negatives num_neg n_negatives n_neg num_rejected n
sft_weight: rpo_alpha pref_ftx sft_coef
selection.criterion: selector
seed: random_seed data_seed rng_seed
log.wandb_project: wandb report_to wandb_name use_wandb
log.tensorboard: tb
mesh.tensor: tp tensor_parallel tensor_parallel_size tensor_model_parallel_size
mesh.fsdp: zero deepspeed zero_stage num_gpus gpus n_gpu
--output,--workdir: output_dir out out_dir output_path output_file save_dir save_path o
--workdir: work_dir logdir log_dir run run_dir run_name checkpoint ckpt checkpoint_path resume
    checkpoint_dir resume_from resume_from_checkpoint
: step
--config: cfg conf config_file config_path config_name
"""

# Choices that other programs call differently.
_FOREIGN_CHOICES = {
    "bf16": "bfloat16", "fp16": "bfloat16", "float16": "bfloat16", "half": "bfloat16",
    "16": "bfloat16", "fp32": "float32", "float": "float32", "full": "float32", "32": "float32",
    "4bit": "nf4", "int4": "nf4", "fp4": "nf4", "8bit": "int8",
    "flash": "fused", "flash_attention_2": "fused", "sdpa": "auto", "eager": "plain",
    **dict.fromkeys(("json", "csv", "tsv", "parquet", "arrow", "huggingface", "hf"), "preferences"),
    "dev": "validation", "val": "validation", "valid": "validation", "eval": "validation",
    "mean": "response", "ignore": "skip", "truncate": "drop",
}  # fmt: skip


@functools.cache
def _read_names() -> dict[str, tuple[str, ...]]:
    targets, ours = {}, ""
    for line in _FOREIGN_NAMES.strip().splitlines():
        if ":" in line:
            ours, _, line = line.partition(":")
        targets.update(dict.fromkeys(line.split(), tuple(ours.split(","))))
    return targets


def suggest_names(name: str, settings: Sequence[str], flags: Collection[str] = ()) -> list[str]:
    """Returns what a name without dashes probably stands for, the most probable first.

    Args:
        name: such as `lr`, `output_dir` or `config.trian.steps`.
        settings: their dotted names. Empty: the command has none.
        flags: the command's other flags.

    Returns:
        Flags and, behind `config.`, settings; none where nothing is similar.
    """
    plain = name.lower().replace("-", "_")
    if plain in flags:
        return [plain]
    dotted = plain.removeprefix("config.")
    last = dotted.rpartition(".")[2]
    for key in (last, dotted.replace(".", "_")):
        if matches := _find_named(key, dotted, settings, flags):
            return matches
        if key in _read_names():
            return []
    by_end = [setting.rpartition(".")[2] for setting in settings]
    other_flags = () if name.startswith("config.") else flags
    for key in difflib.get_close_matches(
        last, {*by_end, *_read_names(), *other_flags}, n=3, cutoff=0.75
    ):
        if key in other_flags:
            return [key]
        if matches := _find_named(key, dotted, settings, flags):
            return matches
    near = difflib.get_close_matches(dotted, settings, n=1, cutoff=0.6)
    if near or name.startswith("config."):
        return [f"config.{setting}" for setting in near]
    return difflib.get_close_matches(plain, flags, n=1, cutoff=0.5)


def _find_named(
    key: str, dotted: str, settings: Sequence[str], flags: Collection[str]
) -> list[str]:
    """Returns the settings whose last part is `key`, or what another program's name stands for.

    Among several settings it takes the one in the group that `dotted` names; among several flags
    the first that the command has.
    """
    ending = [setting for setting in settings if setting.rpartition(".")[2] == key]
    if len(ending) > 1 and "." in dotted:
        ending = [_nearest(dotted, ending)]
    if len(ending) != 1:
        targets = _read_names().get(key, ())
        own_flags = [target[2:] for target in targets if target[2:] in flags and target[:2] == "--"]
        if matches := [target for target in targets if target in settings]:
            ending = matches
        if own_flags:
            return own_flags[:1]
    return [f"config.{setting}" for setting in ending]


def _nearest(name: str, names: Iterable[str]) -> str:
    return max(names, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())


def did_you_mean(names: Iterable[str]) -> str:
    """Returns "; did you mean ...?" for the end of a message, or nothing without names."""
    alternatives = " or ".join(names)
    return f"; did you mean {alternatives}?" if alternatives else ""


def suggest_choice(value: str, choices: Sequence[str]) -> str:
    """Returns "; did you mean ...?" for a value that is none of the choices, or nothing."""
    plain = value.strip().lower().replace("-", "_").replace(" ", "_")
    choices_by_letters = {other.replace("_", ""): other for other in choices}
    choice = choices_by_letters.get(plain.replace("_", ""))
    if choice is None and _FOREIGN_CHOICES.get(plain) in choices:
        choice = _FOREIGN_CHOICES[plain]
    if choice is not None:
        return did_you_mean([choice])
    return did_you_mean(difflib.get_close_matches(plain, choices, n=1, cutoff=0.75))
