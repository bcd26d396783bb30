"""A request under way: its tokens, the KV blocks it holds, and how far it is computed.

Pure, like ``scheduler``, which owns these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moeserve.core import BlockId, FinishReason, Request
from moeserve.engine.blocks import BlockKey, child_key, root_key


@dataclass(frozen=True, slots=True)
class KvSource:
    """A rank of another instance from which the KV of a request's tokens can be had.

    ``running`` names the request there that has it; empty: the rank is to prefill the tokens.
    ``server_name`` is one that the certificate of ``address`` is for, if it has one.
    """

    address: str
    server_name: str = ""
    running: str = ""


@dataclass(frozen=True, slots=True)
class HeldKv:
    """Blocks of a sequence from its first token on, which their holder has a reference to each of.
    The KV of the first ``computed`` tokens lies there."""

    blocks: tuple[BlockId, ...]
    computed: int


@dataclass(frozen=True, slots=True)
class StepKv:
    """What is held of a sequence that a step computes: ``held``, and behind it the positions up to
    ``stop`` - 1, which are there layer by layer as the step with the number ``step`` gets on."""

    held: HeldKv
    stop: int
    step: int


@dataclass(frozen=True, slots=True)
class History:
    """What a request made before it came to a rank: tokens, and of its sequence the most that was
    computed; ``moved`` where another rank had it. ``sources`` have its KV, best first.

    ``kv`` came before it, and becomes the request's own; ``cached`` of its tokens were in a cache,
    and the others were computed for this request elsewhere (None: all were cached). ``keep`` is for
    whoever wants the KV when the request has ended well.
    """

    output_ids: tuple[int, ...] = ()
    reached: int = 0
    moved: bool = False
    sources: tuple[KvSource, ...] = ()
    kv: HeldKv | None = None
    cached: int | None = None
    keep: bool = False


NEW = History()


@dataclass(slots=True)
class SequenceState:
    """The KV of the first ``computed`` tokens lies in ``blocks``, which one that waits has only if
    it came with them (``History.kv``) or shares them. While it waits, host memory has the rest of
    the first ``swapped`` tokens' KV (``swapping``). With ``keep`` blocks outlast it
    (``kv_manager``).

    ``reached`` is the most it ever had computed: below it, work is done again. ``length`` is that
    of prompt and outputs together, which ``append`` keeps; ``end_ids`` and ``end_length`` are what
    may end it where it runs (see ``set_bounds``). ``arrival`` counts requests where several
    schedulers share a queue.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    blocks: tuple[BlockId, ...] = ()
    keys: list[BlockKey] = field(default_factory=list)
    computed: int = 0
    reached: int = 0
    admissions: int = 0
    finish: FinishReason | None = None
    arrival: int = 0
    length: int = 0
    end_ids: frozenset[int] = frozenset()
    end_length: int = 0
    keep: bool = False
    swapped: int = 0

    @staticmethod
    def of(request: Request, history: History) -> SequenceState:
        """One that comes, without its blocks."""
        made, reached = [*history.output_ids], history.reached
        admissions = int(reached > 0)
        return SequenceState(
            request, made, reached=reached, admissions=admissions, keep=history.keep
        )

    def __post_init__(self) -> None:
        self.length = len(self.request.prompt_ids) + len(self.output_ids)

    def __len__(self) -> int:
        return self.length

    @property
    def generating(self) -> bool:
        """Only its newest token is still to be computed."""
        return self.computed + 1 == self.length and bool(self.output_ids)

    @property
    def leaving(self) -> bool:
        """Whether the next token is its last, even if it does not end it by itself."""
        return self.length + 1 >= self.end_length

    def set_bounds(self, eos_ids: frozenset[int], max_model_len: int) -> None:
        """It ends with one of ``end_ids`` (see ``reason_to_end``), or at ``end_length`` tokens."""
        params = self.request.params
        self.end_ids = frozenset() if params.ignore_eos else eos_ids
        if params.stop_token_ids:
            self.end_ids = self.end_ids.union(params.stop_token_ids)
        self.end_length = min(len(self.request.prompt_ids) + params.max_tokens, max_model_len)

    def reason_to_end(self) -> FinishReason | None:
        """What its newest token means for it. An end token counts behind ``min_tokens`` others."""
        newest, made = self.output_ids[-1], len(self.output_ids)
        if newest in self.end_ids and made > self.request.params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.length >= self.end_length else None

    def append(self, token_id: int) -> None:
        """One more output."""
        self.output_ids.append(token_id)
        self.length += 1

    @property
    def stays(self) -> bool:
        """While it waits, it waits here: its KV is here, or will be asked for here."""
        return bool(self.blocks or self.swapped) or self.keep

    @property
    def uncomputed(self) -> int:
        """Tokens whose KV is neither here nor in host memory."""
        return self.length - max(self.computed, self.swapped)

    def late(self, now: float) -> bool:
        """Whether its deadline has come."""
        return self.request.deadline is not None and self.request.deadline <= now

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Those at positions ``start .. stop - 1``."""
        return tokens_between(self.request.prompt_ids, self.output_ids, start, stop)

    def full_keys(self, block_size: int) -> list[BlockKey]:
        """The keys of all full blocks, each computed once."""
        for b in range(len(self.keys), self.length // block_size):
            parent = self.keys[-1] if b else root_key(self.request.scope)
            self.keys.append(child_key(parent, self.tokens(b * block_size, (b + 1) * block_size)))
        return self.keys


def tokens_between(
    prompt_ids: tuple[int, ...], output_ids: Sequence[int], start: int, stop: int
) -> tuple[int, ...]:
    """Positions ``start .. stop - 1`` of the prompt followed by the outputs, without joining
    them."""
    length = len(prompt_ids)
    if stop <= length:
        return prompt_ids[start:stop]
    return prompt_ids[start:] + tuple(output_ids[max(0, start - length) : stop - length])
