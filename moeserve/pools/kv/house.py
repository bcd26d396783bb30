"""The KV of one rank, as those see it who bring some or take some away. ``engine.kv_exchange`` is
it; tests have another.

Blocks are held or free, and whoever holds a block has a reference to it, which it gives back or
hands on. Of a held block the positions that are computed do not change any more, so they can be
exported while the rank runs steps; a block that was borrowed to be written is nobody else's, so it
can be imported into as well. Every call is for any thread, and none waits for a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from moeserve.core import BlockId, CacheScope, FinishReason, Request, RequestId
from moeserve.engine.request_state import EventSink
from moeserve.engine.sequence import HeldKv, History, StepKv
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.ops import KvRuns


class KvHouse(Protocol):
    """``layouts`` has one entry per KV tensor, which is one per layer; they differ in nothing but
    shape. The first ``computed`` positions of a ``HeldKv`` are there, in all layers."""

    @property
    def layouts(self) -> tuple[KvBlockLayout, ...]: ...

    @property
    def block_size(self) -> int: ...

    def borrow(self, token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        """Blocks for so many tokens, of which those that are cached here, from the first on, are
        computed and shared; at least the last token is not. None where there is no room now: what
        runs must be able to grow."""
        ...

    def publish(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None:
        """The full blocks of what is computed can be found by others from now on."""
        ...

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None:
        """Lets go of the references. ``forget`` where the contents cannot be trusted."""
        ...

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor) -> None:
        """Writes uint8 [N, ``layouts[layer].nbytes``]; the blocks are held."""
        ...

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        """The blocks were borrowed, and are not shared."""
        ...

    def export_runs(self, blocks: Sequence[BlockId], runs: KvRuns, out_X: Tensor) -> Tensor:
        """Runs of a sequence that has these blocks, which are held, into ``out_X`` (uint8), with
        their digests, uint8 [R, 16]: many layers and blocks at once (``Ops.export_runs``)."""
        ...

    def import_runs(
        self, blocks: Sequence[BlockId], runs: KvRuns, digests_RD: Tensor, data_X: Tensor
    ) -> Tensor:
        """Those runs whose bytes have their digests enter the blocks, which were borrowed, and are
        not shared; bool [R]: which did."""
        ...

    def submit(self, request: Request, sink: EventSink, history: History) -> None:
        """As an engine's. With ``history.kv`` the references become the request's, whatever comes
        of it, unless this raises. With ``history.keep`` the caller gets them when the request has
        ended well: ``take_kept``."""
        ...

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None: ...

    def look(self, request_id: RequestId) -> HeldKv | None:
        """References to what a request has computed so far; None if it is not here (any more). One
        that waits, preempted perhaps, has nothing: what it had is computed anew, the same bits.
        They are to be read: a request goes on to write to the last block."""
        ...

    def look_within(self, request_id: RequestId) -> StepKv | None:
        """References to what a step that runs now computes of a prompt, beside what ``look`` gives.
        None if there is no such step (any more)."""
        ...

    def layers_done(self, step: int) -> int:
        """The positions of ``StepKv`` are there in so many of the first layers, and stay: in all,
        once the step is over; in none, where it failed. Costs a few calls, and may be asked again
        and again; a layer takes as long as its attention and its experts."""
        ...

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        """What an ended request left, once. None if nothing is kept under this id."""
        ...

    def made(self, request_id: RequestId) -> tuple[int, ...] | None:
        """The tokens that a request has made so far, of at least what was looked at before; None if
        it is not here (any more)."""
        ...

    def detach(self, request_id: RequestId) -> tuple[HeldKv, tuple[int, ...]] | None:
        """Takes a running request out of the rank between two steps, with the tokens it has made:
        its sink is told that it is given back (``RankSink.give_back``), after all their events.
        What a step under way makes for it is lost: nothing is, where this is called by what
        ``between_steps`` tells. None if it does not run any more, or its sink is no
        ``RankSink``."""
        ...

    def on_step(self, tell: Callable[[], None]) -> Callable[[], None]:
        """``tell`` is called on the engine's thread after each step, and when one has begun that
        ``look_within`` may see; it must not block. What is returned ends that."""
        ...

    def between_steps(self, tell: Callable[[], None]) -> Callable[[], None]:
        """``tell`` is called on the engine's thread when the events of a step have been sent and
        none runs, unless steps are started ahead; it must not block. What is returned ends that.
        """
        ...
