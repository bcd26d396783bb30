"""The ranks of ``rank.py`` on the hosts of a test bed, given steps to run together.

Every wait has a deadline; its error names the ranks that did not answer, and repeats the last line
of one that is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moeserve.process.ask import AnsweringProcess, ask_all
from moeserve.process.child import end_all
from moeserve.testbed.network import Bed
from moeserve.testbed.ranks import start_ranks

RANK = Path(__file__).with_name("rank.py")
START_S, STEP_S = 120.0, 60.0


@dataclass(frozen=True, slots=True)
class TrafficVariant:
    """How tokens travel: by which plan, copies per "rank" or "expert", in records of "own" length
    or as long as "bf16" or "fp32" would make them."""

    plan: str = "contiguous"
    copies: str = "rank"
    wire: str = "own"


@dataclass(frozen=True, slots=True)
class GroupStep:
    """A step over all ranks: from when the first began until the last ended; ``waited_s`` by the
    rank that waited least, ``busiest_bytes`` sent or received by the rank with most. ``copies`` and
    ``sent_bytes`` are to other ranks, ``inter_...`` of them to other nodes. ``chosen_LE`` is how
    often each expert was, where it was asked for."""

    seconds: float
    waited_s: float
    sent_bytes: int
    busiest_bytes: int
    copies: int
    token_layers: int
    inter_copies: int
    inter_bytes: int
    digests: tuple[str, ...]
    chosen_LE: Sequence[Sequence[int]] = ()


# Of each rank: sequence, start, stop.
Spans = Sequence[Sequence[tuple[int, int, int]]]


class RankGroup:
    """Owns the processes of the ranks. ``settings`` are what ``rank.set_up`` takes, the same for
    all; what ranks print goes to files in ``logs``."""

    def __init__(
        self, bed: Bed, settings: Mapping[str, Any], logs: Path, ranks_per_host: int = 1
    ) -> None:
        paths = [logs / f"rank-{r}.log" for r in range(bed.hosts * ranks_per_host)]
        with ExitStack() as stack:
            started = start_ranks(
                bed,
                [sys.executable, str(RANK)],
                ranks_per_host,
                {"OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()},
                errors_to=[stack.enter_context(path.open("wb")) for path in paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        self._per_host = ranks_per_host
        self._ranks = [
            AnsweringProcess(f"rank {r}", popen, path)
            for r, (popen, path) in enumerate(zip(started, paths, strict=True))
        ]
        try:
            ask_all(self._ranks, [settings] * self.world, START_S)
        except BaseException:  # goes on up; no rank may outlive it
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def world(self) -> int:
        return len(self._ranks)

    def step(
        self, spans: Spans, microbatches: int, variant: TrafficVariant, *, digest: bool = False
    ) -> GroupStep:
        step = {
            "microbatches": microbatches, "plan": variant.plan,
            "copies": variant.copies, "wire": variant.wire, "digest": digest,
        }  # fmt: skip
        replies = ask_all(self._ranks, [{**step, "spans": own} for own in spans], STEP_S)
        sent_RR = [reply["sent_R"] for reply in replies]
        out_R = [sum(row) for row in sent_RR]
        in_R = [sum(row[r] for row in sent_RR) for r in range(self.world)]
        return GroupStep(
            seconds=max(r["ended"] for r in replies) - min(r["begun"] for r in replies),
            waited_s=min(r["waited"] for r in replies),
            sent_bytes=sum(out_R),
            busiest_bytes=max(*out_R, *in_R),
            copies=sum(r["copies"] for r in replies),
            token_layers=sum(r["token_layers"] for r in replies),
            inter_copies=sum(r["inter_node"] for r in replies),
            inter_bytes=self._between_hosts(sent_RR),
            digests=tuple(r.get("digest", "") for r in replies),
            chosen_LE=_added([r["chosen_LE"] for r in replies]) if digest else (),
        )

    def _between_hosts(self, sent_RR: Sequence[Sequence[int]]) -> int:
        here = self._per_host
        return sum(
            sent
            for r, row in enumerate(sent_RR)
            for to, sent in enumerate(row)
            if r // here != to // here
        )

    def close(self) -> None:
        """The ranks end when nothing more can come."""
        for rank in self._ranks:
            rank.end_requests()
        end_all(self._ranks)


def _search_path() -> str:
    """Where ranks find the modules of this folder by the names that they have here."""
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(RANK.parents[1]), *([known] if known else [])])


def _added(tables: Sequence[Sequence[Sequence[int]]]) -> Sequence[Sequence[int]]:
    """Element by element."""
    return [[sum(each) for each in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
