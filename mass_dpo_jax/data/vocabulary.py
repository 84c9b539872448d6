"""A tokenizer trained on the spot, for models that start from random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mass_dpo_jax.errors import UserError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # Their ids are 0, 1 and 2.
_SPECIAL = [PAD, BOS, EOS]
_SMALLEST = len(_SPECIAL) + 256  # One token a byte, so that every text can be written.


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, a Hugging Face tokenizer, to `folder`.

    It is a byte-level BPE of at most `vocab_size` tokens (fewer when `texts` run out of pairs) that
    puts <bos> before a text and leaves <eos> to the caller. The same texts in the same order give
    the same files.

    Raises:
      UserError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    if vocab_size < _SMALLEST:
        raise UserError(
            f"vocab_size={vocab_size}: a byte-level tokenizer needs at least {_SMALLEST}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, _SPECIAL.index(BOS))],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
