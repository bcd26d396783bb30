"""Which tokens run in the next step.

Continuous batching (Orca) with chunked prefill (Sarathi-Serve): every running request that is
generating gets its one token first, and draft tokens behind it where a ``Drafter`` proposes some;
then prompts fill what is left of the step's token budget, in chunks, in order of admission.
Requests are admitted by priority, then first come first served (another ``Admission`` may choose
otherwise), with blocks for everything they know so far. When a generating request needs a block and
none is free, of the least urgent the one admitted last gives up its blocks, waits again before its
like and is computed anew later. Of the most urgent the one admitted first is never the victim of
another and fits alone (``check``), so some request always advances.

Pure: time is an argument, tokens are numbers. Knows nothing of text, tensors or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    Refusal,
    Request,
    RequestId,
    Sampled,
    StepPlan,
    StepResult,
    TokenOut,
)
from moeserve.engine.acceptance import Acceptance
from moeserve.engine.blocks import BlockCounts, BlockPool
from moeserve.engine.bounds import (
    SchedulerConfig,
    refuse_to_queue,
    refuse_unservable,
)
from moeserve.engine.deadlines import Deadlines
from moeserve.engine.foresight import NextStep, foresee_step
from moeserve.engine.kv_manager import KvManager
from moeserve.engine.policies.choices import Admission, Drafter, FirstComeFirstServed
from moeserve.engine.policies.drafts import add_with_drafts, propose_for
from moeserve.engine.policies.layered import LayeredPrefill
from moeserve.engine.policies.shape import what_lacks, why_none
from moeserve.engine.preemption import Preemption, RunningSequences
from moeserve.engine.sequence import NEW, History, SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.swapping import KvSwap, Swapping
from moeserve.engine.waiting import WaitingQueue


class Scheduler:
    """Owns requests from ``add`` until they finish. Call ``plan`` and ``apply`` in turn.

    ``plan`` is ``begin``, ``admit`` as often as there is room, and ``commit``; where several ranks
    share a queue (``fleet``) its owner calls these, and ``settle`` instead of ``apply``. ``rank``
    is the home of whatever runs here. Without a ``drafter`` every chunk samples one token at most.
    With ``swapping`` the KV of preempted requests may go to host memory.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        counters: Counters,
        admission: Admission | None = None,
        drafter: Drafter | None = None,
        rank: int = 0,
        swapping: Swapping | None = None,
        layered: LayeredPrefill | None = None,
    ) -> None:
        self.rank = rank
        self.config = config
        self.pool = pool
        self.kv = KvManager(pool, prefix_cache=config.prefix_cache)
        self.counters = counters
        self._admission = admission or FirstComeFirstServed()
        self._drafter, self._layered = drafter, layered
        self._waiting = WaitingQueue()
        self._running = RunningSequences()
        self._preemption = Preemption(
            self.kv, self._running, self._waiting, self._admission, counters, swapping
        )
        self._acceptance = Acceptance(self.kv, counters, self._running.leaving, self._finish)
        self._in_flight = StepBuilder(0, rank)
        self._ahead: StepBuilder | None = None
        self._deadlines = Deadlines()
        self._ended: list[RequestId] = []
        self._stuck = self._still_stuck = False  # the last plan left requests waiting, and so it is

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def blocks(self) -> BlockCounts:
        return self.pool.counts

    @property
    def swap(self) -> KvSwap | None:
        """Who has copies of preempted requests' KV, if any are made."""
        return self._preemption.swap

    @property
    def num_tokens(self) -> int:
        """Of the running requests, whether or not their KV is there yet."""
        return self._running.num_tokens

    def foresee(self) -> NextStep:
        """What the step after the one just planned will likely be here."""
        last = self._in_flight
        slots = self.config.max_num_seqs - self.num_running + last.leaving
        # Who found no room in a step that had tokens left needs somebody to leave.
        stuck = self._stuck and last.budget and not last.leaving
        waiting = () if stuck else islice(self._waiting.values(), slots)
        return foresee_step(
            generating=min(last.staying, self.num_running),
            left=last.left,
            waiting=(seq.uncomputed for seq in waiting),
            budget=self.config.max_num_batched_tokens,
        )

    def owns(self, request_id: RequestId) -> bool:
        return request_id in self._running or request_id in self._waiting

    def sequence(self, request_id: RequestId) -> SequenceState | None:
        """One that runs or waits."""
        return self._running.get(request_id) or self._waiting.get(request_id)

    @property
    def sequences(self) -> Iterator[SequenceState]:
        """Those that run, as admitted; then those that wait, whoever is next first."""
        return chain(self._running.values(), self._waiting.values())

    def blocks_in_use(self) -> set[BlockId]:
        """Those that steps under way still read and write, for requests that have left since."""
        steps = (step for step in (self._in_flight, self._ahead) if step is not None)
        return set().union(*(step.blocks_of_left() for step in steps))

    def look_again(self) -> None:
        """Blocks have been given back by others: whoever found no room may have some."""
        self._stuck = self._still_stuck = False

    def check(self, request: Request) -> None:
        """Refuse what can never run, whoever asks for it. Doors refuse the same earlier, with the
        client's words, for they need the bounds to choose a default (``gateway.limits``)."""
        refuse_unservable(request, self.config.max_model_len, self.pool)

    def add(self, request: Request, history: History = NEW) -> None:
        """Queue a request, or refuse it.

        Where another scheduler had it before (``withdraw``), its prompt was counted there.
        With outputs it goes before those that never ran, as a preempted one does; with KV, behind
        those that have some. Its references are the scheduler's then, unless this raises.
        """
        self.check(request)
        in_use = self.owns(request.id) or self.kv.keeps(request.id)
        refuse_to_queue(request, history, self.config, self.pool, self.num_waiting, in_use)
        seq = SequenceState.of(request, history)
        if history.kv is not None:
            self.kv.take(seq, history.kv)
        self._waiting.put(seq)
        self._still_stuck = False
        self._deadlines.note(seq)
        if not history.moved:
            self.counters.prompt_tokens += len(request.prompt_ids)

    @property
    def num_foreseen(self) -> int:
        """Tokens of the running requests in the step after the one just planned, as foreseen."""
        last = self._in_flight
        return min(last.staying + last.left, self.config.max_num_batched_tokens)

    def abort(self, request_id: RequestId, reason: FinishReason) -> bool:
        """End a request and free its blocks; False if there is no such request."""
        seq = self.sequence(request_id)
        if seq is not None:
            self._finish(seq, reason)
        return seq is not None

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's chunks. Its result goes to ``apply``, or its requests abort."""
        builder = self.begin(now)
        self._admit_waiting(builder, now)
        if builder.chunks:
            return self.commit(builder, self.take_ended())
        self._ended += builder.preempted  # told with the next step that is run
        return self.commit(builder, ())

    def plan_ahead(self, now: float) -> StepPlan | None:
        """The step after the planned one, whose ``apply`` comes before this one's.

        None unless all it needs is known: one more token for each request of a step of newest
        tokens. Whoever ends with it unforeseen is in the plan for nothing; a place that falls free
        is given away a step later.
        """
        if (
            self._in_flight.newest != len(self._running)
            or (self._waiting and not self._still_stuck)
            or now >= self._deadlines.earliest
            or (self._drafter is not None and self._drafter.awake(len(self._running)))
        ):
            return None
        self._ahead = self._in_flight.following(self.pool, self.config.max_num_batched_tokens)
        return None if self._ahead is None else self._ahead.plan(self.take_ended(), ahead=True)

    def begin(self, now: float) -> StepBuilder:
        """What running requests need of the next step."""
        builder = self._begin_newest(now)
        all_generate = len(builder.chunks) == len(self._running)
        self._begin_prompts(builder, () if all_generate else self._running.values())
        return builder

    def _begin_newest(self, now: float, *, alone: bool = False) -> StepBuilder:
        """A step of the newest tokens, and of drafts behind them. ``alone``: no prompts follow."""
        most = self.config.max_num_batched_tokens
        builder = StepBuilder(most, self.rank, self._expire(now), now, self._layered)
        generating = self._preemption.grow_generating(builder.preempted)
        builder.swapped_out = sum(bool(self._waiting[name].swapped) for name in builder.preempted)
        beside = generating if alone else self._running.values()
        drafts = propose_for(self._drafter, generating, beside, self.config)
        builder.draft_next = 0 if self._drafter is None else self._drafter.to_make
        if drafts:
            add_with_drafts(builder, generating, drafts, self.pool, self.config)
        else:
            leaving = self._running.leaving.values()
            builder.add_newest(generating, sum(seq.generating for seq in leaving))
        return builder

    def _begin_prompts(self, builder: StepBuilder, running: Iterable[SequenceState]) -> None:
        """Add chunks of those of ``running`` whose prompts are not computed yet."""
        builder.prompts = [seq for seq in running if not seq.generating]
        self._admission.begin(builder, self._running.values(), self._waiting, self.pool)
        builder.add_all(builder.prompts)

    def _admit_waiting(self, builder: StepBuilder, now: float) -> None:
        """Start those that wait, as long as there is room for the next one."""
        while (seq := self._admission.pick(self._waiting, now)) and (
            self.has_room(builder, seq)
            or self._preemption.make_room(builder, seq, partial(self.has_room, builder, seq))
        ):
            self.admit(builder, seq)
        self._stuck = self._still_stuck = seq is not None
        builder.add_all(builder.later)
        if seq is None:
            builder.refused = why_none(builder, len(self._waiting))

    def has_room(self, builder: StepBuilder, seq: SequenceState) -> bool:
        """Whether a request can start: its tokens fit and all running ones can still grow, as the
        admission wants it (``spare``). Not in a step that had to preempt."""
        builder.refused = what_lacks(
            builder, seq, self.kv, len(self._running), self._admission.spare, self.config
        )
        return builder.refused is Refusal.NONE

    def cached_tokens(self, seq: SequenceState) -> int:
        """Of a request's beginning, those whose KV is here."""
        return len(self.kv.cached_prefix(seq)) * self.pool.block_size

    def admit(self, builder: StepBuilder, seq: SequenceState) -> None:
        """Start a request for which there is room."""
        new = not (seq.admissions or seq.blocks)
        self.kv.start(seq)
        seq.admissions += 1
        if new:
            self.counters.prefix_queried_tokens += len(seq)
            self.counters.prefix_hit_tokens += seq.computed
        builder.swapped_in += bool(seq.swapped)
        self._preemption.resume(seq)
        seq.reached = max(seq.reached, seq.computed)
        seq.set_bounds(self.config.eos_ids, self.config.max_model_len)
        self._waiting.take(seq.request.id)
        self._running.start(seq)
        self._deadlines.note(seq)
        builder.admitted += 1
        builder.add(seq)

    def commit(self, builder: StepBuilder, ended: tuple[RequestId, ...]) -> StepPlan:
        """The step as it will run."""
        self._in_flight = builder
        return builder.plan(ended)

    def take_ended(self) -> tuple[RequestId, ...]:
        """Those that ended since the last call."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def withdraw(self, count: int | None = None) -> list[SequenceState]:
        """Let go of so many that wait (``WaitingQueue.withdraw``); None is all."""
        return self._waiting.withdraw(count)

    def detach(self, request_id: RequestId) -> SequenceState | None:
        """Let go of any request, whose blocks are the caller's; None if there is no such one.
        What a planned step makes for it is lost."""
        seq = self.sequence(request_id)
        if seq is not None:
            self._remove(seq, FinishReason.ABORT)
        return seq

    def apply(self, result: StepResult) -> list[TokenOut]:
        """Take note of what the planned step computed and sampled."""
        self.counters.steps += 1
        if self._drafter is not None:
            self._drafter.take(result.drafted, result.draft_s)
            self.counters.draft_read_tokens += sum(one.read for one in result.drafted)
        return self.settle({s.request_id: s for s in result.sampled})

    def settle(self, sampled: Mapping[RequestId, Sampled]) -> list[TokenOut]:
        """``apply`` of a step that is counted elsewhere."""
        outs = self._acceptance.settle(*self.drop(), sampled)
        self._running.num_tokens += len(outs)
        self.counters.generated_tokens += len(outs)
        return outs

    def drop(self) -> tuple[list[SequenceState], list[Chunk], int]:
        """The planned step is over (see ``StepBuilder.take``): one made ahead takes its place."""
        taken = self._in_flight.take()
        if self._ahead is not None:
            self._in_flight, self._ahead = self._ahead, None
        return taken

    def _expire(self, now: float) -> list[RequestId]:
        """End those whose deadline has come."""
        if now < self._deadlines.earliest:
            return []
        late = self._deadlines.take_late(tuple(self.sequences), now)
        for seq in late:
            self._finish(seq, FinishReason.DEADLINE)
        return [seq.request.id for seq in late]

    def _finish(self, seq: SequenceState, reason: FinishReason) -> None:
        self._remove(seq, reason)
        self.kv.end(seq, reason)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _remove(self, seq: SequenceState, reason: FinishReason) -> None:
        seq.finish = reason
        self._preemption.forget(seq)
        self._ended.append(seq.request.id)
        if self._waiting.take(seq.request.id) is None:
            self._running.stop(seq)
            self._still_stuck = False
