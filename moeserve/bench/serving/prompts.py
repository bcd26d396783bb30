"""Token ids or words of a prompt.

Pure. What a span holds is drawn from the seed and the span's key, so that equal keys give equal
tokens in any request and any run. As words, every token id becomes one of ``WORDS``: most
tokenizers have a token for each of them, so that lengths are right but for a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moeserve.bench.serving.plan import PlannedRequest, TokenSpan
from moeserve.errors import ConfigError

FORMS = ("ids", "text")
WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who will "
    "no more if out so up said what its about than into them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after also "
    "well many must before through back years where much your way down should because long each "
    "just state people those too how little good world make very year still see own work"
).split()


class PromptSource:
    """Draws what the spans of a run hold; ids are below ``vocab_size``."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        if vocab_size < 2:
            raise ConfigError(f"--vocab-size={vocab_size}: expected at least 2")
        self._seed = seed
        self._vocab_size = vocab_size

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """ConfigError where the request has a text."""
        if request.text:
            raise ConfigError("a prompt of text cannot be sent as token ids: --prompts text")
        return list(request.token_ids) or self._drawn(request.spans)

    def text(self, request: PlannedRequest) -> str:
        """ConfigError where the request has token ids of its own: only a tokenizer could tell."""
        if request.token_ids:
            raise ConfigError("a prompt of token ids cannot be sent as text: --prompts ids")
        return request.text or words(self._drawn(request.spans))

    def _drawn(self, spans: Iterable[TokenSpan]) -> list[int]:
        found: list[int] = []
        for span in spans:
            # Keys may be negative, and a seed may not.
            key = span.key if span.key >= 0 else (1 << 70) - span.key
            rng = np.random.Generator(np.random.PCG64([self._seed, key]))
            # As doubles, of which a shorter draw is the beginning of a longer one.
            found += (rng.random(span.tokens) * self._vocab_size).astype(np.int64).tolist()
        return found


def form_of_prompts(requests: Sequence[PlannedRequest], asked: str | None, *, chat: bool) -> str:
    """``ids`` or ``text``: what was asked for, else what all can be sent as. ConfigError where one
    cannot, before any is sent."""
    if asked not in (None, *FORMS):
        raise ConfigError(f"--prompts={asked!r}: expected one of {', '.join(FORMS)}")
    texts = any(request.text for request in requests)
    form = asked or ("text" if chat or texts else "ids")
    if form == "ids" and texts:
        raise ConfigError("--prompts ids: the trace has prompts of text: --prompts text")
    if form == "text" and any(request.token_ids for request in requests):
        raise ConfigError(
            f"prompts of token ids cannot be sent as text{', which chat needs' if chat else ''}"
        )
    return form


def words(token_ids: Sequence[int]) -> str:
    return " ".join(WORDS[token % len(WORDS)] for token in token_ids)
