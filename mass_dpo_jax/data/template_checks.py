"""Checks of the prompts that a chat template renders: warnings to count, or errors."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from mass_dpo_jax.data import template_probe
from mass_dpo_jax.data.examples import Message
from mass_dpo_jax.errors import UserError

# The start of texts that a chat template has rendered, of this model or others.
RENDERED = re.compile(
    r"\s*(<[|\uff5c][^|\uff5c>]+[|\uff5c]>|<start_of_turn>|<bos>|<s>|\[INST\]|<<SYS>>)"
)
# What other programs call roles; most templates skip a message with an unknown role.
OTHER_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "ai"), "assistant")}
OTHER_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}  # In any case.
MAX_CACHED = 10_000  # Sequences of roles that are remembered.


class PromptChecks:
    """Checks messages before a template renders them.

    Args:
        render: returns what the template writes for messages, with the generation prompt.
        source: the template's text.
        special: matches special tokens.
        bos: the token that begins a sequence, if there is one.
    """

    def __init__(
        self,
        render: Callable[[list[Message]], str],
        source: str,
        special: re.Pattern[str],
        bos: str | None,
    ):
        self._render = render
        self._source = source
        self._special = special
        self._bos = bos
        self._by_roles: dict[tuple[tuple[str, bool], ...], str] = {}  # By role, and whether empty.

    def check_texts(self, messages: Sequence[Message], location: str) -> str:
        """Returns what looks wrong with a prompt's messages, as a phrase to count by, or "".

        Raises:
            UserError: the messages cannot be meant as they are.
        """
        warning = ""
        for message in messages:
            role, text = message["role"], message["content"]
            meant = OTHER_ROLES.get(role.lower(), role)
            if meant != role and not re.search(rf"""['"]{re.escape(role)}['"]""", self._source):
                raise UserError(
                    f"{location}: a message of the prompt has the role {role!r}, which the chat "
                    f"template does not know: write {meant!r}"
                )
            start = text.lstrip()
            token = self._special.match(start)
            if token and token[0] in self._openers:
                raise UserError(
                    f"{location}: the prompt begins with {token[0]}, which the chat template "
                    "writes itself, so it is rendered already: set "
                    "--config.data.chat_template=none, or write the text alone"
                )
            if RENDERED.match(start) or (self._header and start.startswith(self._header)):
                warning = "that look rendered already"
            elif not warning and self._special.search(text):
                warning = "with special tokens in their text"
        return warning

    def check_roles(self, messages: list[Message]) -> str:
        """Returns which message the template does not write, as a phrase to count by, or ""."""
        key = tuple((m["role"], bool(m["content"])) for m in messages)
        if key not in self._by_roles:
            if len(self._by_roles) >= MAX_CACHED:
                self._by_roles.clear()
            self._by_roles[key] = self._find_unwritten(messages)
        return self._by_roles[key]

    def _find_unwritten(self, messages: list[Message]) -> str:
        texts = [f"[text {i}]" if m["content"] else "" for i, m in enumerate(messages)]
        marked = [{**m, "content": text} for m, text in zip(messages, texts, strict=True)]
        try:
            written = self._render(marked).lower()
        except UserError:
            return ""  # The template needs other texts.
        for message, text in zip(messages, texts, strict=True):
            if text not in written:
                return f"with a {message['role']} message that the chat template does not write"
        return ""

    @functools.cached_property
    def _opening(self) -> str:
        """The text that the template writes before a user's only message."""
        try:
            return self._render([{"role": "user", "content": template_probe.TEXT}]).partition(
                template_probe.TEXT
            )[0]
        except UserError:
            return ""  # The template needs other messages; the data will show whether it works.

    @functools.cached_property
    def _openers(self) -> set[str]:
        return {*self._special.findall(self._opening), *([self._bos] if self._bos else [])}

    @functools.cached_property
    def _header(self) -> str:
        """The header of a user's message that is no special token, as in "### Instruction:"."""
        lines = self._special.sub("\n", self._opening).strip().splitlines()
        header = lines[-1].strip() if lines else ""
        return header if re.search(r"[^\w\s]", header) else ""
