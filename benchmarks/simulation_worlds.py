"""Theorem 5.1 measured: worlds with a known truth, what is learnt in them, tables and a picture.

The setting is described in `benchmarks/simulation.py`, which is the command.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from tqdm import tqdm

from mass_dpo_jax import selection

PROMPTS, NEGATIVES, CENTRES, SPREAD = 500, 19, 5, 1.5
STEPS, LEARNING_RATE, RIDGE = 300, 0.1, 0.1
WORLDS = ("iid", "clusters")
SIZES, DIMENSION = (1, 2, 3, 5, 10, 19), 16  # The first panel: error against n.
DIMENSIONS, SIZE = (8, 16, 32, 64), 3  # The second: error against d.
ONCE = STEPS


class Method(NamedTuple):
    """A way to choose sets, and after how many steps they are chosen again."""

    criterion: str
    refresh: int = ONCE


METHODS = {
    "random, once": Method("random"),
    "pool_fisher, once": Method("pool_fisher"),
    "contrast, once": Method("contrast"),
    "set_fisher, once": Method("set_fisher"),
    "pool_fisher, every 20": Method("pool_fisher", 20),
    "contrast, every 20": Method("contrast", 20),
    "set_fisher, every 20": Method("set_fisher", 20),
    "hardest, every 20": Method("hardest", 20),
    "random, each step": Method("random", 1),
    "pl_sampled (independent), each step": Method("independent", 1),
    "pl_sampled (pivotal), each step": Method("pivotal", 1),
    "all": Method("all"),
}
DRAWS = ("independent", "pivotal")  # These give weights, the others sets.


class World(NamedTuple):
    """theta: [d], the truth. features: [M, C, d], the chosen response first. fresh: likewise."""

    theta: jax.Array
    features: jax.Array
    fresh: jax.Array


@functools.partial(jax.jit, static_argnames=("kind", "dimension"))
def draw_world(key: jax.Array, kind: str, dimension: int) -> World:
    """A truth, prompts to train on and fresh ones; `kind` is one of `WORLDS`."""
    direction, *keys, choices = jax.random.split(key, 4)
    theta = SPREAD * jnp.sqrt(dimension) * _unit(jax.random.normal(direction, (dimension,)))
    features, fresh = (_candidates(k, kind, dimension) for k in keys)
    chosen = jax.random.categorical(choices, features @ theta)[:, None]
    order = (chosen + jnp.arange(NEGATIVES + 1)) % (NEGATIVES + 1)
    return World(theta, jnp.take_along_axis(features, order[..., None], axis=1), fresh)


def _candidates(key: jax.Array, kind: str, dimension: int) -> jax.Array:
    noise, centre, which = jax.random.split(key, 3)
    features = _unit(jax.random.normal(noise, (PROMPTS, NEGATIVES + 1, dimension)))
    if kind == "iid":
        return features
    centres = _unit(jax.random.normal(centre, (PROMPTS, CENTRES, dimension)))
    nearest = jax.random.randint(which, (PROMPTS, NEGATIVES + 1, 1), 0, CENTRES)
    return _unit(jnp.take_along_axis(centres, nearest, axis=1) + 0.3 * features)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("criterion", "n"))
def choose(gram: jax.Array, scores: jax.Array, key: jax.Array, criterion: str, n: int) -> jax.Array:
    """Sets from `mass_dpo_jax.selection`.

    Args:
        gram: [M, C, C], inner products of features.
        scores: [M, N], logits of the negatives less that of the chosen response.
        key: of this choice.
        criterion: static.
        n: size of the sets, static.

    Returns:
        int32 [M, N], the place of each negative in the order of choice; n for those not chosen.
    """
    settings = selection.Settings(criterion=criterion, ridge=RIDGE)
    keys = jax.random.split(key, scores.shape[0])
    pools = selection.Pool(gram, scores, jnp.ones(scores.shape, bool), keys)
    picks = selection.select(pools, n, settings).indices
    hits = picks[..., None] == jnp.arange(NEGATIVES)
    return jnp.where(hits.any(1), jnp.argmax(hits, axis=1), n)


def draw(scores: jax.Array, key: jax.Array, criterion: str, n: int) -> jax.Array:
    """Draws n negatives by the pool weights p = softmax(scores); one of `DRAWS`.

    Args:
        scores: [M, N].
        key: of this draw.
        criterion: static.
        n: static.

    Returns:
        float32 [M, N], weights w whose expectation is p; 0 for those not drawn.
    """
    keys = jax.random.split(key, scores.shape[0])
    settings = selection.Settings(criterion="sampled", draw=criterion)
    pools = selection.Pool(None, scores, jnp.ones(scores.shape, bool), keys)
    picks = selection.select(pools, n, settings)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros_like(scores).at[rows, picks.indices].add(picks.weights)


def gradient(
    features: jax.Array, scores: jax.Array, members: jax.Array, weights: jax.Array | None
) -> jax.Array:
    """Mean over prompts of beta (1 - sigma(Z)) sum_j w_j phi_j: [d].

    Without `weights` it is the gradient of the Plackett-Luce loss on the members, Eq. 9.

    Args:
        features: [M, C, d].
        scores: [M, N].
        members: bool [M, N], the negatives in Z.
        weights: [M, N], w; None for the softmax of the members' scores.
    """
    scores = jnp.where(members, scores, -jnp.inf)
    coefficients = jax.nn.softmax(scores) if weights is None else weights
    coefficients *= jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=1, keepdims=True))
    # phi_j = h_j - h_0: the chosen response's share is minus the sum of the others.
    coefficients = jnp.concatenate([-coefficients.sum(1, keepdims=True), coefficients], axis=1)
    return jnp.einsum("mc,mcd->d", coefficients, features) / features.shape[0]


@functools.partial(jax.jit, static_argnames=("method", "n"))
def fit(
    features: jax.Array,
    gram: jax.Array,
    members: jax.Array,
    key: jax.Array,
    method: Method,
    n: int,
) -> jax.Array:
    """Trains theta from 0: [d]. `members` are the sets of a method that chooses once."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

    def step(state: tuple, t: jax.Array) -> tuple[tuple, None]:
        theta, moments, members = state
        logits = features @ theta
        scores = logits[:, 1:] - logits[:, :1]
        now = jax.random.fold_in(key, t)
        weights = None
        if method.criterion in DRAWS:  # All are members: Z is of the whole pool.
            weights = draw(scores, now, method.criterion, n)
        elif method.refresh < ONCE:
            members = lax.cond(
                t % method.refresh == 0,
                lambda: choose(gram, scores, now, method.criterion, n) < n,
                lambda: members,
            )
        slope = gradient(features, scores, members, weights)
        change, moments = optimizer.update(slope, moments)
        return (theta + change, moments, members), None

    theta = jnp.zeros(features.shape[-1])
    start = (theta, optimizer.init(theta), members)
    return lax.scan(step, start, jnp.arange(STEPS))[0][0]


