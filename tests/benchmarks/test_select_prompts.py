from __future__ import annotations

from tests.support.processes import command, refused

RUN = ("benchmarks.select_prompts", "--prompts=300", "--width=8", "--rounds=1", "--allow_busy")


def test_the_search_as_it_is_written_chooses_the_same() -> None:
    done = command(*RUN, "--k=12", "--paper_k=12", check=True)
    assert "same_first_choices: 12 of 12" in done.stdout
    assert "expected at most --prompts=300" in refused(*RUN, "--k=301")
