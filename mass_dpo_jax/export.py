r"""Writes a run's policy as a Hugging Face folder, for transformers, vLLM and others.

    python -m mass_dpo_jax.export --workdir=runs/lastfm --output=lastfm-mass-dpo
    python -m mass_dpo_jax.export --workdir=runs/lastfm --step=200 --output=at-200 --push=OWNER/NAME
    python -m mass_dpo_jax.export --workdir=runs/qlora --adapters --output=adapters

The folder gets the weights of the run's newest checkpoint (or that of --step) as safetensors, in
files of at most --max_shard_gb; config.json, with rotary settings as transformers writes them
since version 5 and as readers before it look for them; the tokenizer with the chat template of
training; generation_config.json; and README.md, a model card with the run's settings and metrics.

The folder must not exist before, and appears complete or not at all. The other commands take it as
--config.model.path. Weights are stored in the type that the run computed in (config.model.dtype) or
in --dtype; training itself keeps float32. A run with LoRA is written with its adapters
merged into the base; --adapters writes only the adapters, in PEFT's format.

--push also sends the folder to the Hugging Face hub, to a repository that is private unless it
exists or --public is given. With --dry_run it says what would be sent, and sends nothing.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

import mass_dpo_jax
from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import EXPORT_DTYPES
from mass_dpo_jax.utils import hub
from mass_dpo_jax.utils.files import expand, expand_path
from mass_dpo_jax.utils.run_paths import resolve_run

FLAGS = flags.FLAGS


def export(
    workdir: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
    base_model: str = "",
    adapters: bool = False,
    base_path: str = "",
) -> None:
    """Writes the policy of the run in `workdir` to the new folder `output`.

    Args:
        workdir: a run folder.
        output: does not exist yet, or is an empty folder.
        step: the checkpoint's step; None: the newest.
        dtype: type of the stored weights, "float32" or "bfloat16"; None: `model.dtype` of the run.
        max_shard_gb: maximum size of a weights file, in 10^9 bytes.
        base_model: name of the model that training started from, for the card or the adapters'
            settings; empty: the name of its folder.
        adapters: True to write only the adapters of a run with LoRA, in PEFT's format.
        base_path: new location of the base model of a run with LoRA; empty: unchanged.

    Raises:
        UserError: there is no such run or checkpoint, `output` is taken or cannot be written, or
            `dtype` or `max_shard_gb` is another.
    """
    from mass_dpo_jax.reports import model_card
    from mass_dpo_jax.training.export import export_run

    export_run(
        resolve_run(workdir),
        expand_path(output, "output"),
        model_card.write,
        step=step,
        dtype=dtype,
        max_shard_gb=max_shard_gb,
        base_model=base_model,
        adapters=adapters,
        base_path=expand(base_path, "base_path"),
    )


def main() -> None:
    """Writes the folder that the flags ask for, and sends it to the hub if they ask for that."""
    if FLAGS.workdir is None:
        raise UserError("--workdir is missing: the run to export")
    if FLAGS.output is None:
        raise UserError("--output is missing: the folder to write")
    if FLAGS.push is not None:
        hub.check_push_name(FLAGS.push)
    elif FLAGS.public or FLAGS.dry_run:
        raise UserError("--public and --dry_run are for --push=OWNER/NAME, which is missing")
    export(
        FLAGS.workdir,
        FLAGS.output,
        step=FLAGS.step,
        dtype=FLAGS.dtype,
        max_shard_gb=FLAGS.max_shard_gb,
        base_model=FLAGS.base_model,
        adapters=FLAGS.adapters,
        base_path=FLAGS.base_path,
    )
    if FLAGS.push is None:
        return
    folder = expand_path(FLAGS.output, "output")
    if FLAGS.dry_run:
        print(*hub.describe_push(folder, FLAGS.push, FLAGS.public), sep="\n")
        return
    message = f"Trained with mass_dpo_jax {mass_dpo_jax.__version__}"
    print(f"sent to {hub.push_folder(folder, FLAGS.push, FLAGS.public, message)}")


if __name__ == "__main__":
    cli.define_path("workdir", "A run's folder.")
    cli.define_path("output", "The folder to write; it must not exist.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint to export. Default: the newest.")
    flags.DEFINE_enum(
        "dtype",
        None,
        EXPORT_DTYPES,
        "Type of the stored weights. Default: config.model.dtype of the run.",
    )
    flags.DEFINE_float("max_shard_gb", 5.0, "Maximum size of a weights file, in GB.")
    flags.DEFINE_boolean(
        "adapters", False, "Export only the adapters of a run with LoRA, in PEFT's format."
    )
    flags.DEFINE_string(
        "base_path", "", "New location of the base model of a run with LoRA, if it has moved."
    )
    flags.DEFINE_string(
        "base_model",
        "",
        "The model training started from, as the hub calls it (meta-llama/Llama-3.2-3B-Instruct). "
        "Default: the name of its folder.",
    )
    flags.DEFINE_string("push", None, "Send the folder to the hub, as OWNER/NAME.")
    flags.DEFINE_boolean("public", False, "Let everybody read the repository, if it is new.")
    flags.DEFINE_boolean("dry_run", False, "Say what --push would send, and do not send it.")
    cli.run(main)
