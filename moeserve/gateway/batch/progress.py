"""How far a batch is: a bar on a terminal, else a line from time to time; to standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Taken in and made, by all requests so far."""

    prompt: int
    generated: int


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended: ``complete`` unless it was stopped. Of the engine, what it took."""

    complete: bool = True
    steps: int = 0
    preemptions: int = 0


class BatchProgress:
    """``total`` lines, of which ``before`` were answered by earlier runs. ``tokens``, which may be
    replaced, says how many there are by now; ``show`` is to be called from time to time."""

    def __init__(
        self,
        total: int,
        before: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.before = before
        self.answered = self.failed = 0  # by this run
        self.tokens: Callable[[], Tokens] = lambda: Tokens(0, 0)
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._began: float | None = None
        self._said = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("batch", total=total, completed=before, said="")

    def __enter__(self) -> Self:
        self._began = self._said = self._clock()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._say()

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def left_s(self) -> float | None:
        """Seconds until the last answer at the pace of this run; None before the first."""
        left = self.total - self.before - self.answered
        return left * self.seconds / self.answered if self.answered else None

    def on_answer(self, *, failed: bool) -> None:
        self.answered += 1
        self.failed += failed

    def show(self) -> None:
        if self._bar is not None:
            done = self.before + self.answered
            self._bar.update(self._task, completed=done, said=self._figures())
        elif self._clock() - self._said >= LINE_S:
            self._say()

    def _say(self) -> None:
        self._said = self._clock()
        done = self.before + self.answered
        text = f"{done} of {self.total} requests, {self._figures()}"
        print(text, file=self._console.file, flush=True)

    def _figures(self) -> str:
        tokens = self.tokens()
        rate = (tokens.prompt + tokens.generated) / max(self.seconds, 1e-9)
        left = "" if self.left_s is None else f", {duration(self.left_s)} left"
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"{tokens.prompt} tokens in, {tokens.generated} out, {rate:.0f} tokens/s{failed}{left}"
        )


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
