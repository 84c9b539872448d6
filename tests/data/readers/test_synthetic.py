from __future__ import annotations

import hashlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.readers import synthetic
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import baselines

WORLDS = tuple(synthetic.RECIPES)
# The fields that examples had when the digest of the plain world was taken.
DIGESTED = ("id", "prompt", "chosen", "rejected", "place", "scores")


def load(split: str, seed: int = 0, listed: bool = False, world: str = "") -> list[Example]:
    data = ConfigDict({"list_candidates": listed, "path": world})
    return synthetic.load(data, split, seed)


def accuracy(scores: np.ndarray) -> float:
    return float(np.mean((scores[:, 1:] < scores[:, :1]).all(axis=1)))


def test_the_plain_world_never_changes():
    """The quick start's figures are of this one, to the bit."""
    digest = hashlib.sha256()
    for split in synthetic.ROWS:
        for listed in (False, True):
            rows = (
                ", ".join(f"{field}={getattr(row, field)!r}" for field in DIGESTED)
                for row in load(split, 3, listed)
            )
            digest.update("[{}]".format(", ".join(f"Example({row})" for row in rows)).encode())
    assert digest.hexdigest() == "4b92dcae2e925b9f2fe8d6dc53baac7d97a6080557617b8822ea80bd45a3b774"
    assert load("test") == load("test", world="plain")


def test_an_unknown_world_is_an_error():
    with pytest.raises(UserError, match="path='flat': no such world; expected plain, clusters, lo"):
        load("test", world="flat")


@pytest.mark.parametrize("world", WORLDS)
def test_names_are_distinct_and_pronounceable(world: str):
    names = synthetic.make_world(world).names
    assert len(set(names)) == synthetic.RECIPES[world].items
    for name in names:
        assert name.isascii() and name.isalpha() and name == name.capitalize()
        assert 4 <= len(name) <= 9


def test_names_do_not_tell_the_taste():
    """Items that share their first syllable are no closer to each other than others are."""
    world = synthetic.make_world()
    first = np.array([name[:2] for name in world.names])
    same = (first[:, None] == first) & ~np.eye(len(first), dtype=bool)
    closeness = world.items @ world.items.T
    assert abs(closeness[same].mean() - closeness[~same].mean()) < 0.1


@pytest.mark.parametrize("world", WORLDS)
def test_every_row_is_a_well_formed_choice(world: str):
    how = synthetic.RECIPES[world]
    names = set(synthetic.make_world(world).names)
    examples = load("validation", world=world)
    assert len(examples) == synthetic.ROWS["validation"]
    for example in examples:
        assert isinstance(example.prompt, History)
        candidates = [example.chosen, *example.rejected]
        assert len(set(candidates)) == len(candidates) == how.candidates
        assert all(candidate[0] == " " and candidate[1:] in names for candidate in candidates)
        assert len(set(example.prompt.items)) == len(example.prompt.items)
        # What was enjoyed before is not on offer.
        assert not set(example.prompt.items) & {candidate.strip() for candidate in candidates}
        least, most = how.history
        assert least <= len(example.prompt.items) <= most
    assert len({example.id for example in examples}) == len(examples)


def test_seed_changes_the_order_of_the_negatives_and_nothing_else():
    first, again, other = (load("test", seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    for a, b in zip(first, other, strict=True):
        assert (a.id, a.prompt, a.chosen) == (b.id, b.prompt, b.chosen)
        assert sorted(a.rejected) == sorted(b.rejected)


def test_splits_share_no_rows():
    # Short histories may coincide; the candidates with them do not.
    rows = [(e.prompt.text, e.chosen, *e.rejected) for s in synthetic.ROWS for e in load(s)]
    assert len(rows) == len(set(rows)) == sum(synthetic.ROWS.values())


def test_an_unknown_split_is_an_error():
    with pytest.raises(UserError, match="no split 'all'; found train, validation, test"):
        load("all")


def test_listed_candidates_are_shuffled():
    positions = []
    for example in load("validation", listed=True)[:400]:
        listed = example.prompt.after.split("One of: ")[1].removesuffix(". Next:").split(", ")
        candidates = [candidate.strip() for candidate in (example.chosen, *example.rejected)]
        assert sorted(listed) == sorted(candidates)
        positions.append(listed.index(candidates[0]))
    # Uniform over 20 places: 20 expected in each, and more than 45 in one has chance 1e-6.
    counts = np.bincount(positions, minlength=synthetic.RECIPES["plain"].candidates)
    assert counts.min() > 0 and counts.max() < 45


@pytest.mark.parametrize("seed", [0, 7])
def test_difficulty(seed: int):
    """Chance < popularity << co-occurrence < the true tastes < 1."""
    train, test = load("train", seed), load("test", seed)
    oracle = synthetic.compute_oracle_scores(test)
    assert oracle.shape == (len(test), synthetic.RECIPES["plain"].candidates)
    assert 0.12 < accuracy(baselines.popularity(train, test)) < 0.20
    assert 0.45 < accuracy(baselines.cooccurrence(train, test)) < 0.55
    assert 0.55 < accuracy(oracle) < 0.65


@pytest.mark.parametrize("world", ["clusters", "long"])
def test_the_other_worlds_can_be_learnt_and_are_not_easy(world: str):
    """Chance < popularity < co-occurrence < the true tastes < 1/2."""
    train, test = load("train", world=world), load("test", world=world)
    best = accuracy(synthetic.compute_oracle_scores(test))
    learnt = accuracy(baselines.cooccurrence(train, test))
    assert 0.1 < accuracy(baselines.popularity(train, test)) < learnt - 0.1
    assert learnt + 0.04 < best < 0.5


def test_candidates_are_near_copies_of_a_few():
    """In `clusters` a candidate's nearest other one is much nearer than in a world without."""
    angles = {}
    for world in ("plain", "clusters"):
        place = synthetic.make_world(world)
        number = {f" {name}": i for i, name in enumerate(place.names)}
        nearest = []
        for example in load("validation", world=world)[:200]:
            items = [number[str(text)] for text in (example.chosen, *example.rejected)]
            if world == "clusters":
                assert len(set(place.centres[items])) <= 4
            closeness = place.items[items] @ place.items[items].T
            np.fill_diagonal(closeness, -1)
            # The chosen one is left out: a pool is the others.
            nearest.append(np.sort(np.arccos(np.clip(closeness[1:, 1:], -1, 1)), axis=1)[:, :3])
        angles[world] = float(np.median(np.concatenate(nearest)))
    assert angles["clusters"] < 0.08 < angles["plain"]


@pytest.mark.parametrize("world", WORLDS)
def test_choices_follow_the_softmax_of_the_utilities(world: str):
    """The mean utility of the chosen equals its expectation, within the noise of the draw."""
    utilities = synthetic.compute_oracle_scores(load("train", world=world))
    weights = np.exp(utilities - utilities.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    mean = (weights * utilities).sum(axis=1)
    variance = (weights * utilities**2).sum(axis=1) - mean**2
    z = (utilities[:, 0] - mean).sum() / np.sqrt(variance.sum())
    assert abs(z) < 4


def test_prompts_and_names_are_short(tmp_path):
    from transformers import AutoTokenizer

    examples = load("train")[:4000]
    train_tokenizer((e.prompt.text + e.chosen for e in examples), 512, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompts = tokenizer([example.prompt.text for example in examples]).input_ids
    names = tokenizer(
        [f" {name}" for name in synthetic.make_world().names], add_special_tokens=False
    )
    assert max(map(len, prompts)) <= 48
    assert np.mean([len(ids) for ids in names.input_ids]) < 3
