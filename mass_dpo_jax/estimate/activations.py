"""What a forward pass keeps for the backward pass, and temporaries, on one device.

What is kept is the forward pass's record and what JAX's differentiation saves beside it.
Temporaries are estimates: how many copies of an array live at once is up to the compiler. The
counts below were read off XLA's programs for CPUs in float32, and are up to 20% off. A fused kernel
(models/fused_attention.py) has no scores, and what it holds instead has not been measured.
"""

from __future__ import annotations

from mass_dpo_jax.estimate.sizes import BatchLayout, Chunks, DeviceModel, logits_chunk

FLOAT32 = 4  # Bytes.
MASK = FLOAT32 + 1  # Bytes of a score's mask, and of the zero that its masked gradient becomes.
BASE_BYTES = {"float32": FLOAT32, "bfloat16": 2, "int8": 1, "nf4": 1}  # Of a weight, gathered.


def kept_bytes(model: DeviceModel, recorded: BatchLayout, trained: BatchLayout) -> int:
    """Returns the bytes of the forward pass's record and of what differentiation saves besides.

    Args:
        model: the model.
        recorded: layout of the forward pass: the pool, or the same as `trained`.
        trained: the chosen responses and picks that are trained on.
    """
    # The final norm saves two float32 arrays of hidden states, rotary positions their angles.
    saved = trained.last_layer_tokens * 2 * model.hidden + trained.tokens * model.head_dim
    # The vocabulary projection saves its input, in the compute type, and its mask.
    logits_input = trained.batch * trained.response_tokens * model.hidden * (model.itemsize + 1)
    return record_bytes(model, recorded) + saved * FLOAT32 + logits_input


def record_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the bytes of a forward pass's record (models/decoder.py)."""
    # Of every layer its input, and with remat=dots the products of `_recorded_products`.
    token = model.hidden + sum(_recorded_products(model))
    layers = (model.layers - 1) * layout.tokens * token * model.itemsize
    logps = layout.batch * layout.response_tokens * FLOAT32
    return layers + last_layer_record_bytes(model, layout) + logps


def last_layer_record_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the last layer's part of a record.

    It is used up when the backward pass of the other layers begins.
    """
    keys_values, others = _recorded_products(model)
    # Input, keys and values of all tokens; of the last layer's tokens the rest and the output.
    values = layout.tokens * (model.hidden + keys_values)
    values += layout.last_layer_tokens * (others + model.hidden)
    return values * model.itemsize


def _recorded_products(model: DeviceModel) -> tuple[int, int]:
    """Counts recorded values per token and layer: keys and values, and other products.

    A layer's last product is not recorded, unless a norm follows it.
    """
    if model.remat == "full":
        return 0, 0
    # Attention's output projection, queries, and the MLP's gate and up.
    others = model.hidden + model.query_width + 2 * model.inner
    return 2 * model.key_width, others + (model.hidden if model.norms_outputs else 0)


# Temporaries. Tokens hold values of the compute type, pairs float32 scores for every head.


def forward_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the temporaries of a layer in the forward pass: of its MLP or its attention."""
    within_prompt, to_prompt, within_groups = (n * model.heads * FLOAT32 for n in layout.pairs)
    # The scores of the prompt and their softmax live together. Then come those of the responses
    # and their softmax, while the prompt's weights are still there.
    scores = max(2 * within_prompt, within_prompt + 2 * (to_prompt + within_groups))
    if model.fused:
        scores = fused_bytes(model, layout)
    return max(_mlp_bytes(model, layout), _attention_bytes(model, layout) + scores)


def _mlp_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Counts a layer's residual, input and output, and the results of gate and up."""
    return layout.tokens * (3 * model.hidden + 2 * model.inner) * model.itemsize


