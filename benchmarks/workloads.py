"""What the step's benchmarks run: sizes, batches, weights, and our own step on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from benchmarks import cost
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.batches import Batch, Order, Shape, make_batch, make_buckets
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder
from mass_dpo_jax.models.interfaces import Attention, ScoringRecord
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.response_layout import lay_out_rectangle
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.optimizer import make_optimizer, state_shapes
from mass_dpo_jax.training.scorer import Scorer
from mass_dpo_jax.training.step import Program, TrainState

LASTFM_ROWS = 2000  # Enough for buckets like those of the whole split.
LASTFM_BATCHES = 4  # Timed together: prompts of LastFM have many lengths.


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes. With `lastfm`, lengths are those of real rows instead of prompt, response and pool."""

    batch: int = 4  # B, prompts in a batch.
    prompt: int = 160  # P, tokens.
    response: int = 10  # R.
    pool: int = 20  # N, negatives to choose from.
    negatives: int = 3  # n.
    layout: str = "packed"
    lastfm: bool = False
    layers: int = 6
    width: int = 384
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 1024
    vocabulary: int = 8192
    family: str = "llama"

    @property
    def model(self) -> DecoderConfig:
        return DecoderConfig.from_hf(
            {
                "model_type": self.family,
                "vocab_size": self.vocabulary,
                "hidden_size": self.width,
                "intermediate_size": self.mlp,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.width // self.heads,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "initializer_range": self.width**-0.5,
                "tie_word_embeddings": True,
            },
            "a workload",
        )


WORKLOADS = {
    "W1": Workload(),
    "W2": Workload(lastfm=True),
    "W3": Workload(prompt=128, response=256, pool=7, layout="rectangle"),
}


Kind = TypeVar("Kind", bound=Workload)


def changed(workload: Kind, changes: Sequence[str]) -> Kind:
    """The workload with other sizes, `pool=7` and so on.

    Raises:
      UserError: no such size, or not a number above 0.
    """
    sizes = [f.name for f in dataclasses.fields(Workload) if f.type == "int"]
    for change in changes:
        name, _, value = change.partition("=")
        if name not in sizes or not value.isdecimal() or not int(value):
            raise UserError(
                f"--change={change}: expected NAME=NUMBER, NAME one of {', '.join(sizes)}"
            )
        size: Any = {name: int(value)}
        workload = dataclasses.replace(workload, **size)
    return workload


