"""MovieLens and HetRec's LastFM: whose items, in which order, against which candidates."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mass_dpo_jax.errors import UserError
from tests.support.data import candidates, history, listed, load, write_lines

Log = list[tuple[int, int, int]]  # User, item, time.
TITLES = {item: f"Film {item}, The (19{item})" for item in range(10, 40)}
# Four users of twelve films each, in the order of time but not of the file.
LOG: Log = sorted(
    ((user, 10 + (7 * user + k) % 30, 1000 + k) for user in range(1, 5) for k in range(12)),
    key=lambda event: event[1],
)


def ml_100k(folder: Path, log: Log = LOG, titles: dict[int, str] = TITLES) -> Path:
    write_lines(folder / "u.data", (f"{u}\t{i}\t3\t{t}" for u, i, t in log), "latin-1")
    genres = "|".join("0" * 19)
    rows = (f"{i}|{title}|01-Jan-1995||http://url|{genres}" for i, title in titles.items())
    write_lines(folder / "u.item", rows, "latin-1")
    return folder


def ml_1m(folder: Path, log: Log = LOG, titles: dict[int, str] = TITLES) -> Path:
    write_lines(folder / "ratings.dat", (f"{u}::{i}::3::{t}" for u, i, t in log), "latin-1")
    rows = (f"{i}::{title}::Drama|War" for i, title in titles.items())
    write_lines(folder / "movies.dat", rows, "latin-1")
    return folder


def hetrec(folder: Path, log: Log = LOG, titles: dict[int, str] = TITLES) -> Path:
    rows = [f"{u}\t{i}\t13\t{t}" for u, i, t in log]
    header = "userID\tartistID\ttagID\ttimestamp"
    write_lines(folder / "user_taggedartists-timestamps.dat", [header, *rows])
    rows = [f"{i}\t{title}\thttp://url\t" for i, title in titles.items()]
    write_lines(folder / "artists.dat", ["id\tname\turl\tpictureURL", *rows])
    return folder


Layout = Callable[..., Path]
LAYOUTS = pytest.mark.parametrize("layout", [ml_100k, ml_1m, hetrec])


def read(layout: Layout, folder: Path, split: str = "all", seed: int = 0, **changes: Any) -> Any:
    name = "lastfm" if layout is hetrec else "movielens"
    return load(name, folder, split, seed, **{"num_candidates": 5, **changes})


@LAYOUTS
def test_rows(tmp_path: Path, layout: Layout) -> None:
    titles = {**TITLES, 11: "Amélie, or: Le fabuleux destin (2001)"}
    examples = read(layout, layout(tmp_path, titles=titles))
    assert [e.id for e in examples] == [f"user{u}-{k}" for u in range(1, 5) for k in range(3, 12)]
    for example in examples:
        user, k = map(int, example.id.removeprefix("user").split("-"))
        taken = [titles[10 + (7 * user + j) % 30] for j in range(12)]
        assert example.chosen == taken[k]
        assert history(example).items == tuple(taken[max(0, k - 10) : k])
        assert sorted(listed(example)) == sorted(candidates(example))
        assert len(set(candidates(example))) == 5
        assert not set(example.rejected) & set(taken[: k + 1])
        file, line = example.place.split(":")
        written = Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert written.replace("::", "\t").split("\t")[0] == str(user)
    # What is taken later may be a candidate.
    assert any(
        set(e.rejected) & {titles[10 + (7 + j) % 30] for j in range(12)} for e in examples[:9]
    )
    assert "Next" in history(read(layout, tmp_path, list_candidates=False)[0]).after
    assert read(layout, tmp_path, list_candidates=False)[3].rejected == examples[3].rejected


def test_ties_repeats_and_short_users(tmp_path: Path) -> None:
    same = {10: "A", 11: "B", 12: "C", 13: "D", 14: "A"}  # 10 and 14 are one film.
    log = [(1, item, 5) for item in (13, 12, 14, 10, 11)]  # At the same time: the file's order.
    log += [(2, item, 5) for item in (10, 12, 14)]  # Too short: two films.
    log += [(user, item, item) for user in (3, 4) for item in (10, 11, 12, 13)]
    examples = read(ml_100k, ml_100k(tmp_path, log, {**TITLES, **same}))
    assert [(e.id, history(e).items, e.chosen) for e in examples] == [
        ("user1-3", ("D", "C", "A"), "B"),
        ("user3-3", ("A", "B", "C"), "D"),
        ("user4-3", ("A", "B", "C"), "D"),
    ]
    # Tags: the first one of an artist counts.
    (tmp_path / "tags").mkdir()
    items = (10, 11, 10, 12, 13, 13)
    tags = [(user, item, time) for user in (1, 2, 3) for time, item in enumerate(items)]
    examples = read(hetrec, hetrec(tmp_path / "tags", tags))
    assert history(examples[0]).items == tuple(TITLES[i] for i in (10, 11, 12))
    assert [e.place.split(":")[1] for e in examples] == ["6", "12", "18"]  # Below a header.


@LAYOUTS
def test_a_user_is_in_one_split(tmp_path: Path, layout: Layout) -> None:
    log = [(user, 10 + k, k) for user in range(1, 31) for k in range(5)]
    layout(tmp_path, log)

    def users(split: str, seed: int = 0) -> set[str]:
        return {e.id.split("-")[0] for e in read(layout, tmp_path, split, seed)}

    train, validation, test = (users(split) for split in ("train", "validation", "test"))
    assert [len(train), len(validation), len(test)] == [24, 3, 3]
    assert len(train | validation | test) == 30
    assert users("test", seed=1) == test
    assert users("all") == train | validation | test


def test_candidates_are_a_function_of_seed_and_row(tmp_path: Path) -> None:
    whole = read(ml_1m, ml_1m(tmp_path), "train")
    few = read(ml_1m, tmp_path, "train", max_train=6)
    assert len(few) == 6
    assert [e for e in whole if e.id in {f.id for f in few}] == few
    other = read(ml_1m, tmp_path, "train", seed=1)
    assert [e.id for e in other] == [e.id for e in whole]
    assert all(a.rejected != b.rejected for a, b in zip(whole[:5], other, strict=False))


def test_candidates_are_drawn_evenly(tmp_path: Path) -> None:
    log = [(user, 10 + k, k) for user in range(500) for k in range(4)]
    examples = read(ml_1m, ml_1m(tmp_path, log))
    counts = collections.Counter(name for e in examples for name in e.rejected)
    assert len(counts) == len(TITLES) - 4
    assert min(counts.values()) > 45 and max(counts.values()) < 115  # 77, with a deviation of 8.
    places = collections.Counter(listed(e).index(str(e.chosen)) for e in examples)
    assert len(places) == 5 and max(places.values()) < 145  # 100, with a deviation of 9.


@pytest.mark.parametrize(
    ("layout", "file", "line", "message"),
    [
        (ml_100k, "u.data", "1\t12\t3", "expected 4 fields separated by '.t', found 3"),
        (ml_100k, "u.data", "1::12::3::9", "expected 4 fields separated by '.t', found 1"),
        (ml_1m, "ratings.dat", "1::12::3", "expected 4 fields separated by '::', found 3"),
        (hetrec, "user_taggedartists-timestamps.dat", "1\t12\t3", "expected 4 fields .* found 3"),
        (ml_100k, "u.data", "1\t99\t3\t9", "movie id 99 is not in u.item"),
        (ml_1m, "ratings.dat", "1::99::3::9", "movie id 99 is not in movies.dat"),
        (
            hetrec,
            "user_taggedartists-timestamps.dat",
            "1\t9\t3\t9",
            "artist id 9 is not in artists",
        ),
        (ml_100k, "u.data", "x\t12\t3\t9", "user id must be an integer, found 'x'"),
        (ml_100k, "u.data", "1\t12\t3\t", "timestamp must be an integer, found ''"),
        (ml_100k, "u.item", "40", r"expected movie id and name, separated by '\|', found 1 field"),
        (ml_1m, "movies.dat", "x::A", "movie id must be an integer, found 'x'"),
        (hetrec, "artists.dat", "40\t \t", "field 'artist name' is empty"),
        (ml_1m, "movies.dat", "10::A", "id '10' is taken by .*movies.dat:1"),
    ],
)
def test_a_wrong_line_is_named_or_skipped(
    tmp_path: Path, caplog: Any, layout: Layout, file: str, line: str, message: str
) -> None:
    layout(tmp_path)
    right = read(layout, tmp_path)
    with (tmp_path / file).open("a", encoding="latin-1") as lines:
        lines.write(f"{line}\n")
    number = len((tmp_path / file).read_text(encoding="latin-1").splitlines())
    with pytest.raises(UserError, match=message) as error:
        read(layout, tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}:{number}: ")
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        assert read(layout, tmp_path, on_bad_row="skip") == right
    rows = number - (layout is hetrec)
    assert f"{file}: skipped 1 of {rows} rows; first: {tmp_path / file}:{number}: " in caplog.text


def test_too_few_items_or_users(tmp_path: Path) -> None:
    few = {item: TITLES[item] for item in range(10, 20)}
    log = [(user, 10 + (user + k) % 10, k) for user in (1, 2, 3) for k in range(6)]
    ml_100k(tmp_path, log, few)
    with pytest.raises(UserError, match=r"u.data:6: user 1 has 5 movies left .*num_candidates=6"):
        read(ml_100k, tmp_path, num_candidates=6)
    kept = read(ml_100k, tmp_path, num_candidates=6, on_bad_row="skip")
    assert [e.id for e in kept] == [f"user{u}-{k}" for u in (1, 2, 3) for k in (3, 4)]
    assert {len(e.rejected) for e in kept} == {5}
    with pytest.raises(UserError, match=r"u.data all: none of its 9 rows can be used; first: .*:4"):
        read(ml_100k, tmp_path, num_candidates=11, on_bad_row="skip")
    with pytest.raises(UserError, match=r"config.data.num_candidates=1: expected 2 or more"):
        read(ml_100k, tmp_path, num_candidates=1)
    with pytest.raises(UserError, match=r"u.data: 2 user\(s\) with more than 3 items"):
        read(ml_100k, ml_100k(tmp_path, [e for e in LOG if e[0] < 3]))


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has neither u.data and u.item .* nor ratings.dat and mov"
    ):
        read(ml_100k, tmp_path)
    ml_1m(ml_100k(tmp_path))
    with pytest.raises(UserError, match=r"has both u.data and u.item"):
        read(ml_100k, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (hetrec(other) / "user_taggedartists-timestamps.dat").unlink()
    with pytest.raises(UserError, match=r"needs artists.dat and user_taggedartists-timestamps.dat"):
        read(hetrec, other)
