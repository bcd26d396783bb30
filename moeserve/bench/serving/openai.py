"""Requests and answers of OpenAI's API: completions and chat completions, streamed.

Beside OpenAI's own fields ``continuous_usage_stats`` is asked for, with which vLLM, SGLang and we
say in every message how many tokens there are so far, so that messages of several tokens are told
from those of one, and held-back text is no late token. ``standard`` leaves it out, for servers that
refuse what they do not know; then a message with text is one with tokens, and how many tokens an
answer has is told at its end. What comes back is a stranger's: whatever is not as it should be is
RequestFailed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeserve.bench.serving.outcomes import AnswerRecord, RequestFailed
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.prompts import PromptSource
from moeserve.errors import ConfigError

APIS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MOST_TOKENS = 1 << 32
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class AskedOfAll:
    """What all requests of a run have alike; ``extra`` is put into every body as it is."""

    model: str
    api: str = "completions"
    prompts: str = "ids"
    temperature: float | None = 0.0
    ignore_eos: bool = False
    standard: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ConfigError(f"--api={self.api!r}: expected one of {', '.join(APIS)}")
        if self.api == "chat" and self.prompts != "text":
            raise ConfigError("--prompts ids: messages of a chat are texts: --prompts text")
        if self.standard and self.ignore_eos:
            raise ConfigError("--ignore-eos: is no field of OpenAI's own: without --standard")


def body_of(request: PlannedRequest, asked: AskedOfAll, source: PromptSource) -> bytes:
    """Of the HTTP request, as JSON."""
    options = {"include_usage": True}
    if not asked.standard:
        options["continuous_usage_stats"] = True
    body: dict[str, Any] = {"model": asked.model, "stream": True, "stream_options": options}
    if asked.temperature is not None:
        body["temperature"] = asked.temperature
    if asked.ignore_eos:
        body["ignore_eos"] = True
    if asked.api == "chat":
        body["messages"] = [{"role": "user", "content": source.text(request)}]
        body["max_completion_tokens"] = request.output_tokens
    else:
        ids = asked.prompts == "ids"
        body["prompt"] = source.token_ids(request) if ids else source.text(request)
        body["max_tokens"] = request.output_tokens
    return json.dumps(body | dict(asked.extra), separators=(",", ":")).encode()


class StreamedAnswer:
    """Reads the events of one answer into ``record``."""

    def __init__(self, record: AnswerRecord) -> None:
        self._record = record
        self.done = False

    def event(self, data: bytes, now: float) -> None:
        if self.done:
            return
        if data == _DONE:
            self.done = True
            return
        chunk = _object(data)
        if chunk.get("error"):
            raise RequestFailed("error in stream", error_text(chunk))
        told, text = _usage(chunk), _has_text(chunk)
        if told is None:
            if text:
                self._record.message(now, 0)
            return
        self._record.usage(*told)
        new = told[1] - self._record.tokens
        # A count that comes only in the end, after messages without one, says nothing of when.
        if new > 0 and (self._record.tokens or not self._record.messages):
            self._record.message(now, new)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestFailed("bad stream", f"an event is no JSON: {data[:80]!r}") from error
    if not isinstance(found, dict):
        raise RequestFailed("bad stream", f"an event is no object: {data[:80]!r}")
    return found


def _usage(chunk: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Tokens of prompt and answer so far, and of the prompt's those that were cached."""
    usage = chunk.get("usage")
    if usage is None:
        return None
    if not isinstance(usage, dict):
        raise RequestFailed("bad stream", "usage is no object")
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached or 0)
    if not all(type(count) is int and 0 <= count < _MOST_TOKENS for count in counts):
        raise RequestFailed("bad stream", f"usage is {usage!r:.100}")
    prompt, answer, cached = counts
    return int(prompt), int(answer), int(cached)  # type: ignore[arg-type]  # as was checked


def _has_text(chunk: Mapping[str, Any]) -> bool:
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        raise RequestFailed("bad stream", "an event has no choices")
    if not choices:
        return False
    choice = choices[0]
    if not isinstance(choice, dict):
        raise RequestFailed("bad stream", "a choice is no object")
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    names = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
    return any(delta.get(name) for name in names)


def error_text(answer: object) -> str:
    """What an error of OpenAI's form says, or the beginning of whatever it is."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else json.dumps(error)[:300]
