"""Which tokens run in the next step.

Continuous batching (Orca) with chunked prefill (Sarathi-Serve): every running request that is
generating gets its one token first, and draft tokens behind it where a ``Drafter`` proposes some;
then prompts fill what is left of the step's token budget, in chunks, in order of admission.
Requests are admitted first come first served (another ``Admission`` may choose otherwise) with
blocks for everything they know so far. When a generating request needs a block and none is free,
the request admitted last gives up its blocks, returns to the head of the queue and is computed anew
later. The request admitted first is never the victim of another and fits alone (``check``), so
some request always advances.

Pure: time is an argument, tokens are numbers. Knows nothing of text, tensors or threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    Request,
    RequestId,
    Sampled,
    StepPlan,
    StepResult,
    TokenOut,
)
from moeserve.engine.blocks import BlockCounts, BlockPool
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.errors import ConfigError, ExhaustedError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds. ``max_model_len`` counts prompt and generated tokens of one request."""

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queue: int = 1024
    eos_ids: frozenset[int] = frozenset()
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len={self.max_model_len}: must be at least 2")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least "
                f"max_num_seqs={self.max_num_seqs}, one token for each running request"
            )


def refuse_duplicate(request: Request, in_use: bool) -> None:
    """An id names one request at a time."""
    if in_use:
        raise InvalidRequestError(
            f"request id {request.id!r} is in use: choose another", param="request_id"
        )


def refuse_when_full(waiting: int, config: SchedulerConfig) -> None:
    """``max_queue`` bounds the requests that wait."""
    if waiting >= config.max_queue:
        raise ExhaustedError(f"{waiting} requests are waiting, as many as may: try again later")


class Admission(Protocol):
    """Chooses who is admitted next; None admits nobody in this step."""

    def pick(
        self, waiting: Mapping[RequestId, SequenceState], now: float
    ) -> SequenceState | None: ...


class FirstComeFirstServed:
    """In order of arrival; preempted requests stand before those that never ran."""

    def pick(self, waiting: Mapping[RequestId, SequenceState], now: float) -> SequenceState | None:
        return next(iter(waiting.values()), None)


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def propose(self, request: Request, output_ids: Sequence[int]) -> Sequence[int]:
        """Tokens that may follow the newest one, in order; any number of them, none is fine."""
        ...


