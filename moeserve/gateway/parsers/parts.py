"""What a parser makes of a model's text, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentPart:
    """More of the answer's own text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """Call ``index`` of the answer begins. ``call_id`` is empty where the format has no ids."""

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """More of the arguments of call ``index``; together they are JSON, if the model wrote JSON."""

    index: int
    text: str


Part = ContentPart | ReasoningPart | CallPart | ArgumentsPart


class AnswerParser(Protocol):
    """Reads one sequence."""

    def push(self, text: str) -> list[Part]:
        """What more text makes ready."""
        ...

    def flush(self) -> list[Part]:
        """The rest, where the text ends."""
        ...


class PlainParser:
    """All text is content."""

    def push(self, text: str) -> list[Part]:
        return [ContentPart(text)] if text else []

    def flush(self) -> list[Part]:
        return []
