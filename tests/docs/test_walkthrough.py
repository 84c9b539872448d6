"""docs/walkthrough.md as a user follows it: from the wheel, in an empty folder.

`python tests/docs/test_walkthrough.py` writes what the commands print into the page, but for the
part with a pretrained model, which is followed with MASS_DPO_TEST_SMOLLM2.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import processes
from tests.support.packages import ROOT, build, install

PAGE = ROOT / "docs" / "walkthrough.md"
PRETRAINED = "## With a pretrained model"  # The heading of the part that needs one.
MODEL = "SmolLM2-135M-Instruct"


def perform(page: str, folder: Path, xla_flags: str = "", model: str = "") -> str:
    """The page with what its commands print now, having been run in the empty `folder`/here.

    With the folder of a pretrained model it is there, too.
    """
    here, site = folder / "here", folder / "site"
    for path in (here, site, folder / "built"):
        path.mkdir()
    install(build(folder / "built")[1], site)
    if model:
        (here / MODEL).symlink_to(Path(model).absolute())
    for name, program in re.findall(r"^`(\w+\.py)` .*?^```python\n(.*?)^```$", page, re.S | re.M):
        (here / name).write_text(program)
    env = {
        **os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags,
        "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), "LC_ALL": "C",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    where = "import mass_dpo_jax; print(mass_dpo_jax.__file__)"
    assert run(f"python -c '{where}'", here, env) == f"{site}/mass_dpo_jax/__init__.py\n"

    def block(found: re.Match[str]) -> str:
        lines = []
        for command in commands(found[1]):
            printed = run(command, here, env).replace(str(folder / "cache"), "~/.cache")
            lines.append(f"$ {command}\n{printed}")
        return f"```console\n{''.join(lines)}```"

    return re.sub(r"```console\n(.*?)```", block, page, flags=re.DOTALL)


def commands(block: str) -> Iterator[str]:
    """What stands behind a `$`, with the lines that a `\\` joins to it."""
    for found in re.finditer(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE):
        yield found[1]


def run(command: str, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def masked(page: str) -> str:
    """Without the numbers, which differ from machine to machine, and names made of them."""
    page = re.sub(r"(?<=ref_logps-)\w+|(?<=tfevents\.).*", "#", page)
    return re.sub(r"-?\d+(\.\d+)?(e-\d+)?", "#", page)


@pytest.mark.slow(reason="installs the wheel and runs a page")
def test_the_commands_of_the_page_print_what_it_says(tmp_path: Path, torch: ModuleType) -> None:
    page = PAGE.read_text().partition(PRETRAINED)[0]
    now = perform(page, tmp_path, processes.xla_flags(1))
    assert masked(now) == masked(page)
    assert "the same ranking in 50 of 50 rows\nlog-probabilities equal to 1e-3\n" in now
    (events,) = (tmp_path / "here/runs/first/tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.") and events.stat().st_size > 1000


@pytest.mark.smollm2
def test_the_commands_with_a_pretrained_model_print_what_the_page_says(
    tmp_path: Path, torch: ModuleType
) -> None:
    before, _, rest = PAGE.read_text().partition(PRETRAINED)
    data = before[before.index("`pairs.py`") : before.index("```console")]
    page = f"{data}\n```console\n$ python pairs.py\n```\n{rest}"
    now = perform(page, tmp_path, processes.xla_flags(1), os.environ["MASS_DPO_TEST_SMOLLM2"])
    assert masked(now) == masked(page)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        small, heading, rest = PAGE.read_text().partition(PRETRAINED)
        PAGE.write_text(perform(small, Path(folder)) + heading + rest)
