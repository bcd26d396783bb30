"""The messages of a step between rank 0 and another rank: orders down, reports up.

A rank keeps, of every request it runs, prompt, parameters, block table and the tokens it sampled.
So a request travels whole once, and after that a chunk of it is a few small numbers.
``StepEncoder`` keeps, on rank 0, what one rank has; ``StepDecoder`` is what that rank has. Both
change with every order and report, in the same way. Requests have numbers on the wire, which are
used again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import (
    BlockId,
    CacheScope,
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
from moeserve.engine.sequence import tokens_between
from moeserve.errors import InternalError
from moeserve.pb import step_pb2 as pb


@dataclass(slots=True)
class _SentRequest:
    """What the rank has of a request: how many sampled tokens, and which blocks."""

    number: int
    outputs: int
    blocks: tuple[BlockId, ...] = ()


class StepEncoder:
    """Orders to one rank, and its reports. Every order made here must reach it, in their order."""

    def __init__(self) -> None:
        self._sent: dict[RequestId, _SentRequest] = {}
        self._free_numbers: list[int] = []

    def order(
        self,
        step: int,
        microbatches: int,
        chunks: Sequence[Chunk],
        ended: Iterable[RequestId] = (),
        preempted: Iterable[RequestId] = (),
    ) -> pb.StepOrder:
        """The rank's part of a step; before it the rank forgets those that ``ended`` there."""
        order = pb.StepOrder(step=step, microbatches=microbatches)
        order.forget.extend(self._forget(ended))
        for request_id in preempted:
            if request_id in self._sent:
                self._sent[request_id].blocks = ()
        requests = [self._send_request(order, chunk) for chunk in chunks]
        order.number.extend([r.number for r in requests])
        order.start.extend([c.start for c in chunks])
        order.count.extend([len(c.token_ids) for c in chunks])
        order.samples.extend([c.samples for c in chunks])
        for chunk in chunks:
            if chunk.samples > 1:
                order.drafts.extend(chunk.draft_ids)
        _write_blocks(order, chunks, requests)
        return order

    def result(self, chunks: Sequence[Chunk], report: pb.StepReport) -> StepResult:
        """What the rank made of an order's chunks."""
        failed = {f.chunk: f.reason for f in report.failed}
        tokens, scores, accepted = iter(report.tokens), iter(report.scores), iter(report.accepted)
        sampled = []
        for index, chunk in enumerate(chunks):
            if not chunk.samples or index in failed:
                continue
            count = 1 if chunk.samples == 1 else next(accepted, 0)
            token_ids = tuple(islice(tokens, count))
            if not 1 <= count <= chunk.samples or len(token_ids) < count:
                raise InternalError(
                    f"step {report.step}: a rank sampled {len(token_ids)} tokens of {count} where "
                    f"1 to {chunk.samples} were asked for"
                )
            logprobs: tuple[Logprobs, ...] = ()
            if chunk.request.params.logprobs is not None:
                logprobs = tuple(map(_logprobs, islice(scores, count)))
            sampled.append(Sampled(chunk.request.id, token_ids, logprobs))
            self._sent[chunk.request.id].outputs += count
        if next(tokens, None) is not None:
            raise InternalError(f"step {report.step}: a rank sampled more than it was asked to")
        problems = tuple((chunks[i].request.id, reason) for i, reason in failed.items())
        return StepResult(tuple(sampled), problems)

    def _send_request(self, order: pb.StepOrder, chunk: Chunk) -> _SentRequest:
        """What the rank has of the chunk's request: with the order, if it lacks it or has another
        version of it."""
        request = chunk.request
        old = self._sent.get(request.id)
        if old is not None and old.outputs == len(chunk.output_ids):
            return old
        number = self._new_number() if old is None else old.number
        new = self._sent[request.id] = _SentRequest(number, len(chunk.output_ids))
        order.new_requests.append(_write_request(number, chunk))
        return new

    def _new_number(self) -> int:
        return heapq.heappop(self._free_numbers) if self._free_numbers else len(self._sent)

    def _forget(self, ended: Iterable[RequestId]) -> list[int]:
        """The numbers of those that the rank has; they can be used again."""
        found = [self._sent.pop(request_id, None) for request_id in ended]
        numbers = [request.number for request in found if request is not None]
        for number in numbers:
            heapq.heappush(self._free_numbers, number)
        return numbers


