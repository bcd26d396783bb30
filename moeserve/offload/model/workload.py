"""Requests, and the bounds of a server that they meet: what throughput is predicted of. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.errors import ConfigError

MOST_TOKENS = 1 << 24
MOST_REQUESTS = 1 << 20


@dataclass(frozen=True, slots=True)
class UniformWorkload:
    """``requests`` that come at once, each of ``prompt`` tokens, answered by ``output`` ones."""

    requests: int
    prompt: int
    output: int

    def __post_init__(self) -> None:
        for name, value, most in (
            ("requests", self.requests, MOST_REQUESTS),
            ("prompt", self.prompt, MOST_TOKENS),
            ("output", self.output, MOST_TOKENS),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{name}={value}: expected 1 to {most}")

    @property
    def length(self) -> int:
        return self.prompt + self.output


@dataclass(frozen=True, slots=True)
class ServerBounds:
    """What a step may hold, and how many blocks of KV there are."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int

    @property
    def kv_tokens(self) -> int:
        return self.block_size * self.num_blocks

    def blocks_of(self, tokens: float) -> int:
        return -(-int(tokens) // self.block_size)

    def concurrent(self, work: UniformWorkload) -> int:
        """How many of these requests can be held to their end at once; ConfigError where not even
        one can."""
        held = self.num_blocks // max(1, self.blocks_of(work.length - 1))
        if held < 1:
            raise ConfigError(
                f"a request of {work.prompt} + {work.output} tokens needs "
                f"{self.blocks_of(work.length - 1)} KV blocks of {self.block_size} and there are "
                f"{self.num_blocks}: give more --kv-memory, or ask for fewer tokens"
            )
        return min(work.requests, self.max_num_seqs, held)
