"""Clients of a cluster over gRPC: token ids with the time at which each came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from moeserve.pb import inference_pb2 as pb
from moeserve.pb import inference_pb2_grpc as rpc


@dataclass(slots=True)
class Answer:
    """``times_s`` has one entry per token, of the monotonic clock, as ``sent_s`` is. ``error`` is
    the status and detail of a call that failed."""

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    error: str = ""
    code: grpc.StatusCode | None = None

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]


def request(prompt: Sequence[int], tokens: int, **sampling: Any) -> pb.GenerateRequest:
    params = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(max_tokens=tokens, **params)
    )


async def ask(
    channel: grpc.aio.Channel,
    wanted: pb.GenerateRequest,
    timeout_s: float = 120.0,
    metadata: Sequence[tuple[str, str]] = (),
) -> Answer:
    """Everything that came, also of a call that failed in the end."""
    answer = Answer(time.monotonic())
    call = rpc.InferenceStub(channel).Generate(wanted, timeout=timeout_s, metadata=tuple(metadata))
    try:
        async for chunk in call:
            now = time.monotonic()
            answer.token_ids += chunk.token_ids
            answer.times_s += [now] * len(chunk.token_ids)
            answer.cached_tokens = max(answer.cached_tokens, chunk.usage.cached_tokens)
    except grpc.aio.AioRpcError as error:
        answer.code, answer.error = error.code(), f"{error.code().name}: {error.details()}"
    return answer
