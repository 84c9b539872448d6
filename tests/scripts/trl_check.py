r"""Checks DPO's loss, the rewards and `select --format=pairs` against TRL's DPOTrainer. No pytest.

    pip install torch trl    # beside what this package needs
    python -m tests.scripts.trl_check

Last passed with trl 1.16.0, transformers 5.24.0, torch 2.13.0, datasets 5.2.0, jax 0.10.2,
Python 3.11, on a CPU.

1. `losses.dpo` and `plackett_luce`, values and gradients, and `metrics.reward_metrics` equal what
   DPOTrainer computes from the same log-probabilities.
   The loss of every `config.loss.type` equals theirs, those without a reference CPOTrainer's.
2. What `python -m mass_dpo_jax.select --format=pairs` writes, plain texts and chat messages, loads
   as it is, has the same tokens there, gives the loss and rewards that `score` gives, and trains.
3. Rows of every kind of preference data that TRL documents (explicit and implicit prompts, texts
   and conversations, another name for a column) become the same prompt and responses, for a
   template of our own and, with MASS_DPO_TEST_DATA, those of Llama 3.2, Qwen3 and SmolLM3.

The texts of 2 are such that TRL's tokens can be ours. It tokenizes prompt and response in one
piece, we each on its own, so no token may reach across: a response here starts with its space. And
it counts all that a chat template writes after an answer, we what comes up to its end token: the
template here writes nothing after that.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read when JAX and the Hugging Face libraries are first imported.
os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import jax
import numpy as np
import torch
import transformers
import trl
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.cpo import CPOTrainer

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import losses, metrics
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.render import make_renderer, read_template_arguments
from mass_dpo_jax.data.tokenization import tokenize
from mass_dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mass_dpo_jax.score import score
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.methods import Responses
from tests.support import tokenizers
from tests.support.helpers import WORDS, tiny_config, write_jsonl
from tests.support.tokenizers import real

ROOT = Path(__file__).resolve().parents[2]
BETA = 0.1
NEGATIVES = 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


def make_model(folder: Path, seed: int) -> Path:
    """A random Llama as transformers saves it, with a tokenizer and a chat template."""
    train_tokenizer([" ".join(WORDS)], 300, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_data(path: Path, chat: bool) -> Path:
    """`helpers.write_jsonl` with the space before a response in it, or all as messages."""
    rows = [json.loads(line) for line in write_jsonl(path).read_text().splitlines()]

    def response(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if chat else f" {text}"

    for row in rows:
        prompt = row["prompt"].rstrip()
        row["prompt"] = [{"role": "user", "content": prompt}] if chat else prompt
        row["chosen"] = response(row["chosen"])
        row["rejected"] = [response(text) for text in row["rejected"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_trainer(
    policy: Path, reference: Path, rows: datasets.Dataset, folder: Path
) -> trl.DPOTrainer:
    """All rows in one batch, in float32."""
    args = trl.DPOConfig(
        output_dir=str(folder), beta=BETA, loss_type=["sigmoid"], max_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=len(rows), per_device_eval_batch_size=len(rows),
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    trainer = trl.DPOTrainer(
        load(policy, dtype="float32"),
        load(reference, dtype="float32"),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=transformers.AutoTokenizer.from_pretrained(policy),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def ours(log_ratios: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Loss and rewards of pairs [B, 2]; d loss / d log_ratios."""
    valid = np.ones(log_ratios.shape, bool)

    def with_gradient(loss: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda r: loss(r, valid, BETA).mean())(log_ratios)

    value, gradient = with_gradient(losses.dpo)
    same, same_gradient = with_gradient(losses.plackett_luce)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    np.testing.assert_allclose(same_gradient, gradient, rtol=1e-5, atol=1e-9)
    rewards = metrics.reward_metrics(BETA * log_ratios, valid)
    return {"loss": float(value), **{name: rewards[name] for name in REWARDS}}, np.asarray(gradient)


