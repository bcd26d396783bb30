"""The ranks of a run, and a place where they leave notes for one another while they start.

A note is a few bytes under a key; ``all_gather`` is how addresses, versions and digests get around.
Over torch's TCPStore, which every launcher can reach: rank 0 (or torchrun's agent) keeps it.
Nothing here is used once a step runs.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
    TCPStore,
)

from moeserve.comm.exchange.base import Alarm
from moeserve.errors import LateRankError, MoeserveError

START_S = 60.0
# How soon a wait says whom it is for, and how often it looks.
NOTICE_S = 2.0
POLL_S = 0.01
GIVE_UP_S = 2.0
_GIVEN_UP = "given up"
_ACKNOWLEDGED = "acknowledged"


@dataclass(frozen=True, slots=True)
class Topology:
    """``node_R[r]`` is the node of rank r, counted from 0 in order of its first rank."""

    node_R: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.node_R)

    @property
    def num_nodes(self) -> int:
        return max(self.node_R) + 1

    def ranks_of(self, node: int) -> tuple[int, ...]:
        return tuple(r for r, n in enumerate(self.node_R) if n == node)


def ranks_per_node(topology: Topology) -> int | None:
    """How many ranks each node has, where there are several nodes of several ranks each, all alike
    and numbered in order; None otherwise. Where there is a number, tokens cross to a node once
    (``dispatcher.HierarchicalDispatcher``)."""
    size, rest = divmod(topology.world, topology.num_nodes)
    in_order = tuple(r // size for r in range(topology.world))
    alike = not rest and topology.node_R == in_order
    return size if alike and topology.num_nodes > 1 and size > 1 else None


def print_notice(text: str) -> None:
    print(f"moeserve: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Group:
    """This rank among ``world``; ``store`` holds the notes.

    ``members`` are the ranks of the run that this group is of, ascending; empty: all of them.
    ``alarm`` is asked while notes are awaited, which is at most for ``patience_s``; ``notify`` gets
    a sentence about whom a long wait is for.
    """

    rank: int
    world: int
    store: Store
    members: tuple[int, ...] = ()
    alarm: Alarm | None = None
    patience_s: float = START_S
    notify: Callable[[str], None] = print_notice

    def sub_group(self, members: Sequence[int]) -> Group:
        """This rank among some of this group's, ascending; their notes are apart."""
        name = "-".join(map(str, members))
        return replace(
            self,
            rank=list(members).index(self.rank),
            world=len(members),
            store=PrefixStore(f"among {name}", self.store),
            members=tuple(self.of_run(r) for r in members),
        )

    def of_run(self, rank: int) -> int:
        """What the run calls this group's rank; errors use these."""
        return self.members[rank] if self.members else rank

    def all_gather(
        self,
        key: str,
        note: bytes,
        timeout_s: float | None = None,
        check: Callable[[int, bytes], None] | None = None,
    ) -> list[bytes]:
        """Every rank's note, in order of ranks. A key is used once by each rank.

        ``check`` sees each note as it comes, and may refuse it: who is wrong need not be waited
        for by those who are not. LateRankError names the ranks that did not come or gave up.
        """
        begun = time.monotonic()
        notice_at = begun + NOTICE_S
        limit_s = self.patience_s if timeout_s is None else timeout_s
        notes: dict[int, bytes] = {}
        try:
            self.store.set(f"{key}/{self.rank}", note)  # type: ignore[arg-type]
            while True:
                # Asked first: whoever gave up for a note's sake had left its own before.
                trouble = self.trouble()
                for rank in (r for r in range(self.world) if r not in notes):
                    if self.store.check([f"{key}/{rank}"]):
                        notes[rank] = bytes(self.store.get(f"{key}/{rank}"))
                        if check is not None:
                            check(rank, notes[rank])
                missing = [self.of_run(r) for r in range(self.world) if r not in notes]
                if not missing:
                    return [notes[rank] for rank in range(self.world)]
                if trouble is not None:
                    raise trouble
                now = time.monotonic()
                if now - begun > limit_s:
                    raise LateRankError(
                        f"{named(missing)} did not reach {key!r} within {limit_s:g} s", missing
                    )
                if now > notice_at:
                    notice_at = now + (now - begun)  # ever less often
                    self.notify(f"rank {self.rank}, {key}: waiting for {named(missing)}")
                time.sleep(POLL_S)
        except DistError as error:
            raise LateRankError(f"{key}: the rank that keeps the notes has ended", [0]) from error

    def give_up(self, reason: str) -> None:
        """Ranks that wait for a note, now or later, get an error instead. The first reason counts.

        Rank 0 may be the one that keeps the notes: it stays until all have given up, or for
        ``GIVE_UP_S``.
        """
        with contextlib.suppress(DistError):  # then the others have met the error already
            self.store.compare_set(_GIVEN_UP, "", f"{self.rank} {reason}")
            self.store.set(f"{_ACKNOWLEDGED}/{self.rank}", "")
            acknowledged = [f"{_ACKNOWLEDGED}/{rank}" for rank in range(self.world)]
            stay_until = time.monotonic() + (GIVE_UP_S if self.rank == 0 else 0.0)
            while time.monotonic() < stay_until and not self.store.check(acknowledged):
                time.sleep(POLL_S)

    def trouble(self) -> MoeserveError | None:
        """Why to wait no longer: a rank that gave up, or the alarm."""
        if self.store.check([_GIVEN_UP]):
            rank, _, reason = bytes(self.store.get(_GIVEN_UP)).decode().partition(" ")
            return LateRankError(f"rank {rank} gave up: {reason}", [int(rank)])
        return None if self.alarm is None else self.alarm()


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def host_store(host: str, port: int = 0, timeout_s: float = START_S) -> tuple[TCPStore, int]:
    """Keep the notes here, listening on ``host`` alone; the store and its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    port = int(listening.getsockname()[1])
    store = TCPStore(
        host, port, None, True, timedelta(seconds=timeout_s), False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip
    return store, port


def join_store(host: str, port: int, timeout_s: float = START_S) -> TCPStore:
    """Reach the notes that another rank keeps."""
    return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), False)
