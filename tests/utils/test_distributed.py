"""Several processes, with real ones on 127.0.0.1: they compute what one does, and end together."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import train as train_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.score import score
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.offline_selection import select_with_model
from mass_dpo_jax.utils import mesh_axes
from mass_dpo_jax.utils.process_group import ProcessGroup
from tests.support.helpers import losses, slow, tiny_config, write_jsonl
from tests.support.hosts import ARRAYS, DELAY, replay, together
from tests.support.models import random_tensors, write_weights
from tests.support.models import tiny_config as tiny_model
from tests.support.processes import ROOT, ended, environment, free_port, spawn

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
ALL = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data.jsonl`; `one.json`, what one device computes on the sets that it chooses; `sets.json`.

    A near-tie in selection may flip with the order of summation, and then losses differ for a good
    reason. So every mesh trains on these sets, and what it would have chosen is counted.
    """
    folder = tmp_path_factory.mktemp("hosts")
    data = write_jsonl(folder / "data.jsonl", examples=40)
    one = replay(data, folder / "work", ONE)
    (folder / "sets.json").write_text(json.dumps(one.pop("sets")))
    (folder / "one.json").write_text(json.dumps(one))
    return folder


def check(found: dict[str, Any], folder: Path, share: float) -> None:
    """The losses and reference log-probs of one device, and a share of its memory, but for what
    is too small to be split."""
    one = json.loads((folder / "one.json").read_text())
    assert len(one["losses"]) == 10
    assert np.ptp(one["losses"]) > 0.1
    np.testing.assert_allclose(found["losses"], one["losses"], atol=1e-5)
    np.testing.assert_allclose(found["logps"], one["logps"], rtol=1e-5, atol=1e-5)
    assert found["flips"] <= 1
    assert share <= found["bytes"] / one["bytes"] < 1.05 * share


@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        slow({"data": 2, "fsdp": 1, "tensor": 1}, 1),
        ({"data": 1, "fsdp": 4, "tensor": 1}, 1 / 4),
        slow({"data": 1, "fsdp": 1, "tensor": 2}, 1 / 2),
    ],
)
def test_one_process(shared: Path, tmp_path: Path, mesh: dict[str, int], share: float) -> None:
    sets = np.array(json.loads((shared / "sets.json").read_text()), np.int32)
    check(replay(shared / "data.jsonl", tmp_path, mesh, sets), shared, share)


