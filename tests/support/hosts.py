"""What tests of several processes compute, in one of them or in this one.

    python tests/support/hosts.py ADDRESS PROCESSES PROCESS FOLDER

does as one process of several what FOLDER/job.json says; the first one writes FOLDER/found.json.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from flax import nnx

from mass_dpo_jax.models import attention as plain
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.decoder import abstract_decoder, param_dims
from mass_dpo_jax.models.weight_files import WeightFiles
from mass_dpo_jax.models.weights import load_hf
from mass_dpo_jax.runs import run_config, run_folder
from mass_dpo_jax.score import score
from mass_dpo_jax.training import checkpoint
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training import prepare as prepare_lib
from mass_dpo_jax.training.offline_selection import select_with_model
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import Batches, abstract_state, first_state
from mass_dpo_jax.utils import cache, distributed, fingerprint
from tests.support.helpers import tiny_config
from tests.support.models import tiny_config as tiny_model
from tests.support.processes import ended, environment, free_port, spawn

STEPS = 10
DELAY = 2.0  # Seconds.
ARRAYS = {
    "large": np.arange(distributed.PIECE_BYTES // 8 + 3),
    "empty": np.zeros((0, 3), np.float32),
    "turned": np.arange(6, dtype=np.int16).reshape(2, 3).T,
    "scalar": np.array(2.0**40),
}
LEARNING = {
    "data.validation_share": 0.0, "beta": 1.0, "model.remat": "dots",
    "train.learning_rate": 3e-4,
}  # fmt: skip


def together(processes: int, devices: int, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job on several processes with some devices each."""
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    address = f"127.0.0.1:{free_port()}"
    module = ["-m", "tests.support.hosts"]  # As a file, its folder would hide `tokenizers`.
    done = ended(
        [
            spawn([*module, address, str(processes), str(i), str(folder)], env=environment(devices))
            for i in range(processes)
        ],
        seconds=240,
    )
    assert [status for status, _, _ in done] == [0] * processes, done
    return json.loads((folder / "found.json").read_text())


def replay(
    data: Path,
    workdir: Path,
    mesh: Mapping[str, int],
    sets: np.ndarray | None = None,
    count_flips: bool = False,
) -> dict[str, Any]:
    """Trains for some steps on `sets`, or on those of the policy of the moment.

    Args:
      mesh: sizes; on as many devices as that is, of each process the same number.
      sets: `[STEPS, M, n]`, negatives of the examples of each step.
      count_flips: choose too, and count how many sets would have been others.

    Returns:
      `losses` of the steps, `sets`, `flips`, `bytes` of weights and moments on one device, `logps`
      of the reference, and `rows` of a batch of 64 that this process made.
    """
    steps = {"train.steps": STEPS}
    config = tiny_config(
        data, **LEARNING, **steps, **{f"mesh.{axis}": n for axis, n in mesh.items()}
    )
    config.cache_dir = str(workdir / "cache")
    count = int(np.prod(list(mesh.values())))
    each = count // jax.process_count()
    owners = range(jax.process_count())
    devices = [d for i in owners for d in jax.local_devices(process_index=i)[:each]]
    make_mesh = mesh_lib.make_mesh
    mesh_lib.make_mesh = lambda sizes: make_mesh(sizes, devices=devices)
    try:
        setup = prepare(config, workdir, ("train",))
    finally:
        mesh_lib.make_mesh = make_mesh
    # Adam moves a weight whose gradient is rounding noise by the whole learning rate, to a side
    # that the order of summation decides. Its epsilon above that noise lets such weights rest.
    adam = functools.partial(optax.scale_by_adam, eps=1e-3)
    with mock.patch.object(optax, "scale_by_adam", adam):
        optimizer = make_optimizer(config.train, STEPS)
    params = setup.policy.weights("", config.seed)
    like = abstract_state(setup, optimizer)
    state = first_state(like, optimizer, params)
    held = [
        shard.data.nbytes
        for leaf in jax.tree.leaves((state.params, state.opt_state))
        for shard in leaf.addressable_shards
        if shard.device == jax.local_devices()[0]
    ]
    refs = setup.score_reference(params)
    batches = Batches(setup, refs)
    losses, chosen, flips = [], [], 0
    rows = len(refs.logps["train"])
    for step in range(STEPS):
        batch = batches[step]
        if sets is None or count_flips:
            own = np.zeros((rows, 3), np.int32)
            micro = jax.tree.map(lambda x: x[0], batch.arrays)
            choice, _ = setup.program.choose_batch(state.params, micro, setup.key(step))
            own[distributed.gather(micro.index)] = distributed.gather(choice.candidate_ids)
            if sets is not None:
                flips += int((own != sets[step])[batch.rows].any(1).sum())
        chosen.append(own if sets is None else sets[step])
        negatives = batches.shard_negatives(batch.rows, chosen[-1])
        state, _, found = setup.program.train_step(
            optimizer, state, batch.arrays, negatives, setup.key(step), batch.packed_length
        )
        losses.append(float(found["loss"]))
    made: list[int] = []
    mesh_lib.shard_rows(setup.mesh, np.arange(64), lambda mine: made.append(len(mine)) or mine)
    return {
        "losses": losses, "sets": np.stack(chosen).tolist(), "flips": flips, "bytes": sum(held),
        "rows": made[0], "logps": refs.logps["train"].tolist(),
    }  # fmt: skip


