"""Around every method of every service: who calls, how its message is read, that a call runs.

Only health needs no key. The message of a unary request is read here and not by gRPC: after the
key has been looked at, within a limit of time (``reads``). Calls that are refused here, so that the
service does not tell of them, have a line in the log each, within a bound.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from moeserve.errors import (
    ExhaustedError,
    InvalidRequestError,
    MoeserveError,
    UnauthenticatedError,
)
from moeserve.gateway.grpc.reads import MessageReads
from moeserve.gateway.grpc.statuses import Context, abort
from moeserve.gateway.trust.identity import Tenants, serve_tenant
from moeserve.observe.logs import FIELDS
from moeserve.observe.requests import left_out_field, refusal_bound
from moeserve.observe.spans import serve_trace

log = logging.getLogger("moeserve.access")

# At once on one connection. ``grpc.max_concurrent_streams`` cannot say it: what a client sends
# before it has heard of that is refused without a status.
MAX_CALLS = 4096
MAX_METHOD_CHARS = 200
_HEALTH = "/grpc.health.v1.Health/"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class BusyPeers:
    """How many calls run from each remote port: their connections are not idle."""

    def __init__(self) -> None:
        self._calls: Counter[int] = Counter()

    def __contains__(self, port: int) -> bool:
        return port in self._calls

    @contextmanager
    def calling(self, peer: str) -> Iterator[bool]:
        """Whether there may be one more; ``peer`` as gRPC writes it: ``ipv4:127.0.0.1:50000``,
        ``ipv6:%5B::1%5D:50000``."""
        _, _, text = peer.rpartition(":")
        port = int(text) if text.isdecimal() else -1
        self._calls[port] += 1
        try:
            yield self._calls[port] <= MAX_CALLS
        finally:
            self._calls[port] -= 1
            if not self._calls[port]:
                del self._calls[port]


class GrpcGuard(grpc.aio.ServerInterceptor):
    """Everything but health needs ``authorization: Bearer KEY``, where there are keys."""

    def __init__(self, tenants: Tenants | None, reads: MessageReads, busy: BusyPeers) -> None:
        self._tenants = tenants
        self._reads = reads
        self._busy = busy
        self._bound = refusal_bound(time.monotonic)
        # By method and tenant: of what nobody serves there are none, so both are few.
        self._made: dict[tuple[str, str], _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method, tenant = handler_call_details.method, ""
        if self._tenants is not None and not method.startswith(_HEALTH):
            given = dict(handler_call_details.invocation_metadata).get("authorization", "")
            found = self._tenants.of(str(given).encode())
            if found is None:
                return self._denying(method)
            tenant = found
        made = self._made.get((method, tenant))
        if made is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            made = self._made[method, tenant] = self._guarded(handler, tenant, method)
        return made

    def _denying(self, name: str) -> _Handler:
        """Refuses before the message has been read."""

        async def deny(_: object, context: Context) -> None:
            error = "send the api key as metadata 'authorization: Bearer KEY'"
            await self._refuse(name, context, UnauthenticatedError(error))

        return grpc.stream_stream_rpc_method_handler(deny)

    def _guarded(self, handler: _Handler, tenant: str, name: str) -> _Handler:
        """The ``handler`` of the method of this name as one that takes a stream of requests: of
        that of a unary one it reads the first."""
        method = _method_of(handler)
        streaming = handler.request_streaming
        parse = handler.request_deserializer

        async def running(requests: object, context: Context) -> Any:
            with self._busy.calling(context.peer()) as welcome:
                await self._welcome(welcome, tenant, name, context)
                request = requests if streaming else await self._message(parse, name, context)
                return await method(request, context)

        async def yielding(requests: object, context: Context) -> AsyncIterator[Any]:
            with self._busy.calling(context.peer()) as welcome:
                await self._welcome(welcome, tenant, name, context)
                request = requests if streaming else await self._message(parse, name, context)
                async for answer in method(request, context):
                    yield answer

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(
            yielding if inspect.isasyncgenfunction(method) else running,
            request_deserializer=parse if streaming else None,
            response_serializer=handler.response_serializer,
        )

    async def _welcome(self, welcome: bool, tenant: str, name: str, context: Context) -> None:
        serve_tenant(tenant)
        for key, value in context.invocation_metadata() or ():
            if key == "traceparent":
                serve_trace(str(value))
        if not welcome:
            error = f"{MAX_CALLS} calls run on this connection: try again later"
            await self._refuse(name, context, ExhaustedError(error))

    async def _message(
        self, parse: Callable[[bytes], Any] | None, name: str, context: Context
    ) -> Any:
        try:
            message = await self._reads.first(context)
            return message if parse is None else parse(message)
        except DecodeError as error:
            failed: MoeserveError = InvalidRequestError(f"not a valid message: {error}")
        except MoeserveError as error:
            failed = error
        await self._refuse(name, context, failed)
        raise AssertionError("abort raises")

    async def _refuse(self, name: str, context: Context, error: MoeserveError) -> None:
        if log.isEnabledFor(logging.INFO) and self._bound.admits():
            fields = {
                "method": name[:MAX_METHOD_CHARS],
                "status": error.code,
                "error": error.message,
                **left_out_field(self._bound),
            }
            log.info("grpc", extra={FIELDS: fields})
        await abort(context, error)


def _method_of(handler: _Handler) -> Callable[..., Any]:
    kinds = (
        handler.unary_unary,
        handler.unary_stream,
        handler.stream_unary,
        handler.stream_stream,
    )
    return next(method for method in kinds if method is not None)
