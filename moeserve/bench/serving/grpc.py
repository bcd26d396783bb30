"""The target that calls ``moeserve.v1.Inference/Generate``.

Calls are dealt to ``CONNECTIONS`` connections in turn, and never retried by gRPC itself: what fails
is counted. Failures are named by their status; DEADLINE_EXCEEDED of the server's own is one too.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc

from moeserve.bench.serving.outcomes import AnswerRecord, RequestFailed
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.prompts import PromptSource
from moeserve.bench.serving.targets import SETUP_S, ClientTls, TargetAddress
from moeserve.errors import UnavailableError
from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

CONNECTIONS = 4
MOST_MESSAGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # or all channels would share one connection
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MOST_MESSAGE_BYTES),
)


class GrpcTarget:
    """A server of ``moeserve.v1``; ``prompts`` is ids or text. ``source`` may come later, once the
    server has said what its vocabulary is."""

    def __init__(self, address: TargetAddress, *, tls: ClientTls, key: str | None = None) -> None:
        self._address = address
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        if address.tls:
            authority, own_key, cert = tls.pem()
            both = grpc.ssl_channel_credentials(authority, own_key, cert)
            self._channels = [
                grpc.aio.secure_channel(address.place, both, options=_OPTIONS)
                for _ in range(CONNECTIONS)
            ]
        else:
            self._channels = [
                grpc.aio.insecure_channel(address.place, options=_OPTIONS)
                for _ in range(CONNECTIONS)
            ]
        self._stubs = itertools.cycle([_stub(channel) for channel in self._channels])
        self._source: PromptSource | None = None
        self._ids = True
        self._common = pb.GenerateRequest()

    async def info(self) -> pb.GetModelInfoResponse:
        """What is served. UnavailableError where the server does not say."""
        try:
            found = await next(self._stubs).GetModelInfo(
                pb.GetModelInfoRequest(), timeout=SETUP_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(
                f"{self._address.place} does not say what it serves: {error.code().name}: "
                f"{error.details()}"
            ) from error
        assert isinstance(found, pb.GetModelInfoResponse)
        return found

    def ask_for(
        self, model: str, sampling: pb.SamplingParams, source: PromptSource, *, ids: bool
    ) -> None:
        """What all requests have alike, and where prompts come from; before the first of them."""
        self._common = pb.GenerateRequest(model=model, sampling=sampling)
        self._source, self._ids = source, ids

    def prepare(self, request: PlannedRequest) -> pb.GenerateRequest:
        assert self._source is not None
        made = pb.GenerateRequest()
        made.CopyFrom(self._common)
        made.sampling.max_tokens = request.output_tokens
        if self._ids:
            made.token_ids.ids.extend(self._source.token_ids(request))
        else:
            made.text = self._source.text(request)
        return made

    async def send(self, prepared: pb.GenerateRequest, record: AnswerRecord) -> None:
        loop = asyncio.get_running_loop()
        call = next(self._stubs).Generate(prepared, metadata=self._metadata)
        finished = False
        try:
            async for chunk in call:
                if chunk.token_ids:
                    record.message(loop.time(), len(chunk.token_ids))
                if chunk.finish_reason:
                    finished = True
                    usage = chunk.usage
                    record.usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(f"grpc {error.code().name}", error.details() or "") from error
        finally:
            call.cancel()
        if not finished:
            raise RequestFailed("cut off", "the stream has ended without a reason to finish")

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(grace=None)


def _stub(channel: grpc.aio.Channel) -> Any:
    make: Any = InferenceStub  # generated code has no types
    return make(channel)
