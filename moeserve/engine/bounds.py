"""What a scheduler takes: its bounds, and the requests that it refuses because of them.

Pure. InvalidRequestError where the request is at fault, ExhaustedError where there is too little
of something here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import Request
from moeserve.engine.blocks import BlockPool
from moeserve.engine.sequence import HeldKv, History
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


def refuse_complete(request: Request, output_ids: Sequence[int], max_model_len: int) -> None:
    """Who comes with outputs must have some to make."""
    made, length = len(output_ids), len(request.prompt_ids) + len(output_ids)
    if made >= request.params.max_tokens or length >= max_model_len:
        raise InvalidRequestError(
            f"request {request.id!r} comes with {made} tokens of an answer that may have "
            f"{min(request.params.max_tokens, max_model_len - len(request.prompt_ids))}: "
            "it is complete",
            param="max_tokens",
        )


def refuse_to_queue(
    request: Request,
    history: History,
    config: SchedulerConfig,
    pool: BlockPool,
    waiting: int,
    in_use: bool,
) -> None:
    """What cannot be queued now, for one of the reasons below."""
    refuse_complete(request, history.output_ids, config.max_model_len)
    refuse_duplicate(request, in_use)
    refuse_when_full(waiting, config)
    if history.kv is not None:
        refuse_misfit(history.kv, len(request.prompt_ids) + len(history.output_ids), pool)


def refuse_misfit(kv: HeldKv, length: int, pool: BlockPool) -> None:
    """KV that a request of ``length`` tokens comes with lies in its blocks, and leaves at least the
    newest token to be computed."""
    room = len(kv.blocks) * pool.block_size
    if not 0 <= kv.computed <= min(room, length - 1):
        raise InvalidRequestError(
            f"{kv.computed} tokens are said to be computed of a request of {length}, in "
            f"{len(kv.blocks)} blocks of {pool.block_size}: at most {min(room, length - 1)} can be"
        )


def refuse_unservable(request: Request, limit: int, pool: BlockPool) -> None:
    """What can never run: it must be shorter than ``limit`` tokens with one of its answer, and its
    KV must fit into ``pool`` when nobody else is there."""
    prompt = len(request.prompt_ids)
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
    needed = pool.blocks_for(longest)
    if needed > pool.num_blocks:
        raise ExhaustedError(
            f"{prompt} prompt tokens and max_tokens={request.params.max_tokens} need {needed} "
            f"KV blocks, and there are {pool.num_blocks}: ask for fewer tokens, or serve "
            "with more KV memory",
            param="max_tokens",
        )
