r"""How long does selection take? Against the paper's inverses, other libraries, and its own floor.

    python -m benchmarks.select --output=select.json
    python -m benchmarks.select --large         # also pools of 10,000 and 1,000,000

Small pools are what one training step selects from: B prompts with a chosen response and N
negatives each. Peers, in float32: `inverses` is the paper as written, H^-1 [D, D] with an update
for each choice (of so few prompts as --paper_prompts says, its time multiplied); `cholesky` the
incremental Cholesky factorisation of each prompt's Gram matrix (fast greedy MAP); `submodlib` its
LogDeterminantFunction on the same Gram matrix (`pip install submodlib-py`). The floor is the
product of the features with themselves, nothing subtracted and nothing chosen.

Large pools are a whole catalogue. `low-rank` is incremental Cholesky without an N x N matrix: a
product of all N design vectors with one vector for each choice; `dense` is the same in JAX.
`Touched` is the share of those N rows for each choice that ours reads instead.

Every program's picks are compared with ours before anything is timed. Ratios are medians, with
quartiles, over rounds in which each program runs once. NumPy has as many threads as its library
takes by default (OPENBLAS_NUM_THREADS).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from benchmarks import machine
from mass_dpo_jax import cli, selection
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings, catalogue, sharded_search, shards

RIDGE = Settings().ridge
# In other words than a tie: sums in another order, and gains that are a difference of large ones.
CLOSE = 1e-4
OURS, FLOOR = "ours", "floor"
Picks = tuple[np.ndarray, np.ndarray]  # Indices and gains, [prompts, n] each.


class Program(NamedTuple):
    """Something to be timed.

    Attributes:
      run: waits for its result.
      picks: of its result; None for a floor, which chooses nothing.
      times: what to multiply its time with, where it does a part of the work only.
    """

    run: Callable[[], Any]
    picks: Callable[[Any], Picks] | None
    times: float = 1.0


class Case(NamedTuple):
    """A kind of large pool: directions with standard deviations k^-decay, scores N(0, spread^2)."""

    name: str
    decay: float
    spread: float
    ridge: float


CASES = (
    Case("scores N(0, 1)", 0.0, 1.0, RIDGE),
    Case("uniform weights", 0.0, 0.0, RIDGE),
    # Gains fall by orders of magnitude, so bounds are loose.
    Case("uniform weights, directions 1/k, ridge 1e-6", 1.0, 0.0, 1e-6),
)

# ---------------------------------------------------------------- NumPy


def design_vectors(h: np.ndarray, scores: np.ndarray, ridge: float) -> np.ndarray:
    """Algorithm 1's, over the ridge's root: float32 [N, D]."""
    p = np.exp(scores - scores.max())
    p /= p.sum()
    v = h - p @ h
    v *= np.sqrt(p / ridge, dtype=np.float32)[:, None]
    return v


def inverses(v: np.ndarray, n: int) -> Picks:
    """The paper as written: v' H^-1 v of everyone, H^-1 updated after each choice."""
    inverse = np.eye(v.shape[1], dtype=np.float32)
    free = np.ones(len(v), bool)
    indices, gains = [], []
    for k in range(n):
        gain = np.where(free, np.einsum("id,id->i", v @ inverse, v), -1.0)
        best = int(gain.argmax())
        indices.append(best)
        gains.append(gain[best])
        free[best] = False
        if k + 1 < n:
            u = inverse @ v[best]
            inverse -= np.outer(u / (1 + gain[best]), u)
    return np.array(indices), np.array(gains)


def cholesky(gram: np.ndarray, n: int) -> Picks:
    """Greedy by incremental Cholesky factorisation of I + G."""
    columns = np.zeros((n, len(gram)), np.float32)
    gain = np.diag(gram).copy()
    indices, gains = [], []
    for k in range(n):
        best = int(gain.argmax())
        indices.append(best)
        gains.append(gain[best])
        column = gram[best] - columns[:k, best] @ columns[:k]
        columns[k] = column / np.sqrt(1 + gain[best])
        gain -= columns[k] ** 2
        gain[best] = -1.0
    return np.array(indices), np.array(gains)


