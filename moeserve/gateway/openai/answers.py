"""What OpenAI's answers have alike, whole and in chunks: head, choices, usage.

Pure: deltas in, JSON objects out. Completions and chat each write their own choices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moeserve.core import Logprobs
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import AnswerFormat
from moeserve.gateway.openai.logprobs import TokenEntries
from moeserve.gateway.stream import Delta, Usage
from moeserve.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """``text`` only where it stands before the answer."""

    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What names an answer: its id, model, time of creation, ``n`` sequences a prompt, and the
    prompts."""

    answer_id: str
    model: str
    created: int
    n: int
    prompts: tuple[AnsweredPrompt, ...] = ()


@dataclass(slots=True)
class Choice:
    """What came of one sequence so far. ``scores`` are what its ``logprobs`` are written from,
    ``score`` is their sum, and ``echoed`` whether its prompt was shown."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    scores: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    offset: int = 0
    score: float = 0.0
    made: int = 0
    echoed: bool = False
    finish: str | None = None
    usage: Usage | None = None


class AnswerWriter(ABC):
    """Writes one answer and owns what it has so far.

    Of a whole answer every delta is given to ``add``, of a stream to ``chunks``.
    """

    def __init__(
        self, form: AnswerFormat, head: AnswerHead, kind: str, tokenizer: Tokenizer | None
    ) -> None:
        self._form = form
        self._n = head.n
        self._prompts = head.prompts
        self._entries_of = TokenEntries(tokenizer, as_ids=form.tokens_as_ids)
        self._choices: dict[int, Choice] = {}
        self._head = {
            "id": head.answer_id,
            "object": kind,
            "created": head.created,
            "model": head.model,
        }

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> Json:
        """A choice of a whole answer, without what all kinds have."""

    @abstractmethod
    def _parts(self, choice: Choice, delta: Delta, fresh: bool) -> Iterator[Json]:
        """What a delta adds to a choice, each for a chunk of its own; ``fresh`` where it is the
        choice's first."""

    def add(self, delta: Delta) -> None:
        """One more delta of what ``whole`` will be."""
        choice, _ = self._choice(delta)
        choice.texts.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.scores.extend(delta.logprobs)

    def whole(self) -> Json:
        """The answer, once. With long prompts' log-probabilities this takes a while: it touches
        nothing but what this writer owns, so another thread can do it."""
        choices = []
        for index, choice in enumerate(self._shown_choices()):
            text, choice.logprobs = self._echo(choice)
            choice.texts.insert(0, text)
            choice.logprobs += self._entries(choice, choice.token_ids, choice.scores)
            body: Json = {"index": index, "finish_reason": choice.finish}
            body |= self._whole_choice(choice)
            if self._form.token_ids:
                body["token_ids"] = choice.token_ids
            if self._form.prompt_logprobs and not self._form.chat:
                body["prompt_logprobs"] = self._prompt_logprobs(choice)
            choices.append(body)
        answer = self._head | {"choices": choices, "usage": self._usage()}
        if self._form.prompt_logprobs and self._form.chat:
            answer["prompt_logprobs"] = self._prompt_logprobs(self._choices[0])
        return answer

    def _shown_choices(self) -> list[Choice]:
        """In order; of more than are wanted the best of each prompt, the best one first."""
        choices = [choice for _, choice in sorted(self._choices.items())]
        if self._form.best is None:
            return choices
        best: list[Choice] = []
        for first in range(0, len(choices), self._n):
            ranked = sorted(choices[first : first + self._n], key=lambda c: -c.score)
            best += ranked[: self._form.best]
        return best

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """What one delta adds to a stream; nothing if it has nothing to show yet."""
        choice, fresh = self._choice(delta)
        for part in self._parts(choice, delta, fresh):
            body = self._head | {"choices": [{"index": delta.index} | part]}
            if self._form.continuous_usage:
                used = len(self._prompt(choice).token_ids)
                body["usage"] = _tokens_used(used, choice.made)
            elif self._form.include_usage:
                body["usage"] = None
            yield body

    def usage_chunk(self) -> Json:
        return self._head | {"choices": [], "usage": self._usage()}

    def _shows(self, delta: Delta) -> bool:
        tokens = delta.token_ids and (self._form.logprobs or self._form.token_ids)
        return bool(delta.text or tokens or delta.finish)

    def _choice(self, delta: Delta) -> tuple[Choice, bool]:
        fresh = delta.index not in self._choices
        choice = self._choices.setdefault(delta.index, Choice(delta.index))
        choice.prompt_logprobs += delta.prompt_logprobs
        choice.made += len(delta.token_ids)
        choice.score += sum(found.chosen for found in delta.logprobs)
        choice.finish = delta.finish.value if delta.finish else None
        choice.usage = delta.usage or choice.usage
        return choice, fresh

    def _entries(
        self, choice: Choice, token_ids: Sequence[int], logprobs: Sequence[Logprobs]
    ) -> list[Json]:
        if not self._form.logprobs:
            return []
        entries, choice.offset = self._entries_of.entries(token_ids, logprobs, choice.offset)
        return entries

    def _prompt(self, choice: Choice) -> AnsweredPrompt:
        return self._prompts[choice.index // self._n]

    def _echo(self, choice: Choice) -> tuple[str, list[Json]]:
        """The prompt's text and entries, which stand before the first of the answer, once."""
        echo = self._form.echo
        if echo is None or choice.echoed:
            return "", []
        choice.echoed = True
        prompt, entries = self._prompt(choice), list[Json]()
        if echo.logprobs is not None:
            entries, choice.offset = self._entries_of.prompt_entries(
                prompt.token_ids, choice.prompt_logprobs, echo.logprobs
            )
        return prompt.text, entries

    def _prompt_logprobs(self, choice: Choice) -> list[Json | None]:
        ids = self._prompt(choice).token_ids
        return self._entries_of.by_token_id(ids, choice.prompt_logprobs)

    def _usage(self) -> Json:
        used = {index: c.usage for index, c in self._choices.items() if c.usage is not None}
        # The n sequences of one prompt share it, so it counts once.
        firsts = [usage for index, usage in used.items() if index % self._n == 0]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        answer = sum(usage.completion_tokens for usage in used.values())
        cached = sum(usage.cached_tokens for usage in firsts)
        return _tokens_used(prompt, answer) | {"prompt_tokens_details": {"cached_tokens": cached}}


def _tokens_used(prompt: int, answer: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
