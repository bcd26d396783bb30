"""The ranks of a run, and a place where they leave notes for one another while they start.

A note is a few bytes under a key; ``all_gather`` is how addresses, versions and digests get around.
The notes lie in a ``torch.distributed.Store`` that rank 0 keeps (``launch.note_store``), or that
torchrun's agent does.
Nothing here is used once a step runs.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
)

from moeserve.comm.exchange.base import Alarm
from moeserve.errors import ConfigError, LateRankError, MoeserveError

START_S = 60.0
# How soon a wait says whom it is for, and the first pause of one for a process.
NOTICE_S = 2.0
POLL_S = 0.01
_FIRST_PAUSE_S = 0.001
# The longest pause between two looks; at many ranks they take turns of 1,000 looks a second, each
# of which takes rank 0 about 0.3 ms.
_SLOWEST_S = 0.1
_SLOWEST_S_PER_RANK = 0.001
GIVE_UP_S = 2.0
_GIVEN_UP = "given up"
_ACKNOWLEDGED = "acknowledged"
# Before each note in the value of a gathering: whose it is, and how many bytes.
_FRAME = struct.Struct("<II")


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


class PrefixedStore(PrefixStore):
    """Notes under keys that begin with ``prefix``. It keeps ``store``, which a PrefixStore does not
    do for a store that is written in Python."""

    def __init__(self, prefix: str, store: Store) -> None:
        super().__init__(prefix, store)
        self._kept = store


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
            store=PrefixedStore(f"among {name}", self.store),
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

        ``check`` sees each note, soon after it came even where others are late, and may refuse it:
        who is wrong need not be waited for by those who are not. LateRankError names the ranks that
        did not come or gave up.
        """
        limit_s = self.patience_s if timeout_s is None else timeout_s
        try:
            gathering = _Gathering(self, key, check)
            gathering.leave(note)
            return gathering.await_all(limit_s)
        except DistError as error:
            raise LateRankError(f"{key}: the rank that keeps the notes has ended", [0]) from error

    def leave(self, key: str, note: bytes) -> None:
        """A note for whoever asks, which nobody awaits: ``read`` it after a gathering which this
        rank enters later."""
        self.store.set(f"{key}/{self.rank}", note)  # type: ignore[arg-type]

    def read(self, key: str, rank: int) -> bytes:
        """What that rank has left under the key."""
        return bytes(self.store.get(f"{key}/{rank}"))

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
            pauses = backing_off(POLL_S, _SLOWEST_S)
            while time.monotonic() < stay_until and not self.store.check(acknowledged):
                time.sleep(next(pauses))

    def trouble(self) -> MoeserveError | None:
        """Why to wait no longer: a rank that gave up, or the alarm."""
        if self.store.check([_GIVEN_UP]):
            note = bytes(self.store.get(_GIVEN_UP))
            rank, _, reason = note.decode(errors="replace").partition(" ")
            blamed = [int(rank)] if rank in map(str, range(self.world)) else []
            return LateRankError(f"rank {rank[:20]} gave up: {reason}", blamed)
        return None if self.alarm is None else self.alarm()


class _Gathering:
    """One ``all_gather`` of one rank.

    All notes lie in one value to which each rank appends its own; a counter says how many there
    are. So a rank asks the store four or five times, whatever the number of ranks: it appends,
    counts itself, looks at the counter, and reads the value once all have counted themselves.
    While others are late it looks ever less often; and it reads what there is, for ``check`` and
    for the names of those who are missing, each time its wait has doubled, or after ``NOTICE_S``.

    What rank 0's store sends grows with the square of ranks: R * (R * (8 + note)) bytes.
    """

    def __init__(self, group: Group, key: str, check: Callable[[int, bytes], None] | None) -> None:
        self._group = group
        self._key = key
        self._check = check
        self._notes: dict[int, bytes] = {}
        self._parsed = 0  # bytes of the value
        self._count = 0

    def leave(self, note: bytes) -> None:
        """Append first: whoever is counted can be read."""
        group = self._group
        store: Any = group.store  # whose stubs know no ``append``
        store.append(f"{self._key}/notes", _FRAME.pack(group.rank, len(note)) + note)
        self._count = group.store.add(f"{self._key}/count", 1)

    def await_all(self, limit_s: float) -> list[bytes]:
        """In order of ranks. LateRankError, and what ``check`` and ``trouble`` say."""
        group = self._group
        begun = time.monotonic()
        slowest_s = max(_SLOWEST_S, group.world * _SLOWEST_S_PER_RANK)
        notice_at, read_at = begun + NOTICE_S, begun + slowest_s
        pauses = backing_off(_FIRST_PAUSE_S, slowest_s)
        while True:
            # Asked first: whoever gave up for a note's sake had left its own before.
            trouble = None if self._count >= group.world else group.trouble()
            now = time.monotonic()
            late = now - begun > limit_s
            if self._count >= group.world or trouble is not None or late or now > read_at:
                read_at = now + min(now - begun, NOTICE_S)
                self._read()
            if len(self._notes) == group.world:
                return [self._notes[rank] for rank in range(group.world)]
            if trouble is not None:
                raise trouble
            if late:
                missing = self._missing()
                raise LateRankError(
                    f"{named(missing)} did not reach {self._key!r} within {limit_s:g} s", missing
                )
            if now > notice_at:
                notice_at = now + (now - begun)  # ever less often
                self._read()
                who = named(self._missing())
                group.notify(f"rank {group.rank}, {self._key}: waiting for {who}")
            time.sleep(next(pauses))
            self._count = group.store.add(f"{self._key}/count", 0)

    def _read(self) -> None:
        """Notes that have come since the last time, each for ``check``, in order of ranks."""
        value = bytes(self._group.store.get(f"{self._key}/notes"))
        came: dict[int, bytes] = {}
        while self._parsed < len(value):
            rest = len(value) - self._parsed - _FRAME.size
            rank, size = _FRAME.unpack_from(value, self._parsed) if rest >= 0 else (0, 0)
            if size > rest:
                raise spoiled(self._key, f"{len(value)} bytes that are no notes")
            self._parsed += _FRAME.size + size
            if rank < self._group.world:
                came[rank] = value[self._parsed - size : self._parsed]
        self._notes |= came
        for rank in sorted(came):
            if self._check is not None:
                self._check(rank, came[rank])

    def _missing(self) -> list[int]:
        group = self._group
        return [group.of_run(r) for r in range(group.world) if r not in self._notes]


def spoiled(key: str, what: str) -> ConfigError:
    """Notes that no rank has left."""
    return ConfigError(
        f"the notes of the start hold {what} under {key!r}: somebody else writes to them; start "
        "the ranks where only they reach MASTER_PORT"
    )


def backing_off(first_s: float, slowest_s: float) -> Iterator[float]:
    """Pauses between looks, each longer by a half up to ``slowest_s``: a wait is found over at most
    half as long again after it is, by a number of looks that hardly grows with its length."""
    pause_s = first_s
    while True:
        yield min(pause_s, slowest_s)
        pause_s = min(1.5 * pause_s, slowest_s)


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
