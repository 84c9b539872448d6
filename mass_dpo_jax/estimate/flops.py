"""What a train step computes, from formulas: operations of its matrix products, 2 a multiplication.

A fused kernel's are counted as if they were those of plain attention. Letters as in sizes.py.
"""

from __future__ import annotations

import numpy as np

from mass_dpo_jax.estimate.sizes import Layout, Model, logits_chunk


def forward_flops(m: Model, at: Layout) -> int:
    """Operations of a forward pass over all places, 2 a multiplication:
    layers (2 tokens block + 4 H K pairs) + 2 D V response places, the last layer on fewer."""
    products = products_flops(m, at, m.block + m.adapted, m.block_keys + m.adapted_keys)
    return products + attention_flops(m, at) + logits_flops(m, at)


def products_flops(m: Model, at: Layout, weights: int, keys: int) -> int:
    """Of all layers' products with `weights` of each, of which `keys` are for keys and values."""
    elsewhere = (m.layers - 1) * at.tokens + at.ends
    return 2 * (m.layers * at.tokens * keys + elsewhere * (weights - keys))


def attention_flops(m: Model, at: Layout) -> int:
    """4 H K a pair, of all layers."""
    return 4 * m.queries * ((m.layers - 1) * at.pairs + sum(at.end_scores))


def scoring_flops(m: Model, at: Layout, chunk: int | None) -> int:
    """`forward_flops` of a pool in chunks of groups, the last filled up; see `scoring_bytes`."""
    if chunk is None or chunk >= at.groups:
        return forward_flops(m, at)
    chunks = -(-at.groups // chunk)
    filled = at._replace(groups=chunks * chunk)
    layers = forward_flops(m, filled) - logits_flops(m, filled)
    return layers + chunks * logits_flops(m, at._replace(groups=chunk))


def logits_flops(m: Model, at: Layout) -> int:
    """2 D V a response place, those that fill up the last chunk too."""
    chunk = logits_chunk(m, at)
    return 2 * m.hidden * m.vocabulary * at.batch * chunk * -(-at.responses // chunk)


def training_flops(m: Model, at: Layout, recorded: bool = False) -> int:
    """Forward, backward (twice as much) and what it computes again: the logits and attention; with
    `full` the layers but for their last product. Scoring the pool may have been the forward pass,
    `recorded`. Frozen weights get no gradient, and adapters compute x A again."""
    again = attention_flops(m, at) + logits_flops(m, at)
    if m.remat == "full":
        again += products_flops(m, at, m.block - m.inner * m.hidden, m.block_keys)
    frozen = 0
    if m.lora is not None:
        frozen = products_flops(m, at, m.block, m.block_keys) + logits_flops(m, at)
    return (2 if recorded else 3) * forward_flops(m, at) + again - frozen


def useful_flops(m: Model, prompts: np.ndarray, responses: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of a forward pass over real tokens and the pairs that see each other, nothing twice; of the
    prompt the last layer needs keys and values, and all of its last token.

    Args:
      prompts: `[M]` tokens.
      responses: `[M, C]` tokens.

    Returns:
      float64 `[M]` of the prompts, and `[M, C]` of each response behind its prompt.
    """
    p, r = prompts.astype(np.float64), responses.astype(np.float64)
    token, pair, logit = 2.0 * m.block, 4.0 * m.queries, 2.0 * m.hidden * m.vocabulary
    pairs = r * p[:, None] + r * (r + 1) / 2
    behind = r * (m.layers * token + logit) + m.layers * pair * pairs
    below = (m.layers - 1) * (p * token + pair * p * (p + 1) / 2)
    last = (p - 1) * 2.0 * m.block_keys + token + pair * p
    return below + last, behind
