"""One record for each request of a client, when it has ended or was refused; and its line in the
log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from moeserve.observe.log_bound import LogBound
from moeserve.observe.logs import FIELDS

log = logging.getLogger("moeserve.request")

OK = "OK"
# Refusals that are logged in a second.
REFUSALS_PER_S = 20


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """``status`` is OK or the code of the error that ``error`` explains; ``refused`` where nothing
    was begun. Tokens are of all its sequences together, ``longest`` of the one that made most;
    ``prompt_tokens`` count each prompt once. Seconds since it came, None for what it did not reach;
    ``tpot_s`` is the mean between tokens of its sequences. ``finish`` has each reason once.
    """

    id: str
    model: str
    status: str
    total_s: float
    refused: bool = False
    tenant: str = ""
    prompts: int = 1
    n: int = 1
    max_tokens: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    longest: int = 0
    finish: str = ""
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    error: str = ""

    def fields(self) -> dict[str, object]:
        """What is logged: without what says nothing here."""
        found: dict[str, object] = {"id": self.id, "model": self.model, "status": self.status}
        if self.tenant:
            found["tenant"] = self.tenant
        if self.prompts > 1:
            found["prompts"] = self.prompts
        if self.n > 1:
            found["n"] = self.n
        if not self.refused:
            found |= {
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
                "finish": self.finish,
            }
        durations = {"queue_s": self.queue_s, "ttft_s": self.ttft_s, "tpot_s": self.tpot_s}
        durations["total_s"] = self.total_s
        found |= {name: round(s, 6) for name, s in durations.items() if s is not None}
        if self.error:
            found["error"] = self.error
        return found


def refusal_bound(clock: Callable[[], float]) -> LogBound:
    """Refusals cost a client nothing: so many of them are logged in a second, and how many were
    left out since is said with the next one."""
    return LogBound(REFUSALS_PER_S, 1.0, clock)


def left_out_field(bound: LogBound) -> dict[str, object]:
    """What the line of a refusal says of those before it."""
    return {"refusals_left_out": count} if (count := bound.take_left_out()) else {}


class RequestLog:
    """Writes a line for each record, at level info."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._bound = refusal_bound(clock)

    def write(self, record: RequestRecord) -> None:
        if not record.refused:
            log.info("request", extra={FIELDS: record.fields()})
        elif self._bound.admits():
            log.info("request", extra={FIELDS: record.fields() | left_out_field(self._bound)})
