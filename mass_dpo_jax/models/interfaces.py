"""Types that the modules of the model share; it imports none of them.

Letters of shapes, also as suffixes of names (`key_BTGd`) in attention.py, fused_attention.py,
shared_prefix.py and replay.py:

    B  examples                     P  tokens of a prompt        H  query heads
    C  candidates of an example     R  tokens of a response      G  key/value heads
    n  picked candidates            S  packed responses          Q  query heads of each, H / G
    L  layers                       E  groups of responses       d  size of a head
    V  vocabulary                   W  tokens of a group         D  width of hidden states
    T  tokens in general            O  tokens whose final hidden states are asked for
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Float

KEY_VALUE = ("key", "value")  # Projections that the last layer computes for all tokens, too.


class LayerKinds(NamedTuple):
    """Which kind each of some layers is of, [L]; or one of them, a scalar each.

    Attributes:
        number: which layer it is, int, from 0.
        has_positions: whether queries and keys are rotated by their positions.
        is_local: whether tokens see no more than `DecoderConfig.window` tokens, and are rotated by
            the base `Rope.local_theta` where there is one.
    """

    number: Array
    has_positions: Array
    is_local: Array


class Limits(NamedTuple):
    """The limits of a layer's attention.

    Attributes:
        window: the tokens that each sees, itself included; None: all. Static.
        is_local: whether that is so in this layer: a scalar.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap); None: they stay. Static.
    """

    window: int | None = None
    is_local: Array | bool = True
    soft_cap: float | None = None

    def reach(self, distance: int) -> bool:
        """Whether tokens see all that are less than `distance` positions before them."""
        return self.window is None or self.window >= distance

    def show(self, distances: Array) -> Array:
        """Returns whether a token sees those that are so many positions before it."""
        assert self.window is not None
        return (distances < self.window) | ~jnp.asarray(self.is_local)


NO_LIMITS = Limits()


@runtime_checkable
class Attend(Protocol):
    """One layer's attention. The caller supplies the attention pattern."""

    def __call__(
        self, query: Array, key: Array, value: Array, layer_input: Any, limits: Limits, /
    ) -> tuple[Array, Any]:
        """Attends with queries [B, O, H, d] to keys and values [B, T, G, d].

        Args:
            query: queries, already scaled by 1 / sqrt(d); O = T unless there are `OutputTokens`.
            key: keys of all tokens.
            value: values of all tokens.
            layer_input: this layer's slice of what was passed to `Decoder.__call__`, or None.
            limits: how far back tokens see in this layer, and how high scores are.

        Returns:
            The attended values [B, O, H, d], and what to keep of this layer.
        """
        ...


@runtime_checkable
class Attention(Protocol):
    """An implementation: the module attention.py, or a `FusedAttention`."""

    def attend_causally(
        self,
        query: Array,
        key: Array,
        value: Array,
        layer_input: Any = None,
        limits: Limits = NO_LIMITS,
        /,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Lets each token attend to itself and those before it; also returns keys and values."""

    def make_response_attend(
        self, prompt_lengths: Array, segments: Array, offsets: Array, /
    ) -> Attend:
        """Returns how tokens of responses attend: to their prompt, and within their response."""


class OutputTokens(NamedTuple):
    """The tokens whose final hidden states are asked for: one of each row, and all from `start`.

    For all others the last layer computes only keys and values.

    Attributes:
        first: int32 [B], index of the one.
        start: static, index of the first of the others.
        attend: the last layer's attention, from these O = 1 + T - start queries to all T keys.
    """

    first: Array
    start: int
    attend: Attend

    def gather(self, x: Array) -> Array:
        """Takes these tokens out of [B, T, size]: [B, O, size]."""
        first = jnp.take_along_axis(x, self.first[:, None, None], axis=1, mode="clip")
        return jnp.concatenate([first, x[:, self.start :]], axis=1)


class LayerRecord(NamedTuple):
    """What a forward pass through the layers leaves for replay.py.

    Attributes:
        inputs: [L - 1, B, T, D], inputs of all layers but the last.
        projections: [L - 1, B, T, ...] by name; none with remat "full".
        last_input: [B, T, D], input of the last layer.
        last_projections: the last layer's [B, T, ...] of `KEY_VALUE`, [B, O, ...] of the others.
        output: [B, O, D], output of the last layer, before the final norm.
    """

    inputs: Array
    projections: dict[str, Array]
    last_input: Array
    last_projections: dict[str, Array]
    output: Array

    def restrict_to(self, outputs: OutputTokens) -> LayerRecord:
        """Returns the record of all tokens as if only `outputs` had been asked for."""
        projections = {
            name: x if name in KEY_VALUE else outputs.gather(x)
            for name, x in self.last_projections.items()
        }
        return self._replace(last_projections=projections, output=outputs.gather(self.output))


class ScoringRecord(NamedTuple):
    """What `shared_prefix.score` leaves for `replay.replay`.

    Attributes:
        layers: the decoder's part.
        logps: log-probability of every response token, float32.
    """

    layers: LayerRecord
    logps: Float[Array, "B E*W"]


class HiddenShardings(NamedTuple):
    """How hidden states [B * T, D] are split over devices.

    Attributes:
        embedded: their sharding as they leave the embedding table: along D, like the table.
        stream: their sharding between layers: whole rows, like prompts.
    """

    embedded: NamedSharding
    stream: NamedSharding
