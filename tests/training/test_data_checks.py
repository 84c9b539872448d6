"""Grades that losses of lists get: scores and ranks, scaled; draws; and data that has neither."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.data_checks import check_training_data
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.methods import Method


def method(name: str = "lipo_lambda") -> Method:
    config = config_lib.default()
    config.method = name
    return make_method(config, largest_pool=3)


def split(
    lengths: list[list[int]],
    scores: list[list[float]] | None = None,
    ranks: list[list[int]] | None = None,
) -> Tokens:
    """A split of responses with these lengths in tokens, 0 where there is none."""
    response_lengths = np.array(lengths, np.int32)
    rows, columns = response_lengths.shape
    return Tokens(
        ids=[f"row{i}" for i in range(rows)],
        prompt_tokens=np.zeros(rows, np.int32),
        prompt_lengths=np.ones(rows, np.int32),
        response_tokens=np.zeros(response_lengths.sum(), np.int32),
        response_lengths=response_lengths,
        cut={},
        candidate_ids=np.tile(np.arange(columns, dtype=np.int32), (rows, 1)),
        scores=None if scores is None else np.array(scores, np.float32),
        ranks=None if ranks is None else np.array(ranks, np.int32),
    )


LENGTHS = [[2, 1, 3, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("name", config_lib.LIST_METHODS)
def test_scores_are_scaled_alike_in_all_rows(name: str) -> None:
    tokens = split(LENGTHS, [[9, 5, -1, 5], [4, 2, 0, 0]])
    graded = check_training_data(method(name), tokens)
    np.testing.assert_allclose(graded.grades, [[1, 0.6, 0, 0.6], [0.5, 0.3, 0, 0]], rtol=1e-6)
    assert tokens.scores is not None and tokens.scores[0, 0] == 9  # The split itself stays.


def test_scores_from_0_to_1_stay_as_they_are() -> None:
    scores = [[0.9, 0.2, 0.1, 0.2], [0.6, 0.5, 0, 0]]
    graded = check_training_data(method(), split(LENGTHS, scores))
    np.testing.assert_array_equal(graded.grades, np.array(scores, np.float32))


def test_ranks_are_scaled_row_by_row() -> None:
    ranks = [[0, 1, 3, 1], [0, 1, -1, -1]]
    graded = check_training_data(method(), split(LENGTHS, ranks=ranks))
    np.testing.assert_allclose(graded.grades, [[1, 2 / 3, 0, 2 / 3], [1, 0, 0, 0]], rtol=1e-6)
    # Several as good as the chosen one, and nothing else known.
    graded = check_training_data(method(), split(LENGTHS, ranks=[[0, 1, 1, 0], [0, 1, -1, -1]]))
    np.testing.assert_allclose(graded.grades, [[1, 0, 0, 1], [1, 0, 0, 0]])


def test_scores_that_contradict_ranks_give_way_to_them() -> None:
    ranks = [[0, 1, 2, 3], [0, 1, -1, -1]]
    tokens = split(LENGTHS, [[9, 1, 2, 3], [4, 2, 0, 0]], ranks)
    graded = check_training_data(method(), tokens)
    np.testing.assert_allclose(graded.grades, [[1, 2 / 3, 1 / 3, 0], [1, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("name", config_lib.LIST_METHODS)
def test_data_that_says_only_which_response_is_chosen_is_refused(name: str) -> None:
    message = rf"^config\.method={name}: the training data says only which response is chosen; .*"
    with pytest.raises(UserError, match=message + "pl_all"):
        check_training_data(method(name), split(LENGTHS))


def test_scores_that_contradict_the_chosen_response_are_refused() -> None:
    tokens = split(LENGTHS, [[9, 5, -1, 5], [4, 4, 0, 0]])
    message = r"method=tree_po: example 'row1': score_chosen 4.0 is not above .* 4.0\)"
    with pytest.raises(UserError, match=message):
        check_training_data(method("tree_po"), tokens)


def test_scores_too_far_apart_to_be_scaled_are_refused() -> None:
    tokens = split(LENGTHS, [[3e30, 1, 0, -3e30], [4, 2, 0, 0]])
    with pytest.raises(UserError, match=r"scores from -3e\+30 to 3e\+30: .* closer together"):
        check_training_data(method(), tokens)


def test_other_methods_get_the_split_as_it_is() -> None:
    tokens = split(LENGTHS, [[9, 5, -1, 5], [4, 2, 0, 0]])
    assert check_training_data(method("pl_all"), tokens) is tokens
    assert check_training_data(method("odpo"), tokens) is tokens
    by_rank = dataclasses.replace(method("odpo"), uses_scores=False)
    graded = check_training_data(by_rank, tokens)
    np.testing.assert_array_equal(graded.scores, -tokens.candidate_ids.astype(np.float32))


def drawn_split() -> Tokens:
    weights = np.log(np.array([[1, 4, 1, 2], [1, 2, 1, 1]], np.float32))
    return dataclasses.replace(split(LENGTHS), log_weights=weights)


@pytest.mark.parametrize("name", ["dpo", "dpo_k", "dmpo", "mppo", *config_lib.LIST_METHODS])
def test_draws_that_a_loss_cannot_correct_for_are_refused(name: str) -> None:
    message = f"config.method={name}: .*only mass_dpo, pl_sampled, pl_all, sdpo correct for"
    with pytest.raises(UserError, match=message):
        check_training_data(method(name), drawn_split())


def test_draws_are_kept_or_of_no_account(caplog: pytest.LogCaptureFixture) -> None:
    tokens = drawn_split()
    with caplog.at_level("INFO"):
        assert check_training_data(method("pl_all"), tokens) is tokens
    assert "drawn with probabilities from 0.25 to 1 " in caplog.text
    assert check_training_data(method("sft"), tokens).log_weights is None
