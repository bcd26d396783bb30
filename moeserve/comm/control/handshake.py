"""Before a step is run all ranks must serve the same: checkpoint, settings that change results, and
plan. Each rank compares every other rank's identity with its own, so that all refuse with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from google.protobuf.message import DecodeError

from moeserve.comm.group import Group, spoiled
from moeserve.errors import CheckpointError, ConfigError, MoeserveError, PlacementError
from moeserve.pb import ep_pb2 as pb


@dataclass(frozen=True, slots=True)
class Identity:
    """``checkpoint`` is the digest of each file by name; ``plan`` that of the placement plan."""

    checkpoint: Mapping[str, str]
    settings: Mapping[str, str]
    plan: str


def agree(group: Group, mine: Identity, timeout_s: float | None = None) -> None:
    """Returns when all ranks are known to serve the same; the error names who differs in what.

    An identity has a digest for every file, so only its own digest goes to all; the whole is read
    where that differs.
    """

    def same(rank: int, theirs_digest: bytes) -> None:
        if theirs_digest == digest:
            return
        try:
            received = pb.Identity.FromString(group.read("identity/whole", rank))
        except DecodeError as cause:
            raise spoiled("identity/whole", f"no identity of rank {rank}") from cause
        theirs = Identity(dict(received.checkpoint), dict(received.settings), received.plan)
        if (error := difference(group.rank, mine, rank, theirs)) is not None:
            raise error

    note = pb.Identity(checkpoint=mine.checkpoint, settings=mine.settings, plan=mine.plan)
    whole = note.SerializeToString(deterministic=True)
    digest = sha256(whole).digest()
    group.leave("identity/whole", whole)
    group.all_gather("identity", digest, timeout_s, same)


def difference(rank: int, mine: Identity, other: int, theirs: Identity) -> MoeserveError | None:
    """What keeps two ranks from serving together, if anything does."""
    for name in sorted(mine.checkpoint.keys() | theirs.checkpoint.keys()):
        here, there = mine.checkpoint.get(name), theirs.checkpoint.get(name)
        if here != there:
            return CheckpointError(
                f"rank {other} serves another checkpoint than rank {rank}: {name} is "
                f"{there or 'missing'} there and {here or 'missing'} here; copy one model to all"
            )
    for name in sorted(mine.settings.keys() | theirs.settings.keys()):
        ours, others = mine.settings.get(name), theirs.settings.get(name)
        if ours != others:
            return ConfigError(
                f"rank {other} was started with {name}={others}, rank {rank} with {name}={ours}: "
                "start all ranks with the same settings"
            )
    if mine.plan != theirs.plan:
        return PlacementError(
            f"rank {other} has another placement plan ({theirs.plan}) than rank {rank} "
            f"({mine.plan}): copy one plan to all ranks"
        )
    return None
