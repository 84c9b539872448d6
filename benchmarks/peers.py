"""The steps that people run today in PyTorch, on transformers' models. Needs PyTorch.

Written as a careful user would: rows padded on the right to the batch's longest, so that causal
attention needs no mask and runs in its fused kernel; the final norm's output is cut to response
positions before the projection to the vocabulary; fused AdamW; what a data loader's worker would
prepare (`collate`) is not part of a step. In float32 on the CPU, or on a GPU with the model in
float32 and autocast to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.weights import list_entries

# At once, where no gradient is needed: on a CPU, and as ours on a GPU.
MAX_LOGITS, GPU_MAX_LOGITS = 2**24, 2**27
MASKED = torch.finfo(torch.float32).min


def to_torch(config: DecoderConfig, params: Any, device: str = "cpu") -> Any:
    """transformers' model with our weights (nested dicts of arrays)."""
    model = random_torch(config, "cpu")
    state = {}
    for entry in list_entries(config):
        value = np.asarray(_at(params, entry.path))
        layers = list(value) if entry.is_stacked else [value]
        for name, layer in zip(entry.list_names(config), layers, strict=True):
            state[name] = torch.tensor(layer.T if entry.transposed else layer).contiguous()
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.to(device)


def random_torch(config: DecoderConfig, device: str) -> Any:
    """transformers' model with random weights, float32, made where they stay."""
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**config.to_hf()), attn_implementation="sdpa"
        )
    return model.train()


def from_torch(config: DecoderConfig, model: Any) -> dict[tuple[str, ...], np.ndarray]:
    """The model's weights by our names."""
    state = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    found = {}
    for entry in list_entries(config):
        layers = [state[name] for name in entry.list_names(config)]
        layers = [layer.T if entry.transposed else layer for layer in layers]
        found[entry.path] = np.stack(layers) if entry.is_stacked else layers[0]
    return found


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


class Rows(NamedTuple):
    """Prompts followed by one response each, padded on the right: M rows of T tokens.

    tokens: int64 [M, T].
    before: int64 [K], where in M * T the hidden states are that predict the K response tokens.
    targets: int64 [K], those tokens.
    owner: int64 [K], which response each belongs to, 0..M-1 (of `Packed`: 0..B * C-1).
    """

    tokens: Tensor
    before: Tensor
    targets: Tensor
    owner: Tensor


class Packed(NamedTuple):
    """Prompts followed by all their responses, end to end: B rows of T tokens.

    mask: float32 [B, 1, T, T], to be added to the scores.
    positions: int64 [B, T].
    """

    rows: Rows
    mask: Tensor
    positions: Tensor


