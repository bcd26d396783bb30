"""What computing and reading take that run at once. Pure.

Reading takes processors too: calls of the system, or of the host that a guest runs on, whose
threads are then missing. So each is slower while the other runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erf, exp, pi, sqrt

from moeserve.errors import ConfigError

LEAST_LEFT = 0.2


@dataclass(frozen=True, slots=True)
class Beside:
    """What is left of the speed of ``computing`` while the disk is read, and of ``reading`` while
    all threads compute, of that which each has by itself."""

    computing: float = 1.0
    reading: float = 1.0

    def __post_init__(self) -> None:
        both = self.computing, self.reading
        if not (all(LEAST_LEFT <= left <= 1 for left in both) and sum(both) >= 1):
            raise ConfigError(
                f"{self}: what is left beside each other lies within {LEAST_LEFT:g}..1, and adds "
                f"up to 1 at least; calibrate again"
            )

    @staticmethod
    def of(computing: float, reading: float) -> Beside:
        """The nearest that there may be: at the least they take turns."""
        computing = min(1.0, max(LEAST_LEFT, computing))
        return Beside(computing, min(1.0, max(LEAST_LEFT, 1 - computing, reading)))

    def seconds(self, computing: float, reading: float, spread: float = 0.0) -> float:
        """Until both have ended that begin together and take so many by themselves; the mean where
        those of reading are normally distributed with a standard deviation of ``spread``. What ends
        first has slowed the other down by then, which has its whole speed from there on."""
        left, slowed = self.computing + self.reading - 1, (1 - self.computing) / self.reading
        read = computing * self.reading / self.computing  # as computing ends
        later = expected_longer(read, reading, spread) - read
        return computing + slowed * reading + left / self.reading * later

    def computed(self, took: float, reading: float) -> float:
        """Seconds of computing by itself, of what ``took`` so long beside ``reading``."""
        slowed = (1 - self.computing) / self.reading
        return max(took * self.computing, took - slowed * reading)


def expected_longer(one: float, mean: float, spread: float) -> float:
    """The mean of the longer of ``one`` and what is normally distributed."""
    if spread <= 0:
        return max(one, mean)
    z = (mean - one) / spread
    later, density = (1 + erf(z / sqrt(2))) / 2, exp(-z * z / 2) / sqrt(2 * pi)
    return one + (mean - one) * later + spread * density
