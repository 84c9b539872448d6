r"""How fast a data set becomes tokens, and what memory that takes; also of another commit, and TRL.

    python -m benchmarks.data --rows=200000
    python -m benchmarks.data --rows=1000000 --trl=5000    # with TRL installed
    git worktree add /tmp/before COMMIT
    python -m benchmarks.data --rows=200000 --baseline=/tmp/before

A file of rows in the program's own format, each with a prompt of some 60 words and one chosen and
seven rejected responses of some 12 words, all different, is read, rendered with a chat template and
tokenized: in a process of its own, with an empty cache, and again with what the first one left
there. Prints seconds and CPU seconds, rows a CPU second and the largest resident memory, and
compares the tokens with the baseline's.

TRL takes one rejected response a row. With `--trl` the first rows, each as its seven pairs, go
through its DPOTrainer's own preparation, in one process as ours; and each as its first pair alone.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import machine
from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
START = r"""
import hashlib, json, resource, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from mass_dpo_jax.config import default
from mass_dpo_jax.data.token_cache import tokenize_once

begun = time.perf_counter(), time.process_time()
folder = Path(sys.argv[1])
data = default().data
data.update(path=str(folder / "rows.jsonl"), validation_share=0.0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
cache = Path(sys.argv[2])
try:
    from mass_dpo_jax.data.split_cache import open_splits
    examples = open_splits(cache, data, ("train",), 0)["train"]
except ImportError:
    from mass_dpo_jax.data import load_examples
    examples = load_examples(data, "train", 0)
read = time.perf_counter() - begun[0], time.process_time() - begun[1]
tokens = tokenize_once(cache, examples, tokenizer, data, progress=False)
digest = tokens.digest()
print(json.dumps({
    "rows": len(tokens),
    "tokens": int(tokens.prompt_lengths.sum() + tokens.response_lengths.sum()),
    "read": read,
    "all": (time.perf_counter() - begun[0], time.process_time() - begun[1]),
    "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "digest": digest,
}))
"""
TRL = r"""
import itertools, json, resource, sys, time
from pathlib import Path
from types import SimpleNamespace
import datasets
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

begun = time.perf_counter(), time.process_time()
folder, rejected = Path(sys.argv[1]), int(sys.argv[5])

def pairs():
    with (folder / "rows.jsonl").open() as file:
        for line in itertools.islice(file, int(sys.argv[4])):
            row = json.loads(line)
            prompt = [{"role": "user", "content": row["prompt"]}]
            chosen = [{"role": "assistant", "content": row["chosen"]}]
            for text in row["rejected"][:rejected]:
                answer = [{"role": "assistant", "content": text}]
                yield {"prompt": prompt, "chosen": chosen, "rejected": answer}

tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
datasets.disable_progress_bars()
rows = datasets.Dataset.from_generator(pairs, cache_dir=sys.argv[2])
read = time.perf_counter() - begun[0], time.process_time() - begun[1]
arguments = DPOConfig(output_dir=sys.argv[2], max_length=None, use_cpu=True, bf16=False)
trainer = SimpleNamespace(_tokenizer=tokenizer)
tokens = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "train")
print(json.dumps({
    "rows": int(sys.argv[4]),
    "read": read,
    "all": (time.perf_counter() - begun[0], time.process_time() - begun[1]),
    "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


def write(folder: Path, rows: int) -> None:
    """Writes a data set, a template and a tokenizer."""
    from mass_dpo_jax.data.tokenizer import train_tokenizer

    rng = random.Random(0)
    letters = "aeioulnrst"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(20_000)]
    # As often as words of a language are.
    often = list(itertools.accumulate(1 / rank for rank in range(1, 1 + len(words))))

    def text(count: int) -> str:
        return " ".join(
            rng.choices(words, cum_weights=often, k=rng.randint(count // 2, 3 * count // 2))
        )

    with (folder / "rows.jsonl").open("w") as file:
        for i in range(rows):
            rejected = [text(12) for _ in range(7)]
            row = {"id": f"r{i}", "prompt": text(60), "chosen": text(12), "rejected": rejected}
            file.write(json.dumps(row) + "\n")
    train_tokenizer((text(60) for _ in range(2000)), 8000, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)


def start(program: str, tree: Path, *words: Any) -> dict[str, Any]:
    """Runs one of the programs above in a new process, with the package in `tree`."""
    folder = words[0]
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{tree}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(
    rows: int, trees: dict[str, Path], model: Path | None, trl_rows: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Returns, by tree, the first start and the second; and TRL's, of all pairs and of one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, rows)
        model = model or folder / "model"
        found = {
            tree: [start(START, path, folder, folder / tree, model) for _ in range(2)]
            for tree, path in trees.items()
        }
        peer = [
            start(TRL, trees["now"], folder, folder / f"trl{pairs}", model, trl_rows, pairs)
            for pairs in ((7, 1) if trl_rows else ())
        ]
    table = [
        [
            f"{tree}, {which} start",
            *(f"{one[part][kind]:.1f}" for part in ("all", "read") for kind in (0, 1)),
            f"{one['rows'] / one['all'][1]:.0f}",
            f"{one['gigabytes']:.2f}",
        ]
        for tree, starts in found.items()
        for which, one in zip(("first", "second"), starts, strict=True)
    ]
    table += [
        [
            f"TRL, {pairs} of each row",
            *(f"{one[part][kind]:.1f}" for part in ("all", "read") for kind in (0, 1)),
            f"{one['rows'] / one['all'][1]:.0f}",
            f"{one['gigabytes']:.2f}",
        ]
        for pairs, one in zip(("7 pairs", "1 pair"), peer)
    ]
    head = ["", "seconds", "CPU", "of these reading", "CPU", "rows a CPU second", "GiB"]
    print(machine.table(head, table))
    if len({one["digest"] for starts in found.values() for one in starts}) > 1:
        print("the tokens differ")
    if "before" in found:
        ratio = found["now"][0]["all"][1] / found["before"][0]["all"][1]
        print(f"CPU time of the first start, now / before: {ratio:.2f}; goal: at most 0.33")
    return {**found, "trl": peer} if peer else found


def main() -> None:
    if _ROWS.value < 1:
        raise UserError(f"--rows={_ROWS.value}: expected 1 or more")
    trees = {"now": Path(__file__).parent.parent}
    if _BASELINE.value:
        trees = {"before": Path(_BASELINE.value).absolute(), **trees}
    model = Path(_MODEL.value).absolute() if _MODEL.value else None
    found = run(_ROWS.value, trees, model, min(_TRL.value, _ROWS.value))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _ROWS = flags.DEFINE_integer("rows", 20_000, "How many rows.")
    _BASELINE = flags.DEFINE_string("baseline", "", "Folder of another commit to compare with.")
    _MODEL = flags.DEFINE_string(
        "model", "", "Folder of a tokenizer with a chat template; empty: one made on the spot."
    )
    _TRL = flags.DEFINE_integer("trl", 0, "Rows that TRL prepares, too; 0: none.")
    _OUTPUT = flags.DEFINE_string("output", "", "JSON file for the numbers.")
    cli.run(main)