class Unshared(Scorer):
    """Without what the layouts are for: every response is a row behind its own copy of the prompt.

    Needs layout `packed` and no chunk.
    """

    def __call__(
        self,
        params: Any,
        batch: Batch,
        features: bool = False,
        record: bool = False,
        dropout: Any = None,
    ) -> Any:
        assert dropout is None
        found = super().__call__(params, self._repeated(batch), features, record)
        some = found._replace(record=None)
        shape = batch.response_lengths.shape
        some = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), some)
        return some._replace(record=found.record)

    def replay(
        self,
        params: Any,
        record: ScoringRecord,
        batch: Batch,
        picks: Any = None,
        dropout: Any = None,
    ) -> jax.Array:
        assert picks is None and dropout is None
        found = super().replay(params, record, self._repeated(batch))
        return found.reshape(batch.response_lengths.shape)

    def _repeated(self, batch: Batch) -> Batch:
        lengths = batch.response_lengths
        rows, candidates = lengths.shape
        groups = lay_out_rectangle(batch.responses, lengths, self.max_response)
        return batch._replace(
            prompts=jnp.repeat(batch.prompts, candidates, axis=0),
            prompt_lengths=jnp.repeat(batch.prompt_lengths, candidates),
            responses=groups.tokens.reshape(rows * candidates, -1),
            response_lengths=lengths.reshape(-1, 1),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload with everything that all programs share.

    Attributes:
      model: the decoder.
      config: the package's settings.
      tokens: the rows that batches are of.
      batches: on the device; `ref_logps` are the reference's.
      shapes: theirs.
      params, reference: two models' weights, nested dicts; None without weights.
      mesh: one device; of several, programs can be traced.
      dtype: that ours computes in.
      attention: ours, plain or by a fused kernel.
      max_logits: that ours holds at once.
    """

    workload: Workload
    model: DecoderConfig
    config: ConfigDict
    tokens: Tokens
    batches: list[Batch]
    shapes: list[Shape]
    params: Any
    reference: Any
    mesh: Mesh
    dtype: str = "float32"
    attention: Attention = attention
    max_logits: int = MAX_LOGITS

    @classmethod
    def make(
        cls, workload: Workload, data: str | None = None, tokenizer: str | None = None
    ) -> Case:
        """Random weights and tokens; lengths of LastFM in the folder `data` by a tokenizer's.

        Raises:
          UserError: the data or the tokenizer is not what it should be.
        """
        tokens = _lastfm(workload, data, tokenizer) if workload.lastfm else _random(workload)
        params, other = (_weights(workload.model, seed) for seed in (0, 1))
        case = dataclasses.replace(
            cls.without_weights(workload, tokens),
            params=params,
            # Near the policy, as references are; equal to it, all losses would be log(1 + n).
            reference=jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, params, other),
        )
        scorer = case.program("mass_dpo", "dots").scorer
        for i, batch in enumerate(case.batches):
            placed = jax.device_put(batch, mesh_lib.batch_sharding(case.mesh))
            logps = scorer.logps(case.reference, placed)
            case.batches[i] = placed._replace(ref_logps=logps)
        return case

    @classmethod
    def without_weights(
        cls,
        workload: Workload,
        tokens: Tokens | None = None,
        dtype: str = "float32",
        attention: Attention = attention,
        max_logits: int = MAX_LOGITS,
        mesh: Mesh | None = None,
    ) -> Case:
        """Batches on the host, without reference log-probs; of random tokens, if none are given. On
        this process's first device, if there is no mesh."""
        config = config_lib.default()
        config.num_negatives = workload.negatives
        config.model.layout = workload.layout
        config.train.warmup_ratio = 0.0  # So that the first update is one.
        tokens = _random(workload) if tokens is None else tokens
        order = Order(make_buckets(tokens, workload.negatives), workload.batch, seed=0)
        steps = range(min(LASTFM_BATCHES if workload.lastfm else 1, order.steps_per_epoch))
        return cls(
            workload,
            workload.model,
            config,
            tokens,
            [make_batch(tokens, *order(step), None) for step in steps],
            [order(step)[1] for step in steps],
            None,
            None,
            mesh or mesh_lib.make_mesh(config.mesh, devices=jax.devices()[:1]),
            dtype,
            attention,
            max_logits,
        )

    def program(
        self,
        method: str,
        remat: str,
        shared: bool = True,
        reuse: bool = True,
        at_a_time: int = 0,
    ) -> Program:
        """The package's computations by a method of its; without `shared`, prompts are repeated,
        and nothing is reused. `at_a_time` is `train.responses_at_a_time`."""
        config = self.config.copy_and_resolve_references()
        config.method = method
        lengths = self.tokens.response_lengths
        made = make_method(config, largest_pool=lengths.shape[1] - 1)
        splits = mesh_lib.hidden_splits(self.mesh, self.model.hidden_size)
        graphdef, _ = nnx.split(
            abstract_decoder(self.model, dtype=self.dtype, remat=remat, hidden_shardings=splits),
            nnx.Param,
        )
        chunked = shared and self.workload.layout == "rectangle"
        scorer = (Scorer if shared else Unshared)(
            graphdef=graphdef,
            layout=self.workload.layout if shared else "packed",
            max_response=self.max_response,
            chunk=at_a_time or (1 + made.num_negatives if chunked else None),
            pooling=config.selection.pooling,
            attention=self.attention,
            max_logits=self.max_logits,
        )
        shapes = mesh_lib.param_shapes(self.model, self.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        return Program(scorer, made, shardings, reuse and shared, at_a_time)

    @property
    def max_response(self) -> int:
        return -(-int(self.tokens.response_lengths.max()) // 8) * 8

    def passes(
        self, shape: Shape, shared: bool = True, negatives: int | None = None
    ) -> tuple[cost.Pass, cost.Pass]:
        """What our step sends through the decoder to score the pool, and to train.

        Args:
          negatives: n, if it is not the workload's.
        """
        w, widest = self.workload, self.max_response
        n = w.negatives if negatives is None else negatives
        sizes = (self.tokens.response_lengths.shape[1], 1 + n)  # Of pools and sets.
        if not shared:
            whole, some = (cost.packed(w.batch * size, shape.prompt, widest) for size in sizes)
        elif w.layout == "packed":
            room = shape.responses if n == sizes[0] - 1 else shape.selected
            whole = cost.packed(w.batch, shape.prompt, shape.responses)
            some = cost.packed(w.batch, shape.prompt, room)
        else:
            chunked = -(-sizes[0] // sizes[1]) * sizes[1]  # Pools run in chunks of 1 + n.
            whole = cost.rectangle(w.batch, shape.prompt, chunked, widest)
            some = cost.rectangle(w.batch, shape.prompt, sizes[1], widest)
        return whole, some


class Ours:
    """The package's train step with its state, which every step replaces."""

    def __init__(self, case: Case, program: Program):
        self.case, self.program = case, program
        self._optimizer = make_optimizer(case.config.train, total_steps=10**6)
        everywhere = mesh_lib.replicated_sharding(case.mesh)
        params = jax.tree.map(jnp.copy, case.params)
        start = TrainState(jnp.int32(0), params, self._optimizer.init(params))
        self.state = jax.device_put(start, everywhere)
        self._key = jax.device_put(jax.random.key(0), everywhere)
        self._batches = jax.tree.map(lambda x: x[None], case.batches)

    def step(self, i: int, numbers: np.ndarray | None = None) -> tuple[jax.Array, Any]:
        """An update on batch i, without waiting for it: the negatives used [1, B, n], figures."""
        negatives = None if numbers is None else jnp.asarray(numbers[None], jnp.int32)
        shape = self.case.shapes[i]
        everyone = self.program.method.selection.criterion == "all"
        self.state, used, figures = self.program.train_step(
            self._optimizer,
            self.state,
            self._batches[i],
            negatives,
            self._key,
            shape.responses if everyone else shape.selected,
        )
        return used.candidate_ids, figures


def trace(case: Case, program: Program) -> Any:
    """The train step on the first batch, traced from shapes alone for the case's mesh, whose
    devices need not be there; ready to be lowered and compiled."""
    optimizer, mesh = make_optimizer(case.config.train, 1), case.mesh

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def first_batch() -> Batch:
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], case.batches[0])
        if batch.ref_logps is None:
            batch = batch._replace(ref_logps=jnp.zeros(batch.response_lengths.shape))
        return batch

    everywhere = mesh_lib.replicated_sharding(mesh)
    step, key = placed(jax.eval_shape(lambda: (jnp.int32(0), jax.random.key(0))), everywhere)
    batch = placed(jax.eval_shape(first_batch), mesh_lib.batch_sharding(mesh, leading=1))
    params = mesh_lib.param_shapes(case.model, mesh)
    state = TrainState(step, params, state_shapes(optimizer, params, mesh))
    size = case.shapes[0].selected
    return type(program).train_step.trace(program, optimizer, state, batch, None, key, size)


def _weights(model: DecoderConfig, seed: int) -> Any:
    decoder = Decoder(model, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


def _random(w: Workload) -> Tokens:
    """As many rows as a batch has."""
    rng = np.random.default_rng(0)
    lengths = np.full((w.batch, 1 + w.pool), w.response, np.int32)
    return Tokens(
        ids=[str(i) for i in range(w.batch)],
        prompt_tokens=rng.integers(1, w.vocabulary, w.batch * w.prompt, dtype=np.int32),
        prompt_lengths=np.full(w.batch, w.prompt, np.int32),
        response_tokens=rng.integers(1, w.vocabulary, int(lengths.sum()), dtype=np.int32),
        response_lengths=lengths,
        cut={},
        candidate_ids=np.tile(np.arange(1 + w.pool, dtype=np.int32), (w.batch, 1)),
    )


def _lastfm(w: Workload, data: str | None, tokenizer: str | None) -> Tokens:
    """Training rows with their true lengths; ids are brought into the model's vocabulary."""
    if data is None or tokenizer is None:
        raise UserError("LastFM's lengths need its files and a tokenizer")
    config = config_lib.default()
    config.data.update(name="lastfm", path=data, max_train=LASTFM_ROWS)
    made = load_tokenizer(tokenizer)
    if not made.chat_template:
        config.data.chat_template = "none"
    found = tokenize(load_examples(config.data, "train", 0), made, config.data, progress=False)
    if not found.response_lengths.all():
        raise UserError(f"{data}: pools of several sizes; a benchmark needs rows of one size")
    if found.response_lengths.shape[1] <= w.negatives:
        raise UserError(
            f"{data}: pools of {found.response_lengths.shape[1] - 1} negatives, too few"
        )
    return dataclasses.replace(
        found,
        prompt_tokens=found.prompt_tokens % w.vocabulary,
        response_tokens=found.response_tokens % w.vocabulary,
    )
