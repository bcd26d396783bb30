"""What a rank did when, as a trace that Perfetto and chrome://tracing open.

Times are of the monotonic clock, which all processes of a host share, so that files of several
ranks can be opened together. A rank is a process, a microbatch a track in it, and its steps are one
more (``STEPS``). A file whose end is missing opens too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from moeserve.errors import ConfigError

MOST_EVENTS = 1_000_000
# The track of whole steps, behind those of all microbatches.
STEPS = 1000


class Timeline:
    """Writes ``rank-N.json`` into a folder; ``close`` completes it. Ends by itself after
    ``MOST_EVENTS``, so that a server that traces does not fill a disk."""

    def __init__(self, folder: Path, rank: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"ep_trace={str(folder)!r}: {error.strerror}") from error
        self._rank = rank
        self._events = 0
        self._open: tuple[str, int, int, int] | None = None
        self._file: IO[str] | None = (folder / f"rank-{rank}.json").open("w", encoding="utf-8")
        named = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        steps = {"name": "thread_name", "ph": "M", "pid": rank, "tid": STEPS}
        self._file.write(
            f"[{json.dumps(named)},\n{json.dumps(steps | {'args': {'name': 'steps'}})}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self, activity: str, layer: int, lane: int) -> None:
        """What went on before ends."""
        now = time.monotonic_ns()
        self._finish(now)
        self._open = (activity, layer, lane, now)

    def end(self) -> None:
        self._finish(time.monotonic_ns())

    def step(self, kind: str, seconds: float, said: Mapping[str, object]) -> None:
        """A whole step of this kind is over, and what was said of it when it was planned."""
        now = time.monotonic_ns()
        self._write(kind, STEPS, now - int(seconds * 1e9), now, json.dumps(said))

    def close(self) -> None:
        self.end()
        if self._file is not None:
            self._file.write("]\n")
            self._file.close()
            self._file = None

    def _finish(self, now: int) -> None:
        if self._open is None or self._file is None:
            return
        activity, layer, lane, begun = self._open
        self._open = None
        self._write(activity, lane, begun, now, f'{{"layer":{layer}}}')

    def _write(self, name: str, track: int, begun: int, ended: int, args: str) -> None:
        """``args`` is JSON."""
        self._events += 1
        if self._events > MOST_EVENTS:
            self.close()
        if self._file is not None:
            self._file.write(
                f',\n{{"name":"{name}","ph":"X","pid":{self._rank},"tid":{track},'
                f'"ts":{begun / 1000:.3f},"dur":{(ended - begun) / 1000:.3f},"args":{args}}}'
            )
