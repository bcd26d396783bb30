"""Everything that came of one sequence: content, reasoning and calls, joined from their parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moeserve.gateway.parsers.parts import (
    AnswerParser,
    ArgumentsPart,
    CallPart,
    ContentPart,
    Part,
    ReasoningPart,
)


@dataclass(slots=True)
class CallSoFar:
    """``call_id`` is the model's own, or made from the answer's id."""

    name: str
    call_id: str
    arguments: list[str] = field(default_factory=list)


class ParsedAnswer:
    """Owns a sequence's parser and what it gave. ``most_calls`` cuts further calls off, as OpenAI
    has it for ``parallel_tool_calls: false``. ``closing_id`` is the token that ends reasoning."""

    def __init__(
        self,
        parser: AnswerParser,
        id_seed: str,
        most_calls: int | None = None,
        closing_id: int | None = None,
    ) -> None:
        self._parser = parser
        self._closing_id = closing_id
        self._before_closing = 0
        self._closed = False
        self._id_seed = id_seed
        self._most_calls = most_calls
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: list[CallSoFar] = []

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def reasoning_tokens(self) -> int:
        """Up to the token that ends reasoning, its markers among them; 0 where there is none."""
        return self._before_closing if self._reasoning else 0

    def take(self, text: str, *, last: bool, token_ids: Sequence[int] = ()) -> list[Part]:
        """What more text gives, the rest of it where it is the last; kept, and to be shown."""
        if self._closing_id is not None and not self._closed:
            self._count(token_ids)
        parts = self._parser.push(text)
        if last:
            parts += self._parser.flush()
        if len(parts) > 1:
            parts = joined(parts)
        return [kept for part in parts if (kept := self._keep(part)) is not None]

    def _count(self, token_ids: Sequence[int]) -> None:
        self._closed = self._closing_id in token_ids
        for token in token_ids:
            self._before_closing += 1
            if token == self._closing_id:
                break

    def _keep(self, part: Part) -> Part | None:
        if isinstance(part, ContentPart):
            self._content.append(part.text)
        elif isinstance(part, ReasoningPart):
            self._reasoning.append(part.text)
        elif self._most_calls is not None and part.index >= self._most_calls:
            return None
        elif isinstance(part, CallPart):
            call_id = part.call_id or call_id_of(self._id_seed, part.index)
            self.calls.append(CallSoFar(part.name, call_id))
            return CallPart(part.index, part.name, call_id)
        else:
            self.calls[part.index].arguments.append(part.text)
        return part


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    whole: list[Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        if isinstance(part, ContentPart) and isinstance(last, ContentPart):
            whole[-1] = ContentPart(last.text + part.text)
        elif isinstance(part, ReasoningPart) and isinstance(last, ReasoningPart):
            whole[-1] = ReasoningPart(last.text + part.text)
        elif (
            isinstance(part, ArgumentsPart)
            and isinstance(last, ArgumentsPart)
            and part.index == last.index
        ):
            whole[-1] = ArgumentsPart(part.index, last.text + part.text)
        else:
            whole.append(part)
    return whole


def call_id_of(seed: str, index: int) -> str:
    """The same answer names the same call alike, streamed or whole."""
    return "call_" + hashlib.sha256(f"{seed}/{index}".encode()).hexdigest()[:24]
