"""One door process of ``bench/doors.py``: real doors and streams before an engine without a model.

Behind the sockets everything is what serves, the engine's loop included; scheduler and executor are
a ``Conveyor``, which gives every request one token of a real text a step, at next to no cost.
Commands come as lines of JSON on standard input, each is answered by one on standard output:
``{"gang": N, "step_ms": T}`` sets up, and then N requests run together, once all are there;
``{}`` asks what the last gang has taken.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import sys
import time
from typing import Any, cast

from moeserve.core import (
    Chunk,
    Counters,
    FinishReason,
    Request,
    RequestId,
    StepPlan,
    StepResult,
    TokenOut,
)
from moeserve.engine.blocks import BlockCounts
from moeserve.engine.loop import Engine
from moeserve.gateway.limits import ModelLimits
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.service import InferenceService, ServedModel
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

try:
    from moeserve.gateway.grpc.door import GrpcDoor
    from moeserve.gateway.http.app import http_app
    from moeserve.gateway.http.server import HttpServer
except ModuleNotFoundError:  # another tree, from before doors had rooms
    from moeserve.gateway.grpc_door import GrpcDoor
    from moeserve.gateway.http_door import http_app
    from moeserve.gateway.http_server import HttpServer

TEXT = (
    "The experts of a mixture are spread over many devices, and every token visits the few that "
    "its router chose. “Placement”, said the first, “is which expert lies where; dispatch is how "
    "the tokens come there – and back again.” 1 + 1 = 2, naïve as that is.\n"
)
CONTEXT = 1 << 20


class Conveyor:
    """Scheduler and executor in one: all requests of a gang run together, a token each a step."""

    def __init__(self, token_ids: list[int]) -> None:
        self.counters = Counters()
        self.blocks = BlockCounts(1, 1, 0, 1)
        self.step_s = 0.0
        self.gang = 1
        self.began_at = self.began_cpu = self.ended_at = 0.0
        self._token_ids = token_ids
        self._waiting: list[Request] = []
        self._running: dict[RequestId, Request] = {}
        self._chunks: tuple[Chunk, ...] = ()
        self._made = 0
        self._due = 0.0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running) or len(self._waiting) >= self.gang

    def add(self, request: Request, *history: Any) -> None:
        self._waiting.append(request)

    def withdraw(self, count: int) -> list[Any]:
        raise AssertionError("nothing is given back here")

    def abort(self, request_id: RequestId, reason: FinishReason) -> bool:
        found = self._running.pop(request_id, None) is not None
        if found:
            self._chunks = tuple(c for c in self._chunks if c.request.id in self._running)
        return found

    def plan(self, now: float) -> StepPlan:
        if not self._running:
            self._running = {r.id: r for r in self._waiting}
            self._chunks = tuple(Chunk(r, (0,), 0, (), samples=1) for r in self._waiting)
            self._waiting, self._made = [], 0
            self.began_at, self.began_cpu = time.monotonic(), time.process_time()
            self._due = self.began_at
        return StepPlan(self._chunks)

    def run(self, plan: StepPlan) -> StepResult:
        """Ends when its time is up. Also without one, others get their turn."""
        self._due = max(self._due + self.step_s, time.monotonic() - self.step_s)
        time.sleep(max(0.0, self._due - time.monotonic()))
        return StepResult(())

    def apply(self, result: StepResult) -> list[TokenOut]:
        self._made += 1
        self.counters.steps += 1
        ids, made, outs = self._token_ids, self._made, []
        for offset, request in enumerate(self._running.values()):
            finish = FinishReason.LENGTH if made == request.params.max_tokens else None
            token = ids[(7 * offset + made) % len(ids)]
            outs.append(TokenOut(request.id, token, None, finish))
        if outs[-1].finish is not None:
            self._running, self._chunks = {}, ()
            self.ended_at = time.monotonic()
        return outs


def open_engine(conveyor: Conveyor, tokenizer: Tokenizer) -> Engine:
    """Until text was made at the door, engines had a tokenizer."""
    texts: dict[str, Any] = (
        {"tokenizer": tokenizer} if "tokenizer" in inspect.signature(Engine).parameters else {}
    )
    return Engine(conveyor, conveyor, **texts)


async def serve() -> None:
    tokenizer = Tokenizer.load(resolve_model("demo"))
    conveyor = Conveyor(tokenizer.encode(TEXT))
    loop = asyncio.get_running_loop()
    service = InferenceService(Mailbox(loop))
    grpc_door = GrpcDoor(service, "127.0.0.1", 0)
    http = HttpServer(http_app(service, None, lambda: (b"", "")), "127.0.0.1", 0, 1.0)
    with open_engine(conveyor, tokenizer) as engine:
        limits = ModelLimits(tokenizer.vocab_size, CONTEXT)
        service.serve(ServedModel("demo", engine, tokenizer, limits))
        await grpc_door.open()
        http.open()
        print(json.dumps({"grpc": grpc_door.port, "http": http.port}), flush=True)
        gc.collect()
        gc.freeze()
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = cast("dict[str, float]", json.loads(line))
            if command:
                conveyor.gang = int(command["gang"])
                conveyor.step_s = command["step_ms"] / 1e3
            report = {
                "began_at": conveyor.began_at,
                "ended_at": conveyor.ended_at,
                "cpu_s": time.process_time() - conveyor.began_cpu,
            }
            print(json.dumps(report), flush=True)
        await grpc_door.close(1.0)
        await http.close()


if __name__ == "__main__":
    asyncio.run(serve())
