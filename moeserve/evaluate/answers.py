"""What a decoder generates for a list of requests: scheduler and executor, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeserve.core import Counters, Request
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.models.decoder import Decoder

BLOCK = 16
AT_ONCE = 32
KV_BYTES = 1 << 30
TOKENS_PER_STEP = 512


def answer(
    decoder: Decoder,
    requests: Sequence[Request],
    eos: frozenset[int],
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The tokens of each request; ``progress`` gets how many were made in each step."""
    if not requests:
        return []
    longest = max(len(r.prompt_ids) + r.params.max_tokens for r in requests) + 1
    each = -(-longest // BLOCK)
    fit = KV_BYTES // (each * BLOCK * decoder.kv_bytes_per_token)
    at_once = max(1, min(AT_ONCE, len(requests), fit))
    blocks = at_once * each
    counters = Counters()
    config = SchedulerConfig(longest, at_once, TOKENS_PER_STEP, len(requests), eos)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    executor = ModelRunner(decoder, blocks, BLOCK, eos)
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    for request in requests:
        scheduler.add(request)
    for step in drive(scheduler, executor):
        step.raise_failure()
        for out in step.outs:
            answers[out.request_id].append(out.token_id)
        if progress is not None:
            progress(len(step.outs))
    return list(answers.values())
