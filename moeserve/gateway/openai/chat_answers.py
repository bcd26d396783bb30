"""Answers of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator

from moeserve.gateway.openai.answers import AnswerHead, AnswerWriter, Choice
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import AnswerFormat
from moeserve.gateway.openai.logprobs import chat_logprobs
from moeserve.gateway.stream import Delta
from moeserve.models.tokenizer import Tokenizer


class ChatWriter(AnswerWriter):
    def __init__(self, form: AnswerFormat, head: AnswerHead, tokenizer: Tokenizer | None) -> None:
        kind = "chat.completion.chunk" if form.stream else "chat.completion"
        super().__init__(form, head, kind, tokenizer)

    def _whole_choice(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        logprobs = chat_logprobs(choice.logprobs) if self._form.logprobs else None
        return {"logprobs": logprobs, "message": message}

    def _parts(self, choice: Choice, delta: Delta, fresh: bool) -> Iterator[Json]:
        if fresh:
            yield {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        if not self._shows(delta):
            return
        part: Json = {"finish_reason": choice.finish, "logprobs": None}
        if self._form.logprobs:
            part["logprobs"] = chat_logprobs(self._entries(choice, delta.token_ids, delta.logprobs))
        part["delta"] = {"content": delta.text} if delta.text or not delta.finish else {}
        if self._form.token_ids:
            part["token_ids"] = list(delta.token_ids)
        yield part
