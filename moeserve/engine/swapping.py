"""The KV of preempted requests in host memory: out when they stop, back before they run again.

FastSwitch (Shen et al., 2024, arXiv:2411.18424): copies are made in long runs (``swap_space``), and
a copy outlasts its return, as long as nobody else needs the room, so that the next time only what
was computed since is copied. A request keeps its reference to leading blocks that others hold too:
these take no room of their own, and are copied only where they must be given up after all
(``hold``). Where there is no room in host memory, or a copy would cost more than it saves
(``policies.swap``), the KV is computed again, which is counted. What comes back with other bytes
than it left with is computed again, too.

All copies are made while no step runs, on the thread that plans. The scheduler's decisions stay
pure: what copies is an argument (``SwapMemory``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moeserve.core import BlockId, Counters, RequestId
from moeserve.engine.blocks import child_key, root_key
from moeserve.engine.kv_manager import KvManager
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.sequence import SequenceState
from moeserve.engine.swap_space import SwapRun, SwapSpace

# Of one copy, before the last ones are made one.
MANY_RUNS = 4


class SwapMemory(Protocol):
    """Host memory for the KV of ``places`` positions of ``place_bytes`` each, in ``caches`` caches.
    ``byte_s`` is what a copied byte took lately, 0 before the first."""

    @property
    def places(self) -> int: ...
    @property
    def place_bytes(self) -> int: ...
    @property
    def caches(self) -> int: ...
    @property
    def byte_s(self) -> float: ...

    def copy_out(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> None:
        """The positions of the runs, of a sequence that lies in ``blocks``. ``keys`` say what each
        run holds, up to its last token."""
        ...

    def copy_in(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> bool:
        """The same runs into other blocks; False where one is not what went out under its key."""
        ...


@dataclass(frozen=True, slots=True)
class Swapping:
    """What a scheduler needs to swap."""

    host: SwapMemory
    choice: SwapOrCompute


@dataclass(frozen=True, slots=True)
class SwapCopy:
    """Runs of a sequence, one behind the other."""

    seq: SequenceState
    runs: tuple[SwapRun, ...]

    @property
    def start(self) -> int:
        return self.runs[0].start

    @property
    def stop(self) -> int:
        return self.runs[-1].stop


class KvSwap:
    """Owns the copies of one scheduler's requests. One that waits and has a copy is ``swapped``; of
    one that runs the copy is kept while there is room."""

    def __init__(self, swapping: Swapping, kv: KvManager, counters: Counters) -> None:
        self.space = SwapSpace(swapping.host.places)
        self._host = swapping.host
        self._choice = swapping.choice
        self._kv = kv
        self._counters = counters
        self._copies: dict[RequestId, SwapCopy] = {}  # those made longest ago first

    def out(self, seq: SequenceState, *, hold: bool = True) -> None:
        """It gives up its blocks, but for leading ones that others have too (``hold``)."""
        copy = self._copies.pop(seq.request.id, None)
        start = self._shared(seq, copy) if hold else 0
        computed, stop = seq.computed, max(seq.computed, copy.stop if copy else 0)
        if stop <= start:  # whatever it has others have too
            self._give_up(seq, copy)
            return
        missing = computed - start
        if copy is not None:
            missing = max(0, copy.start - start) + max(0, computed - copy.stop)
        host, tokens, before = self._host, stop - start, self._counters.swap_out_bytes
        pays = self._choice.copies((missing + tokens) * host.place_bytes, tokens, host.byte_s)
        runs = self._extended(seq, copy, start) if pays else None
        if runs is None:
            self._counters.swap_recomputed += 1
            self._give_up(seq, None if pays else copy)
            return
        self._copies[seq.request.id] = SwapCopy(seq, runs)
        self._kv.keep_first(seq, start)
        seq.swapped = stop
        self._counters.swaps += 1
        copied = self._counters.swap_out_bytes - before
        self._counters.swap_spared_bytes += max(0, tokens * host.place_bytes - copied)

    def back(self, seq: SequenceState) -> None:
        """It has blocks for all its tokens: what is missing of its copy comes there."""
        if not seq.swapped:
            return
        copy, before, seq.swapped = self._copies[seq.request.id], seq.computed, 0
        runs = [run for run in copy.runs if run.start >= before]
        if not runs or runs[0].start != before:
            return  # but for some tokens, others had all of it
        if not self._host.copy_in(seq.blocks, runs, self._keys(seq, runs)):
            self._counters.swap_recomputed += 1
            self.forget(seq.request.id)
            return
        seq.computed = copy.stop
        self._kv.publish(seq, before)
        self._counters.swap_copies += len(runs) * self._host.caches
        self._counters.swap_in_bytes += (copy.stop - before) * self._host.place_bytes

    def forget(self, request_id: RequestId) -> None:
        """It has left, whether it ran or waited."""
        copy = self._copies.pop(request_id, None)
        if copy is not None:
            copy.seq.swapped = 0
            self._free(copy.runs)

    def check(self) -> None:
        """Every invariant, slowly; for tests."""
        used = sum(run.count for copy in self._copies.values() for run in copy.runs)
        assert used + self.space.num_free == self.space.places, "places are lost"
        for copy in self._copies.values():
            assert copy.seq.finish is None, f"{copy.seq.request.id} has left"
            for run, after in zip(copy.runs, copy.runs[1:], strict=False):
                assert run.stop == after.start, f"{copy} has a gap"
            assert copy.seq.swapped in (0, copy.stop), copy

    def _shared(self, seq: SequenceState, copy: SwapCopy | None) -> int:
        """Positions whose blocks others hold too, up to where a run of the copy begins."""
        size = self._kv.pool.block_size
        shared = min(self._kv.held_beside(seq) * size, seq.computed // size * size)
        if copy is None or shared <= copy.start:
            return shared
        starts = (run.start for run in copy.runs)
        return max((s for s in starts if s <= shared and s % size == 0), default=0)

    def _extended(
        self, seq: SequenceState, copy: SwapCopy | None, start: int
    ) -> tuple[SwapRun, ...] | None:
        """The copy from ``start`` on, with all that is computed; None where there is no room, and
        then there is no copy. Of many runs those at the end that are no longer than what comes
        behind them are copied with it, so that there are never more than a few."""
        runs = [] if copy is None else [*copy.runs]
        front = [(start, runs[0].start)] if runs and start < runs[0].start else []
        behind, first = seq.computed, runs[-1].stop if runs else start
        while len(runs) >= MANY_RUNS and runs[-1].count <= behind - first:
            run = runs.pop()
            self._free((run,))
            first = run.start
        fresh: list[SwapRun] = []
        for begin, end in (*front, (first, behind)):
            if begin < end:
                found = self._take(begin, end - begin)
                if found is None:
                    self._free((*runs, *fresh))
                    return None
                fresh += found
        if fresh:
            self._host.copy_out(seq.blocks, fresh, self._keys(seq, fresh))
            self._counters.swap_copies += len(fresh) * self._host.caches
            nbytes = sum(run.count for run in fresh) * self._host.place_bytes
            self._counters.swap_out_bytes += nbytes
        return tuple(sorted((*runs, *fresh), key=lambda run: run.start))

    def _take(self, start: int, count: int) -> list[SwapRun] | None:
        """Places, for which copies of requests that run are given up, the oldest first."""
        while (runs := self.space.take(start, count)) is None:
            kept = (name for name, copy in self._copies.items() if not copy.seq.swapped)
            oldest = next(kept, None)
            if oldest is None:
                return None
            self.forget(oldest)
        return runs

    def _give_up(self, seq: SequenceState, copy: SwapCopy | None) -> None:
        if copy is not None:
            self._free(copy.runs)
        seq.swapped = 0
        self._kv.free(seq)

    def _free(self, runs: Sequence[SwapRun]) -> None:
        for run in runs:
            self.space.give_back(run)

    def _keys(self, seq: SequenceState, runs: Sequence[SwapRun]) -> list[bytes]:
        """Of the scope and all tokens up to the end of each run."""
        size, keys = self._kv.pool.block_size, seq.full_keys(self._kv.pool.block_size)
        found: list[bytes] = []
        for run in runs:
            full = run.stop // size
            parent = keys[full - 1] if full else root_key(seq.request.scope)
            found.append(child_key(parent, seq.tokens(full * size, run.stop)))
        return found