def _write_blocks(
    order: pb.StepOrder, chunks: Sequence[Chunk], requests: Sequence[_SentRequest]
) -> None:
    """Of each chunk's block table what the rank lacks; if its beginning differs, all of it."""
    kept, added = [], []
    blocks: list[BlockId] = []
    for chunk, request in zip(chunks, requests, strict=True):
        same = len(request.blocks)
        if request.blocks != chunk.blocks[:same]:
            same = 0
        kept.append(same)
        added.append(len(chunk.blocks) - same)
        blocks += chunk.blocks[same:]
        request.blocks = chunk.blocks
    order.kept.extend(kept)
    order.added.extend(added)
    order.blocks.extend(blocks)


@dataclass(slots=True)
class _HeldRequest:
    """A request on the rank that runs it; ``reached`` as in ``Chunk``."""

    request: Request
    outputs: list[int]
    reached: int
    blocks: tuple[BlockId, ...] = ()


@dataclass(slots=True)
class StepDecoder:
    """Orders to rank ``rank``, where it stands, and its reports."""

    rank: int
    _held: dict[int, _HeldRequest] = field(default_factory=dict)

    def plan(self, order: pb.StepOrder) -> StepPlan:
        """The rank's part of the step. Preempted is what comes with all its blocks anew."""
        ended = [self._held.pop(number).request.id for number in order.forget]
        for new in order.new_requests:
            request, outputs = _read_request(new), list(new.outputs)
            self._held[new.number] = _HeldRequest(request, outputs, new.reached)
        preempted: list[RequestId] = []
        for number, kept in zip(order.number, order.kept, strict=True):
            held = self._held.get(number)
            if held is None:
                raise InternalError(f"step {order.step}: request number {number} is not known")
            if held.blocks and not kept:
                preempted.append(held.request.id)
        self._read_blocks(order)
        return StepPlan(
            tuple(self._read_chunks(order)), preempted=tuple(preempted), ended=tuple(ended)
        )

    def report(self, order: pb.StepOrder, plan: StepPlan, result: StepResult) -> pb.StepReport:
        """What goes back to rank 0; the sampled tokens are remembered."""
        report = pb.StepReport(step=order.step)
        sampled = {s.request_id: s for s in result.sampled}
        failed = dict(result.failed)
        tokens: list[int] = []
        for index, (number, chunk) in enumerate(zip(order.number, plan.chunks, strict=True)):
            if chunk.request.id in failed:
                report.failed.add(chunk=index, reason=failed[chunk.request.id])
                continue
            held, count = self._held[number], 0
            if chunk.samples:
                made = sampled[chunk.request.id]
                count = len(made.token_ids)
                held.outputs += made.token_ids
                tokens += made.token_ids
                if chunk.samples > 1:
                    report.accepted.append(count)
                for logprobs in made.logprobs:
                    _write_logprobs(report.scores.add(), logprobs)
            held.reached = max(held.reached, chunk.start + chunk.kept(count))
        report.tokens.extend(tokens)
        return report

    def _read_blocks(self, order: pb.StepOrder) -> None:
        """Bring the block tables of the order's requests up to date."""
        blocks, at = [BlockId(b) for b in order.blocks], 0
        for number, kept, added in zip(order.number, order.kept, order.added, strict=True):
            held = self._held[number]
            if added or kept != len(held.blocks):
                held.blocks = held.blocks[:kept] + tuple(blocks[at : at + added])
            at += added

    def _read_chunks(self, order: pb.StepOrder) -> Iterator[Chunk]:
        drafts = iter(order.drafts)
        for number, start, count, samples in zip(
            order.number, order.start, order.count, order.samples, strict=True
        ):
            held, num_drafts = self._held[number], max(0, samples - 1)
            stop = start + count - num_drafts
            token_ids = tokens_between(held.request.prompt_ids, held.outputs, start, stop)
            if num_drafts:
                token_ids += tuple(islice(drafts, num_drafts))
            yield Chunk(
                held.request, token_ids, start, held.blocks, samples, held.outputs, self.rank,
                held.reached,
            )  # fmt: skip


def _write_request(number: int, chunk: Chunk) -> pb.NewRequest:
    request = chunk.request
    new = pb.NewRequest(
        number=number,
        id=request.id,
        prompt=request.prompt_ids,
        outputs=chunk.output_ids,
        salt=request.scope.salt,
        adapter=request.scope.adapter,
        domain=request.domain,
        reached=chunk.reached,
    )
    _write_sampling(new.sampling, request.params)
    return new


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


def _read_request(new: pb.NewRequest) -> Request:
    s = new.sampling
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
    scope = CacheScope(new.salt, new.adapter)
    return Request(RequestId(new.id), tuple(new.prompt), params, scope=scope, domain=new.domain)


def _write_logprobs(scores: pb.Scores, logprobs: Logprobs) -> None:
    scores.chosen = logprobs.chosen
    scores.top_ids.extend([i for i, _ in logprobs.top])
    scores.top.extend([value for _, value in logprobs.top])


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
