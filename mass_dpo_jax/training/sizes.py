"""The sizes that a train step's memory and arithmetic are counted from (account.py, flops.py).

Letters as in docs and models: B prompts (here of a micro-batch, on one device), P and R tokens, G
groups of L response places (packed: one group of S), D hidden, F inner, V vocabulary, H heads of K.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mass_dpo_jax.models.adapters import Lora
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.logprobs import MAX_LOGITS


class Layout(NamedTuple):
    """B rows of a prompt and G groups of L response places each."""

    batch: int
    prompt: int
    groups: int
    length: int

    @property
    def tokens(self) -> int:
        """B (P + G L)."""
        return self.batch * (self.prompt + self.responses)

    @property
    def responses(self) -> int:
        """G L, of one row."""
        return self.groups * self.length

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
      remat: none | dots | full.
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
    def adapted(self) -> tuple[int, int]:
        """Of a layer's adapters: weights, rank (in + out); and values of a token, rank."""
        if self.lora is None:
            return 0, 0
        into, out = self._sides()
        return self.lora.rank * (into + out), self.lora.rank * len(self.lora.targets)

    @property
    def added(self) -> int:
        """Values of a token that adapters add to products of a layer, but the last."""
        return 0 if self.lora is None else self._sides("down")[1]

    def _sides(self, without: str = "") -> tuple[int, int]:
        """Sizes of the adapted products of a layer, summed: in, out."""
        d, f, q, kv = self.hidden, self.inner, self.queries, self.keys
        sizes = {"query": (d, q), "key": (d, kv), "value": (d, kv), "output": (q, d)}
        sizes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
        assert self.lora is not None
        found = [sizes[name] for name in self.lora.targets if name != without]
        return sum(into for into, _ in found), sum(out for _, out in found)

    @property
    def block(self) -> int:
        """Weights of a layer's matrix products: D (2 H K + 2 KV K + 3 F)."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)


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


def replayed(m: Model) -> Model:
    """As whose backward pass that from a record counts: attention, at least, is computed again."""
    return dataclasses.replace(m, remat="full" if m.remat == "full" else "dots")


def logits_chunk(m: Model, at: Layout) -> int:
    """Response places of a row whose logits are computed at once, see models/logprobs.py."""
    longest = max(1, m.max_logits // (at.batch * m.vocabulary))
    chunks = max(1, -(-at.responses // longest))
    return -(-at.responses // chunks)
