"""The gRPC door: ``moeserve.v1.Inference`` with health and reflection.

Translates messages to client requests and deltas to chunks; what they mean is the service's
business. Messages are parsed here and not by gRPC, so that bytes which are no message get
INVALID_ARGUMENT instead of INTERNAL.
"""

from __future__ import annotations

import functools
import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import moeserve
from moeserve.core import FinishReason, Logprobs
from moeserve.errors import (
    ConfigError,
    InternalError,
    InvalidRequestError,
    MoeserveError,
    UnauthenticatedError,
)
from moeserve.gateway.limits import (
    MAX_IDS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGE_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STOP,
    MAX_STOP_IDS,
)
from moeserve.gateway.service import ClientRequest, InferenceService, ServiceState
from moeserve.gateway.stream import Delta, Durations, Usage
from moeserve.pb import inference_pb2 as pb

log = logging.getLogger(__name__)

SERVICE = "moeserve.v1.Inference"
_SMALL_MESSAGE = 1 << 16
# Fields that are looked at one by one.
_FEW = (
    ("stop", MAX_STOP, "strings"),
    ("stop_token_ids", MAX_STOP_IDS, "ids"),
    ("logit_bias", MAX_LOGIT_BIAS, "entries"),
)
_HEALTH = "/grpc.health.v1.Health/"
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # Without this two servers share a port in silence.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Message | None]]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GrpcDoor:
    """Owns a gRPC server; bound from the start, serving between ``open`` and ``close``."""

    def __init__(
        self,
        service: InferenceService,
        host: str,
        port: int,
        api_key: str | None = None,
        with_reflection: bool = True,
    ) -> None:
        self._service = service
        self._health = health.aio.HealthServicer()
        guards = [] if api_key is None else [_KeyGuard(api_key)]
        self._server = grpc.aio.server(interceptors=guards, options=_OPTIONS)
        self._server.add_generic_rpc_handlers([self._handlers()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if with_reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            raise ConfigError(
                f"grpc_port={port}: cannot listen on {address}; taken, or not of this machine: "
                "choose another --grpc-port (0 for any free one) or --host"
            ) from error

    async def open(self) -> None:
        """Answers from now on; NOT_SERVING until ``announce``."""
        await self.announce(False)
        await self._server.start()

    async def announce(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def close(self, grace_s: float) -> None:
        """Refuses new calls, gives running ones ``grace_s``, then cancels them."""
        await self._server.stop(grace_s)

    def _handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, tuple[Method, type[Message]]] = {
            "GenerateUnary": (self._generate_unary, pb.GenerateRequest),
            "Tokenize": (self._tokenize, pb.TokenizeRequest),
            "Detokenize": (self._detokenize, pb.DetokenizeRequest),
            "Abort": (self._abort, pb.AbortRequest),
            "GetModelInfo": (self._model_info, pb.GetModelInfoRequest),
            "GetLoad": (self._load, pb.GetLoadRequest),
        }
        handlers: dict[str, _Handler] = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(_call, method, kind), response_serializer=_bytes_of
            )
            for name, (method, kind) in unary.items()
        }
        handlers["Generate"] = grpc.unary_stream_rpc_method_handler(
            functools.partial(_call, self._generate, pb.GenerateRequest),
            response_serializer=_bytes_of,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        # Writing here, and not yielding, lets a cancelled call raise inside the ``async with``.
        wanted = _client_request(request, context.time_remaining())
        async with await self._service.open(wanted) as stream:
            async for delta in stream:
                await context.write(_chunk(stream.request_id, delta))

    async def _generate_unary(
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        wanted = _client_request(request, context.time_remaining())
        texts: dict[int, list[str]] = {}
        outputs: dict[int, pb.Output] = {}
        async with await self._service.open(wanted) as stream:
            async for delta in stream:
                output = outputs.setdefault(delta.index, pb.Output(index=delta.index))
                texts.setdefault(delta.index, []).append(delta.text)
                output.token_ids.extend(delta.token_ids)
                output.logprobs.extend(_logprobs(delta))
                if delta.finish is not None:
                    output.text = "".join(texts[delta.index])
                    _close_with(output, delta)
        return pb.GenerateResponse(
            request_id=stream.request_id,
            model=self._service.served.name,
            outputs=[outputs[index] for index in sorted(outputs)],
        )

    async def _tokenize(self, request: pb.TokenizeRequest, _: Context) -> pb.TokenizeResponse:
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        ids = await self._service.tokenize(request.model, request.text, special)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=self._service.served.limits.max_len)

    async def _detokenize(self, request: pb.DetokenizeRequest, _: Context) -> pb.DetokenizeResponse:
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        ids = _ids(request.token_ids, "token_ids")
        text = await self._service.detokenize(request.model, ids, skip)
        return pb.DetokenizeResponse(text=text)

    async def _abort(self, request: pb.AbortRequest, _: Context) -> pb.AbortResponse:
        self._service.abort(request.request_id)
        return pb.AbortResponse()

    async def _model_info(
        self, request: pb.GetModelInfoRequest, _: Context
    ) -> pb.GetModelInfoResponse:
        served = self._service.served
        return pb.GetModelInfoResponse(
            model=served.name,
            architecture=served.architecture,
            vocab_size=served.limits.vocab_size,
            max_model_len=served.limits.max_len,
            eos_token_ids=served.eos_ids,
            has_tokenizer=served.tokenizer is not None,
            server_version=moeserve.__version__,
        )

    async def _load(self, request: pb.GetLoadRequest, _: Context) -> pb.GetLoadResponse:
        load = self._service.served.engine.load()
        return pb.GetLoadResponse(
            running=load.running,
            waiting=load.waiting,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            block_size=load.block_size,
            ready=self._service.state is ServiceState.READY,
        )


class _KeyGuard(grpc.aio.ServerInterceptor):
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
    await _abort(
        context, UnauthenticatedError("send the api key as metadata 'authorization: Bearer KEY'")
    )


async def _call(
    method: Method, kind: type[Message], data: bytes, context: Context
) -> Message | None:
    """The frame around every method: bytes in, our errors out as statuses."""
    try:
        return await method(_parse(kind, data), context)
    except MoeserveError as error:
        failed: MoeserveError = error
    except grpc.aio.AbortError:
        raise
    except Exception:  # a bug of ours: the log has it, the client gets INTERNAL, serving goes on
        log.exception("a bug in %s", kind.DESCRIPTOR.name)
        failed = InternalError("internal error; the server's log tells more")
    await _abort(context, failed)
    return None


async def _abort(context: Context, error: MoeserveError) -> None:
    code = grpc.StatusCode[error.code]
    info = error_details_pb2.ErrorInfo(reason=error.code, domain="moeserve")
    if error.param is not None:
        info.metadata["param"] = error.param
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=code.value[0], message=error.message, details=[detail])
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, error.message, trailers)


