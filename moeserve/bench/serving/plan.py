"""Requests of a run: when each is due, what it asks for.

Pure. A prompt is given as a text, as token ids, or as spans of tokens that are drawn when they are
needed: spans of equal key hold equal tokens, whichever request they are in, so that shared
beginnings of prompts stay shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moeserve.errors import ConfigError

MAX_TOKENS = 1 << 24  # of one prompt or answer: no model takes more
_PREFIX_KEY = -1  # of the beginning that all prompts share; their own keys are 0 and above
_WARMUP_KEY = 1 << 63  # above what traces use


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """``tokens`` tokens that ``key`` draws; a shorter span of a key begins like a longer one."""

    key: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """Due ``at_s`` seconds after the start, for at most ``output_tokens`` tokens; one of ``spans``,
    ``token_ids`` and ``text`` is its prompt."""

    at_s: float
    output_tokens: int
    spans: tuple[TokenSpan, ...] = ()
    token_ids: tuple[int, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.spans, self.token_ids, self.text))) != 1:
            raise ConfigError("a request has a prompt, as one of spans, token ids and text")
        if not 1 <= self.output_tokens <= MAX_TOKENS:
            raise ConfigError(f"{self.output_tokens} output tokens: expected 1 to {MAX_TOKENS}")
        if self.spans and not 1 <= sum(span.tokens for span in self.spans) <= MAX_TOKENS:
            raise ConfigError(f"a prompt's spans have together 1 to {MAX_TOKENS} tokens")

    @property
    def input_tokens(self) -> int | None:
        """Of the prompt; None where only a tokenizer knows."""
        if self.text:
            return None
        return len(self.token_ids) or sum(span.tokens for span in self.spans)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of drawn requests: tokens of prompt and answer, each uniform within ``spread`` (0 to 1, a
    share) of the mean, after ``prefix`` tokens that all prompts have in common."""

    input_tokens: int
    output_tokens: int
    spread: float = 0.0
    prefix: int = 0

    def __post_init__(self) -> None:
        if min(self.input_tokens, self.output_tokens) < 1 or self.prefix < 0:
            raise ConfigError(
                f"{self.input_tokens} input, {self.output_tokens} output and {self.prefix} common "
                "tokens: expected at least 1, 1 and 0"
            )
        if not 0 <= self.spread < 1:
            raise ConfigError(f"--range-ratio={self.spread}: expected 0 up to 1, without 1")


def drawn(at_S: Sequence[float], lengths: Lengths, seed: int) -> tuple[PlannedRequest, ...]:
    """One request for each time, with prompts that share nothing but the common beginning."""
    rng = np.random.default_rng(seed)
    inputs_S = _around(rng, lengths.input_tokens, lengths.spread, len(at_S))
    outputs_S = _around(rng, lengths.output_tokens, lengths.spread, len(at_S))
    common = (TokenSpan(_PREFIX_KEY, lengths.prefix),) if lengths.prefix else ()
    return tuple(
        PlannedRequest(at_s, output, spans=(*common, TokenSpan(i, tokens)))
        for i, (at_s, tokens, output) in enumerate(zip(at_S, inputs_S, outputs_S, strict=True))
    )


def _around(rng: np.random.Generator, mean: int, spread: float, count: int) -> list[int]:
    low, high = int(mean * (1 - spread)), int(mean * (1 + spread))
    drawn_S: list[int] = rng.integers(max(1, low), max(1, high), count, endpoint=True).tolist()
    return drawn_S


def fitted(
    requests: Iterable[PlannedRequest],
    *,
    scale: float = 1.0,
    most_input: int = MAX_TOKENS,
    most_output: int = MAX_TOKENS,
) -> tuple[PlannedRequest, ...]:
    """The requests with every length times ``scale`` and then cut to the given bounds. Prompts that
    began alike still do; texts are left as they are."""
    return tuple(
        dataclasses.replace(
            request,
            output_tokens=min(_scaled(request.output_tokens, scale), most_output),
            token_ids=request.token_ids[: min(_scaled(len(request.token_ids), scale), most_input)],
            spans=_cut(request.spans, scale, most_input),
        )
        for request in requests
    )


def _scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))


def _cut(spans: tuple[TokenSpan, ...], scale: float, most: int) -> tuple[TokenSpan, ...]:
    kept = []
    for span in spans:
        tokens = min(_scaled(span.tokens, scale), most)
        if tokens < 1:
            break
        kept.append(TokenSpan(span.key, tokens))
        most -= tokens
    return tuple(kept)


def due_at(requests: Sequence[PlannedRequest], at_S: Sequence[float]) -> tuple[PlannedRequest, ...]:
    """The same requests at other times."""
    both = zip(requests, at_S, strict=True)
    return tuple(dataclasses.replace(request, at_s=at_s) for request, at_s in both)


def replayed(requests: Sequence[PlannedRequest], speed: float) -> tuple[PlannedRequest, ...]:
    """From the first on, ``speed`` times as fast as they came."""
    first = min((request.at_s for request in requests), default=0.0)
    at_S = [(request.at_s - first) / speed for request in requests]
    return tuple(sorted(due_at(requests, at_S), key=lambda request: request.at_s))


def warmup(requests: Sequence[PlannedRequest], count: int) -> tuple[PlannedRequest, ...]:
    """``count`` requests of the same lengths, due at once. What they draw is in no prompt of the
    run; given texts and ids are sent as they are."""
    made = []
    for i in range(count):
        request = requests[i % len(requests)]
        spans = tuple(TokenSpan(_WARMUP_KEY + i, span.tokens) for span in request.spans)
        made.append(dataclasses.replace(request, at_s=0.0, spans=spans))
    return tuple(made)
