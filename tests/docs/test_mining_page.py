"""The loop of commands in docs/mining.md, as it stands there, on a small model and small data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mass_dpo_jax.data import load_examples
from tests.support.helpers import log_lines, tiny_config, write_jsonl
from tests.support.packages import ROOT
from tests.support.run_homes import write_base

CHANGES = {
    "--config=llama3": "--config=tiny --config.data.chat_template=none "
    "--config.data.name=preferences --config.data.validation_share=0 --config.train.steps=2",
    "Llama-3.2-3B-Instruct": "base",
    "in 1 2 3": "in 1 2",
    "--shortlist=200 --ranks=0:200 --n=8": "--shortlist=6 --ranks=0:6 --n=3",
}


@pytest.mark.slow(reason="four commands one after another; each of them is tested")
def test_rounds_of_mining_and_training(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "mining.md").read_text()
    [block] = re.findall(r"^```bash\n(base=.*?)^```$", page, re.S | re.M)
    for ours, small in CHANGES.items():
        assert ours in block
        block = block.replace(ours, small)
    (tmp_path / "base").mkdir()
    write_base(tmp_path / "base")
    rows = write_jsonl(tmp_path / "pairs.jsonl", examples=6).read_text().splitlines()
    texts = [json.loads(row)["chosen"] for row in rows] + [f"more {i}" for i in range(12)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    for _ in range(2):  # The second time there is nothing left to do.
        done = subprocess.run(
            ["bash", "-ec", block],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    mined = [
        load_examples(tiny_config(tmp_path / f"mined{i}.parquet").data, "all", 0) for i in (1, 2)
    ]
    assert all(example.probabilities for rounds in mined for example in rounds)
    for i in (1, 2):
        assert len([line for line in log_lines(tmp_path / f"runs/round{i}") if "loss" in line]) == 2
    # The second round starts from what the first one learned, against the same reference.
    config = json.loads((tmp_path / "runs/round2/config.json").read_text())
    assert config["model"]["path"].endswith("runs/round1")
    assert config["model"]["reference_path"].endswith("base")
