"""Answers of ``/v1/chat/completions``: content, reasoning and tool calls.

Reasoning goes under both names that clients look for: ``reasoning_content`` (DeepSeek's, and most
servers') and ``reasoning`` (OpenRouter's, and vLLM's newer one).
"""

from __future__ import annotations

from collections.abc import Iterator

from moeserve.gateway.openai.answers import AnswerHead, AnswerWriter, Choice
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import AnswerFormat
from moeserve.gateway.openai.logprobs import chat_logprobs
from moeserve.gateway.openai.reading import Reading
from moeserve.gateway.parsers.answer import ParsedAnswer
from moeserve.gateway.parsers.parts import CallPart, ContentPart, Part, ReasoningPart
from moeserve.gateway.stream import Delta
from moeserve.models.tokenizer import Tokenizer


class ChatWriter(AnswerWriter):
    def __init__(
        self,
        form: AnswerFormat,
        head: AnswerHead,
        tokenizer: Tokenizer | None,
        reading: Reading | None = None,
    ) -> None:
        kind = "chat.completion.chunk" if form.stream else "chat.completion"
        super().__init__(form, head, kind, tokenizer)
        self._answer_id = head.answer_id
        self._reading = reading or Reading()
        # Most answers are content alone: they need no parser.
        self._reads = self._reading.parses
        self._answers: dict[int, ParsedAnswer] = {}

    def add(self, delta: Delta) -> None:
        super().add(delta)
        if self._reads:
            self._take(delta)

    def _take(self, delta: Delta) -> list[Part]:
        answer = self._answers.get(delta.index)
        if answer is None:
            answer = self._reading.open(self._answer_id, delta.index)
            self._answers[delta.index] = answer
        return answer.take(delta.text, last=delta.finish is not None, token_ids=delta.token_ids)

    def _whole_choice(self, choice: Choice) -> Json:
        logprobs = chat_logprobs(choice.logprobs) if self._form.logprobs else None
        message: Json = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        if not self._reads:
            return {"logprobs": logprobs, "message": message}
        answer = self._answers[choice.index]
        message["content"] = answer.content or (None if answer.calls else "")
        if answer.reasoning:
            message |= _reasoning(answer.reasoning)
        if answer.calls:
            message["tool_calls"] = [
                _call(call.call_id, call.name, "".join(call.arguments)) for call in answer.calls
            ]
        return {"logprobs": logprobs, "message": message, "finish_reason": self._finish(choice)}

    def _parts(self, choice: Choice, delta: Delta, fresh: bool) -> Iterator[Json]:
        if fresh:
            yield {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        if self._reads:
            parts = [_delta(part) for part in self._take(delta)]
        else:
            parts = [{"content": delta.text}] if delta.text else []
        if not parts:
            told = delta.token_ids and (self._form.logprobs or self._form.token_ids)
            if not (told or delta.finish):
                return
            parts = [{} if delta.finish else {"content": ""}]
        # What came with the tokens is told with the first part, and an end with the last.
        for i, part in enumerate(parts, 1):
            finish = self._finish(choice) if i == len(parts) else None
            shown: Json = {"finish_reason": finish, "logprobs": None, "delta": part}
            if self._form.logprobs and i == 1:
                shown["logprobs"] = chat_logprobs(
                    self._entries(choice, delta.token_ids, delta.logprobs)
                )
            if self._form.token_ids:
                shown["token_ids"] = list(delta.token_ids) if i == 1 else []
            yield shown

    def _usage(self) -> Json:
        thought = sum(answer.reasoning_tokens for answer in self._answers.values())
        details = {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}
        return super()._usage() | details

    def _finish(self, choice: Choice) -> str | None:
        if not self._reads or choice.finish != "stop" or not self._answers[choice.index].calls:
            return choice.finish
        return "tool_calls"


def _delta(part: Part) -> Json:
    if isinstance(part, ContentPart):
        return {"content": part.text}
    if isinstance(part, ReasoningPart):
        return _reasoning(part.text)
    if isinstance(part, CallPart):
        return {"tool_calls": [{"index": part.index} | _call(part.call_id, part.name, "")]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def _reasoning(text: str) -> Json:
    return {"reasoning_content": text, "reasoning": text}


def _call(call_id: str, name: str, arguments: str) -> Json:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
