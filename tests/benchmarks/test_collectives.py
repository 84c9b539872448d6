"""What devices send each other: counted right, and no more than the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.collectives import collective_bytes, of_step, weights_bytes
from mass_dpo_jax.models import shared_prefix
from mass_dpo_jax.training.prepare import prepare
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.processes import command

HLO = """
HloModule made_up

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %gathered = f32[4,8]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %twice = (f32[2]{0}, bf16[3]{0}) all-reduce(%x, %y), to_apply=%add
  %loop = (s32[], f32[4]) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]) while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %moved = f32[10]{0} collective-permute-start(%x), source_target_pairs={{0,1}}
  %begun = ((f32[4]{0:T(8)}, bf16[2]{0}), (f32[8]{0:T(8)}, bf16[4]{0})) all-gather-start(%x, %y)
  %ended = (f32[8]{0:T(8)}, bf16[4]{0}) all-gather-done(%begun)
  %summed = ((f32[7]{0}), f32[7]{0}) all-reduce-start(%x), to_apply=%add
  ROOT %out = f32[4] get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run() -> None:
    assert collective_bytes(HLO) == {
        "all-gather": 3 * 5 * 4 * 8 * 4 + 8 * 4 + 4 * 2,
        "all-reduce": 3 * (2 * 4 + 3 * 2) + 7 * 4,
        "collective-permute": 10 * 4,
    }


def test_a_loop_of_unknown_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown length"):
        collective_bytes(HLO.replace('{"n":"5"}', "{}"))


@pytest.mark.slow(reason="two steps compiled for eight devices")
def test_a_step_moves_weights_and_gradients_and_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every device computes on its own prompts: what it gathers and sums is weights. Logits come in
    several chunks, and still the vocabulary's weights are gathered once a pass."""
    monkeypatch.setitem(shared_prefix.score.__kwdefaults__, "max_logits", 8192)
    data = write_jsonl(tmp_path / "data.jsonl")
    found, weights = {}, {}
    for axis in ("data", "fsdp"):
        config = tiny_config(data)
        config.model.scratch.update(
            hidden_size=64, intermediate_size=192, num_layers=2, vocab_size=512
        )
        config.train.update(batch_size=64, micro_batch_size=64)
        config.mesh.update(data=1, fsdp=1, tensor=1)
        config.mesh[axis] = 8
        config.eval.batch_size = 8
        (tmp_path / axis).mkdir()
        setup = prepare(config, tmp_path / axis, ("train",))
        found[axis], weights[axis] = of_step(setup, rows=64), weights_bytes(setup)
    assert found["data"]["all-gather"] < 0.1 * weights["data"]
    # The embedding is used twice, and each use has its gradient summed.
    assert 0.9 < found["data"]["all-reduce"] / weights["data"] < 1.5
    # Once for scoring, which is the forward pass as well, and once for the backward pass.
    assert 1.5 < found["fsdp"]["all-gather"] / weights["fsdp"] < 2.5
    assert 0.9 < found["fsdp"]["all-reduce"] / weights["fsdp"] < 1.5


@pytest.mark.slow(reason="compiles for two devices in a process of its own")
def test_the_command(tmp_path: Path) -> None:
    done = command(
        "benchmarks.collectives", "--config=configs/tiny.py", "--devices=2", "--tensor=1",
        "--rows=2", "--config.data.path=plain", "--config.data.max_train=64",
        "--config.model.scratch.num_layers=1", "--config.model.scratch.hidden_size=32",
        f"--config.cache_dir={tmp_path}", f"--output={tmp_path / 'found.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| 2 | data |" in done.stdout
    assert "| 2 | fsdp, tensor=1 |" in done.stdout
    assert (tmp_path / "found.json").is_file()
