"""The training of docs/mining.md that mines, as it stands there, on a small model and data."""

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
    "--config=llama3": "--config=tiny --config.data.chat_template=none --config.mine.n=3 "
    "--config.data.name=preferences --config.data.validation_share=0 --config.train.epochs=2 "
    "--config.train.steps=0 --config.train.batch_size=8 --config.train.micro_batch_size=8",
    "Llama-3.2-3B-Instruct": "base",
    "mine.shortlist=200": "mine.shortlist=6",
    "mine.ranks=0:200": "mine.ranks=0:6",
}


@pytest.mark.slow(reason="a command whose work is tested without it")
def test_the_training_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "mining.md").read_text()
    [block] = re.findall(r"^```bash\n([^`]*?config\.mine.*?)^```$", page, re.S | re.M)
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
    done = subprocess.run(
        ["bash", "-ec", block], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "runs" / "mining" / "mined").iterdir())
    mined = [load_examples(tiny_config(file).data, "all", 0) for file in files]
    assert [len(examples) for examples in mined] == [6, 6]
    assert all(len(x.probabilities or ()) == 3 for examples in mined for x in examples)
    assert sum("loss" in line for line in log_lines(tmp_path / "runs" / "mining")) == 2
