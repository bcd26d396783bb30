"""Servers that refuse, stall, reset and talk nonsense, over real sockets: failures by kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from moeserve.bench.serving.grpc import GrpcTarget
from moeserve.bench.serving.http import HttpTarget
from moeserve.bench.serving.openai import AskedOfAll
from moeserve.bench.serving.outcomes import Outcome
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.prompts import PromptSource
from moeserve.bench.serving.run import LoadRun, RunOptions
from moeserve.bench.serving.targets import ClientTls, parse_address
from moeserve.errors import UnavailableError
from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(tokens: int) -> bytes:
    usage = {"prompt_tokens": 2, "completion_tokens": tokens}
    found = {"choices": [{"index": 0, "text": "a"}], "usage": usage}
    return b"data: " + json.dumps(found).encode() + b"\n\n"


def chunked(*parts: bytes, end: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return body + (b"0\r\n\r\n" if end else b"")


GOOD = HEAD + chunked(event(1), event(2) + DONE)


class ScriptedServer:
    """Answers the n-th request with the n-th of ``answers``, the last one from then on: bytes,
    and then what it does with the connection ("keep", "close", "reset", "stall")."""

    def __init__(self, *answers: tuple[bytes, str]) -> None:
        self.connections = self.requests = 0
        self._answers = answers

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._stop = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (size,) = (
                    int(line.partition(b":")[2])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                )
                await reader.readexactly(size)
                said, then = self._answers[min(self.requests, len(self._answers) - 1)]
                self.requests += 1
                writer.write(said)
                await writer.drain()
                if then == "stall":
                    await self._stop.wait()
                if then != "keep":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            if self.requests and then == "reset":
                writer.transport.abort()
            writer.close()


async def asked(
    server: ScriptedServer, count: int = 1, timeout_s: float = 30.0
) -> tuple[list[Outcome], HttpTarget]:
    """``count`` requests, one after the other."""
    address = parse_address(f"http://127.0.0.1:{server.port}")
    target = HttpTarget(address, AskedOfAll("m"), PromptSource(0, 9), tls=ClientTls())
    try:
        run = LoadRun(target, RunOptions(timeout_s, 1))
        outcomes = await run.drive([PlannedRequest(0, 2, token_ids=(1, 2))] * count)
    finally:
        await target.close()
    return list(outcomes), target


REFUSAL = b'{"error": {"message": "the queue is full", "type": "x"}}'


def refused(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


@pytest.mark.parametrize(
    ("said", "then", "kind", "detail"),
    [
        (refused(b"429 Too Many Requests", REFUSAL), "keep", "http 429", "the queue is full"),
        (refused(b"500 Oh", b"<html>no</html>"), "keep", "http 500", "<html>no</html>"),
        (refused(b"500 Oh", b"x" * (2 << 20)), "keep", "bad answer", "has more than"),
        (refused(b"200 OK", b"{}"), "keep", "bad answer", "is no stream of events"),
        (b"", "close", "reset", ""),
        (b"", "reset", "reset", ""),
        (HEAD, "reset", "reset", ""),
        (HEAD + chunked(event(1), end=False), "close", "reset", ""),
        (HEAD + chunked(event(1), end=False), "reset", "reset", ""),
        (HEAD + chunked(event(1)), "keep", "cut off", "without [DONE]"),
        (HEAD + chunked(b"data: {\n\n"), "keep", "bad stream", "is no JSON"),
        (HEAD + chunked(b'data: {"error": {"message": "late"}}\n\n'), "keep", "error in stream",
         "late"),
        (HEAD + chunked(DONE), "keep", "no usage", ""),
        (HEAD + b"zz\r\n", "keep", "bad answer", ""),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "keep", "bad answer", ""),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000, "keep", "bad answer", ""),
    ],
)  # fmt: skip
async def test_a_failure_has_its_kind_and_what_follows_is_answered(
    said: bytes, then: str, kind: str, detail: str
) -> None:
    async with ScriptedServer((said, then), (GOOD, "keep")) as server:
        (failed, whole), _ = await asked(server, 2)
    assert failed.failure == kind, failed.detail
    assert detail in failed.detail
    assert failed.ttft_s is None
    assert whole.ok
    assert (whole.input_tokens, whole.output_tokens, whole.message_tokens) == (2, 2, (1, 1))


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + chunked(event(1), end=False)])
async def test_a_stalled_server_is_a_timeout(said: bytes) -> None:
    async with ScriptedServer((said, "stall")) as server:
        (failed,), _ = await asked(server, timeout_s=0.3)
    assert failed.failure == "timeout"
    assert failed.output_tokens == len(failed.message_s) == (1 if event(1) in said else 0)


async def test_no_server_is_a_failure_to_connect() -> None:
    async with ScriptedServer((GOOD, "keep")) as server:
        pass
    (failed,), _ = await asked(server)
    assert failed.failure == "connect"


async def test_connections_are_used_again() -> None:
    async with ScriptedServer((GOOD, "keep")) as server:
        outcomes, target = await asked(server, 5)
        assert [o.failure for o in outcomes] == [""] * 5
        assert (server.connections, server.requests, target.resent) == (1, 5, 0)


async def test_an_idle_connection_that_closes_is_no_failure() -> None:
    """The server closes without a word when the second request comes: it goes out once more."""
    async with ScriptedServer((GOOD, "keep"), (b"", "close"), (GOOD, "keep")) as server:
        outcomes, target = await asked(server, 2)
        assert [o.failure for o in outcomes] == ["", ""]
        assert (server.connections, server.requests, target.resent) == (2, 3, 1)


async def test_answers_that_end_with_the_connection_are_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    async with ScriptedServer((head + event(1) + event(2) + DONE, "close")) as server:
        outcomes, _ = await asked(server, 2)
    assert [o.failure for o in outcomes] == ["", ""]


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (refused(b"200 OK", b'{"data": [{"id": "one"}, {"id": "two"}]}'), ["one", "two"]),
        (refused(b"200 OK", b'{"data": 3}'), None),
        (refused(b"401 No", b'{"error": {"message": "no key"}}'), None),
    ],
)
async def test_a_server_names_its_models(said: bytes, names: list[str] | None) -> None:
    async with ScriptedServer((said, "keep")) as server:
        address = parse_address(f"http://127.0.0.1:{server.port}/v1/")
        target = HttpTarget(address, AskedOfAll(""), PromptSource(0, 9), tls=ClientTls())
        try:
            if names is None:
                with pytest.raises(UnavailableError, match="give --model"):
                    await target.models()
            else:
                assert await target.models() == names
        finally:
            await target.close()


class Script(InferenceServicer):  # type: ignore[misc]  # generated code has no types
    """Ends every call as the token that it is asked to continue says."""

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> Any:
        (kind,) = request.token_ids.ids
        if kind == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        yield pb.GenerateChunk(token_ids=[5])
        if kind == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        if kind == 2:
            await asyncio.sleep(60)
        if kind == 3:
            return
        usage = pb.Usage(prompt_tokens=1, completion_tokens=3, cached_tokens=1)
        yield pb.GenerateChunk(
            token_ids=[6, 7], finish_reason=pb.FinishReason.FINISH_REASON_LENGTH, usage=usage
        )


async def test_failures_of_grpc_have_their_status() -> None:
    server = grpc.aio.server()
    add_InferenceServicer_to_server(Script(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    target = GrpcTarget(parse_address(f"grpc://127.0.0.1:{port}"), tls=ClientTls())
    try:
        with pytest.raises(UnavailableError, match="UNAUTHENTICATED: no key"):
            await target.info()
        target.ask_for("m", pb.SamplingParams(), PromptSource(0, 9), ids=True)
        run = LoadRun(target, RunOptions(1.0))
        outcomes = await run.drive([PlannedRequest(0, 3, token_ids=(k,)) for k in range(5)])
        assert [o.failure for o in outcomes] == [
            "grpc RESOURCE_EXHAUSTED",
            "grpc UNAVAILABLE",
            "timeout",
            "cut off",
            "",
        ]
        assert outcomes[0].detail == "the queue is full"
        whole = outcomes[-1]
        assert whole.message_tokens == (1, 2)
        assert (whole.input_tokens, whole.output_tokens, whole.cached_tokens) == (1, 3, 1)
    finally:
        await target.close()
        await server.stop(None)
    gone = GrpcTarget(parse_address(f"grpc://127.0.0.1:{port}"), tls=ClientTls())
    gone.ask_for("m", pb.SamplingParams(), PromptSource(0, 9), ids=True)
    (failed,) = await LoadRun(gone, RunOptions(5.0)).drive([PlannedRequest(0, 1, token_ids=(4,))])
    assert failed.failure == "grpc UNAVAILABLE"
    await gone.close()