def low_rank(h: np.ndarray, scores: np.ndarray, n: int, ridge: float) -> Picks:
    """The same without the Gram matrix: its columns are products with n vectors."""
    v = design_vectors(h, scores, ridge)
    gain = np.einsum("id,id->i", v, v)
    inverse = np.zeros((n, v.shape[1]), np.float32)
    indices, gains = [], []
    for k in range(n):
        best = int(gain.argmax())
        indices.append(best)
        gains.append(gain[best])
        w = v[best] - (inverse[:k] @ v[best]) @ inverse[:k]
        inverse[k] = w / np.sqrt(1 + gain[best])
        column = v @ inverse[k]
        gain -= column * column
        gain[best] = -1.0
    return np.array(indices)[None], np.array(gains)[None]


def submodlib_greedy() -> Callable[[np.ndarray, int], Picks] | None:
    """The same by submodlib; None where that is not installed."""
    try:
        from submodlib import LogDeterminantFunction
    except ImportError:
        return None

    def choose(gram: np.ndarray, n: int) -> Picks:
        function = LogDeterminantFunction(n=len(gram), mode="dense", lambdaVal=1.0, sijs=gram)
        found = function.maximize(
            budget=n, optimizer="NaiveGreedy", stopIfZeroGain=False, stopIfNegativeGain=False,
            verbose=False, show_progress=False,
        )  # fmt: skip
        indices, growth = zip(*found, strict=True)
        return np.array(indices), np.expm1(growth)

    return choose


def each(
    choose: Callable[[np.ndarray, np.ndarray], Picks], h: np.ndarray, scores: np.ndarray
) -> Picks:
    """A choice for every prompt: of features [B, C, D] and scores [B, N]."""
    found = [choose(x[1:], s) for x, s in zip(h, scores, strict=True)]
    return np.stack([x for x, _ in found]), np.stack([x for _, x in found])


# ---------------------------------------------------------------- JAX


def _jax_picks(found: Any) -> Picks:
    return np.atleast_2d(found.indices), np.atleast_2d(found.gains)


@functools.partial(jax.jit, static_argnums=(2, 3))
def select_batch(h: jax.Array, scores: jax.Array, n: int, how: Settings) -> selection.Selection:
    """What a training step does with features [B, C, D] and scores [B, N]."""
    mask = jnp.ones(scores.shape, bool)
    keys = jax.random.split(jax.random.key(0), len(h))
    return selection.select(
        selection.Pool(selection.compute_grams(h, mask, how), scores, mask, keys), n, how
    )


@jax.jit
def batched_product(h: jax.Array) -> jax.Array:
    return jnp.einsum("bid,bjd->bij", h, h, precision=lax.Precision.HIGHEST)


@jax.jit
def product_in_turns(h: jax.Array) -> jax.Array:
    return lax.map(lambda x: jnp.einsum("id,jd->ij", x, x, precision=lax.Precision.HIGHEST), h)


@functools.partial(jax.jit, static_argnums=2)
def dense(h: jax.Array, scores: jax.Array, n: int, ridge: float) -> selection.Selection:
    """`low_rank` in JAX."""
    p = jax.nn.softmax(scores)
    v = jnp.sqrt(p / ridge)[:, None] * (h - p @ h)

    def step(k: jax.Array, state: tuple) -> tuple:
        gain, inverse, indices, gains = state
        best = jnp.argmax(gain)
        w = (v[best] - (inverse @ v[best]) @ inverse) / jnp.sqrt(1 + gain[best])
        after = (gain - (v @ w) ** 2).at[best].set(-1.0)
        return after, inverse.at[k].set(w), indices.at[k].set(best), gains.at[k].set(gain[best])

    start = jnp.sum(v**2, axis=1), jnp.zeros((n, h.shape[1])), jnp.zeros(n, int), jnp.zeros(n)
    _, _, indices, gains = lax.fori_loop(0, n, step, start)
    return selection.Selection(indices, jnp.ones(n, bool), gains, jnp.zeros(n))


# ---------------------------------------------------------------- measuring


