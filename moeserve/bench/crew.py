"""The ranks of ``rank`` on the hosts of a test bed, told steps together.

Every wait has a deadline; its error names the ranks that did not answer, and repeats the last words
of one that is gone.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moeserve.errors import DeadlineError, UnavailableError
from moeserve.testbed.network import Bed
from moeserve.testbed.ranks import end_all, start_ranks

START_S, STEP_S = 120.0, 60.0
LAST_WORDS = 600


@dataclass(frozen=True, slots=True)
class Variant:
    """How tokens travel: by which plan, copies per "rank" or "expert", in records of "own" length
    or as long as "bf16" or "fp32" would make them."""

    plan: str = "contiguous"
    copies: str = "rank"
    wire: str = "own"


@dataclass(frozen=True, slots=True)
class Taken:
    """A step over all ranks: from when the first began until the last ended; ``waited_s`` by the
    rank that waited least, ``busiest_bytes`` sent or received by the rank with most."""

    seconds: float
    waited_s: float
    sent_bytes: int
    busiest_bytes: int
    copies: int
    token_layers: int
    digests: tuple[str, ...]


# Of each rank: sequence, start, stop.
Spans = Sequence[Sequence[tuple[int, int, int]]]


class Crew:
    """``told`` is what ``rank.set_up`` reads; the same for all."""

    def __init__(self, bed: Bed, told: Mapping[str, Any], logs: Path, ranks_per_host: int = 1):
        self._logs = [
            (logs / f"rank-{r}.log").open("w+b") for r in range(bed.hosts * ranks_per_host)
        ]
        command = [sys.executable, "-m", "moeserve.bench.rank"]
        # Output goes to pipes, errors to a file each: nobody needs to read those meanwhile.
        self._ranks = start_ranks(
            bed, command, ranks_per_host, {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, errors_to=self._logs,
        )  # fmt: skip
        try:
            self._ask([told] * len(self._ranks), START_S)
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

    def step(self, spans: Spans, micro: int, variant: Variant, *, digest: bool = False) -> Taken:
        asked = {
            "micro": micro, "plan": variant.plan, "copies": variant.copies, "wire": variant.wire,
            "digest": digest,
        }  # fmt: skip
        said = self._ask([{**asked, "spans": own} for own in spans], STEP_S)
        sent_RR = [s["sent_R"] for s in said]
        out_R = [sum(row) for row in sent_RR]
        in_R = [sum(row[r] for row in sent_RR) for r in range(self.world)]
        return Taken(
            seconds=max(s["ended"] for s in said) - min(s["begun"] for s in said),
            waited_s=min(s["waited"] for s in said),
            sent_bytes=sum(out_R),
            busiest_bytes=max(*out_R, *in_R),
            copies=sum(s["copies"] for s in said),
            token_layers=sum(s["token_layers"] for s in said),
            digests=tuple(s.get("digest", "") for s in said),
        )

    def close(self) -> None:
        """The ranks end when nothing more can come."""
        for rank in self._ranks:
            if rank.stdin is not None:
                rank.stdin.close()
        end_all(self._ranks)
        for rank in self._ranks:
            if rank.stdout is not None:
                rank.stdout.close()
        for log in self._logs:
            log.close()

    def _ask(self, messages: Sequence[Mapping[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
        for r, (rank, message) in enumerate(zip(self._ranks, messages, strict=True)):
            assert rank.stdin is not None
            try:
                rank.stdin.write(json.dumps(message).encode() + b"\n")
                rank.stdin.flush()
            except BrokenPipeError as error:
                raise self._gone(r) from error
        deadline = time.monotonic() + timeout_s
        parts: dict[int, list[bytes]] = {r: [] for r in range(self.world)}
        waiting = set(parts)
        while waiting:
            pipes = {self._pipe(r): r for r in waiting}
            ready = select.select(list(pipes), [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise DeadlineError(f"ranks {sorted(waiting)} said nothing for {timeout_s:g} s")
            for pipe in ready:
                piece = os.read(pipe, 1 << 16)
                if not piece:
                    raise self._gone(pipes[pipe])
                parts[pipes[pipe]].append(piece)
                if piece.endswith(b"\n"):
                    waiting.remove(pipes[pipe])
        return [json.loads(b"".join(parts[r])) for r in range(self.world)]

    def _pipe(self, rank: int) -> int:
        stdout = self._ranks[rank].stdout
        assert stdout is not None
        return stdout.fileno()

    def _gone(self, rank: int) -> UnavailableError:
        log = self._logs[rank]
        log.seek(0)
        words = log.read().decode(errors="replace")[-LAST_WORDS:].strip()
        return UnavailableError(f"rank {rank} has ended: {words or 'without a word'}")
