"""What a train step computes, from formulas: operations of its matrix products, 2 a multiplication.

A fused kernel's are counted as if they were those of plain attention. Letters as in sizes.py.
"""

from __future__ import annotations

import numpy as np

from mass_dpo_jax.training.sizes import Layout, Model, logits_chunk


def forward_flops(m: Model, at: Layout) -> int:
    """Operations of a forward pass over all places, 2 a multiplication:
    layers (2 tokens block + 4 H K pairs) + 2 D V response places."""
    layer = 2 * at.tokens * (m.block + m.adapted) + 4 * m.queries * at.pairs
    return m.layers * layer + logits_flops(m, at)


def scoring_flops(m: Model, at: Layout, chunk: int | None) -> int:
    """`forward_flops` of a pool in chunks of groups, the last filled up; see `scoring_bytes`."""
    if chunk is None or chunk >= at.groups:
        return forward_flops(m, at)
    chunks = -(-at.groups // chunk)
    layers = forward_flops(m, at._replace(groups=chunks * chunk)) - logits_flops(
        m, at._replace(groups=chunks * chunk)
    )
    return layers + chunks * logits_flops(m, at._replace(groups=chunk))


def logits_flops(m: Model, at: Layout) -> int:
    """2 D V a response place, those that fill up the last chunk too."""
    chunk = logits_chunk(m, at)
    return 2 * m.hidden * m.vocabulary * at.batch * chunk * -(-at.responses // chunk)


def training_flops(m: Model, at: Layout, recorded: bool = False) -> int:
    """Forward, backward (twice as much) and what it computes again: the logits and attention; with
    `full` the layers but for their last product. Scoring the pool may have been the forward pass,
    `recorded`. Frozen weights get no gradient, and adapters compute x A again."""
    again = 4 * m.queries * at.pairs
    if m.remat == "full":
        again += 2 * at.tokens * (m.block - m.inner * m.hidden)
    passes = 2 if recorded else 3
    frozen = 0
    if m.lora is not None:
        frozen = m.layers * 2 * at.tokens * m.block + logits_flops(m, at)
    return passes * forward_flops(m, at) + m.layers * again + logits_flops(m, at) - frozen


def useful_flops(m: Model, prompts: np.ndarray, responses: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of a forward pass over real tokens and the pairs that see each other, nothing twice.

    Args:
      prompts: `[M]` tokens.
      responses: `[M, C]` tokens.

    Returns:
      float64 `[M]` of the prompts, and `[M, C]` of each response behind its prompt.
    """
    p, r = prompts.astype(np.float64), responses.astype(np.float64)
    token, pair = 2.0 * m.layers * m.block, 4.0 * m.layers * m.queries
    logit = 2.0 * m.hidden * m.vocabulary
    behind = r * (token + logit) + pair * (r * p[:, None] + r * (r + 1) / 2)
    return p * token + pair * p * (p + 1) / 2, behind
