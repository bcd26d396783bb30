"""Answers of ``/v1/messages``: content blocks, and the events that tell of them.

From Anthropic's API reference (Messages, streaming): ``message_start``, for each block
``content_block_start``, ``content_block_delta`` and ``content_block_stop``, then ``message_delta``
with the reason and the usage, and ``message_stop``. ``ping`` may come at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from moeserve.core import FinishReason
from moeserve.errors import MoeserveError
from moeserve.gateway.anthropic.errors import anthropic_failure
from moeserve.gateway.anthropic.messages import MessageAsked
from moeserve.gateway.openai.answers import AnswerHead
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.reading import Reading
from moeserve.gateway.parsers.parts import (
    ArgumentsPart,
    CallPart,
    ContentPart,
    Part,
    ReasoningPart,
)
from moeserve.gateway.stream import Delta, Usage


class MessageWriter:
    """Writes one answer and owns its blocks. ``prompt_tokens`` are told before there is usage."""

    def __init__(
        self, head: AnswerHead, asked: MessageAsked, reading: Reading, prompt_tokens: int
    ) -> None:
        self._head = head
        self._asked = asked
        self._answer = reading.open(head.answer_id, 0)
        self._usage = Usage(prompt_tokens, 0, 0)
        self._blocks: list[Json] = []
        self._open = False
        self._text: list[str] = []
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    @property
    def ping(self) -> Json | None:
        return {"type": "ping"}

    def begin(self) -> Iterator[Json]:
        yield {"type": "message_start", "message": self.whole()}
        yield {"type": "ping"}

    def events(self, delta: Delta) -> Iterator[Json]:
        ended = delta.finish is not None
        for part in self._answer.take(delta.text, last=ended, token_ids=delta.token_ids):
            yield from self._tell(part)
        if delta.finish is None:
            return
        assert delta.usage is not None
        self._usage = delta.usage
        yield from self._close()
        self._stop_reason = self._reason(delta)
        self._stop_sequence = delta.stop or None
        stopped = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield {"type": "message_delta", "delta": stopped, "usage": self._used()}
        yield {"type": "message_stop"}

    def failed(self, error: MoeserveError) -> Json:
        return anthropic_failure(error)

    def whole(self) -> Json:
        return {
            "id": self._head.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [dict(block) for block in self._blocks],
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._used(),
        }

    def _reason(self, delta: Delta) -> str:
        if delta.finish is FinishReason.LENGTH:
            return "max_tokens"
        if delta.stop:
            return "stop_sequence"
        return "tool_use" if self._answer.calls else "end_turn"

    def _used(self) -> Json:
        """As Anthropic counts: what came from the cache is not among the input tokens."""
        used = self._usage
        return {
            "input_tokens": used.prompt_tokens - used.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": used.cached_tokens,
            "output_tokens": used.completion_tokens,
        }

    def _tell(self, part: Part) -> Iterator[Json]:
        match part:
            case ReasoningPart(text):
                if self._asked.shows_thinking:
                    yield from self._grow("thinking", "thinking_delta", "thinking", text)
            case ContentPart(text):
                yield from self._grow("text", "text_delta", "text", text)
            case CallPart():
                block = {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
                yield from self._begin(block)
            case ArgumentsPart(_, text):
                self._text.append(text)
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _grow(self, kind: str, delta: str, name: str, text: str) -> Iterator[Json]:
        if not self._open or self._blocks[-1]["type"] != kind:
            if self._blocks and text.isspace():
                return  # blanks between blocks are none
            signed = {"signature": ""} if kind == "thinking" else {}
            yield from self._begin({"type": kind, name: ""} | signed)
        self._text.append(text)
        yield self._delta({"type": delta, name: text})

    def _begin(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._open, self._text = True, []
        self._blocks.append(block)
        index = len(self._blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": dict(block)}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if not self._open:
            return
        self._open = False
        block, text = self._blocks[-1], "".join(self._text)
        match block["type"]:
            case "tool_use":
                block["input"] = _object(text)
            case "thinking":
                block["thinking"] = text
            case _:
                block["text"] = text
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}


def _object(arguments: str) -> Json:
    """What a model wrote, where it is an object: a whole answer has no place for another text."""
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
