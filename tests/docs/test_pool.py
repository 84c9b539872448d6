"""The picture of the README is drawn by examples/draw_pool.py, from any scored pool."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from examples.draw_pool import NUM_PICKS, PANELS, ScoredPool, draw, select

ROOT = Path(__file__).parents[2]
MAX_BYTES = 200_000


def test_a_pool_is_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"name {i}" for i in range(8)]
    features, scores = rng.normal(size=(8, 5)), rng.normal(size=7)
    pool = ScoredPool(names, features.astype(np.float32), scores.astype(np.float32))
    for criterion in PANELS:
        picks = select(pool, criterion)
        assert len({*picks}) == len(picks) == NUM_PICKS
        assert {*picks} <= {*range(7)}
    draw(pool, tmp_path / "pool.png")
    image = matplotlib.image.imread(tmp_path / "pool.png")
    assert image[..., :3].min() < 0.5  # Something is drawn, on white.
    np.testing.assert_array_equal(image[0, 0, :3], 1)


def test_the_picture_of_the_readme_is_small() -> None:
    assert (ROOT / "docs/pool.png").stat().st_size <= MAX_BYTES