class Scheduler:
    """Owns requests from ``add`` until they finish. Call ``plan`` and ``apply`` in turn.

    ``plan`` is ``begin``, ``admit`` as often as there is room, and ``commit``; where several ranks
    share a queue (``fleet``) its owner calls these, and ``settle`` instead of ``apply``. ``rank``
    is the home of whatever runs here. Without a ``drafter`` every chunk samples one token at most.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        counters: Counters,
        admission: Admission | None = None,
        drafter: Drafter | None = None,
        rank: int = 0,
    ) -> None:
        self.rank = rank
        self.config = config
        self.pool = pool
        self.counters = counters
        self._admission = admission or FirstComeFirstServed()
        self._drafter = drafter
        self._waiting: OrderedDict[RequestId, SequenceState] = OrderedDict()
        # In order of admission.
        self._running: OrderedDict[RequestId, SequenceState] = OrderedDict()
        self._in_flight: list[tuple[SequenceState, Chunk]] = []
        self._ended: list[RequestId] = []

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
    def num_tokens(self) -> int:
        """Of the running requests, whether or not their KV is there yet."""
        return sum(map(len, self._running.values()))

    def owns(self, request_id: RequestId) -> bool:
        return request_id in self._running or request_id in self._waiting

    def check(self, request: Request) -> None:
        """Refuse what can never run, whoever asks for it. Doors refuse the same earlier, with the
        client's words, for they need the bounds to choose a default (``gateway.limits``)."""
        prompt, limit = len(request.prompt_ids), self.config.max_model_len
        if prompt == 0:
            raise InvalidRequestError("the prompt has no tokens: give one or more", param="prompt")
        if prompt >= limit:
            raise InvalidRequestError(
                f"the prompt has {prompt} tokens, and the model serves {limit} with the answer: "
                f"shorten it to at most {limit - 1}",
                param="prompt",
            )
        if request.params.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens={request.params.max_tokens}: must be at least 1", param="max_tokens"
            )
        longest = min(prompt + request.params.max_tokens, limit) - 1  # the last token has no KV
        needed = self.pool.blocks_for(longest)
        if needed > self.pool.num_blocks:
            raise ExhaustedError(
                f"{prompt} prompt tokens and max_tokens={request.params.max_tokens} need {needed} "
                f"KV blocks, and there are {self.pool.num_blocks}: ask for fewer tokens, or serve "
                "with more KV memory",
                param="max_tokens",
            )

    def add(self, request: Request) -> None:
        """Queue a request, or refuse it."""
        self.check(request)
        refuse_duplicate(request, self.owns(request.id))
        refuse_when_full(self.num_waiting, self.config)
        self._waiting[request.id] = SequenceState(request)
        self.counters.prompt_tokens += len(request.prompt_ids)

    def abort(self, request_id: RequestId, reason: FinishReason) -> bool:
        """End a request and free its blocks; False if there is no such request."""
        seq = self._running.get(request_id) or self._waiting.get(request_id)
        if seq is None:
            return False
        self._finish(seq, reason)
        return True

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's chunks. Its result goes to ``apply``, or its requests abort."""
        builder = self.begin(now)
        while (seq := self._admission.pick(self._waiting, now)) and self.has_room(builder, seq):
            self.admit(builder, seq)
        return self.commit(builder, self.take_ended() if builder.chunks else ())

    def begin(self, now: float) -> StepBuilder:
        """What running requests need of the next step."""
        builder = StepBuilder(self.config.max_num_batched_tokens, self.rank, self._expire(now))
        self._add_generating(builder)
        for seq in self._running.values():
            if builder.budget and not seq.generating:
                builder.add(seq)
        return builder

    def has_room(self, builder: StepBuilder, seq: SequenceState) -> bool:
        """Whether a request can start: its tokens fit and all running ones can still grow a block.

        Not in a step that had to preempt.
        """
        if (
            not builder.budget
            or builder.preempted
            or len(self._running) >= self.config.max_num_seqs
        ):
            return False
        shared = self._cached_prefix(seq)
        fresh = self.pool.blocks_for(len(seq)) - len(shared)
        revived = sum(self.pool.is_free(b) for b in shared)
        return fresh + revived + len(self._running) <= self.pool.num_free

    def cached_tokens(self, seq: SequenceState) -> int:
        """Of a request's beginning, those whose KV is here."""
        return len(self._cached_prefix(seq)) * self.pool.block_size

    def admit(self, builder: StepBuilder, seq: SequenceState) -> None:
        """Start a request for which there is room."""
        shared = self._cached_prefix(seq)
        self.pool.share(shared)
        seq.blocks = shared + self.pool.allocate(self.pool.blocks_for(len(seq)) - len(shared))
        seq.computed = len(shared) * self.pool.block_size
        seq.admissions += 1
        if seq.admissions == 1:
            self.counters.prefix_queried_tokens += len(seq)
            self.counters.prefix_hit_tokens += seq.computed
        seq.reached = max(seq.reached, seq.computed)
        self._waiting.pop(seq.request.id, None)
        self._running[seq.request.id] = seq
        builder.add(seq)

    def commit(self, builder: StepBuilder, ended: tuple[RequestId, ...]) -> StepPlan:
        """The step as it will run."""
        self._in_flight = builder.chunks
        return builder.plan(ended)

    def take_ended(self) -> tuple[RequestId, ...]:
        """Those that ended since the last call."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended

    def withdraw(self) -> list[SequenceState]:
        """Let go of everything that waits."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        return waiting

    def apply(self, result: StepResult) -> list[TokenOut]:
        """Take note of what the planned step computed and sampled."""
        self.counters.steps += 1
        return self.settle({s.request_id: s for s in result.sampled})

    def settle(self, sampled: Mapping[RequestId, Sampled]) -> list[TokenOut]:
        """``apply`` of a step that is counted elsewhere."""
        outs: list[TokenOut] = []
        for seq, chunk in self._in_flight:
            if seq.finish is not None:
                continue  # ended while the step ran
            if chunk.samples:
                outs += self._accept(seq, chunk, sampled[seq.request.id])
            else:
                self._advance(seq, len(chunk.token_ids))
        self._in_flight = []
        return outs

    def _add_generating(self, builder: StepBuilder) -> None:
        """One token each, and drafts as far as the others' one token leaves room."""
        generating = [seq for seq in self._running.values() if seq.generating]
        for seq in generating:
            if seq.request.id in self._running:
                self._grow(seq, builder.preempted)
        if builder.preempted:
            generating = [seq for seq in generating if seq.request.id in self._running]
        others = len(generating)
        for seq in generating:
            others -= 1
            drafts = self._drafts(seq, builder.budget - 1 - others) if self._drafter else ()
            builder.add(seq, drafts)

    def _drafts(self, seq: SequenceState, most: int) -> tuple[int, ...]:
        """Guesses that fit: into the step, the answer, and blocks that nobody else needs now."""
        assert self._drafter is not None
        size, params = self.pool.block_size, seq.request.params
        room = (len(seq.blocks) + self.pool.num_free) * size - len(seq)
        answer = min(params.max_tokens - len(seq.output_ids), self.config.max_model_len - len(seq))
        most = max(0, min(most, room, answer - 1))  # the last token of an answer is not computed
        draft_ids = tuple(self._drafter.propose(seq.request, seq.output_ids)[:most])
        more = self.pool.blocks_for(len(seq) + len(draft_ids)) - len(seq.blocks)
        seq.blocks += self.pool.allocate(max(0, more))
        return draft_ids

    def _accept(self, seq: SequenceState, chunk: Chunk, sampled: Sampled) -> list[TokenOut]:
        """Take the tokens that followed a chunk, in order, up to the first that ends the request.

        Only drafts that were right stay computed.
        """
        assert 1 <= len(sampled.token_ids) <= chunk.samples, (sampled, chunk.samples)
        outs: list[TokenOut] = []
        finish: FinishReason | None = None
        for i, token_id in enumerate(sampled.token_ids):
            seq.output_ids.append(token_id)
            finish = self._reason_to_end(seq)
            logprobs = sampled.logprobs[i] if sampled.logprobs else None
            outs.append(TokenOut(seq.request.id, token_id, logprobs, finish))
            if finish is not None:
                break
        counters, made = self.counters, len(outs)
        counters.generated_tokens += made
        counters.drafted_tokens += chunk.samples - 1
        counters.accepted_tokens += made - 1
        self._advance(seq, chunk.kept(made))
        if finish is not None:
            self._finish(seq, finish)
        return outs

    def _expire(self, now: float) -> list[RequestId]:
        late = [
            seq
            for queue in (self._running, self._waiting)
            for seq in queue.values()
            if seq.late(now)
        ]
        for seq in late:
            self._finish(seq, FinishReason.DEADLINE)
        return [seq.request.id for seq in late]

    def _grow(self, seq: SequenceState, preempted: list[RequestId]) -> None:
        """Give a generating sequence room for its newest token, or preempt it if it is last."""
        while len(seq.blocks) * self.pool.block_size < len(seq):
            if self.pool.num_free:
                seq.blocks += self.pool.allocate(1)
                continue
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            preempted.append(victim.request.id)
            if victim is seq:
                return

    def _preempt(self, seq: SequenceState) -> None:
        del self._running[seq.request.id]
        self._free_blocks(seq)
        self._waiting[seq.request.id] = seq
        self._waiting.move_to_end(seq.request.id, last=False)
        self.counters.preemptions += 1

    def _cached_prefix(self, seq: SequenceState) -> list[BlockId]:
        if not self.config.prefix_cache:
            return []
        usable = (len(seq) - 1) // self.pool.block_size  # one token must be left to compute
        return self.pool.find(seq.full_keys(self.pool.block_size)[:usable])

    def _advance(self, seq: SequenceState, count: int) -> None:
        """So many more tokens are computed; blocks that this fills can be shared."""
        self.counters.computed_tokens += count
        self.counters.recomputed_tokens += min(seq.reached - seq.computed, count)
        first, seq.computed = seq.computed // self.pool.block_size, seq.computed + count
        seq.reached = max(seq.reached, seq.computed)
        if not self.config.prefix_cache:
            return
        last = seq.computed // self.pool.block_size
        keys = seq.full_keys(self.pool.block_size)
        for block, key in zip(seq.blocks[first:last], keys[first:last], strict=True):
            self.pool.publish(block, key)

    def _reason_to_end(self, seq: SequenceState) -> FinishReason | None:
        params, token, made = seq.request.params, seq.output_ids[-1], len(seq.output_ids)
        ends = token in params.stop_token_ids or (
            token in self.config.eos_ids and not params.ignore_eos
        )
        if ends and made > params.min_tokens:
            return FinishReason.STOP
        if made >= params.max_tokens or len(seq) >= self.config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, seq: SequenceState, reason: FinishReason) -> None:
        seq.finish = reason
        self._ended.append(seq.request.id)
        queue = self._running if seq.request.id in self._running else self._waiting
        del queue[seq.request.id]
        self._free_blocks(seq, forget=reason is FinishReason.ERROR)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _free_blocks(self, seq: SequenceState, *, forget: bool = False) -> None:
        self.pool.release(seq.blocks, forget=forget)
        seq.blocks = []
        seq.computed = 0