class Pool:
    """A batch's prompts and candidates, as tensors.

    Args:
      batch: as ours; every candidate has to be there.
      device: where all tensors are.
    """

    def __init__(self, batch: Batch, device: str = "cpu"):
        prompts, responses = np.asarray(batch.prompts), np.asarray(batch.responses)
        self.prompts = np.asarray(batch.prompt_lengths).astype(np.int64)
        self.lengths = np.asarray(batch.response_lengths).astype(np.int64)
        if not self.lengths.all():
            raise ValueError("a candidate is missing: the peers need full pools")
        self.reference = torch.tensor(np.asarray(batch.ref_logps), device=device)
        shape = self.lengths.shape
        width = int((self.prompts[:, None] + self.lengths).max())
        tokens = np.zeros((*shape, width), np.int64)
        for b, prompt in enumerate(self.prompts):
            at = 0
            for c, length in enumerate(self.lengths[b]):
                tokens[b, c, :prompt] = prompts[b, :prompt]
                tokens[b, c, prompt : prompt + length] = responses[b, at : at + length]
                at += length
        self.tokens = torch.tensor(tokens, device=device)
        self._prompts, self._lengths = (
            torch.tensor(x, device=device) for x in (self.prompts, self.lengths)
        )

    def rows(self, candidates: Tensor) -> Rows:
        """Some candidates int64 [B, K] of each prompt, a row each."""
        lengths = self._lengths.gather(1, candidates).reshape(-1)
        prompts = self._prompts.repeat_interleave(candidates.shape[1])
        width = int((prompts + lengths).max())
        which = candidates[..., None].expand(-1, -1, width)
        tokens = self.tokens[..., :width].gather(1, which).reshape(-1, width)
        places = torch.arange(width, device=tokens.device)
        real = (places >= prompts[:, None]) & (places < (prompts + lengths)[:, None])
        at = real.reshape(-1).nonzero()[:, 0]
        return Rows(tokens, at - 1, tokens.reshape(-1)[at], at // width)

    def packed(self, candidates: Tensor) -> Packed:
        """Some candidates int64 [B, K] of each prompt, behind one copy of it."""
        chosen, device = candidates.cpu().numpy(), self.tokens.device
        known = self.tokens.cpu().numpy()
        batch, count = chosen.shape
        lengths = np.take_along_axis(self.lengths, chosen, 1)
        width = int((self.prompts + lengths.sum(1)).max())
        tokens, positions = np.zeros((2, batch, width), np.int64)
        segments = np.full((batch, width), -1)  # Of padding; the prompt is 0.
        before, owner = [], []
        for b, prompt in enumerate(self.prompts):
            tokens[b, :prompt] = known[b, 0, :prompt]
            positions[b, :prompt], segments[b, :prompt] = np.arange(prompt), 0
            at = prompt
            for k, length in enumerate(lengths[b]):
                piece = slice(at, at + length)
                tokens[b, piece] = known[b, chosen[b, k], prompt : prompt + length]
                positions[b, piece] = np.arange(prompt, prompt + length)
                segments[b, piece] = k + 1
                before += [
                    b * width + prompt - 1,
                    *range(b * width + at, b * width + at + length - 1),
                ]
                owner += [b * count + k] * length
                at += length
        seen = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        seen &= np.tri(width, dtype=bool)
        mask = torch.where(torch.tensor(seen, device=device)[:, None], 0.0, MASKED)
        real = torch.tensor(segments > 0, device=device)
        ids = torch.tensor(tokens, device=device)
        places, owners = (torch.tensor(x, device=device) for x in (before, owner))
        rows = Rows(ids, places, ids[real], owners)
        return Packed(rows, mask, torch.tensor(positions, device=device))


def hidden_states(model: Any, inputs: Rows | Packed) -> Tensor:
    """After the final norm, [M * T, D]."""
    if isinstance(inputs, Packed):
        found = model.model(
            input_ids=inputs.rows.tokens,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            use_cache=False,
        )
    else:
        found = model.model(input_ids=inputs.tokens, use_cache=False)
    return found.last_hidden_state.flatten(0, 1)


def logps(model: Any, hidden: Tensor, rows: Rows, count: int) -> Tensor:
    """Summed over each of `count` responses' tokens: float32 [count]."""
    states = hidden.index_select(0, rows.before)
    most = MAX_LOGITS if hidden.device.type == "cpu" else GPU_MAX_LOGITS
    whole = torch.is_grad_enabled()
    size = len(states) if whole else max(1, most // model.config.vocab_size)
    parts = [
        -functional.cross_entropy(model.lm_head(part), targets, reduction="none")
        for part, targets in zip(states.split(size), rows.targets.split(size), strict=True)
    ]
    return torch.zeros(count, device=hidden.device).index_add(0, rows.owner, torch.cat(parts))


def plackett_luce(ratios: Tensor, beta: float) -> Tensor:
    """S-DPO's loss of log-ratios [B, 1 + n], the chosen response first, by log-sum-exp."""
    scores = beta * (ratios[:, 1:] - ratios[:, :1])
    return functional.softplus(torch.logsumexp(scores, dim=1)).mean()


class Peer:
    """A policy that trains on n negatives of each prompt.

    Args:
      model: the policy; its weights are changed.
      beta, learning_rate, clip: as ours.
      reference: a model to run on the same rows; None: the pool's log-probs are looked up.
      shared: prompts once, their responses behind them under a mask.
      dtype: to multiply in (autocast); None: the weights' own.
    """

    def __init__(
        self,
        model: Any,
        beta: float,
        learning_rate: float,
        clip: float,
        reference: Any = None,
        shared: bool = False,
        dtype: torch.dtype | None = None,
    ):
        self._device = next(model.parameters()).device
        self._dtype = dtype
        self.model, self.reference, self.beta, self.shared = model, reference, beta, shared
        self._clip = clip
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def collate(self, pool: Pool, numbers: np.ndarray) -> tuple[Rows | Packed, Tensor]:
        """Inputs and reference log-probs [B, 1 + n] for negatives int [B, n], counted from 1."""
        candidates = torch.tensor(np.pad(numbers, ((0, 0), (1, 0))), device=self._device).long()
        return self._inputs(pool, candidates)

    def _inputs(self, pool: Pool, candidates: Tensor) -> tuple[Rows | Packed, Tensor]:
        inputs = pool.packed(candidates) if self.shared else pool.rows(candidates)
        return inputs, pool.reference.gather(1, candidates)

    def loss(self, inputs: Rows | Packed, reference: Tensor) -> Tensor:
        """The mean over prompts."""
        rows = inputs.rows if isinstance(inputs, Packed) else inputs
        with self.autocast():
            found = logps(self.model, hidden_states(self.model, inputs), rows, reference.numel())
        if self.reference is not None:
            with torch.no_grad(), self.autocast():
                hidden = hidden_states(self.reference, inputs)
                reference = logps(self.reference, hidden, rows, reference.numel()).reshape(
                    reference.shape
                )
        return plackett_luce(found.reshape(reference.shape) - reference, self.beta)

    def step(self, inputs: Rows | Packed, reference: Tensor) -> float:
        """One update; the norm of its gradient."""
        return self.steps([(inputs, reference)])

    def steps(self, parts: Sequence[tuple[Rows | Packed, Tensor]]) -> float:
        """One update on a batch that comes in equal parts, for less memory."""
        for inputs, reference in parts:
            (self.loss(inputs, reference) / len(parts)).backward()
        return self.update()

    def update(self) -> float:
        """With the gradient that is there; its norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)


class MassDpo(Peer):
    """The paper's step: scores the whole pool, chooses with d x d inverses, trains on the sets."""

    def choose(self, pool: Pool, everyone: Rows, n: int, ridge: float) -> Tensor:
        """Algorithm 1 at the current policy: int64 [B, n], negatives counted from 1."""
        with torch.no_grad():
            shape, device = pool.reference.shape, self._device
            with self.autocast():
                hidden = hidden_states(self.model, everyone)
                found = logps(self.model, hidden, everyone, pool.reference.numel()).reshape(shape)
            # The hidden states of the response tokens themselves come one after those before them.
            sums = torch.zeros(pool.reference.numel(), hidden.shape[1], device=device).index_add(
                0, everyone.owner, hidden.index_select(0, everyone.before + 1).float()
            )
            lengths = torch.tensor(pool.lengths, device=device)[..., None]
            features = sums.reshape(*shape, -1) / lengths
            rewards = self.beta * (found - pool.reference)
            return algorithm_1(features[:, 1:], rewards[:, 1:] - rewards[:, :1], n, ridge) + 1

    def select_and_step(self, pool: Pool, everyone: Rows, n: int, ridge: float) -> Tensor:
        """One update on negatives chosen before it; those negatives."""
        return self.select_and_steps([(pool, everyone)], n, ridge)[0]

    def select_and_steps(
        self, parts: Sequence[tuple[Pool, Rows]], n: int, ridge: float
    ) -> list[Tensor]:
        """The same on a batch that comes in equal parts."""
        chosen = []
        for pool, everyone in parts:
            chosen.append(self.choose(pool, everyone, n, ridge))
            loss = self.loss(*self._inputs(pool, functional.pad(chosen[-1], (1, 0))))
            (loss / len(parts)).backward()
        self.update()
        return chosen


def algorithm_1(features: Tensor, scores: Tensor, n: int, ridge: float) -> Tensor:
    """The paper's selection as it is written, for all prompts at once: int64 [B, n].

    v_i = sqrt(p_i) (h_i - sum_j p_j h_j), H_0 = ridge I; n times the largest v' H^-1 v, and
    H^-1 <- H^-1 - u u' / (1 + v' u) with u = H^-1 v (Sherman-Morrison).

    Args:
      features: [B, N, D].
      scores: [B, N].
    """
    weights = scores.softmax(1)[..., None]
    vectors = weights.sqrt() * (features - (weights * features).sum(1, keepdim=True))
    device = features.device
    inverse = torch.eye(features.shape[-1], device=device) / ridge
    inverse = inverse.repeat(len(features), 1, 1)
    free = torch.ones_like(scores, dtype=torch.bool)
    rows, picks = torch.arange(len(features), device=device), []
    for _ in range(n):
        gains = ((vectors @ inverse) * vectors).sum(-1)
        best = gains.masked_fill(~free, -torch.inf).argmax(1)
        free[rows, best] = False
        picks.append(best)
        vector = vectors[rows, best]
        moved = torch.einsum("bde,be->bd", inverse, vector)
        gain = (vector * moved).sum(1)
        inverse.baddbmm_(moved[:, :, None], -moved[:, None, :] / (1 + gain)[:, None, None])
    return torch.stack(picks, 1)
