"""The frame around every gRPC method: bytes in, our errors out as statuses with details.

Messages are parsed here and not by gRPC, so that bytes which are no message get INVALID_ARGUMENT
instead of INTERNAL. Details carry ``google.rpc.ErrorInfo``, and ``RetryInfo`` where HTTP has
``Retry-After``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2, status_pb2

from moeserve.errors import (
    RETRIED,
    RETRY_AFTER_S,
    InternalError,
    InvalidRequestError,
    MoeserveError,
)

log = logging.getLogger(__name__)

_SMALL_MESSAGE = 1 << 16

Context = grpc.aio.ServicerContext[Any, Any]
Kind = TypeVar("Kind", bound=Message)
Method = Callable[[Any, Context], Awaitable[Message | None]]


async def call(
    method: Method, kind: type[Message], data: bytes, context: Context
) -> Message | None:
    """The frame around every method: bytes in, our errors out as statuses."""
    try:
        return await method(parse(kind, data), context)
    except MoeserveError as error:
        failed: MoeserveError = error
    except grpc.aio.AbortError:
        raise
    except Exception:  # a bug of ours: the log has it, the client gets INTERNAL, serving goes on
        log.exception("a bug in %s", kind.DESCRIPTOR.name)
        failed = InternalError("internal error; the server's log tells more")
    await abort(context, failed)
    return None


async def abort(context: Context, error: MoeserveError) -> None:
    code = grpc.StatusCode[error.code]
    info = error_details_pb2.ErrorInfo(reason=error.code, domain="moeserve")
    if error.param is not None:
        info.metadata["param"] = error.param
    details: list[Message] = [info]
    if error.http_status in RETRIED:
        delay = duration_pb2.Duration(seconds=RETRY_AFTER_S)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(
        code=code.value[0], message=error.message, details=[_packed(d) for d in details]
    )
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, error.message, trailers)


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def bytes_of(message: Message) -> bytes:
    return message.SerializeToString()


def parse(kind: type[Kind], data: bytes) -> Kind:
    """The message; InvalidRequestError where it is none, or has a field that is not known here."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequestError(
            f"not a valid {kind.DESCRIPTOR.full_name}; texts must be UTF-8: {error}"
        ) from error
    if len(data) <= _SMALL_MESSAGE:
        _refuse_unknown(message)
        return message
    # To name them takes long where there are many.
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        raise InvalidRequestError(
            f"{kind.DESCRIPTOR.full_name} has fields that this server does not know; it may be "
            "older than the client"
        )
    return message


def _refuse_unknown(message: Message) -> None:
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]
        raise InvalidRequestError(
            f"{message.DESCRIPTOR.full_name} has no field {unknown.field_number}; this server may "
            "be older than the client"
        )
    for field, value in message.ListFields():
        if field.message_type is not None and not field.is_repeated:
            _refuse_unknown(value)
