"""The ranks of a run, and a place where they leave notes for one another while they start.

A note is a few bytes under a key; ``all_gather`` is how addresses, versions and digests get around.
Over torch's TCPStore, which every launcher can reach: rank 0 (or torchrun's agent) keeps it.
Nothing here is used once a step runs.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from moeserve.errors import LateRankError

START_S = 60.0


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


@dataclass(frozen=True, slots=True)
class Group:
    """This rank among ``world``; ``store`` holds the notes.

    ``members`` are the ranks of the run that this group is of, ascending; empty: all of them.
    """

    rank: int
    world: int
    store: Store
    members: tuple[int, ...] = ()

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

    def all_gather(self, key: str, note: bytes, timeout_s: float = START_S) -> list[bytes]:
        """Every rank's note, in order of ranks. A key is used once by each rank."""
        self.store.set(f"{key}/{self.rank}", note)  # type: ignore[arg-type]
        notes = []
        for rank in range(self.world):
            try:
                self.store.wait([f"{key}/{rank}"], timedelta(seconds=timeout_s))
            except RuntimeError as error:
                missing = [
                    self.of_run(r) for r in range(rank, self.world) if not self._has(f"{key}/{r}")
                ]
                raise LateRankError(
                    f"{named(missing)} did not reach {key!r} within {timeout_s:g} s", missing
                ) from error
            notes.append(bytes(self.store.get(f"{key}/{rank}")))
        return notes

    def _has(self, key: str) -> bool:
        return bool(self.store.check([key]))


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