def check_same(name: str, theirs: Picks, ours: Picks) -> None:
    """Raises UserError unless picks are the same, up to the first tie of a prompt.

    Args:
      theirs: of as many of the first prompts as they chose for.
    """
    for prompt, (index, gain, own, own_gain) in enumerate(zip(*theirs, *ours, strict=False)):
        differs = np.append(np.flatnonzero(index != own), len(own))[0]
        apart = np.abs(gain - own_gain)[: differs + 1]
        if (apart > CLOSE * np.abs(own_gain)[: differs + 1]).any():
            raise UserError(
                f"{name}: prompt {prompt}, expected picks {own.tolist()} with gains "
                f"{own_gain.tolist()}, got {index.tolist()} with {gain.tolist()}"
            )


def compare(programs: Mapping[str, Program], rounds: int) -> dict[str, Any]:
    """Milliseconds of every program, and their times over ours, with quartiles over rounds."""
    found = {name: x.picks(x.run()) for name, x in programs.items() if x.picks}
    for name, picks in found.items():
        check_same(name, picks, found[OURS])
    seconds = machine.measure({name: x.run for name, x in programs.items()}, rounds)
    seconds = {name: x * programs[name].times for name, x in seconds.items()}
    return {
        name: {
            "milliseconds": round(1e3 * float(np.median(x)), 3),
            "over_ours": machine.ratio(x, seconds[OURS])._asdict(),
            "ours_over": machine.ratio(seconds[OURS], x)._asdict(),
        }
        for name, x in seconds.items()
    }


