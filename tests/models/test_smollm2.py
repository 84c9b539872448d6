"""A real pretrained model, SmolLM2-135M-Instruct, from end to end, against transformers in PyTorch.

With MASS_DPO_TEST_SMOLLM2=DIR, its folder in float32: no continuous integration has it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mass_dpo_jax as mdj
from mass_dpo_jax.export import export
from mass_dpo_jax.train import train

pytestmark = pytest.mark.smollm2
QUESTIONS = (
    ("What is the capital of France?", "Paris.", ["London.", "The capital of Spain.", "Rome?"]),
    ("Which planet is the largest?", "Jupiter.", ["Mars.", "The Moon.", "Venus, I think."]),
    ("What do bees make?", "Honey.", ["Milk.", "Wool and silk.", "Bread."]),
    ("How many legs has a spider?", "Eight.", ["Six.", "Four or so.", "None at all."]),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["MASS_DPO_TEST_SMOLLM2"])


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in QUESTIONS
    ]


def their_logps(torch: ModuleType, folder: Path) -> np.ndarray:
    """Log-probabilities of the assistant's turns as transformers renders and computes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows():
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        for text in (row["chosen"], *row["rejected"]):
            turn = [*row["prompt"], {"role": "assistant", "content": text}]
            whole = tokenizer.apply_chat_template(turn, tokenize=False).rstrip("\n")
            ids = tokenizer(whole, add_special_tokens=False).input_ids
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            each = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
            found.append(each.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum().item())
    return np.array(found).reshape(len(QUESTIONS), -1)


@pytest.mark.usefixtures("one_device")
def test_scores_are_those_of_transformers(torch: ModuleType, folder: Path) -> None:
    found = mdj.load_model(folder).score(rows())
    np.testing.assert_allclose(found.logps, their_logps(torch, folder), atol=1e-3, rtol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_a_run_is_exported_and_generates(torch: ModuleType, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    config = mdj.default_config()
    config.model.update(path=str(folder), lora={"rank": 4, "base": "float32"})
    config.data.update(path=str(data), validation_share=0.0)
    config.update(cache_dir=str(tmp_path / "cache"), num_negatives=2)
    config.log.report = False
    config.train.update(
        steps=6, batch_size=4, micro_batch_size=4, learning_rate=1e-3, eval_every=0, clip=1.0
    )
    train(config, tmp_path / "run")
    margins = [
        json.loads(line)["rewards/margins"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "rewards/margins" in line
    ]
    assert margins[-1] > max(margins[0], 0.05)
    export(tmp_path / "run", tmp_path / "out", dtype="float32")
    trained = mdj.load_model(tmp_path / "run").score(rows())
    np.testing.assert_allclose(
        trained.logps, their_logps(torch, tmp_path / "out"), atol=1e-3, rtol=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        rows()[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
