"""The three families with their real tokenizers and templates, on real LastFM, end to end."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.score import score
from mass_dpo_jax.train import train
from tests.support.helpers import losses

FAMILIES = {
    "llama3.2": ("config.Llama-3.2-1B.json", "<|eot_id|>"),
    "qwen3": ("config.Qwen3-0.6B.json", "<|im_end|>"),
    "smollm3": ("config.SmolLM3-3B.json", "<|im_end|>"),
}


def small_model(torch: ModuleType, source: Path, family: str, folder: Path) -> Path:
    """The family's real tokenizer, template and vocabulary on a random model, small otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM

    description = json.loads((source / FAMILIES[family][0]).read_text())
    description.update(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.1, torch_dtype="float32",
    )  # fmt: skip
    if "no_rope_layers" in description:
        description["no_rope_layers"] = [1, 1, 1, 0]
    description.pop("max_window_layers", None)
    description.pop("layer_types", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(
        gzip.decompress((source / "tokenizer.json.gz").read_bytes())
    )
    (folder / "chat_template.jinja").write_bytes((source / "chat_template.jinja").read_bytes())
    return folder


def few_rows(source: Path, folder: Path) -> Path:
    """The first rows of each real split: 128,000 logits a token are slow on a CPU."""
    folder.mkdir()
    for split, count in {"train": 16, "val": 4, "test": 4}.items():
        rows = json.loads(gzip.decompress((source / f"lastfm-{split}.json.gz").read_bytes()))
        (folder / f"lastfm-{split}.json").write_text(json.dumps(rows[:count]))
    return folder


@pytest.mark.slow(reason="vocabularies of 128,000 tokens and more")
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("family", FAMILIES)
def test_lastfm_through_the_whole_pipeline(
    tmp_path: Path, torch: ModuleType, real_data: Path, family: str
) -> None:
    model = small_model(torch, real_data / "tokenizers" / family, family, tmp_path / "model")
    config = config_lib.default()  # The paper's settings but for size.
    config.model.path = str(model)
    config.data.update(name="lastfm", path=str(few_rows(real_data / "lastfm", tmp_path / "rows")))
    config.train.update(steps=2, batch_size=8, micro_batch_size=4)
    config.eval.batch_size = 4
    done = train(config, tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(1 + 3), abs=1e-5)
    assert done["examples"] == 4 and 0 <= done["final"]["policy/accuracy"] <= 1

    # The scores of a few rows, against transformers on the conversation as its template writes it.
    from transformers import AutoModelForCausalLM

    from mass_dpo_jax.data import load_examples
    from mass_dpo_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    net = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    example = load_examples(config.data, "test", config.seed)[1]
    line = list(score(config, None, "test"))[1]
    assert line["id"] == example.id and len(line["logps"]) == 20
    messages = [{"role": "user", "content": example.prompt.text}]
    given = {"date_string": config.data.date, "enable_thinking": False, "tokenize": False}
    head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **given)
    prompt = tokenizer(head, add_special_tokens=False).input_ids
    responses = (example.chosen, *example.rejected)
    for text, logp in list(zip(responses, line["logps"], strict=True))[:4]:
        answer = {"role": "assistant", "content": text}
        whole = tokenizer.apply_chat_template([*messages, answer], **given)
        assert whole.startswith(head)
        end = FAMILIES[family][1]
        response = whole[len(head) :].partition(end)[0] + end
        ids = tokenizer(response, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = net(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = float(torch.log_softmax(logits.float(), -1)[np.arange(len(ids)), ids].sum())
        assert logp == pytest.approx(expected, rel=1e-4, abs=1e-4)
