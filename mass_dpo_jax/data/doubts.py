"""What is odd about texts that a chat template writes: counted and said, or refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from mass_dpo_jax.data import probe
from mass_dpo_jax.data.messages import Message
from mass_dpo_jax.errors import UserError

# How texts begin that chat templates have written, also those of other models.
RENDERED = re.compile(
    r"\s*(<[|\uff5c][^|\uff5c>]+[|\uff5c]>|<start_of_turn>|<bos>|<s>|\[INST\]|<<SYS>>)"
)
# What other programs call roles; most templates leave out a message of a role they do not know.
OTHER_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "ai"), "assistant")}
OTHER_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}  # But for case.
MOST_KNOWN = 10_000  # Sequences of roles that are remembered.


class Doubts:
    """Looks at messages before a template writes them.

    Args:
      write: what the template writes for messages, with the generation prompt; or raises UserError.
      source: the template's text.
      special: matches special tokens.
      bos: the token that begins a sequence, if there is one.
    """

    def __init__(
        self,
        write: Callable[[list[Message]], str],
        source: str,
        special: re.Pattern[str],
        bos: str | None,
    ):
        self._write = write
        self._source = source
        self._special = special
        self._bos = bos
        self._left_out: dict[tuple[tuple[str, bool], ...], str] = {}  # By roles, and is there text.

    def of_texts(self, messages: Sequence[Message], place: str) -> str:
        """What is odd about a prompt's messages, in words to count by; "" is nothing.

        Raises:
          UserError: they cannot be meant.
        """
        found = ""
        for message in messages:
            role, text = message["role"], message["content"]
            meant = OTHER_ROLES.get(role.lower(), role)
            if meant != role and not re.search(rf"""['"]{re.escape(role)}['"]""", self._source):
                raise UserError(
                    f"{place}: a message of the prompt has the role {role!r}, which the chat "
                    f"template does not know: write {meant!r}"
                )
            start = text.lstrip()
            token = self._special.match(start)
            if token and token[0] in self._openers:
                raise UserError(
                    f"{place}: the prompt begins with {token[0]}, which the chat template writes "
                    "itself, so it is rendered already: set --config.data.chat_template=none, or "
                    "write the text alone"
                )
            if RENDERED.match(start) or (self._header and start.startswith(self._header)):
                found = "that look rendered already"
            elif not found and self._special.search(text):
                found = "with special tokens in their text"
        return found

    def of_roles(self, messages: list[Message]) -> str:
        """Which message is not written, in words to count by; "" is none."""
        key = tuple((m["role"], bool(m["content"])) for m in messages)
        if key not in self._left_out:
            if len(self._left_out) >= MOST_KNOWN:
                self._left_out.clear()
            self._left_out[key] = self._find_left_out(messages)
        return self._left_out[key]

    def _find_left_out(self, messages: list[Message]) -> str:
        texts = [f"[text {i}]" if m["content"] else "" for i, m in enumerate(messages)]
        marked = [{**m, "content": text} for m, text in zip(messages, texts, strict=True)]
        try:
            written = self._write(marked).lower()
        except UserError:
            return ""  # It wants other texts.
        for message, text in zip(messages, texts, strict=True):
            if text not in written:
                return f"with a {message['role']} message that the chat template does not write"
        return ""

    @functools.cached_property
    def _opening(self) -> str:
        """What the template writes before the text of a user's only message."""
        try:
            return self._write([{"role": "user", "content": probe.TEXT}]).partition(probe.TEXT)[0]
        except UserError:
            return ""  # It wants other messages; those of the data will tell.

    @functools.cached_property
    def _openers(self) -> set[str]:
        return {*self._special.findall(self._opening), *([self._bos] if self._bos else [])}

    @functools.cached_property
    def _header(self) -> str:
        """The user's header where it is no special token, "### Instruction:" say."""
        lines = self._special.sub("\n", self._opening).strip().splitlines()
        header = lines[-1].strip() if lines else ""
        return header if re.search(r"[^\w\s]", header) else ""