def read_share(folder: Path) -> float:
    """Of the numbers in a Hugging Face folder, how many this process reads where weights are split
    over all devices. What comes together of them is what a single device reads."""
    config = tiny_model("llama")
    state = nnx.state(abstract_decoder(config), nnx.Param)
    dims = nnx.to_pure_dict(param_dims(state))
    sizes = tiny_config(folder, **{"mesh.data": 1, "mesh.fsdp": -1}).mesh
    places = mesh_lib.param_shardings(mesh_lib.make_mesh(sizes), nnx.to_pure_dict(state), dims)
    count = 0
    read = WeightFiles.read

    def counted(self: WeightFiles, *args: Any) -> np.ndarray:
        nonlocal count
        part = read(self, *args)
        count += part.size
        return part

    WeightFiles.read = counted  # type: ignore[method-assign]
    split = jax.tree.leaves(load_hf(folder, config, places))
    WeightFiles.read = read  # type: ignore[method-assign]
    for part, whole in zip(split, jax.tree.leaves(load_hf(folder, config)), strict=True):
        assert part.sharding.device_set == set(jax.devices())
        np.testing.assert_array_equal(distributed.gather(part), whole)
    return count / sum(leaf.size for leaf in split)


def waits(folder: Path) -> dict[str, Any]:
    """Returns what this process reads where processes see different files."""
    found: dict[str, Any] = {}
    me, real = (
        jax.process_index(),
        (distributed._get, prepare_lib.open_splits, run_folder.list_steps),
    )
    longest = 0.0

    def get(key: str) -> Any:
        nonlocal longest
        begun = time.monotonic()
        value = real[0](key)
        longest = max(longest, time.monotonic() - begun)
        return value

    def load(*args: Any) -> Any:
        assert distributed.is_primary(), "the data are read once"
        time.sleep(DELAY)
        return real[1](*args)

    # Of reading that takes one process longer than networks wait.
    config = tiny_config(folder / "data.jsonl", **{"mesh.data": 2, "mesh.fsdp": 1})
    config.cache_dir = str(folder / f"cache{me}")
    with (
        mock.patch.object(distributed, "_get", get),
        mock.patch.object(prepare_lib, "open_splits", load),
    ):
        setup = prepare(config, folder / "run", ("train",))
    tokens = setup.tokens["train"]
    found["waited"], found["digest"] = longest, tokens.digest()
    found["rest"] = [tokens.ids, tokens.cut, tokens.candidate_ids.tolist(), tokens.scores.tolist()]

    # Of a table that one process has in its cache: nobody may compute it.
    computed: list[int] = []
    for _ in range(2):
        table = cache.load_or_compute(
            Path(config.cache_dir), "x", "k", lambda: computed.append(1) or np.ones(3, np.float32)
        )
    found["table"], found["computed"] = table.tolist(), len(computed)

    # Of a kernel that fails on one host, each in turn.
    for broken in range(2):
        obstacle = "no such kernel" if me == broken else None
        with mock.patch.object(fused_attention, "find_obstacle", lambda *_, found=obstacle: found):
            chosen = fused_attention.choose_attention(
                "auto", setup.policy.config, "bfloat16", setup.mesh
            )
        found[f"broken on {broken}"] = "fused" if chosen is not plain else "plain"

    # Of a checkpoint that process 1 does not see yet, or sees when it is gone.
    everywhere = mesh_lib.replicated_sharding(setup.mesh)
    step, weights = jax.device_put((np.int32(0), {"w": np.ones(3, np.float32)}), everywhere)
    like = checkpoint.TrainState(step, weights, weights)
    for name, seen in (("nothing", []), ("too much", [1, 2, 3])):
        views = (lambda path, seen=seen: seen) if me == 1 else real[2]
        with mock.patch.object(run_folder, "list_steps", views):
            saved = checkpoint.Checkpoints(folder / name, keep=5)
            found[f"{name}: none"] = saved.latest()
            for step in (1, 1, 2):
                now = jax.device_put(np.int32(step), everywhere)
                saved.save(like._replace(step=now), None, {})
            saved._settle()
            found[f"{name}: newest"] = saved.latest()
            restored = checkpoint.Checkpoints(folder / name).restore(like)
            found[f"{name}: restored"] = int(restored.state.step)
            saved.close()

    # Of a checkpoint whose newest state process 1 alone reads otherwise.
    real_print = fingerprint.fingerprint
    calls: list[int] = []

    def other(tree: Any) -> str:
        calls.append(1)
        return "another" if me == 1 and len(calls) == 1 else real_print(tree)

    with mock.patch.object(fingerprint, "fingerprint", other):
        restored = checkpoint.Checkpoints(folder / "nothing").restore(like)
    found["damaged for one"] = int(restored.state.step)

    for name, array in ARRAYS.items():
        got = distributed.broadcast_array(array if distributed.is_primary() else None)
        found[name] = [got.dtype.str, got.shape, int(got.sum())]
    found["none"] = distributed.broadcast_array(None)
    return found


def main() -> None:
    address, processes, process, name = sys.argv[1:]
    distributed.start(distributed.ProcessGroup(address, int(processes), int(process)))
    folder = Path(name)
    job = json.loads((folder / "job.json").read_text())
    found: dict[str, Any] = {}
    for case, mesh in job.get("meshes", {}).items():
        sets = np.array(json.loads(Path(job["sets"]).read_text()), np.int32)
        # To choose is another program to compile: on the mesh of all axes only.
        flips = case == "all"
        found[case] = replay(Path(job["data"]), folder / "work", mesh, sets, count_flips=flips)
        found[case].pop("sets")
    if "run" in job:
        run = Path(job["run"])
        config = run_config.load_config(run)
        config.cache_dir = str(folder / f"cache{process}")  # No file system that all share.
        config.selection.criterion = "contrast"
        found["score"] = list(score(config.copy_and_resolve_references(), run, None))
        found["select"] = list(select_with_model(config, run, None))
    if "weights" in job:
        found["share"] = read_share(Path(job["weights"]))
    if "waits" in job:
        found["waits"] = distributed.gather_values(waits(folder))
    if distributed.is_primary():
        (folder / "found.json").write_text(json.dumps(found))
    distributed.finish()


if __name__ == "__main__":
    main()