class Measured(NamedTuple):
    """Of logits, or lists of these measures."""

    error: Any
    """Relative logit error."""
    scale: Any
    """<learnt, true> / <true, true>."""
    rescaled: Any
    """The relative logit error of the learnt logits times the best number."""


@jax.jit
def measure(theta: jax.Array, world: World) -> Measured:
    """Compares logits on the fresh prompts, centred in each: what a softmax sees of them."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (world.fresh @ x for x in (a, b))
        return jnp.sum((a - a.mean(1, keepdims=True)) * b)

    true, both = product(world.theta, world.theta), product(theta, world.theta)
    difference = theta - world.theta
    correlation = both**2 / (true * product(theta, theta))
    return Measured(
        jnp.sqrt(product(difference, difference) / true),
        both / true,
        jnp.sqrt(jnp.maximum(1 - correlation, 0.0)),
    )


def measure_all(world: World, sizes: Sequence[int], key: jax.Array) -> dict[str, np.ndarray]:
    """Every method for every n in `sizes`: [sizes, 3], the fields of `Measured`."""
    everyone = jnp.ones((PROMPTS, NEGATIVES), bool)
    gram = selection.compute_grams(world.features, everyone, selection.Settings())
    largest = max((n for n in sizes if n < NEGATIVES), default=1)

    def error(members: jax.Array, method: Method = METHODS["all"], n: int = 0) -> list[float]:
        measured = measure(fit(world.features, gram, members, key, method, n), world)
        return [float(x) for x in measured]

    full = error(everyone)
    errors: dict[str, list[list[float]]] = {}
    for name, method in METHODS.items():
        if method.refresh == ONCE and name != "all":
            # A greedy set of n is the beginning of a larger one; so is a random one.
            order = choose(gram, jnp.zeros(everyone.shape), key, method.criterion, largest)
        errors[name] = []
        for n in sizes:
            if name == "all" or (n == NEGATIVES and method.criterion not in DRAWS):
                errors[name].append(full)
            elif method.refresh == ONCE:
                errors[name].append(error(order < n))
            else:
                errors[name].append(error(everyone, method, n))
    return {name: np.array(values) for name, values in errors.items()}


Results = dict[str, dict[str, np.ndarray]]  # World, method: [seeds, settings, 3].


def run(seeds: int) -> tuple[Results, Results]:
    """By n at d = 16, and by d at n = 3; all methods on the same worlds."""
    by_size: Results = {}
    by_dimension: Results = {}
    for kind in WORLDS:
        errors: dict[int, list[dict[str, np.ndarray]]] = {d: [] for d in DIMENSIONS}
        for seed in tqdm(range(seeds), desc=kind, disable=None):
            key = jax.random.key(seed)
            for d in DIMENSIONS:
                sizes = SIZES if d == DIMENSION else (SIZE,)
                world = draw_world(key, kind, d)
                errors[d].append(measure_all(world, sizes, jax.random.fold_in(key, 1)))
        stacked = {
            d: {m: np.array([seed[m] for seed in errors[d]]) for m in METHODS} for d in errors
        }
        by_size[kind] = stacked[DIMENSION]
        row = {d: SIZES.index(SIZE) if d == DIMENSION else 0 for d in DIMENSIONS}
        by_dimension[kind] = {
            m: np.stack([stacked[d][m][:, row[d]] for d in DIMENSIONS], axis=1) for m in METHODS
        }
    return by_size, by_dimension


def table(results: Mapping[str, np.ndarray], heads: Sequence[str], baseline: str) -> str:
    """Markdown: mean errors in per cent; in brackets the difference to `baseline`, the same seeds
    paired, with its standard error."""
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    errors = {name: values[..., 0] for name, values in results.items()}
    for name, values in errors.items():
        change = 100 * (values - errors[baseline])
        spread = change if name != baseline else 100 * values
        error = spread.std(axis=0, ddof=1) / np.sqrt(len(values))
        means = 100 * values.mean(axis=0)
        if name == baseline:
            cells = [f"{m:.1f} ± {e:.1f}" for m, e in zip(means, error)]
        else:
            moved = change.mean(axis=0)
            cells = [f"{m:.1f} ({c:+.1f} ± {e:.1f})" for m, c, e in zip(means, moved, error)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts(results: Results, n: int) -> str:
    """Markdown: scale of the learnt logits and error once rescaled, per cent, for one n and d."""
    row = SIZES.index(n)
    heads = [f"{kind}: {what}" for kind in results for what in ("scale", "rescaled")]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in METHODS:
        cells = []
        for kind in results:
            values = results[kind][name][:, row, 1:] * [1, 100]
            mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))
            cells += [f"{mean[0]:.2f} ± {error[0]:.2f}", f"{mean[1]:.1f} ± {error[1]:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(by_size: Results, by_dimension: Results, seeds: int) -> str:
    """All tables in Markdown, with what each one is."""
    shown = []
    for kind in WORLDS:
        shown += [
            f"\n{kind}, d = {DIMENSION}, {seeds} seeds, relative logit error in %:\n",
            table(by_size[kind], [f"n = {n}" for n in SIZES], "random, once"),
            f"\n{kind}, n = {SIZE}:\n",
            table(by_dimension[kind], [f"d = {d}" for d in DIMENSIONS], "random, once"),
        ]
    shown += [
        f"\nscale of the learnt logits; error once rescaled, %; d = {DIMENSION}, n = {SIZE}:\n",
        parts(by_size, SIZE),
    ]
    return "\n".join(shown)


# Colours by criterion, told apart with any colour vision; dashes: chosen again in training.
LINES = {
    "random, once": ("#000000", "-"),
    "random, each step": ("#000000", "--"),
    "pool_fisher, once": ("#D55E00", "-"),
    "pool_fisher, every 20": ("#D55E00", "--"),
    "contrast, once": ("#009E73", "-"),
    "contrast, every 20": ("#009E73", "--"),
    "set_fisher, once": ("#0072B2", "-"),
    "set_fisher, every 20": ("#0072B2", "--"),
    "hardest, every 20": ("#CC79A7", "--"),
    "pl_sampled (pivotal), each step": ("#E69F00", "--"),
    "all": ("#888888", ":"),
}


def plot(by_size: Results, by_dimension: Results, output: Path) -> None:
    """A PNG: a row a world, error against n on the left and against d on the right."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(10, 4 * len(by_size)), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(by_size), 2, sharey=True, squeeze=False)
    for row, kind in zip(axes, by_size, strict=True):
        _panel(row[0], by_size[kind], SIZES, f"{kind}, d = {DIMENSION}", "selected negatives n")
        _panel(row[1], by_dimension[kind], DIMENSIONS, f"{kind}, n = {SIZE}", "dimension d")
        row[0].set_ylabel("relative logit error", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, facecolor="white")


def _panel(
    ax: Axes, results: Mapping[str, np.ndarray], x: Sequence[int], title: str, label: str
) -> None:
    for name, (colour, style) in LINES.items():
        errors = results[name][..., 0]
        mean, band = errors.mean(axis=0), errors.std(axis=0, ddof=1) / np.sqrt(len(errors))
        ax.plot(x, mean, color=colour, linestyle=style, linewidth=1.6, label=name)
        ax.fill_between(x, mean - band, mean + band, color=colour, alpha=0.2, linewidth=0)
    ax.set(xscale="log", yscale="log")
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(label, fontsize=9)
    ax.set_xticks(x, [str(value) for value in x])
    ax.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1.0]))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