def compare(what: str, found: dict[str, float], expected: dict[str, float], tol: float) -> None:
    """Asserts and prints the largest difference, relative where values are above 1."""
    differences = {k: abs(found[k] - v) / max(1.0, abs(v)) for k, v in expected.items()}
    worst = max(differences, key=differences.__getitem__)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in expected.items())
    print(f"{what}: {shown}; largest difference {differences[worst]:.1e} ({worst})")
    assert differences[worst] <= tol, (worst, found[worst], expected[worst])


def same_log_probabilities(trainer: trl.DPOTrainer) -> None:
    """DPOTrainer's own loss code, on log-probabilities of our choice instead of its models'."""

    def model_that_says(logps: torch.Tensor) -> Callable[..., SimpleNamespace]:
        """Of responses of one token; the chosen ones first, then the rejected ones."""
        column = logps.T.reshape(-1, 1)
        zeros = torch.zeros_like(column)
        outputs = SimpleNamespace(
            log_probs=column, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )
        return lambda **_: outputs

    rng = np.random.default_rng(0)
    for scale in (0.0, 0.1, 10.0, 300.0, 1e4):
        policy, reference = (-np.abs(rng.normal(0, 1, (2, 64, 2))) * scale).astype(np.float32)
        logps, ref_logps = torch.tensor(policy, requires_grad=True), torch.tensor(reference)
        inputs = {
            "input_ids": torch.ones(128, 2, dtype=torch.long),
            "attention_mask": torch.ones(128, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1]] * 128),
        }
        trainer.model.train()
        trainer.ref_model = model_that_says(ref_logps)
        loss = trainer.compute_loss(model_that_says(logps), inputs)
        loss.backward()
        found = {name: trainer._metrics["train"][name][-1] for name in REWARDS}
        expected, gradient = ours(policy - reference)
        what = f"log-probabilities of size {scale:g}"
        compare(what, {"loss": loss.item(), **found}, expected, tol=1e-6)
        np.testing.assert_allclose(logps.grad.numpy(), gradient, rtol=1e-5, atol=1e-9)


def same_losses(trainer: trl.DPOTrainer) -> None:
    """DPOTrainer's and CPOTrainer's loss code for every `config.loss.type`, on the same responses.

    Responses have 1 to 3 tokens.
    """
    rng = np.random.default_rng(0)
    rows = 64
    tokens = rng.integers(1, 4, (rows, 2))
    mask = np.arange(3) < tokens[..., None]
    policy, reference = np.where(mask, -np.abs(rng.normal(0, 4, (2, rows, 2, 3))), 0)

    def stacked(x: np.ndarray) -> torch.Tensor:
        """The chosen responses first, then the rejected ones."""
        return torch.tensor(np.concatenate([x[:, 0], x[:, 1]]), dtype=torch.float32)

    def model_that_says(logps: np.ndarray) -> Callable[..., SimpleNamespace]:
        values = stacked(logps).requires_grad_()
        zeros = torch.zeros_like(values)
        outputs = SimpleNamespace(
            log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )
        return lambda **_: outputs

    padded = np.concatenate([np.zeros((rows, 2, 1), bool), mask], axis=-1)
    inputs = {
        "input_ids": torch.ones(2 * rows, 4, dtype=torch.long),
        "attention_mask": torch.ones(2 * rows, 4, dtype=torch.long),
        "completion_mask": stacked(padded).long(),
    }
    lengths, valid = jax.numpy.asarray(tokens), jax.numpy.ones((rows, 2), bool)
    logps, refs = policy.sum(-1).astype(np.float32), reference.sum(-1).astype(np.float32)
    for name in config_lib.LOSS_TYPES:
        config = config_lib.default()
        config.update(method="dpo", beta=BETA)
        config.loss.update(type=name, gamma=0.7, label_smoothing=0.1 if name == "robust" else 0.0)
        x = Responses(logps, logps - refs, lengths, valid, None, None, None)
        found = float(make_method(config, 1).loss(x).mean())
        if config.loss.reference:
            trainer.loss_types, trainer.loss_weights = [name], [1.0]
            trainer.label_smoothing = config.loss.label_smoothing
            trainer.ref_model = model_that_says(reference)
            expected = trainer.compute_loss(model_that_says(policy), inputs).item()
        else:
            settings = SimpleNamespace(
                alpha=0.0, beta=BETA, label_smoothing=0.0, simpo_gamma=0.7,
                loss_type="sigmoid" if name == "cpo" else name,
                accelerator=SimpleNamespace(device="cpu"),
            )  # fmt: skip
            values = logps / tokens if config.loss.reward == "per_token" else logps
            pair = (torch.tensor(values[:, column]) for column in (0, 1))
            expected = CPOTrainer.cpo_loss(settings, *pair)[0].mean().item()
        compare(f"loss.type={name}", {"loss": found}, {"loss": expected}, tol=1e-6)
    trainer.loss_types, trainer.label_smoothing = ["sigmoid"], 0.0


