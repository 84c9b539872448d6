"""What a finished run says about its method, for the last line of `train`."""

from __future__ import annotations

import math
from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax.config import LIST_METHODS
from mass_dpo_jax.runs import metrics_files

PAGE = "docs/methods.md says which method when"
OTHER_LOSSES = ("sft", "odpo", "mppo", *LIST_METHODS)
USUAL_LOSS = ("logistic", 0.0)  # Link and label smoothing of what pl_sampled estimates.


def advise(config: ConfigDict, workdir: Path) -> str:
    """Returns a sentence on whether another method or n would pay; "" where nothing is known.

    Args:
        config: the run's configuration.
        workdir: the run folder, with metrics.jsonl.
    """
    spread_by_step = metrics_files.read_figure(workdir, "selection/effective_pool")
    n = config.num_negatives
    usual = (config.loss.link, config.loss.label_smoothing) == USUAL_LOSS
    if config.method in OTHER_LOSSES or not usual:
        return ""
    if not spread_by_step:
        return f"pl_all and pl_sampled train on the loss of the whole pool; {PAGE}"
    spread = spread_by_step[max(spread_by_step)]
    spread_out = f"the pool weights were spread over {spread:.1f} candidates at the end"
    if config.method == "pl_all":
        enough = math.ceil(spread)
        return f"{spread_out}: pl_sampled with n = {enough} is nearly the same; {PAGE}"
    if config.method != "pl_sampled":
        return f"{spread_out}; pl_all and pl_sampled train on the loss of all of them; {PAGE}"
    if spread <= n:
        return f"{spread_out}: drawing n = {n} is nearly exact; {PAGE}"
    return f"{spread_out}: with n = {n} of them the draw adds noise that pl_all has not; {PAGE}"
