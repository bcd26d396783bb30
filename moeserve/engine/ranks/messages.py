"""What rank 0 tells another rank about a step, and what comes back; only what the other lacks.

A rank keeps, of every request it runs, prompt, parameters, block table and the tokens it sampled.
So a request travels whole once, and then a chunk of it is a few small numbers. ``StepEncoder`` is
rank 0's memory of what a rank knows, ``StepDecoder`` is that rank's: they change in step. Requests
have numbers on the wire, which are used again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import (
    BlockId,
    Chunk,
    Logprobs,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.errors import InternalError
from moeserve.pb import step_pb2 as pb


@dataclass(slots=True)
class _Sent:
    number: int
    outputs: int
    blocks: tuple[BlockId, ...] = ()


class StepEncoder:
    """What one rank has been told. Every order made here must reach it, in this sequence."""

    def __init__(self) -> None:
        self._requests: dict[RequestId, _Sent] = {}
        self._free: list[int] = []

    def order(
        self,
        step: int,
        microbatches: int,
        chunks: Sequence[Chunk],
        gone: Iterable[RequestId] = (),
        preempted: Iterable[RequestId] = (),
    ) -> pb.StepOrder:
        """The rank's part of a step; those ``gone`` are forgotten before."""
        order = pb.StepOrder(step=step, microbatches=microbatches)
        order.forget.extend(self._forget(gone))
        for request_id in preempted:
            if request_id in self._requests:
                self._requests[request_id].blocks = ()
        numbers, kept, added = [], [], []
        blocks: list[BlockId] = []
        for chunk in chunks:
            told = self._requests.get(chunk.request.id)
            if told is None or told.outputs != len(chunk.output_ids):
                told = self._tell(order, chunk)
            stay = len(told.blocks)
            if told.blocks != chunk.blocks[:stay]:
                stay = 0
            numbers.append(told.number)
            kept.append(stay)
            added.append(len(chunk.blocks) - stay)
            blocks += chunk.blocks[stay:]
            told.blocks = chunk.blocks
        order.number.extend(numbers)
        order.start.extend([c.start for c in chunks])
        order.count.extend([len(c.token_ids) for c in chunks])
        order.sample.extend([c.sample for c in chunks])
        order.kept.extend(kept)
        order.added.extend(added)
        order.blocks.extend(blocks)
        return order

    def result(self, chunks: Sequence[Chunk], report: pb.StepReport) -> StepResult:
        """What the rank made of an order's chunks."""
        failed = {f.chunk: f.reason for f in report.failed}
        tokens, scores = iter(report.tokens), iter(report.scores)
        sampled = []
        for index, chunk in enumerate(chunks):
            if chunk.sample and index not in failed:
                wants = chunk.request.params.logprobs is not None
                logprobs = _logprobs(next(scores)) if wants else None
                sampled.append(Sampled(chunk.request.id, next(tokens), logprobs))
                self._requests[chunk.request.id].outputs += 1
        if next(tokens, None) is not None:
            raise InternalError(f"step {report.step}: a rank sampled more than it was asked to")
        problems = tuple((chunks[i].request.id, reason) for i, reason in failed.items())
        return StepResult(tuple(sampled), problems)

    def _tell(self, order: pb.StepOrder, chunk: Chunk) -> _Sent:
        """A request as a whole; if the rank has another version of it, it takes this one."""
        request = chunk.request
        old = self._requests.get(request.id)
        number = self._number() if old is None else old.number
        told = self._requests[request.id] = _Sent(number, len(chunk.output_ids))
        begun = order.begun.add(
            number=number, id=request.id, salt=request.salt, domain=request.domain
        )
        begun.prompt.extend(request.prompt_ids)
        begun.outputs.extend(chunk.output_ids)
        _write_sampling(begun.sampling, request.params)
        return told

    def _number(self) -> int:
        return heapq.heappop(self._free) if self._free else len(self._requests)

    def _forget(self, gone: Iterable[RequestId]) -> list[int]:
        told = [self._requests.pop(request_id, None) for request_id in gone]
        numbers = [t.number for t in told if t is not None]
        for number in numbers:
            heapq.heappush(self._free, number)
        return numbers


@dataclass(slots=True)
class _Held:
    request: Request
    outputs: list[int]
    blocks: tuple[BlockId, ...] = ()

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        prompt = self.request.prompt_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        first = max(0, start - len(prompt))
        return prompt[start:] + tuple(self.outputs[first : stop - len(prompt)])


