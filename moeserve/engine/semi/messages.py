"""Steps and results between the process that decodes and the one that computes prompts.

A frame (``process.frames``) has a small head, and a payload of JSON; behind that of a step stand
the requests of its chunks, as ``rank.proto`` has them (``ranks.messages``). None has any KV.
A step stands for itself: whoever runs it needs to know of none before. A prompt travels as a whole
with its last chunk, whose sampling may ask for it, and with all where it is scored. Stop strings
and deadlines do not travel; they are matters of doors and of the scheduler. Floats keep every bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeserve.core import (
    BlockId,
    Chunk,
    Logprobs,
    RequestId,
    Sampled,
    Scored,
    StepPlan,
    StepResult,
)
from moeserve.engine.ranks.messages import parse, read_submission, write_submission
from moeserve.engine.sequence import History
from moeserve.pb import rank_pb2 as pb
from moeserve.process.frames import Head


def write_step(plan: StepPlan, threads: int) -> tuple[Head, bytes]:
    """A step, and how many threads compute it."""
    requests = [_request_of(chunk) for chunk in plan.chunks]
    chunks = [
        (c.token_ids, c.start, c.blocks, c.samples, c.rank, c.reached, len(request))
        for c, request in zip(plan.chunks, requests, strict=True)
    ]
    text = json.dumps(chunks).encode()
    head = {"do": "step", "threads": threads, "chunks": len(text)}
    return head, b"".join((text, *requests))


def read_step(head: Mapping[str, Any], payload: bytes, vocab: int) -> tuple[StepPlan, int]:
    """``write_step``. InvalidRequestError where a number means nothing to the model."""
    at = int(head["chunks"])
    chunks = []
    for token_ids, start, blocks, samples, rank, reached, size in json.loads(payload[:at]):
        submission = parse(pb.Submission, payload[at : at + size])
        at += size
        request, history = read_submission(submission, 0.0, vocab)
        chunks.append(
            Chunk(
                request,
                tuple(token_ids),
                start,
                tuple(map(BlockId, blocks)),
                samples,
                [*history.output_ids],
                rank,
                reached,
            )
        )
    return StepPlan(tuple(chunks)), int(head["threads"])


def write_result(result: StepResult) -> bytes:
    """What a step made; guesses are none of it."""
    return json.dumps(
        {
            "sampled": [(s.request_id, s.token_ids, _listed(s.logprobs)) for s in result.sampled],
            "failed": result.failed,
            "scored": [(s.request_id, _listed(s.logprobs)) for s in result.scored],
            "told": sorted(result.told),
        }
    ).encode()


def read_result(payload: bytes) -> StepResult:
    found = json.loads(payload)
    return StepResult(
        tuple(
            Sampled(RequestId(name), tuple(token_ids), _logprobs(scores))
            for name, token_ids, scores in found["sampled"]
        ),
        tuple((RequestId(name), problem) for name, problem in found["failed"]),
        tuple(Scored(RequestId(name), _logprobs(scores)) for name, scores in found["scored"]),
        frozenset(map(RequestId, found["told"])),
    )


def _request_of(chunk: Chunk) -> bytes:
    request, made = chunk.request, tuple(chunk.output_ids)
    if not chunk.samples and request.params.prompt_logprobs is None:
        request, made = replace(request, prompt_ids=()), ()
    out = pb.Submission()
    write_submission(out, request, History(made), 0.0)
    return out.SerializeToString()


def _listed(logprobs: Sequence[Logprobs]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    return [(scores.chosen, scores.top) for scores in logprobs]


def _logprobs(listed: Sequence[Any]) -> tuple[Logprobs, ...]:
    return tuple(
        Logprobs(chosen, tuple((token, value) for token, value in top)) for chosen, top in listed
    )
