"""A control channel between threads, and drafts for null executors."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from moeserve.core import Request
from moeserve.engine.null import draw, extend
from moeserve.engine.scheduler import Drafter
from moeserve.errors import LateRankError, MoeserveError

WAIT_S = 20.0


@dataclass
class Wire:
    """Both directions between rank 0 and the others; one trouble ends everybody's waiting."""

    world: int
    down: dict[int, queue.Queue[bytes | None]] = field(default_factory=dict)
    up: dict[int, queue.Queue[bytes]] = field(default_factory=dict)
    trouble: LateRankError | None = None
    order_bytes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for rank in range(1, self.world):
            self.down[rank], self.up[rank] = queue.Queue(), queue.Queue()

    def leader(self) -> LeaderEnd:
        return LeaderEnd(self)

    def follower(self, rank: int) -> FollowerEnd:
        return FollowerEnd(self, rank)

    def alarm(self) -> LateRankError | None:
        return self.trouble

    def take(self, mailbox: queue.Queue[bytes | None] | queue.Queue[bytes]) -> bytes | None:
        for _ in range(int(WAIT_S / 0.02)):
            if self.trouble is not None:
                raise self.trouble
            with contextlib.suppress(queue.Empty):
                message = mailbox.get(timeout=0.02)
                if self.trouble is None:
                    return message
        raise AssertionError("nothing came")


@dataclass
class LeaderEnd:
    wire: Wire

    def send(self, rank: int, message: bytes) -> None:
        self.wire.order_bytes.append(len(message))
        self.wire.down[rank].put(message)

    def receive(self, rank: int, timeout_s: float) -> bytes:
        message = self.wire.take(self.wire.up[rank])
        assert message is not None
        return message

    def alarm(self) -> LateRankError | None:
        return self.wire.alarm()

    def fail(self, error: MoeserveError) -> None:
        self.wire.trouble = self.wire.trouble or LateRankError(f"rank 0: {error.message}", [0])


@dataclass
class FollowerEnd:
    wire: Wire
    rank: int

    def send(self, message: bytes) -> None:
        self.wire.up[self.rank].put(message)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        return self.wire.take(self.wire.down[self.rank])

    def fail(self, error: MoeserveError) -> None:
        told = f"rank {self.rank}: {error.message}"
        self.wire.trouble = self.wire.trouble or LateRankError(told, [self.rank])


@pytest.fixture(scope="session")
def wires() -> Callable[[int], Wire]:
    """By number of ranks."""
    return Wire


@dataclass(frozen=True)
class Guesser:
    """Drafts ``count`` of the tokens that a null executor will make; at every ``errs``-th position
    another one, none if that is 0."""

    vocab: int
    count: int
    errs: int = 0

    def propose(self, request: Request, output_ids: Sequence[int]) -> Sequence[int]:
        history, digest = [*request.prompt_ids, *output_ids], b""
        for token in history:
            digest = extend(digest, token)
        for _ in range(self.count):
            token = draw(digest, request.params.seed, self.vocab)
            if self.errs and len(history) % self.errs == 0:
                token = (token + 1) % self.vocab
            history.append(token)
            digest = extend(digest, token)
        return history[len(history) - self.count :]


@pytest.fixture(scope="session")
def guessers() -> Callable[..., Drafter]:
    """By vocabulary, number of drafts, and how often they are wrong."""
    return Guesser
