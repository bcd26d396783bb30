"""What every rank says once per step, and what all ranks conclude from it.

A record is of fixed size; the mesh gives every rank the records of all (``comm.control.mesh``). So
whatever must be common to a step is a function of the same bytes on every rank: whether there is a
step, in how many microbatches it runs, whether a layer's new experts are taken into use before it,
and whether the run is over. The same records carry each rank's load, from which a door chooses
homes.

The record of a step is given before the step before it runs, so it foresees: ``tokens`` may differ
from what comes to pass, which costs a step that nobody needed or one that begins anew. Pure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.ranks.loads import RankLoads
from moeserve.engine.ranks.microbatches import StepShape
from moeserve.engine.replan.switch import agreed_turn

WORK, PREFILL, LEAVING = 1, 2, 4

# One word of four bytes for each field, two for ``held``.
_PACKED = struct.Struct("<IIIffIIIIQIII")
RECORD_BYTES = _PACKED.size
_WORDS = RECORD_BYTES // 4
(_FLAGS, _TOKENS, _PREPARED, _SECONDS, _WAITED, _RAN, _CAME, _RUNNING, _WAITING, _HELD) = range(10)
_FORESEEN, _FREE_BLOCKS, _QUEUED = 11, 12, 13
_FLOAT = struct.Struct("<f")


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's record.

    It foresees ``tokens`` of its own in the step, all of decoding requests where ``decode``;
    ``work`` where it wants the step. ``prepared`` is the turn of a plan change it is ready for, 0
    for none; ``leaving`` where it wants the run to end. Of its last step: ``seconds`` it took,
    ``waited`` of them for others, ``ran`` tokens of its own, ``came`` copies from other ranks. Its
    load is as in ``loads.RankLoads``.
    """

    work: bool = False
    decode: bool = True
    tokens: int = 0
    prepared: int = 0
    leaving: bool = False
    seconds: float = 0.0
    waited: float = 0.0
    ran: int = 0
    came: int = 0
    running: int = 0
    waiting: int = 0
    held: int = 0
    foreseen: int = 0
    free_blocks: int = 0
    queued: int = 0

    def pack(self) -> bytes:
        prefill = self.tokens > 0 and not self.decode
        flags = WORK * self.work | PREFILL * prefill | LEAVING * self.leaving
        return _PACKED.pack(
            flags, self.tokens, self.prepared, self.seconds, self.waited, self.ran, self.came,
            self.running, self.waiting, self.held, self.foreseen, self.free_blocks, self.queued,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks conclude: whether a step runs (``run``), of which ``shape``; the ``turn`` of
    a plan change that all are ready for, 0 for none; whether the run is ``over``.

    ``waiting`` requests wait at ranks. Of the last step that was measured: ``seconds`` of the
    slowest rank, ``waited`` of the one that waited least, tokens of all (``ran``), copies that came
    to all and to the busiest rank.
    """

    run: bool
    shape: StepShape
    turn: int
    over: bool
    seconds: float
    waited: float
    ran: int
    came: int
    came_most: int
    waiting: int


def decide(records: bytes) -> Decision:
    """From the records of all ranks, in order of ranks."""
    table = _table(records)
    most, least = table.max(axis=0).tolist(), table.min(axis=0).tolist()
    ran, came = table[:, _RAN : _CAME + 1].sum(axis=0, dtype=np.int64).tolist()
    some = int(np.bitwise_or.reduce(table[:, _FLAGS]))
    every = int(np.bitwise_and.reduce(table[:, _FLAGS]))
    return Decision(
        run=bool(some & WORK),
        shape=StepShape(most[_TOKENS], not some & PREFILL),
        turn=agreed_turn(least[_PREPARED], most[_PREPARED]),
        over=bool(every & LEAVING),
        seconds=_seconds(most[_SECONDS]),
        waited=_seconds(least[_WAITED]),
        ran=ran,
        came=came,
        came_most=most[_CAME],
        waiting=int(table[:, _WAITING].sum(dtype=np.int64)),
    )


def loads_of(records: bytes, step: int) -> RankLoads:
    """From the same records."""
    table = _table(records)
    held_R = table[:, _HELD : _HELD + 2].copy().view("<u8")[:, 0]
    columns = table[:, (_RUNNING, _WAITING, _FORESEEN, _FREE_BLOCKS, _QUEUED)].T.astype(np.int64)
    running_R, waiting_R, foreseen_R, free_blocks_R, queued_R = columns
    return RankLoads(
        step, running_R, waiting_R, held_R.astype(np.int64), foreseen_R, free_blocks_R, queued_R
    )


def _table(records: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(records, "<u4").reshape(-1, _WORDS)


def _seconds(word: int) -> float:
    """Floats that are not negative stand in the order of their bits."""
    found: float = _FLOAT.unpack(word.to_bytes(4, "little"))[0]
    return found
