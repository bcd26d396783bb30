"""Who gives up KV blocks where a generating request needs one and none is free.

First, of those that wait with blocks, the last one in the queue; then, of those that run, whoever
the admission names (``Admission.victim``): it waits again before its like. What a request gave up
is computed anew when it runs again, or comes back from host memory (``swapping``). Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Set

from moeserve.core import Counters, RequestId
from moeserve.engine.kv_manager import KvManager
from moeserve.engine.policies.choices import Admission
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.swapping import KvSwap, Swapping
from moeserve.engine.waiting import WaitingQueue


class RunningSequences(OrderedDict[RequestId, SequenceState]):
    """By id, as admitted. ``num_tokens`` are theirs, whether or not their KV is there yet; of
    ``leaving`` the next token is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving: dict[RequestId, SequenceState] = {}
        self.num_tokens = 0

    def start(self, seq: SequenceState) -> None:
        self[seq.request.id] = seq
        self.num_tokens += seq.length
        if seq.leaving:
            self.leaving[seq.request.id] = seq

    def stop(self, seq: SequenceState) -> None:
        del self[seq.request.id]
        self.leaving.pop(seq.request.id, None)
        self.num_tokens -= seq.length


class Preemption:
    """Of one scheduler, whose ``running`` and ``waiting`` requests these are.

    Another step that is under way has those of ``elsewhere`` (``semi``). None of them gets a token
    here, and none gives up its blocks, which would not be free before that step is over: whoever
    would need them sits a step out.
    """

    elsewhere: Set[RequestId] = frozenset()

    def __init__(
        self,
        kv: KvManager,
        running: RunningSequences,
        waiting: WaitingQueue,
        admission: Admission,
        counters: Counters,
        swapping: Swapping | None = None,
    ) -> None:
        self.swap = None if swapping is None else KvSwap(swapping, kv, counters)
        self._kv = kv
        self._running = running
        self._waiting = waiting
        self._admission = admission
        self._counters = counters

    def grow_generating(self, preempted: list[RequestId]) -> list[SequenceState]:
        """Those that generate, each with room for its newest token; who has none is preempted."""
        size, elsewhere = self._kv.pool.block_size, self.elsewhere
        generating = [
            seq
            for seq in self._running.values()
            if seq.computed + 1 == seq.length and seq.output_ids
        ]
        if elsewhere:
            generating = [seq for seq in generating if seq.request.id not in elsewhere]
        for seq in [seq for seq in generating if len(seq.blocks) * size < seq.length]:
            if not preempted or seq.request.id in self._running:
                self._grow(seq, preempted)
        if preempted:
            generating = [seq for seq in generating if seq.request.id in self._running]
        if elsewhere:
            generating = [seq for seq in generating if len(seq.blocks) * size >= seq.length]
        return generating

    def make_room(
        self, builder: StepBuilder, seq: SequenceState, has_room: Callable[[], bool]
    ) -> bool:
        """Where nobody runs, those that wait with blocks must give them up to ``seq``, which is to
        start, until it ``has_room``."""
        while not (self._running or builder.preempted) and self._take_back(seq):
            if has_room():
                return True
        return False

    def resume(self, seq: SequenceState) -> None:
        """It runs again, and has its blocks."""
        if self.swap is not None:
            self.swap.back(seq)

    def forget(self, seq: SequenceState) -> None:
        """It has left."""
        if self.swap is not None:
            self.swap.forget(seq.request.id)

    def _grow(self, seq: SequenceState, preempted: list[RequestId]) -> None:
        """Give a generating sequence room for its newest token, or preempt it if it is last."""
        pool = self._kv.pool
        while len(seq.blocks) * pool.block_size < len(seq):
            if pool.num_free:
                seq.blocks += tuple(pool.allocate(1))
                continue
            if self._take_back(gains=self._frees_some):
                continue
            victim = self._admission.victim(self._running.values())
            if victim is seq and self._take_back():
                continue
            if victim.request.id in self.elsewhere:
                return
            self._running.stop(victim)
            self._give_up(victim)
            self._waiting.put_first(victim)
            self._counters.preemptions += 1
            preempted.append(victim.request.id)
            if victim is seq:
                return

    def _take_back(
        self,
        first: SequenceState | None = None,
        gains: Callable[[SequenceState], bool] = lambda seq: True,
    ) -> bool:
        """The last that waits with blocks, but for ``first``, gives them up; False: none does."""
        seq = self._waiting.last_with_blocks(first, gains)
        if seq is not None:
            self._counters.preemptions += not seq.swapped  # that one was counted
            self._give_up(seq, hold=False)
        return seq is not None

    def _frees_some(self, seq: SequenceState) -> bool:
        """Not what a swapped request merely shares."""
        pool = self._kv.pool
        return not seq.swapped or any(pool.num_holders(block) == 1 for block in seq.blocks)

    def _give_up(self, seq: SequenceState, *, hold: bool = True) -> None:
        """Its blocks; their KV may go to host memory."""
        if self.swap is None:
            self._kv.free(seq)
        else:
            self.swap.out(seq, hold=hold)
