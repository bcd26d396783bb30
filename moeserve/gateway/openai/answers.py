"""Answers as OpenAI writes them: completions and chat, whole and in chunks, logprobs in both forms.

Pure: deltas in, JSON objects out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import AnswerFormat
from moeserve.gateway.stream import Delta, Usage
from moeserve.models.tokenizer import Tokenizer

# JSON has no -Infinity; OpenAI writes this for a token that cannot occur.
LEAST_LOGPROB = -9999.0


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    offset: int = 0
    finish: str | None = None
    usage: Usage | None = None


class AnswerWriter:
    """Writes one answer and owns what it has so far. ``n`` sequences for every prompt."""

    def __init__(
        self,
        form: AnswerFormat,
        answer_id: str,
        model: str,
        created: int,
        n: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._form = form
        self._n = n
        self._tokenizer = tokenizer
        self._choices: dict[int, _Choice] = {}
        what = "chat.completion" if form.chat else "text_completion"
        chunk = ".chunk" if form.chat and form.stream else ""
        self._head = {"id": answer_id, "object": what + chunk, "created": created, "model": model}

    def add(self, delta: Delta) -> None:
        """One more delta of what ``whole`` will be."""
        choice = self._choice(delta)
        choice.texts.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        if self._form.logprobs:
            choice.logprobs.extend(self._entries(choice, delta))

    def whole(self) -> Json:
        choices = []
        for index, choice in sorted(self._choices.items()):
            text = "".join(choice.texts)
            body: Json = {"index": index, "finish_reason": choice.finish}
            body["logprobs"] = self._logprobs(choice.logprobs) if self._form.logprobs else None
            if self._form.chat:
                body["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                body["text"] = text
            if self._form.token_ids:
                body["token_ids"] = choice.token_ids
            choices.append(body)
        return self._head | {"choices": choices, "usage": self._usage()}

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """What one delta adds to a stream; nothing if it has nothing to show yet."""
        fresh = delta.index not in self._choices
        choice = self._choice(delta)
        if fresh and self._form.chat:
            opening = {"role": "assistant", "content": ""}
            yield self._chunk({"index": delta.index, "delta": opening, "finish_reason": None})
        shows_tokens = delta.token_ids and (self._form.logprobs or self._form.token_ids)
        if not (delta.text or shows_tokens or delta.finish):
            return
        body: Json = {"index": delta.index, "finish_reason": choice.finish, "logprobs": None}
        if self._form.logprobs:
            body["logprobs"] = self._logprobs(self._entries(choice, delta))
        if self._form.chat:
            body["delta"] = {"content": delta.text} if delta.text or not delta.finish else {}
        else:
            body["text"] = delta.text
        if self._form.token_ids:
            body["token_ids"] = list(delta.token_ids)
        yield self._chunk(body)

    def usage_chunk(self) -> Json:
        return self._head | {"choices": [], "usage": self._usage()}

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self._form.include_usage else {}
        return self._head | {"choices": [choice]} | usage

    def _choice(self, delta: Delta) -> _Choice:
        choice = self._choices.setdefault(delta.index, _Choice())
        choice.finish = delta.finish.value if delta.finish else None
        choice.usage = delta.usage or choice.usage
        return choice

    def _usage(self) -> Json:
        used = {index: c.usage for index, c in self._choices.items() if c.usage is not None}
        # The n sequences of one prompt share it, so it counts once.
        firsts = [usage for index, usage in used.items() if index % self._n == 0]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        answer = sum(usage.completion_tokens for usage in used.values())
        cached = sum(usage.cached_tokens for usage in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _entries(self, choice: _Choice, delta: Delta) -> list[Json]:
        """One entry per token, in a form from which both of OpenAI's are made."""
        entries = []
        for token, found in zip(delta.token_ids, delta.logprobs, strict=True):
            shown = self._shown(token, found.chosen)
            tops = [self._shown(other, value) for other, value in found.top]
            entries.append(shown | {"top_logprobs": tops, "offset": choice.offset})
            choice.offset += len(self._whole_text(token))
        return entries

    def _shown(self, token: int, logprob: float) -> Json:
        raw = self._bytes(token)
        return {
            "token": self._whole_text(token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": None if raw is None else list(raw),
        }

    def _bytes(self, token: int) -> bytes | None:
        return None if self._tokenizer is None else self._tokenizer.token_bytes(token)

    def _whole_text(self, token: int) -> str:
        raw = self._bytes(token)
        if raw is None:
            return f"token_id:{token}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _logprobs(self, entries: list[Json]) -> Json:
        if self._form.chat:
            shown = [{k: v for k, v in entry.items() if k != "offset"} for entry in entries]
            return {"content": shown, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [_by_token(entry) for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }


def _by_token(entry: Json) -> dict[str, float]:
    """The best tokens, and the chosen one where it is not among them."""
    best = {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
    return best | {entry["token"]: entry["logprob"]}
