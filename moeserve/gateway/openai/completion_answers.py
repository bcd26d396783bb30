"""Answers of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator

from moeserve.gateway.openai.answers import AnswerHead, AnswerWriter, Choice
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import AnswerFormat
from moeserve.gateway.openai.logprobs import completion_logprobs
from moeserve.gateway.stream import Delta
from moeserve.models.tokenizer import Tokenizer


class CompletionWriter(AnswerWriter):
    def __init__(self, form: AnswerFormat, head: AnswerHead, tokenizer: Tokenizer | None) -> None:
        super().__init__(form, head, "text_completion", tokenizer)

    def _whole_choice(self, choice: Choice) -> Json:
        logprobs = completion_logprobs(choice.logprobs) if self._form.logprobs else None
        return {"logprobs": logprobs, "text": "".join(choice.texts)}

    def _parts(self, choice: Choice, delta: Delta, fresh: bool) -> Iterator[Json]:
        if not self._shows(delta):
            return
        text, entries = self._echo(choice)
        part: Json = {"finish_reason": choice.finish, "logprobs": None, "text": text + delta.text}
        if self._form.logprobs:
            entries += self._entries(choice, delta.token_ids, delta.logprobs)
            part["logprobs"] = completion_logprobs(entries)
        if self._form.token_ids:
            part["token_ids"] = list(delta.token_ids)
        yield part
