"""Who may call: without the api key only health."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from moeserve.errors import UnauthenticatedError
from moeserve.gateway.grpc.statuses import Context, abort

_HEALTH = "/grpc.health.v1.Health/"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GrpcKeyGuard(grpc.aio.ServerInterceptor):
    """Everything but health needs ``authorization: Bearer KEY``."""

    def __init__(self, api_key: str) -> None:
        self._expected = f"Bearer {api_key}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        known = hmac.compare_digest(str(given).encode(), self._expected)
        if handler is None or known or handler_call_details.method.startswith(_HEALTH):
            return handler
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_deny)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_deny)
        return grpc.unary_unary_rpc_method_handler(_deny)


async def _deny(_: object, context: Context) -> None:
    await abort(
        context, UnauthenticatedError("send the api key as metadata 'authorization: Bearer KEY'")
    )
