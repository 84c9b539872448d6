"""Whether the training data has what a method needs: enough negatives, grades, no odd draws."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.methods import METHODS, Method

_log = logging.getLogger(__name__)


def check_training_data(method: Method, tokens: Tokens) -> Tokens:
    """Checks the training split, and returns it with the grades and weights that the method uses.

    Raises:
        UserError: every pool is smaller than the method's n, grades are missing or contradict the
            preferences, or negatives were drawn in a way that the method cannot correct for.
    """
    check_pools(method, tokens)
    tokens = _check_draws(method, tokens)
    return grade_split(method, tokens)


def grade_split(method: Method, tokens: Tokens) -> Tokens:
    """Returns a split with the grades that the method uses, if any.

    Raises:
        UserError: grades are missing or contradict the preferences.
    """
    if method.uses_order:
        return _scale_grades(method, tokens)
    if method.uses_scores:
        _check_scores(method, tokens)
    elif method.margin == "grade":  # By rank: rejected responses are listed from the best to the
        # worst, and those left out as too long keep their rank.
        order = tokens.candidate_ids if tokens.ranks is None else tokens.ranks
        return dataclasses.replace(tokens, scores=-order.astype(np.float32))
    return tokens


def check_pools(method: Method, tokens: Tokens) -> None:
    """Logs how many pools have fewer negatives than the method takes.

    Raises:
        UserError: all of them have.
    """
    sizes, n = (tokens.response_lengths[:, 1:] > 0).sum(1), method.num_negatives
    largest = int(sizes.max())
    if n > largest:
        alternative = ", or config.method=dpo" if largest == 1 else " or fewer"
        raise UserError(
            f"config.num_negatives={n}: larger than every pool of the data (the largest has "
            f"{largest} rejected response{'s' * (largest > 1)}); set config.num_negatives={largest}"
            f"{alternative}"
        )
    if not method.uses_whole_pool:
        log_small_pools(n, sizes)


def _check_draws(method: Method, tokens: Tokens) -> Tokens:
    """Returns a split with the weights of drawn negatives only where the loss uses them.

    Raises:
        UserError: there are some, and the loss is not of a kind that they could correct.
    """
    if tokens.log_weights is None:
        return tokens
    if method.is_supervised:  # It sees no negatives.
        return dataclasses.replace(tokens, log_weights=None)
    if not method.uses_draws_of_data:
        raise make_draws_error(method)
    drawn = tokens.log_weights[:, 1:][tokens.response_lengths[:, 1:] > 0]
    _log.info(
        f"negatives were drawn with probabilities from {np.exp(-drawn.max()):.2g} to "
        f"{np.exp(-drawn.min()):.2g} (mined_probabilities), for which the loss is corrected"
    )
    return tokens


def make_draws_error(method: Method) -> UserError:
    """Returns the refusal of drawn negatives by a method that cannot correct for the draw."""
    able = ", ".join(name for name, spec in METHODS.items() if spec.uses_draws_of_data)
    return UserError(
        f"config.method={method.name}: the training data's negatives are drawn with the "
        f"probabilities in mined_probabilities, which only {able} correct for; "
        "--config.data.columns=mined_probabilities= reads none, and mining with "
        "--config.mine.draw=top needs no correction"
    )


def log_small_pools(n: int, sizes: np.ndarray) -> None:
    """Logs how many pools, whose sizes are int [M], have fewer than n negatives, if any."""
    if few := int((sizes < n).sum()):
        _log.info(
            f"config.num_negatives={n}: {few} of {len(sizes)} pools have fewer (the smallest "
            f"{sizes.min()}); of those all are taken"
        )


def _scale_grades(method: Method, tokens: Tokens) -> Tokens:
    """Returns a split whose scores are its grades, scaled to [0, 1].

    Scores are scaled alike in all rows, so that it still counts how far apart those of a row are;
    in [0, 1] they stay as they are. Ranks are scaled row by row: 1 for the best, 0 for the worst.

    Raises:
        UserError: the data does not grade responses, or not in the order of the preferences.
    """
    if tokens.grades is None:
        if tokens.scores is not None:
            _check_scores(method, tokens)
        raise UserError(
            f"config.method={method.name}: the training data says only which response is chosen; "
            "expected score_chosen and score_rejected, or ranks, in every row. "
            "config.method=pl_all trains on whole pools without"
        )
    exists = tokens.response_lengths > 0
    grades = tokens.grades.astype(np.float64)
    if tokens.grades is not tokens.scores:
        low, width = np.zeros(1), np.maximum(grades.max(1, keepdims=True), 1.0)
    elif grades[exists].min() >= 0 and grades[exists].max() <= 1:
        return tokens
    else:
        low, high = grades[exists].min(), grades[exists].max()
        width = high - low
        _log.info(f"scores from {low:g} to {high:g} are scaled to grades from 0 to 1")
        if len(np.unique(_scale(grades[exists], low, width))) < len(np.unique(grades[exists])):
            raise UserError(
                f"config.method={method.name}: scores from {low:g} to {high:g}: some that differ "
                "become equal when they are scaled to [0, 1]; give scores that are closer together"
            )
    return dataclasses.replace(tokens, scores=np.where(exists, _scale(grades, low, width), 0))


def _scale(grades: np.ndarray, low: Any, width: Any) -> np.ndarray:
    return ((grades - low) / width).astype(np.float32)


def _check_scores(method: Method, tokens: Tokens) -> None:
    if tokens.scores is None:
        raise UserError(
            "margins by score: the training data has no scores; expected score_chosen and "
            "score_rejected in every row, or config.odpo.offset=rank where rejected responses are "
            "listed from the best to the worst"
        )
    above = tokens.scores[:, :1] > tokens.scores[:, 1:]
    bad = np.flatnonzero((~above & (tokens.response_lengths[:, 1:] > 0)).any(1))
    if len(bad):
        chosen, *rejected = tokens.scores[bad[0], tokens.response_lengths[bad[0]] > 0].tolist()
        raise UserError(
            f"config.method={method.name}: example {tokens.ids[bad[0]]!r}: score_chosen {chosen} "
            f"is not above every score_rejected (the largest is {max(rejected)})"
        )


def describe_split(tokens: Tokens) -> str:
    """Describes the size of a split in a line of text."""
    pools, ties = tokens.compared[:, 1:].sum(1), tokens.relevant
    sizes = f"{pools.min()}" if pools.min() == pools.max() else f"{pools.min()} to {pools.max()}"
    prompts = tokens.prompt_lengths
    ranked = 0 if tokens.ranks is None else int((tokens.ranks > 1).any(1).sum())
    cut = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in tokens.cut.items() if count
    )
    return (
        f"{len(tokens)} examples with {sizes} negatives, prompts of {prompts.mean():.0f} tokens "
        f"(at most {prompts.max()}), responses of at most {tokens.response_lengths.max()}"
        + (f"; negatives are ranked in {ranked}" if ranked else "")
        + ("" if ties is None else f"; several are chosen in {(ties.sum(1) > 1).sum()}")
        + (f"; {cut}" if cut else "")
    )
