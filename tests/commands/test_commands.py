"""The commands from outside: what they write, against PyTorch, and how they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mass_dpo_jax import cli, metrics
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.evaluate import evaluate
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.score import score
from mass_dpo_jax.selection import select_negatives
from mass_dpo_jax.train import train
from tests.support.helpers import WORDS, log_lines, tiny_config, write_jsonl
from tests.support.processes import ROOT, command, environment, python, refused
from tests.support.runs import SmallFiles


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, torch: ModuleType) -> Path:
    """A random Llama as transformers saves it, with a tokenizer of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([" ".join(WORDS)], 300, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def torch_logps(torch: ModuleType, folder: Path, rows: list[dict]) -> list[list[float]]:
    """One row a response, as transformers computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        logps = []
        for text in (row["chosen"], *row["rejected"]):
            response = tokenizer(text, add_special_tokens=False).input_ids
            response = [*response, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = net(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            picked = torch.log_softmax(logits, -1)[range(len(response)), response]
            logps.append(float(picked.sum()))
        found.append(logps)
    return found


@pytest.mark.usefixtures("one_device")
def test_score_and_evaluate_equal_transformers(
    tmp_path: Path, torch: ModuleType, model: Path
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", examples=10)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    expected = torch_logps(torch, model, rows)
    config = tiny_config(data, **{"model.path": str(model)})
    lines = list(score(config, None, None))
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    for line, logps in zip(lines, expected, strict=True):
        assert line["logps"] == pytest.approx(logps, rel=1e-4, abs=1e-4)
        assert set(line) == {"id", "logps", "response_tokens"}  # No reference was given.

    config = tiny_config(data, **{"model.path": str(model), "model.reference_path": str(model)})
    for line in score(config, None, None):
        assert line["rewards"] == pytest.approx([0.0] * len(line["logps"]), abs=1e-4)

    table = np.full((len(rows), 7), -np.inf)
    for row, logps in zip(table, expected, strict=True):
        row[: len(logps)] = logps
    wanted = metrics.ranking(table, np.isfinite(table), "policy")
    config = tiny_config(data, **{"model.path": str(model)})
    found = evaluate(config, None, None)
    # The rows have scores, so there is more: tests/test_metrics.py.
    more = {name for name in found if "gain_ndcg" in name} | {"policy/map", "policy/map_se"}
    assert set(found) - more == set(wanted)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.usefixtures("one_device")
def test_a_diverged_model_has_no_scores(tmp_path: Path, model: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", examples=10)
    diverged = tmp_path / "diverged"
    shutil.copytree(model, diverged)
    tensors = load_file(diverged / "model.safetensors")
    tensors["model.norm.weight"][3] = 3e38  # Finite, as what is computed with it is not.
    save_file(tensors, diverged / "model.safetensors", {"format": "pt"})
    for path, reference, place in (
        (diverged, "", str(diverged)),
        (model, str(diverged), "the reference"),
    ):
        changes = {"model.path": str(path), "model.reference_path": reference}
        for compute in (lambda config: list(score(config, None, None)),
                        lambda config: evaluate(config, None, None)):  # fmt: skip
            with pytest.raises(UserError, match=rf"^{place}: example 'row0': .*\[nan, .*10 of 10"):
                compute(tiny_config(data, **changes))


@pytest.mark.usefixtures("one_device")
def test_a_trained_run_scores_as_it_reported(tmp_path: Path, model: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", examples=30)
    config = tiny_config(data, **{"model.path": str(model)})
    done = train(config, tmp_path / "run")
    found = evaluate(tiny_config(data), tmp_path / "run", None)
    assert found == pytest.approx(done["final"], abs=1e-5)
    last = [line for line in log_lines(tmp_path / "run") if "eval/policy/mrr" in line][-1]
    assert last["eval/policy/mrr"] == pytest.approx(found["policy/mrr"], abs=1e-6)
    # The reference of a run is the model that it started from.
    lines = list(score(tiny_config(data), tmp_path / "run", None))
    started = list(score(tiny_config(data, **{"model.path": str(model)}), None, None))
    assert len(lines) == 30
    for line, before in zip(lines, started, strict=True):
        assert line["ref_logps"] == pytest.approx(before["logps"], abs=1e-4)


def test_commands_one_after_the_other(tmp_path: Path) -> None:
    """As a user types them: a run, and what the others make of it."""
    data = write_jsonl(tmp_path / "data.jsonl", examples=40)
    settings = {
        "data.name": "jsonl", "data.path": data, "data.chat_template": "none",
        "model.scratch.hidden_size": 32, "model.scratch.intermediate_size": 48,
        "model.scratch.num_layers": 1, "model.scratch.vocab_size": 300, "train.batch_size": 8,
        "train.micro_batch_size": 8, "train.steps": 2, "train.eval_every": 1, "eval.batch_size": 8,
        "log.report": False,
    }  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    run = tmp_path / "run"

    def said(name: str, *words: str) -> str:
        done = command(f"mass_dpo_jax.{name}", *words)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    defaults = ROOT / "mass_dpo_jax" / "config.py"
    assert f"written to {run}" in said("train", f"--config={defaults}", f"--workdir={run}", *words)
    done = json.loads((run / "metrics.json").read_text())
    assert done["step"] == 2 and "policy/mrr" in done["final"]
    assert "nothing to do" in said("train", f"--workdir={run}")

    for name in ("score", "select"):
        said(name, f"--workdir={run}", f"--output={tmp_path / name}")
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [line["id"] for line in lines] == [f"row{i}" for i in range(40)]
    found = tmp_path / "metrics.json"
    said("evaluate", f"--workdir={run}", "--split=validation", f"--output={found}")
    assert json.loads(found.read_text())["policy/mrr"] == pytest.approx(
        done["final"]["policy/mrr"], abs=1e-6
    )
    said("export", f"--workdir={run}", f"--output={tmp_path / 'exported'}")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert str(run.name) in said("compare", str(run))
    picture = tmp_path / "curves.png"
    table = said("compare", str(run), f"--plot={picture}")
    assert str(run.name) in table and table.endswith(f"Curves: {picture}\n")
    assert picture.is_file()
    said("report", str(run), f"--output={tmp_path / 'report'}")
    assert list((tmp_path / "report").glob("*.html"))


TRAIN = ("mass_dpo_jax.train", "--config=configs/tiny.py")


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    workdir = f"--workdir={tmp_path / 'run'}"
    line = refused(*TRAIN, workdir, "--config.train.learning_rat=1")
    assert "--config.train.learning_rat" in line and "--config.train.learning_rate" in line
    line = refused(*TRAIN, workdir, "--config.train.steps=many")
    assert "--config.train.steps=many" in line and "int" in line
    line = refused("mass_dpo_jax.train", "--config=configs/tony.py", workdir)
    assert "configs/tony.py: no such file" in line
    line = refused(*TRAIN, workdir, "--config.method=mass_dop")
    assert "config.method='mass_dop'" in line and "mass_dpo" in line


def test_mistakes_in_files(tmp_path: Path, model: Path) -> None:
    workdir = f"--workdir={tmp_path / 'run'}"
    data = write_jsonl(tmp_path / "data.jsonl")
    with data.open("a") as file:
        file.write('{"prompt": "after amber comes ", "rejected": ["basil"]}\n')
    jsonl = ("--config.data.name=jsonl", f"--config.data.path={data}")
    line = refused(*TRAIN, workdir, *jsonl)
    assert f"{data}:25" in line and "chosen" in line
    empty = tmp_path / "model"
    empty.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (empty / file.name).write_bytes(file.read_bytes())
    write_jsonl(tmp_path / "data.jsonl")
    line = refused(*TRAIN, workdir, *jsonl, f"--config.model.path={empty}")
    assert str(empty) in line and "safetensors" in line
    assert not (tmp_path / "run").exists()


def test_select_without_a_model_or_a_configuration(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    output = tmp_path / "selected.jsonl"
    words = ("mass_dpo_jax.select", f"--features={tmp_path / 'features.npy'}",
             f"--output={output}", "--config.num_negatives=2")  # fmt: skip
    done = command(*words, "--config.selection.criterion=contrast", "--format=pairs")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"8 pairs written to {output}\n"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    want = select_negatives(features, n=2, criterion="contrast")
    assert [row["selected"] for row in rows] == np.asarray(want.indices).ravel().tolist()
    output.unlink()
    line = refused(*words, "--config.selection.criterion=contrasts")
    assert "criterion='contrasts'" in line and not list(tmp_path.glob("selected*"))
    assert "--output is missing" in refused(*words[:2])
    line = refused(*words[:2], f"--output={tmp_path / 'features.npy'}")
    assert "would replace the input" in line
    assert np.array_equal(np.load(tmp_path / "features.npy"), features)


def test_exporting_what_is_no_run(tmp_path: Path) -> None:
    words = ("mass_dpo_jax.export", f"--output={tmp_path / 'out'}")
    assert "--workdir is missing" in refused(*words)
    line = refused(*words, f"--workdir={tmp_path}")
    assert f"{tmp_path}: not a run folder" in line
    assert "python -m mass_dpo_jax.export --workdir=" in command(words[0], "--help").stdout


def test_what_an_output_must_not_be(tmp_path: Path) -> None:
    data, link = write_jsonl(tmp_path / "data.jsonl"), tmp_path / "link.jsonl"
    link.symlink_to(data)
    for value, message in (
        (tmp_path, "no ordinary file; expected the JSON file"),
        ("/dev/null", "no ordinary file"),
        ("/dev/stdout", "no ordinary file"),  # It can be a link to one, which is the terminal's.
        ("-", "no ordinary file"),
        (tmp_path / "missing" / "file", "its folder does not exist"),
        (link, f"would replace the input {data}"),
    ):
        with pytest.raises(UserError, match=f"^--output={value}: {message}"):
            cli.check_output(Path(value), "JSON", "", "missing", data)
    assert cli.check_output(tmp_path / "new", "JSON", data) == tmp_path / "new"
    for name in ("score", "select", "evaluate"):  # Said before there is a model to read.
        words = (f"mass_dpo_jax.{name}", "--config=llama3", f"--config.data.path={data}")
        assert "would replace the input" in refused(*words, f"--output={link}")


def test_an_output_replaces_no_file_of_a_run_or_of_a_data_folder(tmp_path: Path) -> None:
    run, data, link = tmp_path / "run", tmp_path / "data", tmp_path / "link.json"
    (run / "checkpoints").mkdir(parents=True)
    data.mkdir()
    for file in (run / "config.json", run / "metrics.jsonl", run / "scores.jsonl", data / "a"):
        file.write_text("before")
    link.symlink_to(run / "config.json")
    for path in (run / "config.json", run / "metrics.jsonl", link):
        with pytest.raises(UserError, match=f"^--output={path}: is a part of the run {run}; name"):
            cli.check_output(path, "JSON")
    with pytest.raises(UserError, match=f"would replace a file in the folder of the data, {data}"):
        cli.check_output(data / "a", "JSON", data)
    for path in (run / "scores.jsonl", data / "new"):
        assert cli.check_output(path, "JSON", data) == path


def test_an_output_goes_where_a_link_points(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    cli.write_lines(link, [1])
    assert link.is_symlink() and target.read_text() == "1\n"


def test_a_full_disk_leaves_an_output_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    output.write_text("before")
    code = (
        "import sys, pathlib; from mass_dpo_jax import cli\n"
        "rows = ({'row': 'x' * 100} for _ in range(1000))\n"
        f"cli.run(lambda: cli.write_lines(pathlib.Path({str(output)!r}), rows))"
    )
    with SmallFiles(10_000):
        done = python("-c", code)
    assert done.returncode == 2
    assert done.stderr == f"error: {output}: File too large\n"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("rows.jsonl", "before")]


@pytest.mark.parametrize("content", ["{", '{"model": {"remat": "some"}}'])
def test_a_run_whose_settings_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    line = refused("mass_dpo_jax.evaluate", f"--workdir={tmp_path}")
    assert line.startswith(f"error: {tmp_path}/config.json:")


def test_settings_before_the_file_and_the_last_of_two_files(tmp_path: Path) -> None:
    done = command("mass_dpo_jax.data", "--config.data.name=jsonl", "--config=configs/tony.py",
                   "--config=tiny", "--config.print=True")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--config.beta=1.0" in done.stdout and "--config.data.name=jsonl" in done.stdout


def test_of_two_run_folders_the_last(tmp_path: Path) -> None:
    """Its settings, as its weights."""
    for name, beta in (("first", 0.2), ("last", 0.3)):
        run_folder.write_config(tmp_path / name, tiny_config(tmp_path, beta=beta))
    folders = (f"--workdir={tmp_path / 'first'}", "--workdir", str(tmp_path / "last"))
    done = command("mass_dpo_jax.evaluate", *folders, "--config.print=True")
    assert done.returncode == 0, done.stderr
    assert "--config.beta=0.3" in done.stdout


def test_too_little_memory_on_the_device() -> None:
    """XLA's own error, of 64 TiB in one array."""
    code = (
        "import jax.numpy as jnp; from mass_dpo_jax import cli\n"
        "cli.run(lambda: jnp.zeros(2**46, jnp.uint8).block_until_ready())"
    )
    done = python("-c", code, "--verbosity=-1", env=environment(JAX_PLATFORMS="cpu"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: not enough memory on a device: lower config.train.micro_batch_")
    assert "Out of memory" in line and str(2**46) in line


@pytest.mark.parametrize(
    ("settings", "hint"),
    [("", "nothing was written"), (", resumes=True", "the same command goes on from what was sa")],
)
def test_what_an_interruption_left(settings: str, hint: str) -> None:
    code = (
        "import signal; from mass_dpo_jax import cli\n"
        # A shell has its background jobs ignore the signal, and these tests may be one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"cli.run(lambda: signal.raise_signal(signal.SIGINT){settings})"
    )
    done = python("-c", code)
    assert done.returncode == 130 and done.stderr.startswith(f"interrupted; {hint}")


def test_refusals_say_what_to_do_next(tmp_path: Path) -> None:
    workdir = f"--workdir={tmp_path / 'run'}"
    line = refused("mass_dpo_jax.train", "--config=lama3", workdir)
    assert (
        "--config=lama3: no such file" in line
        and "llama3, paper, qlora, qwen3, smollm2, smollm3, tiny" in line
    )
    assert "as in --workdir=" in refused(*TRAIN)
    jsonl = ("mass_dpo_jax.train", "--config=llama3", workdir)
    assert "as in --config.data.path=" in refused(*jsonl)
    line = refused(*jsonl, "--config.data.path=a/b")
    assert "a/b: no such file or folder" in line and "hub it cannot be read" in line
    data = write_jsonl(tmp_path / "data.jsonl")
    line = refused(*jsonl, f"--config.data.path={data}", "--config.model.path=meta-llama/Llama")
    assert "meta-llama/Llama: no such folder here" in line and "cannot be reached" in line
    line = refused(*jsonl, f"--config.data.path={data}", "--config.mesh.tensor=3")
    assert "what is left of the 1 device(s) here" in line and "no multiple of 3" in line
    line = refused("mass_dpo_jax.compare", str(tmp_path))
    assert f"{tmp_path}: not a run folder" in line and "the --workdir of mass_dpo_jax" in line
    assert not (tmp_path / "run").exists()
