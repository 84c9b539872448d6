"""Sizes that the memory and the arithmetic of a train step are computed from.

The other modules take both from a `DeviceModel`, the decoder on one device, and a `BatchLayout`,
the tokens of a micro-batch on it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.response_layout import measure_chunks


class Chunks(NamedTuple):
    """Responses that are computed some at a time, after their prompt.

    Attributes:
        number: how many chunks there are.
        groups: groups of a chunk.
        length: tokens of a group.
    """

    number: int
    groups: int
    length: int

    @classmethod
    def divide(
        cls,
        layout: str,
        count: int,
        at_a_time: int | None,
        max_response: int,
        packed_length: int,
    ) -> Chunks | None:
        """Divides responses as `response_layout.deal`; None where all are computed at once.

        Args:
            layout: "packed" or "rectangle".
            count: number of responses.
            at_a_time: the most of a chunk; None or 0 for all.
            max_response: tokens of the longest response.
            packed_length: tokens of all.
        """
        if not at_a_time or at_a_time >= count:
            return None
        number, size, room = measure_chunks(layout, count, at_a_time, max_response, packed_length)
        return cls(number, size, max_response) if layout == "rectangle" else cls(number, 1, room)


class BatchLayout(NamedTuple):
    """The tokens of a micro-batch on one device, padding included.

    A row is a prompt and `groups` groups of `length` response tokens each. Packed responses are
    one group, in a rectangle every response is its own. A response token sees the prompt and its
    group.

    Attributes:
        batch: rows.
        prompt: tokens of a prompt.
        groups: groups of a row.
        length: tokens of a group.
        whole_prompt: whether the final hidden states of the whole prompt are needed, not only
            those of its last token: features are pooled over it too.
        prompt_given: whether the prompt has been computed before, and only its keys and values are
            used.
    """

    batch: int
    prompt: int
    groups: int
    length: int
    whole_prompt: bool = False
    prompt_given: bool = False

    @property
    def prompt_alone(self) -> BatchLayout:
        """The prompt without responses."""
        return self._replace(groups=0)

    def take(self, chunks: Chunks, number: int = 1) -> BatchLayout:
        """Returns the layout of so many chunks, without their prompt."""
        groups = number * chunks.groups
        return self._replace(groups=groups, length=chunks.length, prompt_given=True)

    @property
    def response_tokens(self) -> int:
        """Response tokens of one row."""
        return self.groups * self.length

    @property
    def tokens(self) -> int:
        """All tokens of the batch."""
        prompt = 0 if self.prompt_given else self.prompt
        return self.batch * (prompt + self.response_tokens)

    @property
    def last_layer_tokens(self) -> int:
        """Tokens of which the last layer computes more than keys and values."""
        if self.whole_prompt or self.prompt_given:
            return self.tokens
        return self.batch * (1 + self.response_tokens)

    @property
    def pairs(self) -> tuple[int, int, int]:
        """Query-key pairs of one head and layer, masked ones included.

        Those among prompt tokens, of response tokens with the prompt, and within groups.
        """
        return (
            0 if self.prompt_given else self.batch * self.prompt**2,
            self.batch * self.response_tokens * self.prompt,
            self.batch * self.response_tokens * self.length,
        )

    @property
    def last_layer_pairs(self) -> tuple[int, int, int]:
        """The pairs of the last layer, where only the prompt's last token has a query.

        It sees the prompt and, in a separate column, itself.
        """
        within_prompt, to_prompt, within_groups = self.pairs
        if not (self.whole_prompt or self.prompt_given):
            within_prompt = self.batch * (self.prompt + 1)
        return within_prompt, to_prompt, within_groups

    @property
    def repeated_keys(self) -> int:
        """Keys that a fused kernel's responses see: the prompt's are repeated for every group."""
        return self.batch * self.groups * (self.prompt + self.length)


@dataclasses.dataclass(frozen=True)
class DeviceModel:
    """The part of a decoder that one device computes with.

    Attributes:
        layers: number of layers.
        hidden: D, width of hidden states.
        inner: F, width of the MLP.
        vocabulary: V, size of the vocabulary.
        heads: H, query heads.
        query_width: H d, width of all query heads together.
        key_width: G d, width of all key heads, and of all value heads.
        head_dim: d, size of a head.
        itemsize: bytes of a value of the compute type.
        remat: "dots" or "full", as `config.model.remat`.
        norms_outputs: whether norms follow attention and MLP.
        gathers_weights: whether weights are stored in parts, on devices that compute with them
            whole.
        fused: whether attention is a fused kernel.
        max_logits: logits held at once.
        lora: the adapters; None where all weights are trained.
        base_dtype: the type that weights are stored in: "float32" without adapters, otherwise as
            `config.model.lora.base`.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    query_width: int
    key_width: int
    head_dim: int
    itemsize: int
    remat: str
    norms_outputs: bool = False
    gathers_weights: bool = False
    fused: bool = False
    max_logits: int = MAX_LOGITS
    lora: Lora | None = None
    base_dtype: str = "float32"

    @classmethod
    def from_decoder(
        cls,
        config: DecoderConfig,
        itemsize: int,
        remat: str,
        fsdp: int = 1,
        tensor: int = 1,
        fused: bool = False,
        max_logits: int = MAX_LOGITS,
        lora: Lora | None = None,
        base_dtype: str = "float32",
    ) -> DeviceModel:
        """Returns the part of a decoder on a mesh; `tensor` splits what it divides."""

        def split(size: int) -> int:
            return size // tensor if size % tensor == 0 else size

        return cls(
            layers=config.num_layers,
            hidden=config.hidden_size,
            inner=split(config.intermediate_size),
            vocabulary=split(config.vocab_size),
            heads=split(config.num_heads),
            query_width=split(config.num_heads * config.head_dim),
            key_width=split(config.num_kv_heads * config.head_dim),
            head_dim=config.head_dim,
            itemsize=itemsize,
            remat=remat,
            norms_outputs="mlp_output_norm" in config.family.norms,
            gathers_weights=fsdp > 1,
            fused=fused,
            max_logits=max_logits,
            lora=lora,
            base_dtype=base_dtype if lora else "float32",
        )

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrix products, without adapters."""
        # Query and output projections, then gate, up and down.
        others = self.hidden * (2 * self.query_width + 3 * self.inner)
        return others + self.key_value_weights

    @property
    def key_value_weights(self) -> int:
        """Those of keys and values, which the last layer computes of all tokens too."""
        return self.hidden * 2 * self.key_width

    @property
    def adapter_weights(self) -> int:
        """Weights of a layer's adapters."""
        hidden, inner, query = self.hidden, self.inner, self.query_width
        products = {
            "query": hidden + query,
            "output": query + hidden,
            "gate": hidden + inner,
            "up": hidden + inner,
            "down": inner + hidden,
        }
        return self._low_rank(products) + self.key_value_adapter_weights

    @property
    def key_value_adapter_weights(self) -> int:
        """Those of the adapters of keys and values."""
        return self._low_rank(dict.fromkeys(("key", "value"), self.hidden + self.key_width))

    def _low_rank(self, products: dict[str, int]) -> int:
        """Sums up rank * (inputs + outputs) of the adapted products."""
        if self.lora is None:
            return 0
        targets = self.lora.targets
        return self.lora.rank * sum(n for name, n in products.items() if name in targets)


def logits_chunk(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the response tokens of a row whose logits are computed at once.

    See models/logprobs.py.
    """
    longest = max(1, model.max_logits // (layout.batch * model.vocabulary))
    chunks = max(1, -(-layout.response_tokens // longest))
    return -(-layout.response_tokens // chunks)