@dataclass(slots=True)
class StepDecoder:
    """What rank ``rank`` knows of its requests."""

    rank: int
    _requests: dict[int, _Held] = field(default_factory=dict)

    def plan(self, order: pb.StepOrder) -> StepPlan:
        """The rank's part of the step. Preempted is what comes with all its blocks anew."""
        ended = [self._requests.pop(number).request.id for number in order.forget]
        for begun in order.begun:
            self._requests[begun.number] = _Held(_read_request(begun), list(begun.outputs))
        chunks, preempted = [], []
        blocks, at = [BlockId(b) for b in order.blocks], 0
        for number, start, count, sample, kept, added in zip(
            order.number, order.start, order.count, order.sample, order.kept, order.added,
            strict=True,
        ):  # fmt: skip
            known = self._requests.get(number)
            if known is None:
                raise InternalError(f"step {order.step}: request number {number} is not known")
            if known.blocks and not kept:
                preempted.append(known.request.id)
            if added or kept != len(known.blocks):
                known.blocks = known.blocks[:kept] + tuple(blocks[at : at + added])
            at += added
            tokens = known.tokens(start, start + count)
            chunks.append(
                Chunk(known.request, tokens, start, known.blocks, sample, known.outputs, self.rank)
            )
        return StepPlan(tuple(chunks), preempted=tuple(preempted), ended=tuple(ended))

    def report(self, order: pb.StepOrder, plan: StepPlan, result: StepResult) -> pb.StepReport:
        """What goes back; the sampled tokens are remembered."""
        report = pb.StepReport(step=order.step)
        sampled = {s.request_id: s for s in result.sampled}
        failed = dict(result.failed)
        tokens = []
        for index, (number, chunk) in enumerate(zip(order.number, plan.chunks, strict=True)):
            if chunk.request.id in failed:
                report.failed.add(chunk=index, reason=failed[chunk.request.id])
            elif chunk.sample:
                made = sampled[chunk.request.id]
                self._requests[number].outputs.append(made.token_id)
                tokens.append(made.token_id)
                if made.logprobs is not None:
                    scores = report.scores.add(chosen=made.logprobs.chosen)
                    scores.top_ids.extend([i for i, _ in made.logprobs.top])
                    scores.top.extend([value for _, value in made.logprobs.top])
        report.tokens.extend(tokens)
        return report


def _write_sampling(out: pb.Sampling, params: SamplingParams) -> None:
    out.min_tokens = params.min_tokens
    out.temperature = params.temperature
    out.top_k = params.top_k
    out.top_p = params.top_p
    out.min_p = params.min_p
    out.repetition_penalty = params.repetition_penalty
    out.presence_penalty = params.presence_penalty
    out.frequency_penalty = params.frequency_penalty
    out.bias_ids.extend([i for i, _ in params.logit_bias])
    out.biases.extend([bias for _, bias in params.logit_bias])
    out.seed = params.seed & (2**64 - 1)  # of which the sampler uses no more
    out.stop_token_ids.extend(params.stop_token_ids)
    out.ignore_eos = params.ignore_eos
    if params.logprobs is not None:
        out.logprobs = params.logprobs


def _read_request(begun: pb.Begun) -> Request:
    s = begun.sampling
    params = SamplingParams(
        min_tokens=s.min_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=tuple(zip(s.bias_ids, s.biases, strict=True)),
        seed=s.seed,
        stop_token_ids=tuple(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        logprobs=s.logprobs if s.HasField("logprobs") else None,
    )
    prompt = tuple(begun.prompt)
    return Request(RequestId(begun.id), prompt, params, salt=begun.salt, domain=begun.domain)


def _logprobs(scores: pb.Scores) -> Logprobs:
    return Logprobs(scores.chosen, tuple(zip(scores.top_ids, scores.top, strict=True)))


def write_work(out: pb.Work, stats: DispatchStats) -> None:
    """Into a report."""
    out.rounds, out.tokens, out.inter_node = stats.rounds, stats.tokens, stats.inter_node
    out.waited_s = stats.waited_s
    out.copies.extend(stats.copies_R)
    out.dispatch_bytes.extend(stats.dispatch_bytes_R)
    out.combine_bytes.extend(stats.combine_bytes_R)


def read_work(work: pb.Work, world: int) -> DispatchStats:
    """Out of a report."""
    stats = DispatchStats(
        world, work.rounds, work.tokens, inter_node=work.inter_node, waited_s=work.waited_s
    )
    stats.copies_R = list(work.copies)
    stats.dispatch_bytes_R = list(work.dispatch_bytes)
    stats.combine_bytes_R = list(work.combine_bytes)
    return stats


def write_uses(report: pb.StepReport, uses: Iterable[ExpertUse]) -> None:
    for use in uses:
        report.uses.add(kind=use.kind, tokens=use.tokens).ranks.extend(use.use_R)


def read_uses(report: pb.StepReport) -> list[ExpertUse]:
    return [ExpertUse(use.kind, use.tokens, tuple(use.ranks)) for use in report.uses]
