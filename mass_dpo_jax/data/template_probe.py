"""Finds out whether what a chat template writes for an answer can be known without rendering it.

Most templates write an answer as it is between two fixed texts, perhaps after a look for
`</think>` or for space to trim. To find out whether a template is of this kind, we render a
`Probe`, a string that records what is done with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jinja2 import nodes

# A template that escapes anything would change this text.
TEXT = "a \"b\" 'c' <d> & {{e}} %s \\ é f"
ITSELF = object()  # The result of a method that returns the string it was called on.
_STRIPS = ("strip", "lstrip", "rstrip")
_QUESTIONS = ("__contains__", "__eq__", "__ne__", "startswith", "endswith")
# Methods of every Python object, which say nothing about the characters.
_HARMLESS = {
    "__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__getnewargs__",
    "__getstate__", "__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__",
    "__setattr__", "__sizeof__", "__subclasshook__",
}  # fmt: skip
# These turn a probe into an ordinary string, which records nothing: `a ~ b`, blocks whose output is
# a value, and functions and filters written in C.
_BLOCKS = (nodes.Concat, nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Macro)
_FUNCTIONS = {"e", "escape", "float", "forceescape", "format", "int", "join", "safe", "urlize"}


@dataclasses.dataclass
class Uses:
    """What a template did with a probe.

    Attributes:
        calls: questions and their results: (method, arguments, result).
        complete: whether nothing else was done with it that could depend on its characters.
    """

    calls: list[tuple[str, tuple[Any, ...], Any]] = dataclasses.field(default_factory=list)
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a template writes around an answer for which the same calls have the same results.

    Attributes:
        before: the text before the answer.
        after: the text after it.
        calls: the calls of `Uses`.
    """

    before: str
    after: str
    calls: tuple[tuple[str, tuple[Any, ...], Any], ...]

    def holds(self, answer: str) -> bool:
        """Whether the rule says what is written for an answer."""
        return all(
            getattr(answer, method)(*arguments) == (answer if result is ITSELF else result)
            for method, arguments, result in self.calls
        )


def find_rule(render: Callable[[str], str], template: nodes.Template) -> Rule | None:
    """Finds the rule of a template; None if it may depend on an answer in other ways.

    Args:
        render: returns what the template writes for an answer, which it passes on unchanged.
        template: the template's syntax tree.
    """
    if _may_hide_probe(template):
        return None
    uses = Uses()
    before, *after = render(_make(Probe, TEXT, uses)).split(TEXT)
    if not uses.complete or len(after) != 1:
        return None
    return Rule(before, after[0], tuple(dict.fromkeys(uses.calls)))


def _may_hide_probe(template: nodes.Template) -> bool:
    """Whether a template may turn a probe into an ordinary string."""
    formats = (node.left for node in template.find_all(nodes.Mod))
    return (
        any(True for _ in template.find_all(_BLOCKS))
        or any(
            not isinstance(left, nodes.Getattr) for left in formats
        )  # `loop.index % 2` formats nothing.
        or any(node.name in _FUNCTIONS for node in template.find_all(nodes.Filter))
        or any(node.attr in _FUNCTIONS for node in template.find_all(nodes.Getattr))
    )


class _Recorded(str):
    """A string that contains a probe; every method that is not overridden makes it incomplete."""

    uses: Uses

    def __str__(self) -> str:  # What is written or passed to a filter keeps recording.
        return self

    def __add__(self, other: str) -> str:
        return _make(_Recorded, _plain(self) + _plain(other), self.uses)

    def __radd__(self, other: str) -> str:
        return _make(_Recorded, _plain(other) + _plain(self), self.uses)


def _make(kind: type[_Recorded], text: str, uses: Uses) -> str:
    recorded = kind(text)
    recorded.uses = uses
    return recorded


def _plain(text: str) -> str:
    return str.__str__(text)


def _make_incomplete(name: str) -> Callable[..., Any]:
    def method(self: _Recorded, *arguments: Any, **options: Any) -> Any:
        self.uses.complete = False
        return getattr(str, name)(_plain(self), *arguments, **options)

    return method


for _name in dir(str):
    if _name not in _HARMLESS and _name not in vars(_Recorded):
        setattr(_Recorded, _name, _make_incomplete(_name))


class Probe(_Recorded):
    """A string in place of an answer; strings that it is joined to are `_Recorded`."""

    def __bool__(self) -> bool:
        return self.__ne__("")


def _make_question(name: str) -> Callable[..., Any]:
    def method(self: Probe, *arguments: Any) -> Any:
        result = getattr(str, name)(_plain(self), *arguments)
        if any(isinstance(argument, _Recorded) for argument in arguments):
            self.uses.complete = False
        self.uses.calls.append((name, arguments, result))
        return result

    return method


def _make_strip(name: str) -> Callable[..., Any]:
    def method(self: Probe, *arguments: Any) -> Any:
        result = getattr(str, name)(_plain(self), *arguments)
        if result != _plain(self):
            self.uses.complete = False
            return result
        self.uses.calls.append((name, arguments, ITSELF))
        return self

    return method


for _name in _QUESTIONS:
    setattr(Probe, _name, _make_question(_name))
for _name in _STRIPS:
    setattr(Probe, _name, _make_strip(_name))
