"""Answers of ``/v1/responses``: output items, and the events that tell of them.

From OpenAI's API reference (Responses, streaming). Every item is added, grows part by part, and is
done; the answer is made of the items that were done. Reasoning is an item of its own, as raw text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from moeserve.core import FinishReason
from moeserve.errors import MoeserveError
from moeserve.gateway.openai.answers import AnswerHead
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.reading import Reading
from moeserve.gateway.openai.responses import ResponseAsked
from moeserve.gateway.parsers.parts import (
    ArgumentsPart,
    CallPart,
    ContentPart,
    Part,
    ReasoningPart,
)
from moeserve.gateway.stream import Delta, Usage

# The kind of an item: how its id begins, its events' names, and the type of its part.
_TEXTS = {
    "message": ("msg", "output_text", "output_text"),
    "reasoning": ("rs", "reasoning_text", "reasoning_text"),
}


class ResponseWriter:
    """Writes one answer and owns its items."""

    def __init__(self, head: AnswerHead, asked: ResponseAsked, reading: Reading) -> None:
        self._head = head
        self._asked = asked
        self._answer = reading.open(head.answer_id, 0)
        self._items: list[Json] = []
        self._open = False
        self._text: list[str] = []
        self._number = 0
        self._status = "in_progress"
        self._usage: Usage | None = None
        self._error: Json | None = None

    @property
    def ping(self) -> Json | None:
        return None

    def begin(self) -> Iterator[Json]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.whole())

    def events(self, delta: Delta) -> Iterator[Json]:
        ended = delta.finish is not None
        for part in self._answer.take(delta.text, last=ended, token_ids=delta.token_ids):
            yield from self._tell(part)
        if delta.finish is None:
            return
        cut = delta.finish is FinishReason.LENGTH
        self._usage = delta.usage
        if not self._items:
            yield from self._add("message")
        yield from self._close("incomplete" if cut else "completed")
        self._status = "incomplete" if cut else "completed"
        yield self._event(f"response.{self._status}", response=self.whole())

    def failed(self, error: MoeserveError) -> Json:
        self._status = "failed"
        kind = "rate_limit_exceeded" if error.http_status == 429 else "server_error"
        self._error = {"code": kind, "message": error.message}
        return self._event("response.failed", response=self.whole())

    def whole(self) -> Json:
        cut = self._status == "incomplete"
        return {
            "id": self._head.answer_id,
            "object": "response",
            "created_at": self._head.created,
            "model": self._head.model,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [dict(item) for item in self._items],
            "usage": _usage(self._usage, self._answer.reasoning_tokens),
        } | self._asked.echo()

    def _tell(self, part: Part) -> Iterator[Json]:
        if isinstance(part, CallPart):
            yield from self._close("completed")
            yield from self._add("function_call", call_id=part.call_id, name=part.name)
            return
        if isinstance(part, ArgumentsPart):
            self._text.append(part.text)
            yield self._about("response.function_call_arguments.delta", delta=part.text)
            return
        kind = "reasoning" if isinstance(part, ReasoningPart) else "message"
        if not self._open or self._items[-1]["type"] != kind:
            if isinstance(part, ContentPart) and self._only_blanks(part.text):
                return
            yield from self._close("completed")
            yield from self._add(kind)
        self._text.append(part.text)
        more: Json = {"delta": part.text} | ({"logprobs": []} if kind == "message" else {})
        yield self._about(f"response.{_TEXTS[kind][1]}.delta", content_index=0, **more)

    def _only_blanks(self, text: str) -> bool:
        """Blanks between items are none."""
        return bool(self._items) and text.isspace()

    def _add(self, kind: str, **more: object) -> Iterator[Json]:
        self._open, self._text = True, []
        prefix = _TEXTS[kind][0] if kind in _TEXTS else "fc"
        item: Json = {"id": self._item_id(prefix), "type": kind, "status": "in_progress"} | more
        match kind:
            case "message":
                item |= {"role": "assistant", "content": []}
            case "reasoning":
                item |= {"summary": [], "content": [], "encrypted_content": None}
            case _:
                item |= {"arguments": ""}
        self._items.append(item)
        yield self._about("response.output_item.added", item=dict(item), with_id=False)
        if kind in _TEXTS:
            part = _text_part(kind, "")
            yield self._about("response.content_part.added", content_index=0, part=part)

    def _close(self, status: str) -> Iterator[Json]:
        if not self._open:
            return
        self._open = False
        item, text = self._items[-1], "".join(self._text)
        item["status"] = status
        if item["type"] in _TEXTS:
            part = _text_part(item["type"], text)
            item["content"] = [part]
            more: Json = {"logprobs": []} if item["type"] == "message" else {}
            done = f"response.{_TEXTS[item['type']][1]}.done"
            yield self._about(done, content_index=0, text=text, **more)
            yield self._about("response.content_part.done", content_index=0, part=part)
        else:
            item["arguments"] = text
            yield self._about(
                "response.function_call_arguments.done", arguments=text, name=item["name"]
            )
        yield self._about("response.output_item.done", item=dict(item), with_id=False)

    def _about(self, kind: str, *, with_id: bool = True, **fields: object) -> Json:
        """An event of the newest item."""
        own = {"item_id": self._items[-1]["id"]} if with_id else {}
        return self._event(kind, output_index=len(self._items) - 1, **own, **fields)

    def _event(self, kind: str, **fields: object) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1} | fields

    def _item_id(self, prefix: str) -> str:
        seed = f"{self._head.answer_id}/item/{len(self._items)}"
        return f"{prefix}_{hashlib.sha256(seed.encode()).hexdigest()[:24]}"


def _text_part(kind: str, text: str) -> Json:
    part: Json = {"type": _TEXTS[kind][2], "text": text}
    return part | ({"annotations": [], "logprobs": []} if kind == "message" else {})


def _usage(usage: Usage | None, reasoning_tokens: int) -> Json | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
