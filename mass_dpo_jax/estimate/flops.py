"""Operations of a train step's matrix products, from formulas; a multiplication and addition are 2.

A fused kernel is counted as if it were plain attention.
"""

from __future__ import annotations

import numpy as np

from mass_dpo_jax.estimate.sizes import BatchLayout, Chunks, DeviceModel, logits_chunk


def forward_flops(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the operations of a forward pass over all tokens, adapters included."""
    weights = model.layer_weights + model.adapter_weights
    key_value = model.key_value_weights + model.key_value_adapter_weights
    products = product_flops(model, layout, weights, key_value)
    return products + attention_flops(model, layout) + logits_flops(model, layout)


def product_flops(model: DeviceModel, layout: BatchLayout, weights: int, key_value: int) -> int:
    """Returns the operations of all layers' products with weights: 2 a weight and token.

    Args:
        model: the model.
        layout: the tokens.
        weights: a layer's weights.
        key_value: the weights among them for keys and values, which every layer multiplies with all
            tokens. The last layer multiplies the others with its own tokens only.
    """
    other_tokens = (model.layers - 1) * layout.tokens + layout.last_layer_tokens
    return 2 * (model.layers * layout.tokens * key_value + other_tokens * (weights - key_value))


def attention_flops(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the operations of all layers' scores and weighted sums: 4 H d a pair."""
    pairs = (model.layers - 1) * sum(layout.pairs) + sum(layout.last_layer_pairs)
    return 4 * model.query_width * pairs


def logits_flops(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns 2 D V a response token, with those that fill up the last chunk."""
    if not layout.response_tokens:
        return 0
    chunk = logits_chunk(model, layout)
    tokens = layout.batch * chunk * -(-layout.response_tokens // chunk)
    return 2 * model.hidden * model.vocabulary * tokens


def scoring_flops(model: DeviceModel, layout: BatchLayout, chunks: Chunks | None) -> int:
    """Returns the operations of scoring a pool.

    Args:
        model: the model.
        layout: the pool.
        chunks: how it is divided, see `activations.scoring_bytes`.
    """
    if chunks is None:
        return forward_flops(model, layout)
    responses = chunks.number * forward_flops(model, layout.take(chunks))
    return forward_flops(model, layout.prompt_alone) + responses


def training_flops(model: DeviceModel, layout: BatchLayout, recorded: bool = False) -> int:
    """Returns the operations of the loss and its gradient.

    Args:
        model: the model.
        layout: the chosen responses and picks that are trained on.
        recorded: whether scoring the pool was the forward pass, and is counted there.
    """
    # The backward pass computes logits and attention again, with remat=full also all products of
    # the layers, but their last if no norm follows.
    recomputed = attention_flops(model, layout) + logits_flops(model, layout)
    if model.remat == "full":
        last = 0 if model.norms_outputs else model.inner * model.hidden
        weights = model.layer_weights - last
        recomputed += product_flops(model, layout, weights, model.key_value_weights)
    # Gradients of weights are half of the backward pass; frozen ones have none.
    frozen = 0
    if model.lora is not None:
        frozen = product_flops(model, layout, model.layer_weights, model.key_value_weights)
        frozen += logits_flops(model, layout)
    passes = 2 if recorded else 3  # Backward takes twice as much as forward.
    return passes * forward_flops(model, layout) + recomputed - frozen


def chunked_training_flops(
    model: DeviceModel, layout: BatchLayout, chunks: Chunks, scored: bool
) -> int:
    """Returns the operations of the loss and its gradient, some responses at a time.

    Args:
        model: the model.
        layout: the chosen responses and picks that are trained on.
        chunks: how they are divided.
        scored: whether scoring the pool has found their log-probabilities.
    """
    responses = layout.take(chunks)
    # Recorded without their log-probabilities, which only the scoring pass computes.
    each = training_flops(model, responses) - logits_flops(model, responses)
    if not scored:
        each += forward_flops(model, responses)
    return training_flops(model, layout.prompt_alone) + chunks.number * each


def useful_flops(
    model: DeviceModel, prompts: np.ndarray, responses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the operations of a forward pass without padding, masked pairs and repetitions.

    Args:
        model: the model.
        prompts: int [M], tokens of prompts.
        responses: int [M, C], tokens of responses.

    Returns:
        float64 [M] of the prompts, and [M, C] of each response behind its prompt.
    """
    prompts, responses = prompts.astype(np.float64), responses.astype(np.float64)
    token = 2.0 * model.layer_weights
    pair = 4.0 * model.query_width
    logits = 2.0 * model.hidden * model.vocabulary
    # A response token sees the prompt, itself and those before it.
    pairs = responses * prompts[:, None] + responses * (responses + 1) / 2
    response_flops = responses * (model.layers * token + logits) + model.layers * pair * pairs
    lower_layers = (model.layers - 1) * (prompts * token + pair * prompts * (prompts + 1) / 2)
    # The last layer needs keys and values of the prompt, and everything of its last token.
    last_layer = (prompts - 1) * 2.0 * model.key_value_weights + token + pair * prompts
    return lower_layers + last_layer, response_flops
