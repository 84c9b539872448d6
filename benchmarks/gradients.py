r"""How far from the pool's gradient is what n of its negatives give? On a pretrained model.

    python -m benchmarks.gradients --model=DIR --data.name=qasc --data.path=DIR --output=FILE
    python -m benchmarks.gradients --model=RUN --reference=DIR --data.name=qasc --data.path=DIR \
        --output=FILE
    python -m benchmarks.gradients --report --output=docs/results/gradients/qasc-start.jsonl

For some prompts with N = 19 negatives, takes the gradient of every response's log-probability
with respect to all weights, one response at a time, and keeps their products, those of the
features and the log-probabilities: a line of FILE for each prompt. A line that is there is not
computed again. The tables (`--report`) are arithmetic on those lines, see benchmarks/estimators.py.

QASC's pools are a question's own wrong answers, filled up with answers of other questions; LastFM's
are its own. Gradients are reduced by a count sketch: weights are multiplied by random signs and
added up in 2^19 buckets, so that a product of two gradients is that of their sketches, up to an
error of about |x| |y| / sqrt(2^19), 0.14 %. Exact norms are kept beside to show it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import mass_dpo_jax
from benchmarks.gradient_tables import read_prompts, tables
from mass_dpo_jax import cli, config
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.batches import Batch, Shape, make_batch
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers.questions import find_distinct
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection.gram import compute_gram
from mass_dpo_jax.training.prepare import prepare_examples
from mass_dpo_jax.training.scorer import Scorer

BUCKETS = 2**19
POOL = 19
MULTIPLE = 8  # Lengths are rounded up to it.


class Sketch(NamedTuple):
    """A gradient of a response's log-probability.

    Attributes:
        logp: the log-probability, nats.
        buckets: float32 [BUCKETS].
        norm: the exact squared length of the gradient.
    """

    logp: jax.Array
    buckets: jax.Array
    norm: jax.Array


def signs(start: jax.Array | int, size: int, seed: int) -> jax.Array:
    """Pseudo-random signs, float32 [size], of the weights from number `start` on."""
    x = jnp.uint32(start) + jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(0x9E3779B9 * seed)
    # The finalizer of MurmurHash3.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return 1.0 - 2.0 * ((x ^ (x >> 16)) >> 31).astype(jnp.float32)


def sketch(leaves: Sequence[jax.Array], buckets: int, seed: int = 1) -> jax.Array:
    """Adds the entries of all arrays, with random signs, into buckets: float32 [buckets].

    Rows of as many entries as there are buckets are turned by a random number of places each, so
    each bucket has at most one entry of a row, and any two entries of different rows meet with
    probability 1 / buckets. Linear, for arrays of the same shapes.
    """
    total = jnp.zeros(buckets)
    turns = np.random.default_rng(seed)
    start = 0
    for leaf in leaves:
        rows = -(-leaf.size // buckets)
        padded = jnp.pad(leaf.astype(jnp.float32).ravel(), (0, rows * buckets - leaf.size))
        shifts = jnp.asarray(turns.integers(buckets, size=rows))

        def add(
            row: jax.Array, total: jax.Array, x: jax.Array = padded, shifts: jax.Array = shifts,
            start: int = start,
        ) -> jax.Array:  # fmt: skip
            part = jax.lax.dynamic_slice(x, (row * buckets,), (buckets,))
            signed = part * signs(start + row * buckets, buckets, seed)
            return total + jnp.roll(signed, shifts[row])

        total = jax.lax.fori_loop(0, rows, add, total)
        start += rows * buckets
    return total


@jax.jit(static_argnums=0)
def sketch_gradient(scorer: Scorer, params: Any, batch: Batch) -> Sketch:
    """Of the only response of a batch of one row."""

    def logp(params: Any) -> jax.Array:
        return scorer(params, batch).logps[0, 0]

    value, gradient = jax.value_and_grad(logp)(params)
    leaves = jax.tree.leaves(gradient)
    norm = sum(jnp.vdot(x, x) for x in leaves)
    return Sketch(value, sketch(leaves, BUCKETS), jnp.asarray(norm))


def one_response(batch: Batch, candidate: int, size: int) -> Batch:
    """The batch of one row with one of its candidates alone, of `size` tokens at most."""
    lengths = np.asarray(batch.response_lengths)[0]
    begin = int(lengths[:candidate].sum())
    tokens = np.zeros((1, size), np.int32)
    length = int(lengths[candidate])
    tokens[0, :length] = np.asarray(batch.responses)[0, begin : begin + length]
    return batch._replace(
        responses=tokens,
        response_lengths=np.array([[length]], np.int32),
        ref_logps=np.zeros((1, 1), np.float32),
        grades=None,
    )


def fill_pools(rows: Sequence[Example], others: Sequence[str], seed: int) -> list[Example]:
    """The examples with POOL negatives each: their own, then `others` drawn at random."""
    filled = []
    for i, row in enumerate(rows):
        rng = np.random.default_rng([seed, i, 7])
        drawn = [others[k] for k in rng.permutation(len(others))[: 3 * POOL]]
        new = find_distinct([*map(str, row.rejected), *drawn], without=[str(row.chosen)])
        filled.append(dataclasses.replace(row, rejected=new[:POOL], scores=None))
    return filled


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured, and where the lines go.

    Attributes:
        model: the policy, a Hugging Face folder or a run.
        reference: likewise; empty: the policy, as at the start of a training.
        data: the section `config.data`.
        output: the file of the lines.
        prompts: how many prompts.
        seed: draws the prompts and the fill of their pools.
    """

    model: str
    reference: str
    data: dict[str, str]
    output: Path
    prompts: int
    seed: int = 0

    def config(self) -> ConfigDict:
        settings = config.default()
        settings.data.update(**self.data, list_candidates=False, max_test=self.prompts)
        settings.eval.batch_size = 1
        settings.train.micro_batch_size = settings.train.batch_size = 1
        settings.method = "pl_all"
        return settings

    def examples(self) -> list[Example]:
        data = self.config().data
        rows = load_examples(data, "test", self.seed)
        data.update(max_train=4 * self.prompts * POOL)
        others = [str(row.chosen) for row in load_examples(data, "train", self.seed)]
        return fill_pools(rows, others, self.seed)

    def run(self) -> None:
        """Appends the lines that are missing."""
        done = {line["id"] for line in read_prompts(self.output)}
        examples = [row for row in self.examples() if row.id not in done]
        print(f"{len(done)} prompts are there, {len(examples)} to do", flush=True)
        if not examples:
            return
        references = None
        if self.reference:
            references = mass_dpo_jax.load_model(self.reference, self.config()).score(examples)
        model = mass_dpo_jax.load_model(self.model, self.config())
        scores = model.score(examples, features=True)
        features = jnp.asarray(scores.features)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        for row, (example, sketches) in enumerate(zip(examples, self._sketches(model, examples))):
            logps = [float(one.logp) for one in sketches]
            np.testing.assert_allclose(logps, scores.logps[row], atol=2e-3)  # A check of rows.
            buckets = np.stack([np.asarray(one.buckets, np.float64) for one in sketches])
            there = jnp.ones(len(logps) - 1, bool)
            line = {
                "id": example.id,
                "logps": scores.logps[row].tolist(),
                "ref_logps": (references or scores).logps[row].tolist(),
                "norms": [float(one.norm) for one in sketches],
                "gradients": pack(buckets @ buckets.T),
                "features": pack(np.asarray(compute_gram(features[row], there, "none"))),
            }
            with self.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{example.id}: {time.perf_counter() - began:.0f} s", flush=True)
            began = time.perf_counter()

    def _sketches(
        self, model: mass_dpo_jax.Model, examples: Sequence[Example]
    ) -> Iterator[list[Sketch]]:
        """Yields the sketches of all responses of each example."""
        setup = prepare_examples(self.config(), model.policy, {"train": examples})
        tokens, scorer = setup.tokens["train"], setup.program.scorer
        lengths = tokens.response_lengths
        longest = (int(x.max()) for x in (tokens.prompt_lengths, lengths.sum(1), lengths))
        prompt, responses, response = (-(-x // MULTIPLE) * MULTIPLE for x in longest)
        for row in range(len(tokens)):
            shape = Shape(prompt, responses, responses)
            batch = make_batch(tokens, np.array([row]), shape, None)
            ones = (one_response(batch, c, response) for c in range(lengths.shape[1]))
            yield [jax.device_get(sketch_gradient(scorer, model.params, one)) for one in ones]


def pack(values: np.ndarray) -> str:
    """A float32 matrix as text."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def main() -> None:
    if not _OUTPUT.value:
        raise UserError("--output is missing: the file of what is measured")
    output = Path(_OUTPUT.value)
    if not _REPORT.value:
        if not _MODEL.value or not _PATH.value:
            raise UserError("--model and --data.path are missing: what to measure")
        data = {"name": _NAME.value, "path": _PATH.value}
        Bench(_MODEL.value, _REFERENCE.value, data, output, _PROMPTS.value, _SEED.value).run()
    print(tables(output, _BETA.value))


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", "", "The policy: a model's folder or a run.")
    _REFERENCE = flags.DEFINE_string("reference", "", "The reference; empty: the policy itself.")
    _NAME = flags.DEFINE_enum("data.name", "qasc", ["qasc", "lastfm"], "Format of the data.")
    _PATH = flags.DEFINE_string("data.path", "", "Folder of the data.")
    _PROMPTS = flags.DEFINE_integer("prompts", 16, "How many prompts.", lower_bound=2)
    _SEED = flags.DEFINE_integer("seed", 0, "Draws the prompts and fills their pools.")
    _BETA = flags.DEFINE_float("beta", 0.1, "Of the scores.", lower_bound=0.0)
    _OUTPUT = flags.DEFINE_string("output", "", "JSON-lines file, a prompt a line.")
    _REPORT = flags.DEFINE_bool("report", False, "Print the tables of --output, measure nothing.")
    cli.run(main, resumes=True)