def _bytes_of(message: Message) -> bytes:
    return message.SerializeToString()


def _parse(kind: type[Message], data: bytes) -> Message:
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


def _client_request(request: pb.GenerateRequest, time_remaining: float | None) -> ClientRequest:
    sampling = request.sampling
    for name, most, unit in _FEW:
        if (given := len(getattr(sampling, name))) > most:
            raise InvalidRequestError(f"{name}: {given} {unit}, at most {most}", param=name)
    params: dict[str, object] = {
        field.name: value
        for field, value in sampling.ListFields()
        if field.name not in ("logit_bias", "stop", "stop_token_ids")
    }
    if sampling.logit_bias:
        params["logit_bias"] = dict(sampling.logit_bias)
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    match request.WhichOneof("prompt"):
        case "text":
            prompt: str | tuple[int, ...] = request.text
        case "token_ids":
            prompt = _ids(request.token_ids.ids, "prompt")
        case _:
            raise InvalidRequestError(
                "the prompt is missing: set text or token_ids", param="prompt"
            )
    return ClientRequest(
        prompts=(prompt,),
        params=params,
        n=request.n or 1,
        request_id=request.request_id,
        model=request.model,
        salt=request.cache_salt,
        domain=request.domain,
        timeout_s=time_remaining,
    )


def _ids(field: Sequence[int], name: str) -> tuple[int, ...]:
    """As Python has them, which takes long where there are many."""
    if len(field) > MAX_IDS:
        raise InvalidRequestError(f"{name}: {len(field)} ids, at most {MAX_IDS}", param=name)
    return tuple(field)


def _chunk(request_id: str, delta: Delta) -> pb.GenerateChunk:
    chunk = pb.GenerateChunk(
        request_id=request_id,
        index=delta.index,
        text_delta=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta),
    )
    if delta.finish is not None:
        _close_with(chunk, delta)
    return chunk


def _close_with(message: pb.GenerateChunk | pb.Output, delta: Delta) -> None:
    message.finish_reason = _FINISH[cast("FinishReason", delta.finish)]
    usage, timing = cast("Usage", delta.usage), cast("Durations", delta.timing)
    message.usage.CopyFrom(
        pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )
    )
    message.timing.CopyFrom(
        pb.Timing(ttft_s=timing.ttft_s, tpot_s=timing.tpot_s, total_s=timing.total_s)
    )


def _logprobs(delta: Delta) -> list[pb.Logprobs]:
    return [
        pb.Logprobs(chosen=pb.TokenLogprob(token_id=token, logprob=entry.chosen), top=_top(entry))
        for token, entry in zip(delta.token_ids, delta.logprobs, strict=False)
    ]


def _top(entry: Logprobs) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(token_id=token, logprob=value) for token, value in entry.top]
