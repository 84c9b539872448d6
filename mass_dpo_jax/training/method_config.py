"""From a configuration to its method, and which settings that method does not read."""

from __future__ import annotations

from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings
from mass_dpo_jax.selection.registry import CRITERIA
from mass_dpo_jax.training.methods import METHODS, Method, MethodSpec

SMOOTHED = ("logistic", "robust")  # Links that have label_smoothing.


def has_rewards(config: ConfigDict) -> bool:
    """Whether runs of a configuration have `Method.implicit_rewards` that are not None."""
    takes = METHODS[config.method].takes
    return uses_reference(config) or ("reward" in takes and config.loss.reward == "per_token")


def uses_reference(config: ConfigDict) -> bool:
    """Whether the loss of a configuration compares the policy with a reference."""
    spec = METHODS[config.method]
    return spec.uses_reference and (config.loss.reference or "reference" not in spec.takes)


def make_method(config: ConfigDict, largest_pool: int) -> Method:
    """Returns the method of a configuration.

    Args:
        config: the configuration; `method`, `num_negatives`, `beta`, `sft_weight`, `selection`,
            `loss`, `odpo` and `pl_rank` are read.
        largest_pool: the most negatives that any pool has.

    Raises:
        UserError: settings do not go together.
    """
    spec = METHODS[config.method]
    criterion = spec.criterion or config.selection.criterion
    if criterion == "sampled" and config.selection.refresh != "step":
        raise UserError(
            f"config.selection.refresh={config.selection.refresh}: config.method=pl_sampled draws "
            "at every step (its weights are those of the current policy); expected step"
        )
    _check_loss(config, spec)
    settings = Settings(
        criterion=criterion,
        ridge=config.selection.ridge,
        feature_norm=config.selection.feature_norm,
        fisher_scale=config.selection.fisher_scale,
        beta=config.beta,
        draw=config.selection.draw,
        top=config.selection.top,
    )
    loss = config.loss
    margin = "grade" if config.method == "odpo" else loss.margin
    frozen_features = config.selection.features == "reference" and settings.needs_features
    if frozen_features and not uses_reference(config):
        raise UserError(
            "config.selection.features=reference: with config.loss.reference=False there is no "
            "reference; expected config.selection.features=policy"
        )
    bounds = [config.num_negatives, spec.max_negatives]
    n = min(bound for bound in bounds if bound is not None)
    return Method(
        name=config.method,
        num_negatives=largest_pool if criterion == "all" else n,
        selection=settings,
        beta=config.beta,
        sft_weight=config.sft_weight,
        link=loss.link,
        label_smoothing=loss.label_smoothing,
        per_token=loss.reward == "per_token",
        uses_reference=uses_reference(config),
        margin=margin,
        gamma=loss.gamma,
        margin_alpha=config.odpo.alpha,
        uses_scores=margin == "grade" and config.odpo.offset == "score",
        rank_top=config.pl_rank.top,
        frozen_features=frozen_features,
    )


def _check_loss(config: ConfigDict, spec: MethodSpec) -> None:
    """Raises UserError for settings of the loss, other than the default, that the method ignores.

    The supervised method ignores all of them, and none is refused: `find_unread` names them.
    """
    if spec.max_negatives == 0:
        return
    usual = config_lib.LOSS_TYPES["sigmoid"]
    for name, value in usual.items():
        if name not in spec.takes and config.loss[name] != value:
            others = [other for other, s in METHODS.items() if name in s.takes]
            raise UserError(
                f"config.loss.{name}={config.loss[name]}: config.method={config.method} takes no "
                f"such setting; expected {value}, or one of the methods {', '.join(others)}"
            )


def find_unread(config: ConfigDict) -> list[str]:
    """Returns the settings that nothing reads in a training with this configuration.

    An entry that ends with a dot stands for a whole group.
    """
    spec = METHODS[config.method]
    criterion = CRITERIA[spec.criterion or config.selection.criterion]
    selects = criterion is not CRITERIA["all"] and spec.max_negatives != 0
    uses_lora = bool(config.model.lora.rank or config.model.lora.path)
    is_design = criterion.design is not None and spec.max_negatives != 0
    draws_by_features = criterion.weighted and config.selection.draw in config_lib.FEATURE_DRAWS
    reads_features = (criterion.needs_features and spec.max_negatives != 0) or draws_by_features
    by_design = config.selection.prompts == "design"
    is_read = {
        "selection.criterion": not spec.criterion,
        "selection.ridge": is_design or by_design,
        "selection.fisher_scale": is_design,
        "selection.feature_norm selection.pooling": reads_features or by_design,
        "selection.features": reads_features,
        "selection.prompt_budget selection.prompt_refresh": config.selection.prompts != "all",
        "selection.draw": criterion.weighted,
        "selection.top": criterion is CRITERIA["topk"],
        "selection.refresh": selects,
        "num_negatives": selects and spec.max_negatives is None,
        # Other negatives are the same whenever they are chosen with the same weights.
        "log.draw_noise_every": criterion in (CRITERIA["random"], CRITERIA["sampled"])
        and config.selection.refresh == "step"
        and spec.max_negatives != 0,
        "loss.gamma": "margin" in spec.takes and config.loss.margin == "constant",
        "loss.label_smoothing": "link" in spec.takes and config.loss.link in SMOOTHED,
        "odpo.offset odpo.alpha": config.method == "odpo"
        or ("margin" in spec.takes and config.loss.margin == "grade"),
        "pl_rank.top": config.method == "pl_rank",
        **{f"loss.{name}": name in spec.takes for name in config_lib.LOSS_TYPES["sigmoid"]},
        "beta": bool(spec.takes),
        "model.reference_path": uses_reference(config),
        "model.lora.alpha model.lora.rank_stabilized model.lora.targets": uses_lora,
        "model.lora.base model.lora.dropout": uses_lora,
        "model.scratch.": not config.model.path,
        "train.reuse_scoring": not config.train.responses_at_a_time
        and not config.model.lora.dropout,
        "train.epochs": not config.train.steps,
        "device_memory_gb": config.dry_run,
        "mine.": bool(config.mine.catalogue),
        "mine.temperature": config.mine.draw == "softmax",
    }
    return [name for names, read in is_read.items() if not read for name in names.split()]
