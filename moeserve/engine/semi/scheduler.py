"""Two steps under way that share no request: newest tokens here, prompts elsewhere.

semi-PD (arXiv:2504.19867): prefill and decode as two processes over one set of weights and blocks.
Decisions stay in one place: this scheduler plans the steps of both. ``plan_newest`` and ``apply``
take turns as ``plan`` and ``apply`` of a ``Scheduler`` do, and beside them ``plan_prompts`` and
``apply_prompts``. A request is in one of the two at most; it goes over to the newest tokens when
``apply_prompts`` brings its first one. With no step of prompts under way ``plan`` may be called
instead, whose step has both.

**Blocks.** A step of prompts holds a reference of its own to every block of its chunks until it is
over. So whatever becomes of a request meanwhile (cancelled, late, taken out), its blocks are not
free, found or reused while somebody may write to them. ``drop_prompts`` may be called only when it
is certain that nobody does. Nobody preempts a request of that step: who needs its blocks sits out
(``Preemption.elsewhere``). Pure.
"""

from __future__ import annotations

from itertools import chain

from moeserve.core import BlockId, Chunk, Refusal, RequestId, StepPlan, StepResult, TokenOut
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder


class SplitScheduler(Scheduler):
    """Owns its requests as a ``Scheduler`` does. Prompts go in chunks."""

    _prompts: StepBuilder | None = None
    _held: tuple[BlockId, ...] = ()

    @property
    def prompts_under_way(self) -> bool:
        return self._prompts is not None

    @property
    def has_work(self) -> bool:
        """Also where all requests of a step have left that still runs."""
        return super().has_work or self.prompts_under_way

    def plan(self, now: float) -> StepPlan:
        assert self._prompts is None, "a step of prompts is under way: its requests are not free"
        return super().plan(now)

    def plan_newest(self, now: float) -> StepPlan:
        """One token, and drafts, for each that generates and is not in the other step."""
        builder = self._begin_newest(now, alone=True)
        if builder.chunks:
            return self.commit(builder, self.take_ended())
        self._ended += builder.preempted
        return self.commit(builder, ())

    def plan_prompts(self, now: float) -> StepPlan | None:
        """After ``plan_newest``, whose step is still to run: chunks of prompts within a budget of
        their own, where no step of them is under way; None where there is nothing to compute."""
        assert self._prompts is None, "one step of prompts at most"
        newest = self._in_flight
        taken = {seq.request.id for seq in newest.seqs}
        builder = StepBuilder(self.config.max_num_batched_tokens, self.rank, (), now)
        running = (seq for seq in self._running.values() if seq.request.id not in taken)
        self._begin_prompts(builder, running)
        if newest.preempted:
            builder.refused = Refusal.PREEMPTED if self._waiting else Refusal.NONE
            builder.add_all(builder.later)
        else:
            self._admit_waiting(builder, now)
        if not builder.chunks:
            return None
        self._prompts = builder
        self._preemption.elsewhere = frozenset(seq.request.id for seq in builder.seqs)
        self._held = tuple(chain.from_iterable(chunk.blocks for chunk in builder.chunks))
        self.pool.hold(self._held)
        return builder.plan(())

    def left_prompts(self) -> frozenset[RequestId]:
        """Of the step of prompts, the requests that have left since it was planned. Another one
        may have such a name by now."""
        assert self._prompts is not None, "no step of prompts is under way"
        return frozenset(seq.request.id for seq in self._prompts.seqs if seq.finish is not None)

    def apply_prompts(self, result: StepResult) -> list[TokenOut]:
        """Take note of what the step of prompts computed and sampled; nobody writes to its blocks
        any more."""
        self.counters.steps += 1
        taken = self._end_prompts()
        outs = self._acceptance.settle(*taken, {s.request_id: s for s in result.sampled})
        self._running.num_tokens += len(outs)
        self.counters.generated_tokens += len(outs)
        return outs

    def drop_prompts(self) -> list[RequestId]:
        """There is no result of the step of prompts, and it is certain that nobody writes to its
        blocks any more. Gives those that are still here, whose chunks are to be computed again."""
        seqs, _, _ = self._end_prompts()
        return [seq.request.id for seq in seqs if seq.finish is None]

    def blocks_in_use(self) -> set[BlockId]:
        return super().blocks_in_use() | set(self._held)

    def _end_prompts(self) -> tuple[list[SequenceState], list[Chunk], int]:
        builder, self._prompts = self._prompts, None
        assert builder is not None, "no step of prompts is under way"
        self._preemption.elsewhere = frozenset()
        held, self._held = self._held, ()
        self.pool.release(held)
        self.look_again()
        return builder.take()
