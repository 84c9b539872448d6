"""Questions in QASC's format, and a chat template, for benchmarks of pretrained models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.helpers import WORDS

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def write_questions(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 40), ("dev", 3)):
        rows = []
        for i in range(count):
            words = [" ".join(rng.choice(WORDS, 2, replace=False)) for _ in range(9)]
            texts = list(dict.fromkeys(words))[:4]
            choices = [{"text": t, "label": "ABCD"[k]} for k, t in enumerate(texts)]
            stem = f"what is {split} {WORDS[i % len(WORDS)]} {i}?"
            question = {"stem": stem, "choices": choices}
            rows.append({"id": f"{split}{i}", "question": question, "answerKey": "B"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
