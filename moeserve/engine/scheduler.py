"""Which tokens run in the next step.

Continuous batching: every running request that is generating gets its one token first, then
prompts fill what is left of the step's token budget, in chunks, in order of admission. Requests
are admitted first come first served (another ``Admission`` may choose otherwise) with blocks
for everything they know so far. When a generating request needs a block and none is free, the
request admitted last gives up its blocks, returns to the head of the queue and is computed anew
later. The request admitted first is never the victim of another and fits alone (``check``), so
some request always advances.

Pure: time is an argument, tokens are numbers. Knows nothing of text, tensors or threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    Request,
    RequestId,
    StepPlan,
    StepResult,
    TokenOut,
)
from moeserve.engine.blocks import BlockKey, BlockPool, child_key, root_key
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


@dataclass(slots=True)
class Sequence:
    """A request under way. The KV of its first ``computed`` tokens lies in ``blocks``.

    ``reached`` is the most it ever had computed: below it, work is done again.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    blocks: list[BlockId] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    computed: int = 0
    reached: int = 0
    admissions: int = 0
    finish: FinishReason | None = None

    def __len__(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def generating(self) -> bool:
        """Only its newest token is still to be computed."""
        return bool(self.output_ids) and self.computed == len(self) - 1

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        prompt = self.request.prompt_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        outputs = self.output_ids[max(0, start - len(prompt)) : stop - len(prompt)]
        return prompt[start:] + tuple(outputs)

    def full_keys(self, block_size: int) -> list[BlockKey]:
        """The keys of all full blocks, each computed once."""
        for b in range(len(self.keys), len(self) // block_size):
            parent = self.keys[-1] if b else root_key(self.request.salt)
            self.keys.append(child_key(parent, self.tokens(b * block_size, (b + 1) * block_size)))
        return self.keys


class Admission(Protocol):
    """Chooses who is admitted next; None admits nobody in this step."""

    def pick(self, waiting: Mapping[RequestId, Sequence], now: float) -> Sequence | None: ...


class FirstComeFirstServed:
    """In order of arrival; preempted requests stand before those that never ran."""

    def pick(self, waiting: Mapping[RequestId, Sequence], now: float) -> Sequence | None:
        return next(iter(waiting.values()), None)


class Scheduler:
    """Owns requests from ``add`` until they finish. Call ``plan`` and ``apply`` in turn."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        counters: Counters,
        admission: Admission | None = None,
    ) -> None:
        self.config = config
        self.pool = pool
        self.counters = counters
        self._admission = admission or FirstComeFirstServed()
        self._waiting: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._running: OrderedDict[RequestId, Sequence] = OrderedDict()  # oldest admission first
        self._in_flight: list[tuple[Sequence, Chunk]] = []
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

    def check(self, request: Request) -> None:
        """Refuse what can never run."""
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
        if request.id in self._waiting or request.id in self._running:
            raise InvalidRequestError(
                f"request id {request.id!r} is in use: choose another", param="request_id"
            )
        if len(self._waiting) >= self.config.max_queue:
            raise ExhaustedError(
                f"{len(self._waiting)} requests are waiting, as many as may: try again later"
            )
        self._waiting[request.id] = Sequence(request)
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
        expired = self._expire(now)
        chunks: list[tuple[Sequence, Chunk]] = []
        preempted: list[RequestId] = []
        budget = self.config.max_num_batched_tokens
        for seq in [s for s in self._running.values() if s.generating]:
            if seq.request.id in self._running and self._grow(seq, preempted):
                chunks.append((seq, self._chunk(seq, 1)))
                budget -= 1
        for seq in self._running.values():
            if budget and not seq.generating:
                chunks.append((seq, self._chunk(seq, budget)))
                budget -= len(chunks[-1][1].token_ids)
        while budget and not preempted and (admitted := self._admit(now)):
            chunks.append((admitted, self._chunk(admitted, budget)))
            budget -= len(chunks[-1][1].token_ids)
        self._in_flight = chunks
        ended = tuple(self._ended) if chunks else ()
        del self._ended[: len(ended)]
        return StepPlan(tuple(c for _, c in chunks), tuple(expired), tuple(preempted), ended)

    def apply(self, result: StepResult) -> list[TokenOut]:
        """Take note of what the planned step computed and sampled."""
        self.counters.steps += 1
        sampled = {s.request_id: s for s in result.sampled}
        outs = []
        for seq, chunk in self._in_flight:
            if seq.finish is not None:
                continue  # ended while the step ran
            self._advance(seq, len(chunk.token_ids))
            if chunk.sample:
                sample = sampled[seq.request.id]
                seq.output_ids.append(sample.token_id)
                self.counters.generated_tokens += 1
                finish = self._reason_to_end(seq)
                if finish is not None:
                    self._finish(seq, finish)
                outs.append(TokenOut(seq.request.id, sample.token_id, sample.logprobs, finish))
        self._in_flight = []
        return outs

    def _expire(self, now: float) -> list[RequestId]:
        late = [
            seq
            for queue in (self._running, self._waiting)
            for seq in queue.values()
            if seq.request.deadline is not None and seq.request.deadline <= now
        ]
        for seq in late:
            self._finish(seq, FinishReason.DEADLINE)
        return [seq.request.id for seq in late]

    def _grow(self, seq: Sequence, preempted: list[RequestId]) -> bool:
        """Give a generating sequence room for its newest token; False if it had to yield."""
        while len(seq.blocks) * self.pool.block_size < len(seq):
            if self.pool.num_free:
                seq.blocks += self.pool.allocate(1)
                continue
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            preempted.append(victim.request.id)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        del self._running[seq.request.id]
        self._free_blocks(seq)
        self._waiting[seq.request.id] = seq
        self._waiting.move_to_end(seq.request.id, last=False)
        self.counters.preemptions += 1

    def _admit(self, now: float) -> Sequence | None:
        """Start the next request if its tokens fit and all running ones can still grow a block."""
        seq = self._admission.pick(self._waiting, now)
        if seq is None or len(self._running) >= self.config.max_num_seqs:
            return None
        shared = self._cached_prefix(seq)
        fresh = self.pool.blocks_for(len(seq)) - len(shared)
        revived = sum(self.pool.is_free(b) for b in shared)
        if fresh + revived + len(self._running) > self.pool.num_free:
            return None
        self.pool.share(shared)
        seq.blocks = shared + self.pool.allocate(fresh)
        seq.computed = len(shared) * self.pool.block_size
        seq.admissions += 1
        if seq.admissions == 1:
            self.counters.prefix_queried_tokens += len(seq)
            self.counters.prefix_hit_tokens += seq.computed
        seq.reached = max(seq.reached, seq.computed)
        del self._waiting[seq.request.id]
        self._running[seq.request.id] = seq
        return seq

    def _cached_prefix(self, seq: Sequence) -> list[BlockId]:
        if not self.config.prefix_cache:
            return []
        usable = (len(seq) - 1) // self.pool.block_size  # one token must be left to compute
        return self.pool.find(seq.full_keys(self.pool.block_size)[:usable])

    def _chunk(self, seq: Sequence, budget: int) -> Chunk:
        stop = min(len(seq), seq.computed + budget)
        return Chunk(
            request=seq.request,
            token_ids=seq.tokens(seq.computed, stop),
            start=seq.computed,
            blocks=tuple(seq.blocks),
            sample=stop == len(seq),
            output_ids=seq.output_ids,
        )

    def _advance(self, seq: Sequence, count: int) -> None:
        self.counters.computed_tokens += count
        self.counters.recomputed_tokens += max(0, min(seq.reached - seq.computed, count))
        first, seq.computed = seq.computed // self.pool.block_size, seq.computed + count
        seq.reached = max(seq.reached, seq.computed)
        if not self.config.prefix_cache:
            return
        last = seq.computed // self.pool.block_size
        keys = seq.full_keys(self.pool.block_size)
        for block, key in zip(seq.blocks[first:last], keys[first:last], strict=True):
            self.pool.publish(block, key)

    def _reason_to_end(self, seq: Sequence) -> FinishReason | None:
        params, token, made = seq.request.params, seq.output_ids[-1], len(seq.output_ids)
        ends = token in params.stop_token_ids or (
            token in self.config.eos_ids and not params.ignore_eos
        )
        if ends and made > params.min_tokens:
            return FinishReason.STOP
        if made >= params.max_tokens or len(seq) >= self.config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish = reason
        self._ended.append(seq.request.id)
        queue = self._running if seq.request.id in self._running else self._waiting
        del queue[seq.request.id]
        self._free_blocks(seq, forget=reason is FinishReason.ERROR)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _free_blocks(self, seq: Sequence, *, forget: bool = False) -> None:
        self.pool.release(seq.blocks, forget=forget)
        seq.blocks = []
        seq.computed = 0
