r"""Draws a real pool of negatives, and which of them each way of selecting takes.

    python -m examples.draw_pool --policy=runs/pool --reference=SMOLLM2 --lastfm=DIR \
        --output=docs/pool.png

The policy is a run on LastFM that began from the reference. docs/pool.png shows SmolLM2-135M after

    python -m mass_dpo_jax.train --config=tiny --config.method=sdpo --config.model.path=SMOLLM2 \
        --config.model.lora.rank=16 --config.data.name=lastfm --config.data.path=DIR \
        --config.data.chat_template=tokenizer --config.data.max_train=192 \
        --config.data.max_validation=8 --config.data.max_test=16 --config.train.steps=24 \
        --config.train.batch_size=8 --config.train.micro_batch_size=8 \
        --config.train.eval_every=0 --config.eval.batch_size=8 --workdir=runs/pool

Points are the responses' mean hidden states, projected on the two directions in which they vary
most. Criteria see all directions, so points that look close may be far apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

import mass_dpo_jax as mdj
from mass_dpo_jax.reports.curves import COLOURS, INK

NUM_PICKS = 3
SEED = 1  # Of the two panels that draw.
PANELS = {
    "random": "random (S-DPO)",
    "hardest": "hardest",
    "sampled": "drawn from the pool weights (pl_sampled)",
    "pool_fisher": "Fisher information (MASS-DPO)",
    "contrast": "contrast (sees the chosen response)",
}
PICKED, CHOSEN, REST = COLOURS[0], COLOURS[1], "#BCC3CC"
# Where a label may stand beside its point, in points: offset, then alignment.
LABEL_SPOTS = (
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
    ((8, 0), "left", "center"),
    ((-8, 0), "right", "center"),
)


class ScoredPool(NamedTuple):
    """The responses to one prompt under a policy, the chosen one first.

    Attributes:
        names: C texts.
        features: float32 [C, D], mean hidden states.
        scores: float32 [N], reward of each negative - reward of the chosen response.
    """

    names: list[str]
    features: np.ndarray
    scores: np.ndarray


def score_pool(policy: Path, reference: Path, lastfm: Path, row: int) -> ScoredPool:
    """Scores the responses of one test row of LastFM.

    Args:
        policy: a run that began from the reference.
        reference: a model folder.
        lastfm: the folder with S-DPO's files.
        row: index within the test split.
    """
    model = mdj.load_model(policy)
    data = model.config.data
    data.path, data.max_test = str(lastfm), 60
    example = mdj.load_examples(data, "test", seed=0)[row]
    scores = model.score([example], features=True)
    assert scores.features is not None
    config = model.config.copy_and_resolve_references()
    ref_scores = mdj.load_model(reference, config).score([example])
    rewards = model.config.beta * (scores.logps[0] - ref_scores.logps[0])
    names = [str(text) for text in (example.chosen, *example.rejected)]
    return ScoredPool(names, scores.features[0], rewards[1:] - rewards[0])


def draw(pool: ScoredPool, output: Path) -> None:
    """Writes a PNG: the pool with its names, then the picks of each way of selecting."""
    centred = pool.features - pool.features.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    points = centred @ directions.T
    weights = np.exp(pool.scores - pool.scores.max())
    sizes = 25 + 900 * weights / weights.sum()

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(10.8, 6.4), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 3).flat)
    picks = [select(pool, criterion) for criterion in PANELS]
    _draw_points(axes[0], "one pool; larger points have more weight", points, sizes, [])
    for ax, title, indices in zip(axes[1:], PANELS.values(), picks, strict=True):
        _draw_points(ax, title, points, sizes, indices)
    figure.draw_without_rendering()  # Labels need to know where points lie.
    _label(axes[0], pool.names, points, range(len(points)))
    for ax, indices in zip(axes[1:], picks, strict=True):
        _label(ax, pool.names, points, [0, *(1 + i for i in indices)])
    figure.savefig(output, facecolor="white")


def select(pool: ScoredPool, criterion: str) -> list[int]:
    """Returns the picks of a criterion, negatives counted from 0."""
    picks = mdj.select_negatives(
        pool.features,
        pool.scores,
        n=NUM_PICKS,
        seed=SEED,
        criterion=criterion,
    )
    return np.asarray(picks.indices)[np.asarray(picks.valid)].tolist()


def _draw_points(
    ax: Axes, title: str, points: np.ndarray, sizes: np.ndarray, picks: list[int]
) -> None:
    negatives = points[1:]
    outline: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8}
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    for index in picks:
        ax.plot(*points[[0, 1 + index]].T, color=PICKED, linewidth=1.1, alpha=0.45, zorder=1)
    ax.scatter(negatives[:, 0], negatives[:, 1], s=sizes, color=REST, zorder=2, **outline)
    ax.scatter(
        negatives[picks, 0], negatives[picks, 1], s=sizes[picks], color=PICKED, zorder=3, **outline
    )
    ax.scatter(points[0, 0], points[0, 1], s=210, marker="*", color=CHOSEN, zorder=4, **outline)
    ax.set(xticks=[], yticks=[])
    ax.margins(x=0.2, y=0.13)
    ax.spines[:].set_color("#D8DBE0")


def _label(ax: Axes, names: Sequence[str], points: np.ndarray, shown: Sequence[int]) -> None:
    """Names points in order, where there is room: the chosen response, then picks or all."""
    few = len(shown) <= 1 + NUM_PICKS
    frame = ax.get_window_extent()
    pixels = ax.transData.transform(points[list(shown)])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
    for index in shown:
        for offset, horizontal, vertical in LABEL_SPOTS:
            text = ax.annotate(
                names[index],
                points[index],
                xytext=offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=9 if few else 7,
                fontweight="bold" if few or index == 0 else "normal",
                color=CHOSEN if index == 0 else PICKED if few else INK,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=5,
            )
            box = text.get_window_extent()
            if frame.fully_containsx(box.x0) and frame.fully_containsx(box.x1):
                if not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
            text.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True, help="a run on LastFM")
    parser.add_argument("--reference", type=Path, required=True, help="the model it began from")
    parser.add_argument("--lastfm", type=Path, required=True, help="folder with S-DPO's files")
    parser.add_argument("--row", type=int, default=13, help="index within 60 test rows")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args()
    pool = score_pool(options.policy, options.reference, options.lastfm, options.row)
    draw(pool, options.output)


if __name__ == "__main__":
    main()
