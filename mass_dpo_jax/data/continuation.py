"""Tokenizes responses as continuations of their prompts.

Some tokenizers change the beginning of every text: those of Llama 2, Mistral and Phi-3 put a space
before it, others strip one. They do not within a text, so they must not at the beginning of a
response either, which is tokenized separately from its prompt.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mass_dpo_jax.data.tokenizer import encode_texts, raise_user_errors
from mass_dpo_jax.data.tokens import RaggedTokens

# The parts of a tokenizer that can change a text's beginning, and the fields with their own parts.
PARTS = ("normalizer", "pre_tokenizer")
INNER_PARTS = ("normalizers", "pretokenizers")


class ResponseEncoder:
    """Tokenizes responses, without special tokens around them.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = self._continuing = tokenizer
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), np.int32)
        self._changes_sections = False
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return
        backend = tokenizer.backend_tokenizer
        with raise_user_errors(f"{tokenizer.name_or_path}: the tokenizer cannot be read"):
            states = {name: _get_state(getattr(backend, name)) for name in PARTS}
            bare = {name: _remove_changes(state) for name, state in states.items()}
            if bare == states:
                return
            self._changes_sections = any(map(_changes_sections, states.values()))
            self._continuing = copy.deepcopy(tokenizer)
            # Only a whole tokenizer can be made of JSON.
            shell = json.loads(Tokenizer(models.BPE()).to_str())
            made = Tokenizer.from_str(json.dumps(shell | bare))
            for name in PARTS:
                setattr(self._continuing.backend_tokenizer, name, getattr(made, name))

    def find_beginnings(self, texts: Sequence[str], prompts: RaggedTokens) -> np.ndarray:
        """Returns whether the tokenizer treats what follows each prompt as a beginning, bool [m].

        It does after an empty prompt, and with some tokenizers after an added token like [/INST].

        Args:
            texts: the prompts' texts.
            prompts: their tokens, at least one of each.
        """
        if self._continuing is self._tokenizer:
            return np.zeros(len(texts), bool)
        empty = np.fromiter((not text for text in texts), bool, len(texts))
        if not self._changes_sections:
            return empty
        last = prompts.tokens[prompts.starts + prompts.lengths - 1]
        return empty | np.isin(last, self._added)

    def encode(self, texts: Sequence[tuple[str, bool]]) -> RaggedTokens:
        """Tokenizes pairs of a text and whether it is treated as a beginning."""
        if not any(begins for _, begins in texts):
            return encode_texts(self._continuing, [text for text, _ in texts])
        parts = [
            encode_texts(tokenizer, [text for text, begins in texts if begins == which])
            for tokenizer, which in ((self._continuing, False), (self._tokenizer, True))
        ]
        arrays = zip(*((part.tokens, part.lengths) for part in parts), strict=True)
        order = np.argsort([begins for _, begins in texts], kind="stable")
        return RaggedTokens(*map(np.concatenate, arrays)).take(np.argsort(order))


def _get_state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _remove_changes(state: Any) -> Any:
    """Returns the state of a part that does not change a text's beginning, otherwise the same."""
    if state is None or state["type"] == "Prepend":
        return None
    state = dict(state)
    for name in INNER_PARTS:
        if name in state:
            state[name] = [x for x in map(_remove_changes, state[name]) if x is not None]
    if state["type"] == "Metaspace":
        state["prepend_scheme"] = "never"
    for field in ("add_prefix_space", "strip_left"):
        if state.get(field):
            state[field] = False
    return state


def _changes_sections(state: Any) -> bool:
    """Whether a part changes the beginning of every section of a text, not only of the first.

    Sections are what added tokens separate; only Metaspace can treat the first one differently.
    """
    if state is None or state == _remove_changes(state):
        return False
    inner = [part for name in INNER_PARTS for part in state.get(name, ())]
    return any(map(_changes_sections, inner)) if inner else state.get("prepend_scheme") != "first"
