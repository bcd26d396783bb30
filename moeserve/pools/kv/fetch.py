"""KV from other members: who has it is asked, one source at a time.

On the event loop's thread. Whatever goes wrong with a source, and however late it is, ends in
``SourceLostError``; what has come whole until then stays in the importer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc

from moeserve.comm.control.rpc import reason
from moeserve.engine.ranks.messages import write_submission
from moeserve.errors import DataLossError, InvalidRequestError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import geometry_of
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.memory import SlotMemories, SlotMemory
from moeserve.pools.kv.mooncake import Mooncake, RegisteredSlots
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.receiver_call import FetchOrder, ReceiverCall, SourceLostError
from moeserve.pools.kv.serve import SERVICE


class Fetcher:
    """``compute_id`` is of the model that ``house`` has the KV of."""

    def __init__(
        self,
        house: KvHouse,
        compute_id: str,
        channels: ChannelPool,
        mover: Mover,
        counters: KvCounters,
        limits: FetchLimits,
        clock: Callable[[], float] = time.monotonic,
        mooncake: Mooncake | None = None,
    ) -> None:
        self._mooncake = mooncake
        self._layouts = house.layouts
        self._geometry = geometry_of(house.layouts)
        self._compute_id = compute_id
        self._channels = channels
        self._mover = mover
        self._counters = counters
        self._limits = limits
        self._clock = clock
        self._calls = asyncio.Semaphore(limits.calls)
        self._memories = SlotMemories(limits.slots, limits.slot_bytes, limits.memories)

    def close(self) -> None:
        """When no call is under way, and the mover has no jobs."""
        self._memories.close()

    async def fetch(self, order: FetchOrder) -> None:
        """Until all is there; SourceLostError."""
        address = order.source.address
        async with self._calls:
            self._counters.add("calls")
            try:
                async with asyncio.timeout(self._limits.whole_s):
                    await self._ask(order)
            except TimeoutError as error:
                text = f"{address} was not done in {self._limits.whole_s:.0f} s"
                raise SourceLostError(text, "late") from error
            except grpc.aio.AioRpcError as error:
                raise SourceLostError(f"{address}: {reason(error)}", _kind(error)) from error
            except DataLossError as error:
                self._counters.add("bad_frames")
                raise SourceLostError(f"{address}: {error.message}", "wrong") from error
            except InvalidRequestError as error:
                raise SourceLostError(f"{address} sent {error.message}", "wrong") from error
            finally:
                self._counters.add("calls", -1)

    async def _ask(self, order: FetchOrder) -> None:
        source = order.source
        async with self._channels.use(source.address, source.server_name) as channel:
            begin: Any = channel.stream_stream(f"/{SERVICE}/Fetch")
            have = order.importer.restart()
            memory, registered = self._memories_for(order.importer.length - have)
            call = begin(metadata=self._channels.metadata, timeout=self._limits.whole_s)
            receiver = ReceiverCall(
                order, call, self._layouts, self._mover, self._counters, self._limits, memory,
                registered,
            )  # fmt: skip
            asked = _cancels()
            try:
                await receiver.run(self._wanted(order, have, memory, registered))
            except asyncio.CancelledError:
                if _cancels() > asked:
                    raise
                # Nobody asked for it: gRPC says so of a call that it has ended.
                text = f"{source.address} ended the call"
                raise SourceLostError(text, "unreachable") from None
            finally:
                call.cancel()
                if memory is not None:  # behind what still reads it
                    self._mover.later(self._memories.give, memory, again=receiver.ended_well)
                if registered is not None and self._mooncake is not None:
                    self._mover.later(self._mooncake.give, registered, again=receiver.ended_well)

    def _memories_for(self, positions: int) -> tuple[SlotMemory | None, RegisteredSlots | None]:
        """For what is worth it."""
        size = sum(layout.nbytes // layout.block_size for layout in self._layouts) * positions
        limits = self._limits
        if size < limits.memory_from:
            return None, None
        shared = self._memories.take() if limits.slots else None
        if self._mooncake is None:
            return shared, None
        return shared, self._mooncake.take(limits.registered, limits.slot_bytes)

    def _wanted(
        self,
        order: FetchOrder,
        have: int,
        memory: SlotMemory | None,
        registered: RegisteredSlots | None,
    ) -> pb.ToSource:
        """The first message."""
        wanted = pb.Wanted(
            compute_id=self._compute_id,
            geometry=self._geometry,
            have=have,
            running=order.source.running,
            memory=None if memory is None else memory.offer(),
            registered=None if registered is None else registered.offer(),
        )
        history = replace(order.history, sources=())
        write_submission(wanted.submission, order.request, history, self._clock())
        return pb.ToSource(wanted=wanted)


def _cancels() -> int:
    """How often this task was asked to end, deadlines among them."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _kind(error: grpc.aio.AioRpcError) -> str:
    match error.code():
        case grpc.StatusCode.DATA_LOSS:
            return "wrong"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return "late"
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.UNKNOWN | grpc.StatusCode.CANCELLED:
            return "unreachable"
    return "refused"
