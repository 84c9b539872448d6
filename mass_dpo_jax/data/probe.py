"""Does a chat template only write an answer, or does it look at it?

Most templates write an answer as it is between two fixed texts, perhaps after a look for
`</think>` or for space to trim. What they write for an answer is then known without rendering it.
Whether a template is of this kind we see by rendering a `Probe`, a string that records what is
done with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jinja2 import nodes

# A template that escaped anything would change it.
TEXT = "a \"b\" 'c' <d> & {{e}} %s \\ é f"
ITSELF = object()  # Stands for "the string that the method was called on" as a result.
_STRIPS = ("strip", "lstrip", "rstrip")
_QUESTIONS = ("__contains__", "__eq__", "__ne__", "startswith", "endswith")
# Python's own, which say nothing about the characters.
_HARMLESS = {
    "__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__getnewargs__",
    "__getstate__", "__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__",
    "__setattr__", "__sizeof__", "__subclasshook__",
}  # fmt: skip
# What makes an ordinary string of a probe, which records nothing any more: `a ~ b`, blocks whose
# output is a value, functions and filters written in C.
_BLOCKS = (nodes.Concat, nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Macro)
_FUNCTIONS = {"e", "escape", "float", "forceescape", "format", "int", "join", "safe", "urlize"}


@dataclasses.dataclass
class Uses:
    """What a template did with a probe.

    Attributes:
      asked: questions and their results, (method, arguments, result).
      only: nothing was done with it that could depend on its characters in another way.
    """

    asked: list[tuple[str, tuple[Any, ...], Any]] = dataclasses.field(default_factory=list)
    only: bool = True


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a template writes for an answer that gives the same results to the same questions."""

    before: str
    after: str
    asked: tuple[tuple[str, tuple[Any, ...], Any], ...]

    def holds(self, answer: str) -> bool:
        return all(
            getattr(answer, method)(*arguments) == (answer if result is ITSELF else result)
            for method, arguments, result in self.asked
        )


def find_rule(render: Callable[[str], str], template: nodes.Template) -> Rule | None:
    """The rule of a template, or None where it may depend on an answer in other ways.

    Args:
      render: gives what the template writes for an answer, by handing it on as it is.
      template: its syntax tree.
    """
    if _hides(template):
        return None
    uses = Uses()
    before, *after = render(_make(Probe, TEXT, uses)).split(TEXT)
    if not uses.only or len(after) != 1:
        return None
    return Rule(before, after[0], tuple(dict.fromkeys(uses.asked)))


def _hides(template: nodes.Template) -> bool:
    formats = (node.left for node in template.find_all(nodes.Mod))
    return (
        any(True for _ in template.find_all(_BLOCKS))
        or any(not isinstance(left, nodes.Getattr) for left in formats)  # `loop.index % 2` is none.
        or any(node.name in _FUNCTIONS for node in template.find_all(nodes.Filter))
        or any(node.attr in _FUNCTIONS for node in template.find_all(nodes.Getattr))
    )


class _Recorded(str):
    uses: Uses

    def __str__(self) -> str:  # Also what is written or handed to a filter goes on recording.
        return self

    def __add__(self, other: str) -> str:
        return _make(_Recorded, _plain(self) + _plain(other), self.uses)

    def __radd__(self, other: str) -> str:
        return _make(_Recorded, _plain(other) + _plain(self), self.uses)


def _make(kind: type[_Recorded], text: str, uses: Uses) -> str:
    made = kind(text)
    made.uses = uses
    return made


def _plain(text: str) -> str:
    return str.__str__(text)


def _other(name: str) -> Callable[..., Any]:
    def method(self: _Recorded, *arguments: Any, **more: Any) -> Any:
        self.uses.only = False
        return getattr(str, name)(_plain(self), *arguments, **more)

    return method


for _name in dir(str):
    if _name not in _HARMLESS and _name not in vars(_Recorded):
        setattr(_Recorded, _name, _other(_name))


class Probe(_Recorded):
    """Stands for an answer; what it is joined to records, too, but answers no questions."""

    def __bool__(self) -> bool:
        return self.__ne__("")


def _question(name: str) -> Callable[..., Any]:
    def method(self: Probe, *arguments: Any) -> Any:
        result = getattr(str, name)(_plain(self), *arguments)
        if any(isinstance(argument, _Recorded) for argument in arguments):
            self.uses.only = False
        self.uses.asked.append((name, arguments, result))
        return result

    return method


def _strip(name: str) -> Callable[..., Any]:
    def method(self: Probe, *arguments: Any) -> Any:
        result = getattr(str, name)(_plain(self), *arguments)
        if result != _plain(self):
            self.uses.only = False
            return result
        self.uses.asked.append((name, arguments, ITSELF))
        return self

    return method


for _name in _QUESTIONS:
    setattr(Probe, _name, _question(_name))
for _name in _STRIPS:
    setattr(Probe, _name, _strip(_name))
