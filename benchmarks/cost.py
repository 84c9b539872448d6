r"""How many floating-point operations a step needs, by formula, and how many a program has.

A multiplication and an addition count as two. Only matrix products are counted: products with
weights, attention, and the projection to the vocabulary. A `Pass` says how much of each goes
through the decoder; with c_w, c_a and c_v the cost of a token's products with weights, of one
query-key pair and of one token's logits,

    forward = c_w tokens + c_a pairs + c_v projected
    train   = 3 forward, and what the backward pass computes again.

where the last layer has tokens and pairs of its own. The floor of a step is `useful`: real tokens
only, pairs that are not masked, nothing computed twice, and in the last layer nothing of a prompt
but keys, values and its last token. Scoring a pool is the forward pass on whatever is selected from
it, so that MASS-DPO's is forward on the pool and 2 forward, the backward pass, on the set.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from mass_dpo_jax.models.config import DecoderConfig

FLASH_BACKWARD = 2.5  # A fused attention computes the scores again: five products after two.


class Pass(NamedTuple):
    """What goes through the decoder at once, over all rows of a batch. Passes add up with `+`.

    tokens: positions, padding included where it is computed.
    pairs: of a query and a key that are multiplied, in each layer but the last for each head.
    projected: positions whose logits are computed.
    ends: positions of which the last layer computes more than keys and values.
    end_pairs: pairs in the last layer.
    """

    tokens: float
    pairs: float
    projected: float
    ends: float
    end_pairs: float

    def __add__(self, other: Pass) -> Pass:  # type: ignore[override]
        return Pass(*(a + b for a, b in zip(self, other, strict=True)))


def weights_cost(config: DecoderConfig) -> int:
    """c_w: of one token's products with the weights of all layers."""
    heads = 2 * config.num_heads * config.head_dim
    rest = 2 * config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * (keys_cost(config) + rest)


def keys_cost(config: DecoderConfig) -> int:
    """Of one token's keys and values in one layer."""
    return 4 * config.hidden_size * config.num_kv_heads * config.head_dim


def products_cost(config: DecoderConfig, size: Pass) -> float:
    """Of all products with weights: c_w tokens, the last layer's but for keys and values of its
    own tokens."""
    rest = weights_cost(config) / config.num_layers - keys_cost(config)
    return weights_cost(config) * size.tokens - rest * (size.tokens - size.ends)


def pairs_cost(config: DecoderConfig, size: Pass) -> float:
    """Of all pairs, their product and the value's, all heads and layers."""
    pairs = (config.num_layers - 1) * size.pairs + size.end_pairs
    return 4 * config.num_heads * config.head_dim * pairs


def logits_cost(config: DecoderConfig) -> int:
    """c_v: of one token's logits."""
    return 2 * config.hidden_size * config.vocab_size


def _alike(tokens: float, pairs: float, projected: float) -> Pass:
    """With a last layer like all others."""
    return Pass(tokens, pairs, projected, tokens, pairs)


def packed(batch: int, prompt: int, responses: int) -> Pass:
    """Our packed layout: P prompt tokens, then S of responses, which see all P + S under a mask."""
    return rectangle(batch, prompt, 1, responses)


def rectangle(batch: int, prompt: int, candidates: int, response: int) -> Pass:
    """Our rectangle: C responses of R tokens, each sees the prompt and itself. In the last layer
    only one token of the prompt is left, which sees the prompt and, beside it, itself."""
    tokens = candidates * response
    behind = tokens * (prompt + response)
    one_row = Pass(prompt + tokens, prompt**2 + behind, tokens, 1 + tokens, prompt + 1 + behind)
    return Pass(*(batch * x for x in one_row))


def useful(prompt_lengths: np.ndarray, response_lengths: np.ndarray) -> Pass:
    """The least that a shared prompt allows.

    Args:
      prompt_lengths: int [B].
      response_lengths: int [B, C]; 0 where there is no candidate.
    """
    prompts, responses = prompt_lengths.astype(float), response_lengths.astype(float)
    behind = (responses * prompts[:, None] + responses * (responses + 1) / 2).sum()
    return Pass(
        prompts.sum() + responses.sum(),
        (prompts * (prompts + 1) / 2).sum() + behind,
        responses.sum(),
        len(prompts) + responses.sum(),
        prompts.sum() + behind,
    )


def rows(prompt_lengths: np.ndarray, response_lengths: np.ndarray) -> Pass:
    """Every response behind its own copy of the prompt, padded to the longest row; attention leaves
    out what is behind the diagonal, and only real response tokens are projected. As PyTorch does.
    """
    lengths = prompt_lengths[:, None] + response_lengths
    longest = int(lengths.max())
    pairs = lengths.size * longest * (longest + 1) / 2
    return _alike(lengths.size * longest, pairs, float(response_lengths.sum()))


def masked(prompt_lengths: np.ndarray, response_lengths: np.ndarray) -> Pass:
    """Prompt and responses in one row under a mask: every pair is computed. As PyTorch does."""
    lengths = prompt_lengths + response_lengths.sum(1)
    longest = int(lengths.max())
    pairs = len(lengths) * longest**2
    return _alike(len(lengths) * longest, pairs, float(response_lengths.sum()))


def forward(config: DecoderConfig, size: Pass) -> float:
    """FLOPs of a forward pass."""
    logits = logits_cost(config) * size.projected
    return products_cost(config, size) + pairs_cost(config, size) + logits


def train(config: DecoderConfig, size: Pass) -> float:
    """FLOPs of forward and backward, each product computed once: three times `forward`."""
    return 3 * forward(config, size)


def train_ours(config: DecoderConfig, size: Pass, remat: str, recorded: bool = False) -> float:
    """FLOPs of forward and backward as our decoder does them.

    Logits and attention are always computed again; with remat "full" so is every layer, but for the
    last product, whose result no gradient needs. `recorded`: scoring the pool was the forward pass.
    """
    flops = (2 if recorded else 3) * forward(config, size) + logits_cost(config) * size.projected
    flops += pairs_cost(config, size)
    if remat == "full":
        down = 2 * config.intermediate_size * config.hidden_size
        done = (config.num_layers - 1) * size.tokens + size.ends
        flops += products_cost(config, size) - down * done
    return flops


def train_flash(config: DecoderConfig, size: Pass) -> float:
    """FLOPs of forward and backward with fused attention, as PyTorch does them."""
    return train(config, size) + (FLASH_BACKWARD - 2) * pairs_cost(config, size)


def counted(jaxpr: Any) -> int:
    """FLOPs of all matrix products in a jaxpr whose results something uses, those in a `scan` as
    often as it runs.

    Raises:
      ValueError: a product in a loop of unknown length.
    """
    return _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0])


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = math.prod(shape[axis] for axis in contracted)
            total += 2 * size * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [_count(part) for part in _inner(params.values())]
        if name == "while" and any(inner):
            raise ValueError("a matrix product in a loop of unknown length")
        total += (max(inner) if name == "cond" else sum(inner)) * params.get("length", 1)
    return total


def _inner(values: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in values:
        if isinstance(value, tuple | list):
            found += _inner(value)
        elif hasattr(value, "jaxpr"):  # A closed one.
            found.append(value.jaxpr)
        elif hasattr(value, "eqns"):
            found.append(value)
    return found
