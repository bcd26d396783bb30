"""What became of a request: times, tokens, failure.

Times are seconds after the start of the run. Definitions are those of ``vllm bench serve``:

* TTFT: from sending to the first message with a token; E2EL: from sending to the last.
* TPOT: (E2EL - TTFT) / (output tokens - 1), of answers of two tokens and more.
* ITL: gaps between messages with tokens. A message may hold several tokens; how many is told.

A request is sent when its connection is asked for, so that connecting is part of TTFT. Tokens are
those that the server counts, never messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.bench.serving.plan import PlannedRequest

DETAIL_CHARS = 300


class RequestFailed(Exception):
    """One request has failed; ``kind`` is what failures are counted by, ``detail`` may be of the
    server's own words."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail[:DETAIL_CHARS]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``ready_s`` is when the request could be sent: due, and within ``--max-concurrency``.
    ``message_s`` and ``message_tokens`` have an entry for each message with tokens, 0 where the
    server does not say how many. ``failure`` is empty where the answer is whole."""

    index: int
    due_s: float
    ready_s: float
    sent_s: float
    end_s: float
    asked_input: int | None
    asked_output: int
    message_s: tuple[float, ...] = ()
    message_tokens: tuple[int, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    failure: str = ""
    detail: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure

    @property
    def lag_s(self) -> float:
        """How late it was sent: the error of who measures, not of the server."""
        return self.sent_s - self.ready_s

    @property
    def ttft_s(self) -> float | None:
        return self.message_s[0] - self.sent_s if self.ok and self.message_s else None

    @property
    def e2el_s(self) -> float | None:
        return self.message_s[-1] - self.sent_s if self.ok and self.message_s else None

    @property
    def tpot_s(self) -> float | None:
        if not self.ok or self.output_tokens < 2 or not self.message_s:
            return None
        return (self.message_s[-1] - self.message_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> Sequence[float]:
        if not self.ok:
            return ()
        following = zip(self.message_s, self.message_s[1:], strict=False)
        return [after - before for before, after in following]


class AnswerRecord:
    """Of a running request: what has come, as it comes."""

    __slots__ = ("_at", "_cached", "_input", "_output", "_tokens", "_total")

    def __init__(self) -> None:
        self._at: list[float] = []
        self._tokens: list[int] = []
        self._total = 0
        self._input = self._cached = 0
        self._output: int | None = None

    @property
    def tokens(self) -> int:
        """So far, as far as the server has told."""
        return self._total

    @property
    def messages(self) -> int:
        """With tokens, so far."""
        return len(self._at)

    def message(self, now: float, tokens: int) -> None:
        """A message with ``tokens`` tokens, 0 where it does not say, came at ``now``."""
        self._at.append(now)
        self._tokens.append(tokens)
        self._total += tokens

    def usage(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> None:
        """What the server counts in the end."""
        self._input, self._output, self._cached = input_tokens, output_tokens, cached_tokens

    def complete(self) -> None:
        """RequestFailed where the answer has ended without what is measured."""
        if self._output is None:
            raise RequestFailed("no usage", "the server does not count the tokens of its answers")
        if not self._at and self._output:
            raise RequestFailed("no tokens", f"none was streamed of {self._output}")
        if not self._output:
            raise RequestFailed("no tokens", "the answer is empty")

    def outcome(
        self,
        index: int,
        asked: PlannedRequest,
        times: tuple[float, float, float],
        *,
        start: float,
        failed: RequestFailed | None,
    ) -> Outcome:
        """``times``: when it could be sent, was sent, and ended, on the clock that says ``start``
        when the run starts."""
        ready_s, sent_s, end_s = (at - start for at in times)
        return Outcome(
            index=index,
            due_s=asked.at_s,
            ready_s=ready_s,
            sent_s=sent_s,
            end_s=end_s,
            asked_input=asked.input_tokens,
            asked_output=asked.output_tokens,
            message_s=tuple(at - start for at in self._at),
            message_tokens=tuple(self._tokens),
            input_tokens=self._input,
            output_tokens=self._total if self._output is None else self._output,
            cached_tokens=self._cached,
            failure="" if failed is None else failed.kind,
            detail="" if failed is None else failed.detail,
        )