def select_pairs(config: str, output: Path) -> list[dict]:
    words = [
        sys.executable, "-m", "mass_dpo_jax.select", "--config=configs/tiny.py", *config.split(),
        f"--config.num_negatives={NEGATIVES}", "--format=pairs", f"--output={output}",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in output.read_text().splitlines()]


def check_tokens(pairs: list[dict], theirs: datasets.Dataset, config: Any) -> None:
    """TRL's prompt and responses are the tokens that we score."""
    examples = load_examples(config.data, "all", config.seed)
    tokens = tokenize(examples, load_tokenizer(config.model.path), config.data, progress=False)
    row_of = {name: row for row, name in enumerate(tokens.ids)}
    for pair, found in zip(pairs, theirs, strict=True):
        row = row_of[pair["id"].rpartition("-")[0]]
        assert found["prompt_ids"] == tokens.prompt(row).tolist()
        assert found["chosen_ids"] == tokens.response(row, 0).tolist()
        assert found["rejected_ids"] == tokens.response(row, 1 + pair["selected"]).tolist()


def selected_pairs(policy: Path, reference: Path, folder: Path, chat: bool) -> trl.DPOTrainer:
    """From `select` to one step of DPOTrainer."""
    what = "chat messages" if chat else "plain texts"
    template = "tokenizer" if chat else "none"
    folder.mkdir()
    data = make_data(folder / "data.jsonl", chat)
    pairs = select_pairs(
        f"--config.model.path={policy} --config.model.reference_path={reference} "
        f"--config.data.name=jsonl --config.data.path={data} "
        f"--config.data.chat_template={template}",
        folder / "pairs.jsonl",
    )
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder)
    )
    print(f"{what}: {len(rows)} pairs with the columns {', '.join(rows.column_names)}")
    trainer = make_trainer(policy, reference, rows, folder / "trainer")
    config = tiny_config(
        data,
        **{
            "model.path": str(policy),
            "model.reference_path": str(reference),
            "data.chat_template": template,
        },
    )
    check_tokens(pairs, trainer.train_dataset, config)

    scores = {line["id"]: line for line in score(config, None, None)}
    logps, ref_logps = (
        np.array(
            [
                [scores[p["id"].rpartition("-")[0]][name][i] for i in (0, 1 + p["selected"])]
                for p in pairs
            ],
            np.float32,
        )
        for name in ("logps", "ref_logps")
    )
    expected, _ = ours(logps - ref_logps)
    expected |= {"logps/chosen": float(logps[:, 0].mean())}
    expected |= {"logps/rejected": float(logps[:, 1].mean())}
    reported = trainer.evaluate()
    compare(what, {name: reported[f"eval_{name}"] for name in expected}, expected, tol=1e-5)

    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    (step,) = (line for line in trainer.state.log_history if "loss" in line)
    compare(f"{what}, first step", step, expected, tol=1e-5)
    assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))
    return trainer


