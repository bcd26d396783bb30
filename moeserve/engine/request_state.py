"""What the step loop keeps of one request: where its events go, the text so far, and the times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeserve.core import Event, FinishReason, Logprobs, Request, Timing
from moeserve.engine.text import TextStream

Sink = Callable[[Event], None]


@dataclass(slots=True)
class RequestState:
    """A request on its way through the engine."""

    request: Request
    sink: Sink
    text: TextStream | None
    submitted: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    made: int = 0
    cached: int = 0

    def timing(self, now: float) -> Timing:
        return Timing(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.cached,
            output_tokens=self.made,
            scheduled_s=None if self.scheduled is None else self.scheduled - self.submitted,
            first_token_s=None if self.first_token is None else self.first_token - self.submitted,
            elapsed_s=now - self.submitted,
        )

    def event(
        self,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[Logprobs, ...] = (),
        finish: FinishReason | None = None,
        error: str = "",
    ) -> Event:
        return Event(self.request.id, token_ids, text, logprobs, finish, error, self.cached)
