"""Every family's gradients of one step, beside PyTorch's of the same weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mass_dpo_jax.models import chunked_replay
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.replay import replay
from mass_dpo_jax.models.response_layout import Picks
from mass_dpo_jax.models.shared_prefix import score
from mass_dpo_jax.models.weights import list_entries, load_hf
from tests.models.test_transformers import random_folder
from tests.support.helpers import slow
from tests.support.models import FAMILIES, Candidates, hf_config, random_candidates

RESPONSE = 7
WAYS = {
    "packed": {"layout": "packed"},
    "rectangle": {"layout": "rectangle", "max_response": RESPONSE},
    "two at a time": {"layout": "packed", "max_response": RESPONSE},
}


def pytorchs(torch: ModuleType, model: Any, pool: Candidates, weights: np.ndarray) -> float:
    """Differentiates the weighted sum of log-probs, one row a response; returns it."""
    total = 0.0
    for row, candidate in np.argwhere(pool.response_lengths > 0):
        prompt, response = pool.prompt(row), pool.response(row, candidate)
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
        logps = torch.log_softmax(model(ids[None]).logits[0, len(prompt) - 1 : -1], -1)
        loss = weights[row, candidate] * logps.gather(1, ids[len(prompt) :, None]).sum()
        loss.backward()
        total += loss.item()
    return total


def ours(folder: Path, pool: Candidates, weights: np.ndarray, way: str, remat: str) -> Any:
    """The same sum and its gradient, from the record of scoring or a few responses at a time."""
    config = load_config(folder)
    graphdef, _ = nnx.split(abstract_decoder(config, remat=remat))
    params = nnx.to_pure_dict(load_hf(folder, config))
    arrays = tuple(map(jnp.asarray, pool))

    def differentiate_at_once(params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        record = score(model, *arrays, pooling=None, record=True, **WAYS[way]).record

        def loss(params: Any) -> jax.Array:
            logps = replay(nnx.merge(graphdef, params), record, *arrays, **WAYS[way])
            return jnp.sum(weights * logps)

        return jax.value_and_grad(loss)(params)

    def differentiate_in_chunks(params: Any) -> Any:
        shape = pool.response_lengths.shape
        columns = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        picks = Picks(columns, jnp.ones(shape, bool), pool.responses.shape[1])
        (value, _), grads = chunked_replay.value_and_grad(
            lambda logps: (jnp.sum(weights * logps), None),
            lambda params: nnx.merge(graphdef, params),
            params,
            *arrays,
            picks,
            2,
            **WAYS[way],
        )
        return value, grads

    way_to_go = differentiate_in_chunks if way == "two at a time" else differentiate_at_once
    return jax.jit(way_to_go)(params)


@pytest.mark.parametrize("remat", ["dots", slow("full")])
@pytest.mark.parametrize("way", ["packed", slow("rectangle"), slow("two at a time")])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_of_a_step(
    torch: ModuleType, tmp_path: Path, model_type: str, way: str, remat: str
) -> None:
    theirs = random_folder(torch, tmp_path, hf_config(model_type))
    pool = random_candidates(seed=2, response=RESPONSE)
    weights = np.random.default_rng(3).normal(size=pool.response_lengths.shape)
    expected = pytorchs(torch, theirs, pool, weights)
    value, grads = ours(tmp_path, pool, weights, way, remat)
    assert float(value) == pytest.approx(expected, rel=1e-4)
    parameters = dict(theirs.named_parameters())
    config = load_config(tmp_path)
    for entry in list_entries(config):
        found = grads
        for key in entry.path:
            found = found[key]
        tensors = [parameters[name].grad.numpy() for name in entry.list_names(config)]
        if entry.transposed:  # Some tensors hold several parameters.
            rows = slice(entry.first_row, entry.first_row + found.shape[-1])
            tensors = [x[rows].T for x in tensors]
        right = np.stack(tensors) if entry.is_stacked else tensors[0]
        norm = np.linalg.norm(right)
        assert norm > 0, entry.name
        assert np.linalg.norm(np.asarray(found) - right) < 1e-4 * norm, entry.name
