"""Whether a preempted request's KV is copied to host memory and back, or computed again.

Whichever takes less of the rank's time, as measured: the bytes to copy at the rate of the copies so
far, or the tokens to compute at what a token adds to a step (``StepLine``: prompts run beside
others, who make the step anyway). Before a rate is known, and once in a while against it, KV is
copied, so that it becomes known and stays so. Pure.
"""

from __future__ import annotations

from moeserve.engine.step_cost import StepLine

# Of the mean rate, what a copy counts at least.
FADE = 0.1
# After so many requests that were computed again in a row, one is copied all the same.
LOOK_AGAIN = 16


class CopyRate:
    """Seconds of a byte that is copied, either way, as lately measured."""

    def __init__(self) -> None:
        self._copies = 0
        self.byte_s = 0.0

    def note(self, nbytes: int, seconds: float) -> None:
        """A copy is made, and took so long."""
        self._copies += 1
        self.byte_s += max(FADE, 1 / self._copies) * (seconds / nbytes - self.byte_s)


class SwapOrCompute:
    """``steps`` says what tokens cost; without it all is copied."""

    def __init__(self, steps: StepLine | None = None) -> None:
        self._steps = steps
        self._refused = 0  # in a row

    def copies(self, nbytes: int, tokens: int, byte_s: float) -> bool:
        """Whether ``nbytes``, out and in again, are rather copied than ``tokens`` computed."""
        line = None if self._steps is None else self._steps.line
        if line is None or nbytes * byte_s <= tokens * line[1] or self._refused >= LOOK_AGAIN:
            self._refused = 0
            return True
        self._refused += 1
        return False
