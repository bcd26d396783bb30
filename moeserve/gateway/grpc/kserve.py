"""``inference.GRPCInferenceService``: the Open Inference Protocol as KServe and Triton speak it.

Inputs and outputs are those of Triton's vLLM backend (``tensors``, and the comments of
``grpc_predict_v2.proto``). ModelInfer answers once. ModelStreamInfer runs up to ``MAX_INFLIGHT``
inferences side by side, reads no further ones meanwhile, and answers each in parts where its
input ``stream`` says so; what one of them does wrong is told in its own answer.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

import moeserve
from moeserve.errors import InternalError, InvalidRequestError, MoeserveError, NotFoundError
from moeserve.gateway.grpc.infer_request import VERSION, InferRequest, read_request, require_version
from moeserve.gateway.grpc.statuses import Context, Method, bytes_of, call, parse
from moeserve.gateway.grpc.tensors import INPUTS, OUTPUTS, Output, TensorSpec, write_outputs
from moeserve.gateway.service import InferenceService
from moeserve.gateway.stream import Delta
from moeserve.pb import grpc_predict_v2_pb2 as pb

log = logging.getLogger(__name__)

KSERVE_SERVICE = "inference.GRPCInferenceService"
PLATFORM = "moeserve"
MAX_INFLIGHT = 64
FINAL = "triton_final_response"
_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL, "UINT32": pb.TYPE_UINT32}

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Reply = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


class KserveMethods:
    """The methods, for one service."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, tuple[Method, type[Message]]] = {
            "ServerLive": (self._server_live, pb.ServerLiveRequest),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
            "ModelMetadata": (self._model_metadata, pb.ModelMetadataRequest),
            "ModelConfig": (self._model_config, pb.ModelConfigRequest),
            "ModelInfer": (self._model_infer, pb.ModelInferRequest),
            "RepositoryIndex": (self._repository_index, pb.RepositoryIndexRequest),
        }
        handlers: dict[str, _Handler] = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(call, method, kind), response_serializer=bytes_of
            )
            for name, (method, kind) in unary.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._model_stream_infer, response_serializer=bytes_of
        )
        return grpc.method_handlers_generic_handler(KSERVE_SERVICE, handlers)

    @property
    def _ready(self) -> bool:
        return self._service.ready

    async def _server_live(self, _: pb.ServerLiveRequest, __: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: pb.ServerReadyRequest, __: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready)

    async def _server_metadata(
        self, _: pb.ServerMetadataRequest, __: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="moeserve",
            version=moeserve.__version__,
            extensions=["model_configuration", "model_repository"],
        )

    async def _model_ready(
        self, request: pb.ModelReadyRequest, _: Context
    ) -> pb.ModelReadyResponse:
        ready = self._ready and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=ready and request.name == self._service.served.name)

    async def _model_metadata(
        self, request: pb.ModelMetadataRequest, _: Context
    ) -> pb.ModelMetadataResponse:
        self._require_model(request.name, request.version)

        def described(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
            return pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=spec.datatype, shape=spec.shape
            )

        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=map(described, INPUTS),
            outputs=map(described, OUTPUTS),
        )

    async def _model_config(
        self, request: pb.ModelConfigRequest, _: Context
    ) -> pb.ModelConfigResponse:
        self._require_model(request.name, request.version)
        inputs = [
            pb.ModelInput(
                name=s.name, data_type=_TYPES[s.datatype], dims=s.shape, optional=s.optional
            )
            for s in INPUTS
        ]
        outputs = [
            pb.ModelOutput(name=s.name, data_type=_TYPES[s.datatype], dims=s.shape) for s in OUTPUTS
        ]
        return pb.ModelConfigResponse(
            config=pb.ModelConfig(
                name=request.name,
                backend=PLATFORM,
                input=inputs,
                output=outputs,
                model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
            )
        )

    async def _repository_index(
        self, request: pb.RepositoryIndexRequest, _: Context
    ) -> pb.RepositoryIndexResponse:
        if request.ready and not self._ready:
            return pb.RepositoryIndexResponse()
        index = pb.RepositoryIndexResponse.ModelIndex(
            name=self._service.served.name,
            version=VERSION,
            state="READY" if self._ready else "UNAVAILABLE",
            reason="" if self._ready else self._service.state.value,
        )
        return pb.RepositoryIndexResponse(models=[index])

    def _require_model(self, name: str, version: str) -> None:
        self._service.model(name)
        if not name:
            raise NotFoundError("the model's name is missing", param="name")
        require_version(name, version)

    async def _model_infer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        asked = read_request(request, context.time_remaining())
        if asked.stream:
            raise InvalidRequestError(
                "stream=true: ModelInfer answers once, use ModelStreamInfer", param="stream"
            )
        return await self._whole(request, asked)

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        writing, room = asyncio.Lock(), asyncio.Semaphore(MAX_INFLIGHT)

        async def reply(answer: pb.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(answer)

        async with asyncio.TaskGroup() as inferences:
            async for data in requests:
                await room.acquire()
                inference = inferences.create_task(
                    self._answer(data, context.time_remaining(), reply)
                )
                inference.add_done_callback(lambda _: room.release())

    async def _answer(self, data: bytes, timeout_s: float | None, reply: _Reply) -> None:
        """One inference of a stream, whatever becomes of it."""
        request = pb.ModelInferRequest()
        try:
            request = parse(pb.ModelInferRequest, data)
            asked = read_request(request, timeout_s)
            if asked.stream:
                await self._parts(request, asked, reply)
            else:
                await reply(_part(await self._whole(request, asked), final=True))
            return
        except MoeserveError as refused:
            failed: MoeserveError = refused
        except Exception:  # a bug of ours: the log has it, the stream goes on
            log.exception("a bug in ModelStreamInfer")
            failed = InternalError("internal error; the server's log tells more")
        error = f"{failed.code}: {failed.message}"
        await reply(_part(_response(request), final=True, error=error))

    async def _whole(
        self, request: pb.ModelInferRequest, asked: InferRequest
    ) -> pb.ModelInferResponse:
        async with await self._service.open(asked.wanted) as stream:
            news = _News(asked, stream.prompt_lens)
            if not asked.exclude_input:
                news.begin_with_prompts()
            async for delta in stream:
                news.add(delta)
        return news.response(request)

    async def _parts(
        self, request: pb.ModelInferRequest, asked: InferRequest, reply: _Reply
    ) -> None:
        running = asked.sequences
        async with await self._service.open(asked.wanted) as stream:
            async for delta in stream:
                news = _News(asked, stream.prompt_lens)
                news.add(delta)
                running -= delta.finish is not None
                await reply(_part(news.response(request), final=running == 0))


class _News:
    """What is new of an inference's sequences, all of it or since the last answer."""

    def __init__(self, asked: InferRequest, prompt_lens: Sequence[int]) -> None:
        self._asked = asked
        self._prompt_tokens = sum(prompt_lens[:: asked.wanted.n])
        self._texts: list[list[str]] = [[] for _ in prompt_lens]
        self._finishes = [""] * len(prompt_lens)
        self._made = [0] * len(prompt_lens)

    def begin_with_prompts(self) -> None:
        for index, parts in enumerate(self._texts):
            parts.append(self._asked.prompts[index // self._asked.wanted.n])

    def add(self, delta: Delta) -> None:
        self._texts[delta.index].append(delta.text)
        self._made[delta.index] += len(delta.token_ids)
        if delta.finish is not None:
            self._finishes[delta.index] = delta.finish.value

    def response(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        outputs: Mapping[str, Sequence[Output]] = {
            "text_output": ["".join(parts).encode() for parts in self._texts],
            "finish_reason": [finish.encode() for finish in self._finishes],
            "num_input_tokens": [self._prompt_tokens],
            "num_output_tokens": self._made,
        }
        response = _response(request)
        asked = {name: outputs[name] for name in outputs if name in self._asked.outputs}
        write_outputs(response, asked, raw=self._asked.raw)
        return response


def _response(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(
        model_name=request.model_name, model_version=VERSION, id=request.id
    )


def _part(
    response: pb.ModelInferResponse, *, final: bool, error: str = ""
) -> pb.ModelStreamInferResponse:
    response.parameters[FINAL].bool_param = final
    return pb.ModelStreamInferResponse(error_message=error, infer_response=response)
