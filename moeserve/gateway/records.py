"""What is told of a client's request when it has ended: from what was wanted and what its stream
came to, or from the error that refused it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeserve.core import FinishReason, Request
from moeserve.errors import CancelledError, InternalError, MoeserveError
from moeserve.observe.requests import OK, RequestRecord
from moeserve.observe.spans import Attribute

if TYPE_CHECKING:
    from moeserve.gateway.service import ClientRequest
    from moeserve.gateway.stream import ResponseStream, Totals

_WELL = frozenset({FinishReason.STOP, FinishReason.LENGTH})


def record_of(
    wanted: ClientRequest,
    requests: Sequence[Request],
    stream: ResponseStream,
    model: str,
    error: BaseException | None,
    total_s: float,
) -> RequestRecord:
    """Of a request whose stream is closed, because of ``error`` if there was one."""
    totals = stream.totals()
    return RequestRecord(
        id=stream.request_id,
        model=model,
        status=_status(totals, error),
        total_s=total_s,
        refused=not stream.started,
        prompts=len(wanted.prompts),
        n=wanted.n,
        max_tokens=_max_tokens(wanted),
        prompt_tokens=sum(len(r.prompt_ids) for r in requests[:: wanted.n]),
        cached_tokens=totals.cached_tokens,
        output_tokens=totals.output_tokens,
        longest=totals.longest,
        finish=",".join(totals.finish),
        queue_s=totals.queue_s,
        ttft_s=totals.ttft_s,
        tpot_s=totals.tpot_s,
        error=_message(error),
    )


def refusal(
    wanted: ClientRequest, model: str | None, error: BaseException, total_s: float
) -> RequestRecord:
    """Of a request that never had a stream; ``model`` is None while none is loaded."""
    return RequestRecord(
        id=wanted.request_id[:128],
        model=model or "",
        status=_code(error),
        total_s=total_s,
        refused=True,
        error=_message(error),
    )


def traced(wanted: ClientRequest) -> dict[str, Attribute]:
    """What a client asked for, as attributes of the span of its request."""
    found: dict[str, Attribute] = {"gen_ai.operation.name": wanted.operation}
    for name in ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed"):
        given = wanted.params.get(name)
        if isinstance(given, int | float):
            found[f"gen_ai.request.{name}"] = given
    return found


def _status(totals: Totals, error: BaseException | None) -> str:
    """A client that leaves once it has all has been served."""
    if totals.complete and _WELL.issuperset(totals.finish):
        return OK
    return CancelledError.code if error is None else _code(error)


def _code(error: BaseException) -> str:
    if isinstance(error, MoeserveError):
        return error.code
    return InternalError.code if isinstance(error, Exception) else CancelledError.code


def _message(error: BaseException | None) -> str:
    """Of an error of ours: others are in the log already, or are no errors."""
    return error.message if isinstance(error, MoeserveError) else ""


def _max_tokens(wanted: ClientRequest) -> int | None:
    given = wanted.params.get("max_tokens")
    return given if isinstance(given, int) else None
