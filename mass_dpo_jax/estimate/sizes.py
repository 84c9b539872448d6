"""The sizes that a train step's memory and arithmetic are counted from (account.py, flops.py).

Letters as in docs and models: B prompts (here of a micro-batch, on one device), P and R tokens, G
groups of L response places (packed: one group of S), D hidden, F inner, V vocabulary, H heads of K.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.lora import Lora


class Layout(NamedTuple):
    """B rows of a prompt and G groups of L response places each.

    whole: are final hidden states of all the prompt wanted, not of its last token only? Where
      features are pooled over both, that is.
    """

    batch: int
    prompt: int
    groups: int
    length: int
    whole: bool = False

    @property
    def tokens(self) -> int:
        """B (P + G L)."""
        return self.batch * (self.prompt + self.responses)

    @property
    def responses(self) -> int:
        """G L, of one row."""
        return self.groups * self.length

    @property
    def ends(self) -> int:
        """Tokens of which the last layer computes more than keys and values: B (1 + G L)."""
        return self.tokens if self.whole else self.batch * (1 + self.responses)

    @property
    def pairs(self) -> int:
        """Query-key pairs whose scores are computed, masked ones too: B (P^2 + G L P + G L^2)."""
        return sum(self.scores)

    @property
    def scores(self) -> tuple[int, int, int]:
        """Pairs among prompt tokens, of responses with the prompt, and within groups."""
        own = self.responses * self.length
        return tuple(self.batch * n for n in (self.prompt**2, self.responses * self.prompt, own))  # type: ignore[return-value]

    @property
    def end_scores(self) -> tuple[int, int, int]:
        """Those in the last layer, where the prompt's last token sees it and, beside it, itself."""
        prompt, to_prompt, own = self.scores
        return (prompt if self.whole else self.batch * (self.prompt + 1)), to_prompt, own

    @property
    def repeated(self) -> int:
        """Keys of a fused kernel's responses, the prompt's again for every group: B G (P + L)."""
        return self.batch * self.groups * (self.prompt + self.length)


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a decoder on one device: a dimension that `tensor` devices divide is split.

    Attributes:
      layers: how many.
      hidden, inner, vocabulary: D, F, V.
      heads: H; queries, keys: widths H K and KV K of all heads together; size: K.
      itemsize: bytes of the compute type.
      remat: dots | full.
      gathered: are weights split over devices that compute with them whole?
      fused: is attention a fused kernel?
      max_logits: held at once.
      lora: the adapters; None: all weights are trained.
      stored: with LoRA, the type of the other weights (models/frozen.py).
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    queries: int
    keys: int
    size: int
    itemsize: int
    remat: str
    gathered: bool = False
    fused: bool = False
    max_logits: int = MAX_LOGITS
    lora: Lora | None = None
    stored: str = "float32"

    @property
    def adapted(self) -> int:
        """Weights of a layer's adapters: rank (in + out) of every product they add to."""
        d, f, q = self.hidden, self.inner, self.queries
        sides = {"query": d + q, "output": q + d, "gate": d + f, "up": d + f, "down": f + d}
        return self._rank(sides) + self.adapted_keys

    @property
    def adapted_keys(self) -> int:
        """Those of keys and values."""
        return self._rank(dict.fromkeys(("key", "value"), self.hidden + self.keys))

    def _rank(self, sides: dict[str, int]) -> int:
        if self.lora is None:
            return 0
        return self.lora.rank * sum(n for name, n in sides.items() if name in self.lora.targets)

    @property
    def block(self) -> int:
        """Weights of a layer's matrix products: D (2 H K + 2 KV K + 3 F)."""
        return self.hidden * (2 * self.queries + 3 * self.inner) + self.block_keys

    @property
    def block_keys(self) -> int:
        """Those of keys and values, which the last layer too computes of all tokens."""
        return self.hidden * 2 * self.keys


def of_device(
    config: DecoderConfig,
    itemsize: int,
    remat: str,
    fsdp: int = 1,
    tensor: int = 1,
    fused: bool = False,
    max_logits: int = MAX_LOGITS,
    lora: Lora | None = None,
    stored: str = "float32",
) -> Model:
    """The part of a decoder that one device computes with."""

    def part(size: int) -> int:
        return size // tensor if size % tensor == 0 else size

    return Model(
        layers=config.num_layers,
        hidden=config.hidden_size,
        inner=part(config.intermediate_size),
        vocabulary=part(config.vocab_size),
        heads=part(config.num_heads),
        queries=part(config.num_heads * config.head_dim),
        keys=part(config.num_kv_heads * config.head_dim),
        size=config.head_dim,
        itemsize=itemsize,
        remat=remat,
        gathered=fsdp > 1,
        fused=fused,
        max_logits=max_logits,
        lora=lora,
        stored=stored if lora else "float32",
    )


def logits_chunk(m: Model, at: Layout) -> int:
    """Response places of a row whose logits are computed at once, see models/logprobs.py."""
    longest = max(1, m.max_logits // (at.batch * m.vocabulary))
    chunks = max(1, -(-at.responses // longest))
    return -(-at.responses // chunks)
