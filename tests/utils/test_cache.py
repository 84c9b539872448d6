"""Programs kept on disk: found again by the next process, and never in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from mass_dpo_jax.utils import cache

files = json.loads(sys.argv[2])
cache._read_system_file = lambda path: files.get(path.rpartition("/")[2], "")
cache.keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))
total = jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(7.0))
hits = sum(name.endswith("cache_hits") for name in events)
folder = jax.config.jax_compilation_cache_dir
print(json.dumps({"hits": hits, "total": float(total), "folder": folder}))
"""


def run(cache_dir: Path, *, cpuinfo: str = "", gathering: str = "", **env: str) -> tuple[dict, str]:
    """What the program found on a made-up CPU, and what it said on standard error."""
    files = {"cpuinfo": cpuinfo, "gather_data_sampling": gathering}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache_dir), json.dumps(files)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_next_process_finds_what_was_compiled(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    second, _ = run(tmp_path)
    assert first["hits"] == 0
    assert second["hits"] > 0
    assert second["total"] == first["total"]
    assert Path(first["folder"]).parent == tmp_path


def test_every_kind_of_cpu_has_a_folder(tmp_path: Path) -> None:
    found = [run(tmp_path, cpuinfo=f"flags : {flags}")[0] for flags in ("avx2", "avx2 avx512f")]
    assert found[0]["folder"] != found[1]["folder"]
    assert found[1]["hits"] == 0


def test_the_users_own_folder_has_precedence(tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    found, _ = run(tmp_path, JAX_COMPILATION_CACHE_DIR=own)
    assert found["folder"] == own


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found, said = run(file)
    assert found["folder"] is None
    assert str(file) in said and "not kept" in said


@pytest.mark.parametrize(("state", "kept"), [("Not affected\n", True), ("Vulnerable\n", False)])
def test_cpus_whose_programs_xla_refuses(tmp_path: Path, state: str, kept: bool) -> None:
    found, _ = run(tmp_path, gathering=state)
    assert (found["folder"] is not None) == kept
