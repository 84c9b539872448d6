"""Buckets, order and batches: nothing is lost, nothing is mixed up, little is padding."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.batches import (
    Buckets,
    Order,
    Shape,
    iterate_batches,
    make_batch,
    make_buckets,
)
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokens import Tokens
from tests.support.tokenizers import real

FEW = settings(deadline=None, max_examples=40)


def made_up(prompt_lengths: Any, response_lengths: Any) -> Tokens:
    """Tokens with given lengths; every token is another number, from 1."""
    prompts = np.asarray(prompt_lengths, np.int32)
    responses = np.asarray(response_lengths, np.int32)
    first = np.arange(1, 1 + prompts.sum(), dtype=np.int32)
    second = np.arange(1 + prompts.sum(), 1 + prompts.sum() + responses.sum(), dtype=np.int32)
    ids, numbers = [str(i) for i in range(len(prompts))], np.arange(responses.shape[1])
    numbers = np.broadcast_to(numbers, responses.shape)
    return Tokens(ids, first, prompts, second, responses, {}, numbers)


@st.composite
def splits(draw: st.DrawFn) -> Tokens:
    """Up to 120 examples with up to 5 candidates; some rows are much longer than others."""
    rows = draw(st.integers(1, 120))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([3, 20, 200]))
    prompts = 1 + rng.geometric(1 / scale, rows)
    responses = rng.geometric(1 / rng.choice([2, scale], rows)[:, None], (rows, 5))
    responses[:, 2:] *= rng.random((rows, 3)) < 0.5
    order = np.argsort(responses[:, 1:] == 0, axis=1, kind="stable") + 1
    responses[:, 1:] = np.take_along_axis(responses, order, axis=1)
    return made_up(prompts, responses)


def selected_size(tokens: Tokens, i: int, n: int | None) -> int:
    """The most tokens that the chosen response and n rejected ones of example i can have."""
    chosen, *rejected = tokens.response_lengths[i].tolist()
    return int(chosen + sum(sorted(rejected, reverse=True)[:n]))


def fits(tokens: Tokens, i: int, shape: Shape, n: int | None) -> bool:
    return (
        tokens.prompt_lengths[i] <= shape.prompt
        and tokens.response_lengths[i].sum() <= shape.responses
        and selected_size(tokens, i, n) <= shape.selected
    )


@FEW
@given(splits(), st.sampled_from([1, 3, None]), st.integers(1, 5))
def test_buckets_hold_their_examples(tokens: Tokens, n: int | None, most: int) -> None:
    buckets = make_buckets(tokens, n, most, min_rows=5)
    shapes = buckets.shapes
    assert 1 <= len(shapes) <= min(most, max(1, len(tokens) // 5))
    assert set(buckets.group.tolist()) <= set(range(len(shapes)))
    assert all(size % 8 == 0 for shape in shapes for size in shape)
    for i, g in enumerate(buckets.group.tolist()):
        assert fits(tokens, i, shapes[g], n)
        assert fits(tokens, i, shapes[-1], n)
        cheaper = [s for s in shapes[:g] if sum(s[:2]) < sum(shapes[g][:2])]
        assert not any(
            tokens.prompt_lengths[i] <= s.prompt and tokens.response_lengths[i].sum() <= s.responses
            for s in cheaper
        )
    whole = np.array(
        [[tokens.prompt_lengths[i], tokens.response_lengths[i].sum()] for i in range(len(tokens))]
    )
    assert np.all(shapes[-1][:2] - whole.max(0) < 8)
    processed = sum(sum(shapes[g][:2]) for g in buckets.group)
    assert processed <= len(tokens) * sum(shapes[-1][:2])


def test_buckets_find_obvious_groups() -> None:
    # Long prompts with short responses and the other way round: neither order of length has them
    # apart, two shapes do (a third holds everything).
    lengths = np.array([[80, 4, 4], [8, 40, 40]] * 100)
    buckets = make_buckets(made_up(lengths[:, 0], lengths[:, 1:]), 1)
    assert [shape[:2] for shape in buckets.shapes[:2]] == [(8, 80), (80, 8)]
    assert buckets.group.reshape(-1, 2).tolist() == [[1, 0]] * 100
    assert buckets.shapes[-1] == (80, 80, 80)


def test_few_rows_make_one_bucket() -> None:
    tokens = made_up([1, 50, 900], [[1, 1], [20, 3], [300, 4]])
    assert make_buckets(tokens, 3).shapes == ((904, 304, 304),)


@FEW
@given(splits(), st.integers(1, 40), st.integers(0, 9))
def test_an_epoch_has_every_example_once(tokens: Tokens, batch_size: int, seed: int) -> None:
    buckets = make_buckets(tokens, 3, min_rows=5)
    order = Order(buckets, batch_size, seed)
    total = len(tokens)
    assert order.steps_per_epoch == -(-total // batch_size)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order(step) for step in steps]
        counts = collections.Counter(i for rows, _ in batches for i in rows.tolist())
        assert set(counts) == set(range(total))
        # The surplus fills one batch; a row is there twice in a batch only if the split is small.
        assert sum(counts.values()) == order.steps_per_epoch * batch_size
        if batch_size <= total:
            assert max(counts.values()) <= 2
        for rows, shape in batches:
            assert rows.shape == (batch_size,)
            assert shape in buckets.shapes
            assert all(fits(tokens, i, shape, 3) for i in rows)
            assert len(set(rows.tolist())) == min(batch_size, total)


@FEW
@given(splits(), st.integers(1, 40), st.integers(0, 9))
def test_order_is_a_function(tokens: Tokens, batch_size: int, seed: int) -> None:
    buckets = make_buckets(tokens, 3, min_rows=5)
    forward, fresh = Order(buckets, batch_size, seed), Order(buckets, batch_size, seed)
    steps = list(range(3 * forward.steps_per_epoch))[:60]
    seen = [forward(step) for step in steps]
    for step in reversed(steps):
        rows, shape = fresh(step)
        assert shape == seen[step][1]
        np.testing.assert_array_equal(rows, seen[step][0])


def test_order_changes_with_epoch_and_seed() -> None:
    buckets = Buckets(np.zeros(64, np.int32), (Shape(8, 8, 8),))
    order = Order(buckets, 8, seed=0)
    assert order(0)[0].tolist() != order(8)[0].tolist()
    assert order(0)[0].tolist() != Order(buckets, 8, seed=1)(0)[0].tolist()
    # No bucket comes first in every epoch, and other rows are left over each time.
    sizes = (Shape(8, 8, 8), Shape(16, 16, 16))
    order = Order(Buckets(np.arange(64, dtype=np.int32) % 2, sizes), 20, seed=0)
    epochs = [[order(4 * epoch + k) for k in range(4)] for epoch in range(20)]
    assert len({tuple(shape for _, shape in epoch) for epoch in epochs}) > 2
    moved = {
        int(i) for epoch in epochs for rows, s in epoch if s == sizes[1] for i in rows if i % 2 == 0
    }
    assert len(moved) > 20


@FEW
@given(splits(), st.integers(1, 40), st.booleans())
def test_iterate_batches_has_every_row_once(tokens: Tokens, batch_size: int, some: bool) -> None:
    buckets = make_buckets(tokens, None, min_rows=5)
    wanted = list(range(0, len(tokens), 2 if some else 1))
    batches = list(iterate_batches(buckets, batch_size, wanted if some else None))
    assert len(batches) == -(-len(wanted) // batch_size)
    rows = np.concatenate([rows for rows, _ in batches])
    assert sorted(rows[rows >= 0].tolist()) == wanted
    assert all((rows >= 0).all() for rows, _ in batches[:-1])
    for rows, shape in batches:
        assert rows.shape == (batch_size,)
        assert all(fits(tokens, i, shape, None) for i in rows if i >= 0)
    assert list(iterate_batches(buckets, batch_size, [])) == []


def test_make_batch() -> None:
    tokens = made_up([2, 3], [[1, 2, 0], [2, 1, 1]])  # Prompts 1 2, 3 4 5; responses from 6.
    refs = np.array([[-1.0, -2.0, -9.0], [-3.0, -4.0, -5.0]])
    batch = make_batch(tokens, np.array([1, -1, 0]), Shape(4, 6, 4), refs)
    assert batch.prompts.tolist() == [[3, 4, 5, 0], [0] * 4, [1, 2, 0, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1, 2]
    assert batch.responses.tolist() == [[9, 10, 11, 12, 0, 0], [0] * 6, [6, 7, 8, 0, 0, 0]]
    assert batch.response_lengths.tolist() == [[2, 1, 1], [0, 0, 0], [1, 2, 0]]
    assert batch.ref_logps.tolist() == [[-3, -4, -5], [0, 0, 0], [-1, -2, 0]]
    assert batch.index.tolist() == [1, -1, 0]
    assert [array.dtype for array in batch[:6]] == [np.int32] * 4 + [np.float32, np.int32]
    assert batch.grades is None and batch.ref_gram is None
    graded = dataclasses.replace(tokens, scores=np.float32([[3, 2, 0], [6, 5, 4]]))
    batch = make_batch(graded, np.array([1, 0]), Shape(4, 6, 4), None)
    assert batch.grades.tolist() == [[6, 5, 4], [3, 2, 0]]
    assert not make_batch(tokens, np.array([0]), Shape(8, 8, 8), None).ref_logps.any()
    for shape in (Shape(2, 6, 4), Shape(4, 3, 3)):
        with pytest.raises(ValueError, match="do not fit"):
            make_batch(tokens, np.array([0, 1]), shape, None)


@pytest.mark.parametrize(("name", "rows"), [("llama3.2", 0), ("qwen3", 1000), ("smollm3", 1000)])
def test_little_is_padding_on_lastfm(real_data: Path, name: str, rows: int) -> None:
    data = default().data
    data.update(name="lastfm", path=str(real_data / "lastfm"), max_test=rows)
    tokens = tokenize(load_examples(data, "test", 0), real(real_data, name), data, progress=False)
    buckets = make_buckets(tokens, 3)
    assert len(buckets.shapes) <= 4

    def useful(batches: Any) -> float:
        found = [make_batch(tokens, chosen, shape, None) for chosen, shape in batches]
        tokens_in = sum(b.prompt_lengths.sum() + b.response_lengths.sum() for b in found)
        return float(tokens_in / sum(b.prompts.size + b.responses.size for b in found))

    order = Order(buckets, 32, seed=0)
    training = useful(order(step) for step in range(order.steps_per_epoch))
    scoring = useful(iterate_batches(buckets, 32))
    print(f"{name}: useful tokens {training:.3f} in training batches, {scoring:.3f} in scoring")
    assert training > 0.9
    assert scoring > 0.9