def row_kinds() -> list[dict[str, Any]]:
    """One row of each kind."""

    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    ask, first = say("user", "What colour is the sky?"), say("user", "Hello!")
    blue, green = say("assistant", "It is blue. "), say("assistant", "It is green,\n I think.")
    system, hello = say("system", "Be brief."), say("assistant", "Hi, what is it?")
    talk = [system, first, hello, ask]
    text = {"chosen": "The sky is blue, they say.", "rejected": "The sky is green, they say."}
    return [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        text,
        {"chosen": "Q: 1\nA: yes", "rejected": "Q: 1\nA: yellow"},
        {"prompt": [ask], "chosen": [blue], "rejected": [green]},
        {"prompt": talk, "chosen": [blue], "rejected": [green]},
        {"chosen": [ask, blue], "rejected": [ask, green]},
        {"chosen": [*talk, blue], "rejected": [*talk, green]},
        {"prompt": ask["content"], "chosen": [ask, blue], "rejected": [ask, green]},
        {"prompt": ask["content"], "chosen": [*talk, blue], "rejected": [*talk, green]},
    ]


def same_texts(tokenizer: Any, folder: Path, arguments: dict[str, Any]) -> int:
    """Prompts and responses of `row_kinds` as TRL renders them; how many."""
    count = 0
    for row in row_kinds():
        file = folder / "row.jsonl"
        file.write_text(
            json.dumps({("question" if k == "prompt" else k): v for k, v in row.items()})
        )
        chat = isinstance(row["chosen"], list)
        data = tiny_config(file).data
        data.update(
            chat_template="tokenizer" if chat else "none",
            columns="prompt=question" if "prompt" in row else "",
            chat_template_kwargs=json.dumps(arguments),
        )
        (example,) = load_examples(data, "all", 0)
        renderer = make_renderer(tokenizer, data)
        prompt = renderer.render_prompt(example.prompt, example.place)
        found = [prompt, *renderer.render_responses(example, prompt)]
        theirs = maybe_apply_chat_template(
            maybe_extract_prompt(row), tokenizer, **read_template_arguments(data)
        )
        expected = [theirs["prompt"], theirs["chosen"], theirs["rejected"]]
        if chat:  # We leave out what a template writes after a response's end token.
            end = next(t for t in ("<|eot_id|>", "<|im_end|>", "<eos>") if t in expected[1])
            expected[1:] = [text[: text.index(end) + len(end)] for text in expected[1:]]
        assert found == expected, (row, found, expected)
        count += 3
    return count


def every_kind_of_row(small: Any, folder: Path) -> None:
    # SmolLM3's template asks for today's date, and TRL has no argument for it.
    today = datetime.datetime.now().strftime("%d %B %Y")
    named = {"a template of our own": small}
    if "MASS_DPO_TEST_DATA" in os.environ:
        data = Path(os.environ["MASS_DPO_TEST_DATA"])
        named |= {name: real(data, name) for name in tokenizers.CONFIGS}
    for name, tokenizer in named.items():
        counts = [
            same_texts(tokenizer, folder, {"date_string": today, "enable_thinking": thinking})
            for thinking in (False, True)
        ]
        print(f"{name}: {sum(counts)} prompts and responses as TRL renders them")


def main() -> None:
    libraries = (trl, transformers, torch, datasets, jax)
    print(", ".join(f"{library.__name__} {library.__version__}" for library in libraries))
    warnings.simplefilter("ignore", FutureWarning)  # Of the libraries to each other.
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, reference = make_model(folder / "a", 0), make_model(folder / "b", 1)
        trainer = selected_pairs(policy, reference, folder / "plain", chat=False)
        same_log_probabilities(trainer)
        same_losses(trainer)
        chat = selected_pairs(policy, reference, folder / "chat", chat=True)
        every_kind_of_row(chat.processing_class, folder)
    print("TRL agrees")


if __name__ == "__main__":
    main()