def small_pools(
    prompts: int, candidates: int, width: int, n: int, paper_prompts: int
) -> dict[str, Program]:
    """Programs that choose n of candidates - 1 negatives for every prompt."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((prompts, candidates, width), dtype=np.float32)
    # Hidden states have more in common than what they differ in.
    h += 3 * rng.standard_normal(width, dtype=np.float32)
    scores = rng.standard_normal((prompts, candidates - 1), dtype=np.float32)
    on_device, their_scores = jnp.asarray(h), jnp.asarray(scores)

    def vectors(x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return design_vectors(x, s, RIDGE)

    def gram(x: np.ndarray, s: np.ndarray) -> np.ndarray:
        v = vectors(x, s)
        return v @ v.T

    def ready(program: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(program(*args))

    few = slice(min(paper_prompts, prompts))
    paper = functools.partial(each, lambda x, s: inverses(vectors(x, s), n), h[few], scores[few])
    fast = functools.partial(each, lambda x, s: cholesky(gram(x, s), n), h, scores)
    programs = {
        OURS: Program(ready(select_batch, on_device, their_scores, n, Settings()), _jax_picks),
        f"{FLOOR}: product, batched": Program(ready(batched_product, on_device), None),
        f"{FLOOR}: product, prompt by prompt": Program(ready(product_in_turns, on_device), None),
        "numpy inverses": Program(paper, lambda found: found, prompts / len(h[few])),
        "numpy cholesky": Program(fast, lambda found: found),
    }
    if library := submodlib_greedy():
        theirs = functools.partial(each, lambda x, s: library(gram(x, s), n), h, scores)
        programs["submodlib"] = Program(theirs, lambda found: found)
    return programs


def large_pool(size: int, width: int, n: int, case: Case) -> tuple[dict[str, Program], float]:
    """Programs that choose n of one pool, and the share of it that ours touches at a choice."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((size, width), dtype=np.float32)
    h *= np.arange(1, width + 1, dtype=np.float32) ** -case.decay
    scores = rng.standard_normal(size, dtype=np.float32) * np.float32(case.spread)
    mesh = shards.make_mesh()
    arrays = [shards.shard_rows(mesh, x) for x in (h, scores, np.ones(size, bool))]
    static = n, "pool_fisher", "none", mesh
    scale, unused = jnp.float32(1 / case.ridge), jnp.zeros(width)
    on_device, their_scores = jnp.asarray(h), jnp.asarray(scores)

    def ours() -> tuple[selection.Selection, jax.Array]:
        return jax.block_until_ready(catalogue.search_greedily(*arrays, unused, scale, *static))

    sweeps = int(ours()[1])
    room = sharded_search.shortlist_size(size // mesh.size) * mesh.size
    touched = (room * n + (sweeps - 1) * size) / (size * n)  # The first is of norms only.
    programs = {
        OURS: Program(ours, lambda found: _jax_picks(found[0])),
        "numpy low-rank": Program(lambda: low_rank(h, scores, n, case.ridge), lambda found: found),
        "JAX dense": Program(
            lambda: jax.block_until_ready(dense(on_device, their_scores, n, case.ridge)), _jax_picks
        ),
    }
    return programs, touched


# ---------------------------------------------------------------- the command


def small_table(rows: Mapping[str, Any], paper_prompts: int) -> str:
    lines = []
    for name, row in rows.items():
        if name == "numpy inverses":
            name += f" ({paper_prompts} prompts, scaled)"
        ratio, inverse = (machine.Ratio(**row[key]) for key in ("over_ours", "ours_over"))
        lines.append([name, f"{row['milliseconds']:.2f}", str(ratio), str(inverse)])
    if "submodlib" not in rows:
        lines.append(["submodlib", "not installed", "", ""])
    return machine.table(["program", "ms", "over ours", "ours over it"], lines)


def large_table(results: Mapping[str, Any]) -> str:
    lines = []
    for case, found in results.items():
        for name, row in found["programs"].items():
            touched = f"{100 * found['touched']:.1f} %" if name == OURS else "100 %"
            ratio = machine.Ratio(**row["over_ours"])
            lines.append([case, name, f"{row['milliseconds']:.1f}", str(ratio), touched])
    return machine.table(["pool", "program", "ms", "over ours", "touched"], lines)


def main() -> None:
    sizes = flags.FLAGS.candidates, flags.FLAGS.width, flags.FLAGS.n
    if sizes[2] > sizes[0] - 2:
        raise UserError(f"--n={sizes[2]}: expected at most --candidates - 2 = {sizes[0] - 2}")
    batches = [_number(word) for word in _PROMPTS.value]
    busy = machine.check_quiet(_ALLOW_BUSY.value)
    figures: dict[str, Any] = {"small": {}, "large": {}}
    for prompts in batches:
        paper_prompts = min(flags.FLAGS.paper_prompts, prompts)
        programs = small_pools(prompts, *sizes, paper_prompts)
        found = compare(programs, flags.FLAGS.rounds)
        name = f"{prompts} x {sizes[0]} x {sizes[1]}, n = {sizes[2]}"
        figures["small"][name] = {"paper_prompts": paper_prompts, "programs": found}
        print(f"\n{name} (goals: inverses over ours 2000, ours over the faster floor 1.3)\n")
        print(small_table(found, paper_prompts), flush=True)
    pools = [(flags.FLAGS.pool, flags.FLAGS.pool_width)]
    if _LARGE.value:
        pools += [(10_000, 64), (1_000_000, 64)]
    for size, width in pools:
        results = {}
        for case in CASES:
            programs, touched = large_pool(size, width, flags.FLAGS.pool_n, case)
            found = compare(programs, flags.FLAGS.rounds)
            results[case.name] = {"touched": touched, "programs": found}
        name = f"{size} x {width}, n = {flags.FLAGS.pool_n}"
        figures["large"][name] = results
        print(f"\n{name} (goal: numpy low-rank over ours 3)\n\n{large_table(results)}", flush=True)
    machine.record(_OUTPUT.value, busy, figures)


def _number(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise UserError(f"--prompts: {word!r} is no number of prompts; expected 128,16 or the like")
    return int(word)


if __name__ == "__main__":
    _OUTPUT, _ALLOW_BUSY = machine.define_flags()
    _PROMPTS = flags.DEFINE_list("prompts", "128,16", "Prompts of a batch of small pools.")
    for name, default, text in (
        ("rounds", 7, "How often each program runs."),
        ("candidates", 20, "Responses of a prompt of small pools."),
        ("width", 3072, "Of their features."),
        ("n", 3, "Negatives to choose of a small pool."),
        ("paper_prompts", 4, "Prompts for the paper's inverses."),
        ("pool", 100_000, "Candidates of the large pool."),
        ("pool_width", 256, "Of their features."),
        ("pool_n", 50, "How many to choose of it."),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=1)
    _LARGE = flags.DEFINE_bool("large", False, "Also 10,000 and 1,000,000 candidates of width 64.")
    cli.run(main)