def check_processes(
    count: int, shared: Path, folder: Path, meshes: dict[str, tuple[dict[str, int], float, int]]
) -> None:
    """Trains on meshes over some processes with eight devices; of each a size, the share of the
    state on a device, and how many rows of 64 a process makes."""
    job = {
        "data": str(shared / "data.jsonl"), "sets": str(shared / "sets.json"),
        "meshes": {name: mesh for name, (mesh, _, _) in meshes.items()},
    }  # fmt: skip
    found = together(count, 8 // count, folder, job)
    for name, (_, share, rows) in meshes.items():
        check(found[name], shared, share)
        assert found[name]["rows"] == rows, name


def test_two_processes(shared: Path, tmp_path: Path) -> None:
    check_processes(2, shared, tmp_path / "two", {"all": (ALL, 1 / 4, 32)})


@pytest.mark.slow(reason="other values of what a quick one covers")
def test_two_processes_on_other_meshes(shared: Path, tmp_path: Path) -> None:
    meshes = {
        "fsdp": ({"data": 1, "fsdp": 2, "tensor": 1}, 1 / 2, 32),
        "tensor": ({"data": 1, "fsdp": 1, "tensor": 4}, 1 / 4, 64),  # They need the same rows.
    }
    check_processes(2, shared, tmp_path / "two", meshes)


@pytest.mark.slow(reason="four processes; the quick tests have two")
def test_four_processes(shared: Path, tmp_path: Path) -> None:
    """`tensor` stays inside of a process, `data` and `fsdp` go across."""
    check_processes(4, shared, tmp_path / "four", {"all": (ALL, 1 / 4, 16)})


# Every example's set is chosen once, at step 0, and is in the checkpoints.
RUN = {
    "selection.refresh": "once", "train.learning_rate": 1e-5, "train.steps": 40, "beta": 1.0,
    "train.checkpoint_every": 5, "train.eval_every": 0, "model.remat": "dots",
    "data.max_validation": 20,
}  # fmt: skip


def flags(workdir: Path, data: Path, cache: Path) -> list[str]:
    """Of the command that trains `tiny_config(data, **RUN)`."""
    # Quoted: ml_collections takes the type of a field from its default.
    config = workdir.with_suffix(".py")
    config.write_text(
        "import sys; sys.path.append('tests')\n"
        "from pathlib import Path\nfrom tests.support.helpers import tiny_config\n"
        f"def get_config():\n    return tiny_config(Path({str(data)!r}), **{RUN!r})\n"
    )
    return [f"--config={config}", f"--workdir={workdir}", f"--config.cache_dir={cache}"]


@pytest.mark.slow(reason="waits for a peer's timeout, and trains twice")
def test_a_dead_process_ends_the_others_and_fewer_go_on(tmp_path: Path) -> None:
    """Two processes; one is killed; one process goes on with other devices, as if nothing was."""
    data = write_jsonl(tmp_path / "data.jsonl")
    workdir = tmp_path / "run"
    train = ["-m", "mass_dpo_jax.train", *flags(workdir, data, tmp_path / "cache")]
    where = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    peer_timeout = 10
    more = [
        *where,
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        f"--peer_timeout={peer_timeout}",
    ]
    both = [spawn([*train, *more, f"--process_id={i}"], env=environment(1)) for i in range(2)]
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 8):
        assert time.monotonic() < deadline
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.02)
    both[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    (status, _, said), _ = ended(both, seconds=60)
    assert time.monotonic() - killed < peer_timeout + 10
    assert status not in (0, -signal.SIGKILL)
    # As the network says it or, where there is no answer at all, as JAX does.
    assert "process 0 of 2" in said or "another task died" in said
    assert "lost another process" in said or "1\nThe tasks have crashed" in said

    kept = losses(workdir)
    assert 7 < len(kept) < 40
    config = tiny_config(data, **RUN)
    config.cache_dir = str(tmp_path / "cache")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    train_lib.train(config, workdir)  # Eight devices of this process.
    train_lib.train(config, tmp_path / "whole")
    found, expected = losses(workdir), losses(tmp_path / "whole")
    assert len(found) == len(expected) == 40
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not list(workdir.glob("*.tmp"))


@pytest.mark.slow(reason="a pair of processes; another one trains")
def test_scores_and_choices_of_two_processes(tmp_path: Path) -> None:
    """Without a file system for their caches in common, and from a Hugging Face folder of which
    each reads its part."""
    data = write_jsonl(tmp_path / "data.jsonl", examples=30)
    run = tmp_path / "run"
    config = tiny_config(data, **{"train.steps": 1, "data.max_validation": 4})
    config.cache_dir = str(tmp_path / "cache")
    train_lib.train(config, run)
    config.selection.criterion = "contrast"
    expected = {
        "score": list(score(config.copy_and_resolve_references(), run, None)),
        "select": list(select_with_model(config, run, None)),
    }
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", random_tensors(tiny_model("llama")))
    job = {"run": str(run), "weights": str(tmp_path / "weights")}
    found = together(2, 2, tmp_path / "two", job)
    assert 0.5 <= found["share"] < 0.55  # Vectors are not split.
    assert [row["id"] for row in found["score"]] == [row["id"] for row in expected["score"]]
    for row, same in zip(found["score"], expected["score"], strict=True):
        for name in ("logps", "ref_logps", "rewards"):
            np.testing.assert_allclose(row[name], same[name], atol=1e-4)
    chosen = [(row["id"], row["selected"]) for row in found["select"]]
    assert chosen == [(row["id"], row["selected"]) for row in expected["select"]]
    # The first process kept what it computed; the second one asked it.
    assert list((tmp_path / "two" / "cache0").glob("ref_logps*"))
    assert not list((tmp_path / "two" / "cache1").glob("ref_logps*"))


def test_processes_that_see_different_things_stay_together(tmp_path: Path) -> None:
    """Data that one of them reads, caches, kernels, checkpoints."""
    data = write_jsonl(tmp_path / "data.jsonl", examples=12)
    folder = tmp_path / "two"
    folder.mkdir()
    shutil.copy(data, folder)
    zero, one = together(2, 1, folder, {"waits": True})["waits"]
    # The other waited, and not in a computation, which a network would have ended after a time.
    assert zero.pop("waited") < DELAY / 2 < one.pop("waited")
    assert zero == one
    assert len(zero["rest"][0]) == 11
    assert zero["computed"] == 1
    assert zero["table"] == [1, 1, 1]
    assert {zero["broken on 0"], zero["broken on 1"]} == {"plain"}
    for view in ("nothing", "too much"):
        found = [zero[f"{view}: {what}"] for what in ("none", "newest", "restored")]
        assert found == [None, 2, 2]
    assert zero["damaged for one"] == 1
    assert zero["none"] is None
    for name, array in ARRAYS.items():
        assert zero[name] == [array.dtype.str, list(array.shape), int(array.sum())], name


def slurm(process: int, processes: int, port: int) -> dict[str, str]:
    """What SLURM tells a process of a job on this machine."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(processes), "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def test_a_mistake_of_one_process_ends_all_and_is_said_once(tmp_path: Path) -> None:
    """Who they are they know from SLURM."""
    data = write_jsonl(tmp_path / "data.jsonl")
    train = ["-m", "mass_dpo_jax.train", *flags(tmp_path / "run", data, tmp_path), "--distributed"]
    port = free_port()
    done = ended(
        [
            spawn(
                [*train, *(["--config.data.path=gone.jsonl"] if process == 1 else [])],
                env=environment(1, **slurm(process, 2, port)),
            )
            for process in range(2)
        ],
        seconds=90,
    )
    assert [status for status, _, _ in done] == [2, 2], done
    said = "".join(out + err for _, out, err in done)
    assert said.count("error: ") == 1
    assert "gone.jsonl" in done[0][2]  # In the log that people look at.
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_folder_that_another_training_is_at_work_in(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    lock = run_folder.Lock(tmp_path / "run")
    lock.take()
    train = ["-m", "mass_dpo_jax.train", *flags(tmp_path / "run", data, tmp_path)]
    train += [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    both = [spawn([*train, f"--process_id={i}"], env=environment(1)) for i in range(2)]
    done = ended(both, seconds=90)
    lock.close()
    assert [status for status, _, _ in done] == [2, 2], done
    said = "".join(out + err for _, out, err in done)
    assert said.count("another training is at work in this folder") == 1
    assert not list((tmp_path / "run").glob("*.json"))


def test_others_that_do_not_come(tmp_path: Path) -> None:
    """Nobody at the address; too few at it; and somebody who expects more."""
    data = write_jsonl(tmp_path / "data.jsonl")
    train = ["-m", "mass_dpo_jax.train", *flags(tmp_path / "run", data, tmp_path)]

    def started(port: int, processes: int, process: int, timeout: int) -> Any:
        where = f"--coordinator_address=127.0.0.1:{port}"
        numbers = [f"--num_processes={processes}", f"--process_id={process}"]
        command = [*train, where, *numbers, f"--start_timeout={timeout}"]
        return spawn(command, env=environment(1))

    port, other, third = free_port(), free_port(), free_port()
    nobody, alone, two, three = ended(
        [
            started(port, 2, 1, 3),
            started(other, 2, 0, 3),
            started(third, 2, 0, 60),
            started(third, 3, 1, 60),
        ],
        seconds=120,
    )
    assert [nobody[0], alone[0], two[0], three[0]] == [2, 2, 2, 2]
    assert f"nobody answers at the coordinator's 127.0.0.1:{port}" in nobody[2]
    assert f"not all processes have come to 127.0.0.1:{other}" in alone[2]
    assert "--num_processes=3 of process 1: process 0 was started with 2" in two[2]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            ProcessGroup("10.0.0.1:1234"),
            "without --num_processes, --process_id: expected all three",
        ),
        (ProcessGroup(processes=2, process=0), "without --coordinator_address"),
        (ProcessGroup("10.0.0.1", 2, 0), "expected HOST:PORT"),
        (ProcessGroup("10.0.0.1:x", 2, 0), "expected HOST:PORT"),
        (ProcessGroup("10.0.0.1:99999", 2, 0), "expected HOST:PORT"),
        (ProcessGroup("10.0.0.1:1234", 0, 0), "num_processes=0"),
        (ProcessGroup("10.0.0.1:1234", 2, 2), "process_id=2: expected 0 to 1"),
        (ProcessGroup(peer_timeout=0), "peer_timeout=0"),
    ],
)
def test_flags_by_half(group: ProcessGroup, message: str) -> None:
    with pytest.raises(UserError, match=message):
        group.check()


@pytest.mark.parametrize(
    ("groups", "sizes", "across"),
    [
        (2, (2, 4, 1), (2, 1, 1)),  # Copies of the model on two hosts.
        (2, (1, 8, 1), (1, 2, 1)),  # One model over both.
        (4, (2, 4, 4), (2, 2, 1)),
        (6, (4, 3, 2), (2, 3, 1)),
        (2, (1, 1, 8), (1, 1, 2)),
    ],
)
def test_data_goes_across_hosts_before_fsdp_and_tensor(
    groups: int, sizes: tuple[int, ...], across: tuple[int, ...]
) -> None:
    found, inside = mesh_lib.split_sizes(groups, dict(zip(mesh_axes.AXES, sizes, strict=True)))
    assert tuple(found.values()) == across
    assert tuple(x * y for x, y in zip(across, inside.values(), strict=True)) == sizes


@pytest.mark.slow(reason="starts processes to be refused, as flags' tests do")
def test_local_sh_says_a_mistake_of_all_once(tmp_path: Path) -> None:
    """The script ends with the command's exit status."""
    data = write_jsonl(tmp_path / "data.jsonl")
    done = subprocess.run(
        [
            "bash", "launch/local.sh", "2", "2", "mass_dpo_jax.train",
            *flags(tmp_path / "run", data, tmp_path), "--config.mesh.data=3",
        ],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**environment(1), "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (done.stdout + done.stderr).count("error: ") == 1
    assert (
        "config.mesh.data=3 config.mesh.fsdp=1 config.mesh.tensor=1: does not fit the 4 device(s)"
        in done.stderr
    )


def test_launch_files(tmp_path: Path) -> None:
    """What there is to check without a cluster: they parse, name flags and settings that exist, and
    ask for as many processes as their mesh needs."""
    scripts = [*ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm.sbatch"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    for name, chips in (("gpu", "nvidia.com/gpu"), ("tpu", "google.com/tpu")):
        text = (ROOT / "launch" / "kubernetes" / f"{name}.yaml").read_text()
        parts = list(yaml.safe_load_all(text))
        (jobs,) = parts[-1]["spec"]["replicatedJobs"]
        job = jobs["template"]["spec"]
        assert job["completionMode"] == "Indexed"
        assert job["parallelism"] == job["completions"]
        (container,) = job["template"]["spec"]["containers"]
        assert "--distributed" in container["args"]
        assert job["template"]["spec"]["serviceAccountName"] == parts[0]["metadata"]["name"]
        sizes = dict(re.findall(r"--config\.mesh\.(\w+)=(\d+)", " ".join(container["args"])))
        devices = jobs["replicas"] * job["parallelism"] * container["resources"]["limits"][chips]
        assert math.prod(map(int, sizes.values())) == devices
        known = dict(config_lib.flatten(config_lib.default()))
        named = re.findall(r"--config\.([\w.]+)=", " ".join(container["args"]))
        assert named
        assert set(named) <= set(known)
    shown = subprocess.run(
        ["bash", "launch/tpu_pod.sh", "--config=configs/llama3.py", "--config.data.path=a b"],
        capture_output=True, text=True, cwd=ROOT, check=True,
        env={**os.environ, "TPU": "pod", "ZONE": "here", "DRY": "1", "QUEUED": "1", "SETUP": "0"},
    )  # fmt: skip
    words = shlex.split(shown.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "ssh", "pod"]
    remote = shlex.split(words[-1].removeprefix("--command="))
    assert remote[-3:] == ["--distributed", "--config=configs/llama3.py", "--config.data.path=a b"]


@pytest.mark.slow(reason="starts processes to be refused, as the other launchers' tests do")
def test_slurm_script(tmp_path: Path) -> None:
    """With a `srun` that starts its command with SLURM's variables, once a task."""
    srun = tmp_path / "srun"
    srun.write_text(
        f"#!{sys.executable}\nimport os, subprocess, sys\n"
        "command = [word for word in sys.argv[1:]]\n"
        "while command[0].startswith('--'):\n    command.pop(0)\n"
        "started = [subprocess.Popen(command, env={**os.environ, 'SLURM_PROCID': str(i),\n"
        "           'SLURM_LOCALID': str(i)}) for i in range(int(os.environ['SLURM_NTASKS']))]\n"
        "sys.exit(max(process.wait() for process in started))\n"
    )
    srun.chmod(0o755)
    data = write_jsonl(tmp_path / "data.jsonl")
    found = slurm(0, 2, free_port())
    done = subprocess.run(
        [
            "bash", str(ROOT / "launch" / "slurm.sbatch"), *flags(tmp_path / "run", data, tmp_path),
            "--config.mesh.data=3",
        ],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={
            **environment(2), **found, "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        },
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "2 processes, 4 devices" in done.stdout
    assert done.stderr.count("does not fit the 4 device(s)") == 1