def _attention_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Counts a layer's residual, queries, attention's output, keys and values."""
    token = model.hidden + 2 * model.query_width + 2 * model.key_width
    return layout.tokens * token * model.itemsize


def backward_bytes(model: DeviceModel, layout: BatchLayout, last_layer: bool = False) -> int:
    """Returns the temporaries of a layer in the backward pass, what is recomputed included.

    Args:
        model: the model.
        layout: the chosen responses and picks that are trained on.
        last_layer: whether the layer is the last one, which has fewer tokens.
    """
    hidden, inner, query, key = model.hidden, model.inner, model.query_width, model.key_width
    tokens = layout.last_layer_tokens if last_layer else layout.tokens
    pairs = layout.last_layer_pairs if last_layer else layout.pairs
    within_prompt, to_prompt, within_groups = (n * model.heads for n in pairs)
    all_pairs = within_prompt + to_prompt + within_groups
    # A pair's attention weight: in float32 and, where that differs, in the compute type.
    weight = FLOAT32 + (model.itemsize if model.itemsize < FLOAT32 else 0)
    if model.fused:
        masks, weights = 0, fused_bytes(model, layout)
        scores = fused_bytes(model, layout, copies=2)
    else:
        masks, weights = all_pairs * MASK, all_pairs * weight
        # Weights of all pairs and gradients of the responses', or both of the prompt's.
        scores = max(
            weights + (to_prompt + within_groups) * FLOAT32, within_prompt * (weight + FLOAT32)
        )
    # The largest of four places, in values of a token. The MLP has three hidden states, its inner
    # ones with their gradients, and attention's inputs and output. A norm has seven hidden states.
    # Heads are queries, keys and values before and after rotation, with gradients. The scores have
    # attention's inputs and output.
    inner_copies = {"full": 5, "dots": 4}[model.remat]
    mlp = 3 * hidden + inner_copies * inner + 2 * query + 2 * key
    norm = 7 * hidden
    heads = 2 * hidden + 5 * query + 5 * key
    attention = hidden + 2 * query + 2 * key
    return masks + max(
        tokens * mlp * model.itemsize + weights,
        tokens * norm * model.itemsize,
        tokens * heads * model.itemsize,
        tokens * attention * model.itemsize + scores,
    )


def fused_bytes(model: DeviceModel, layout: BatchLayout, copies: int = 1) -> int:
    """Returns what a fused kernel holds beside the layer's queries, keys and values.

    Args:
        model: the model.
        layout: the tokens.
        copies: 2 with gradients of what it holds.
    """
    # Its own queries and outputs, and keys and values that repeat the prompt's for every group.
    rows = layout.tokens * 2 * model.query_width + layout.repeated_keys * 2 * model.key_width
    # The responses' mask, and the same in the compute type as a bias for all heads.
    mask = sum(layout.pairs[1:])
    bias = mask * model.itemsize
    log_sum_exps = layout.tokens * model.heads * FLOAT32
    return copies * (rows * model.itemsize + bias) + log_sum_exps + mask


def weight_copy_bytes(model: DeviceModel, backward: bool) -> int:
    """Returns the copies of weights that a layer computes with.

    One is taken out of the stack of all layers, in the compute type. Where weights are stored in
    parts, a layer is also gathered as it is stored, and its gradient is whole before it is split.
    """
    gathered = model.layer_weights * BASE_BYTES[model.base_dtype] if model.gathers_weights else 0
    if backward and model.lora is None:
        gathered *= 2
    return model.layer_weights * model.itemsize + gathered


def logits_bytes(model: DeviceModel, layout: BatchLayout, backward: bool) -> int:
    """Returns the temporaries of a chunk of the vocabulary projection."""
    chunk = logits_chunk(model, layout)
    logits = layout.batch * chunk * model.vocabulary * FLOAT32
    # The head's weights in the compute type, gathered as they are stored, and their gradient.
    stored = FLOAT32 if model.base_dtype == "float32" else 2
    head = model.itemsize if model.itemsize != stored else 0
    head += stored if model.gathers_weights else 0
    head += FLOAT32 if backward and model.lora is None else 0
    return (3 if backward else 1) * logits + model.vocabulary * model.hidden * head


def scoring_bytes(model: DeviceModel, layout: BatchLayout, chunks: Chunks | None) -> int:
    """Returns the temporaries of scoring a pool, without a record.

    Args:
        model: the model.
        layout: the pool.
        chunks: how it is divided; None where all is computed together with the prompt.
    """
    weights = weight_copy_bytes(model, backward=False)
    if chunks is None:
        hidden = 2 * layout.last_layer_tokens * model.hidden * model.itemsize
        return max(
            forward_bytes(model, layout) + weights,
            hidden + logits_bytes(model, layout, backward=False),
        )
    kept = prompt_bytes(model, layout)
    return max(
        forward_bytes(model, layout.prompt_alone) + weights,
        kept + chunk_scoring_bytes(model, layout, chunks),
    )


def prompt_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns what responses in chunks read of their prompt, once it is computed.

    That is its keys and values of all layers, and its last hidden states.
    """
    prompt = layout.prompt_alone
    values = prompt.tokens * 2 * model.layers * model.key_width
    return (values + prompt.last_layer_tokens * model.hidden) * model.itemsize


def chunk_scoring_bytes(model: DeviceModel, layout: BatchLayout, chunks: Chunks) -> int:
    """Returns the temporaries of scoring a chunk; its prompt's are not among them."""
    responses = layout.take(chunks)
    weights = weight_copy_bytes(model, backward=False)
    hidden = 2 * responses.tokens * model.hidden * model.itemsize
    return max(
        forward_bytes(model, responses) + weights,
        hidden + logits_bytes(model, responses, backward=False),
    )
