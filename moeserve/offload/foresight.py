"""Which experts of the next layer are worth reading before that layer has chosen them.

Pure. A step of many tokens needs nearly all experts of a layer, so all are read ahead
(``model.distinct.uses_nearly_all``). Of others the next layer's router is asked with this layer's
residual stream, which is near what it will get; how often that is right is counted, and where it is
set to "auto" such reading stops while too much of it is in vain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Prediction = Literal["auto", "on", "off"]

# Read-ahead that is used, at least, of all; half of what is known is forgotten in so many experts.
LEAST_USED = 0.5
HALF_LIFE = 256.0
# While predicting rests, every so many steps it is tried; and where so many times as much is
# missing as when it was in vain: a request that begins finds little of what it prefers.
TRIED_EVERY, MORE = 16, 2.0


@dataclass(slots=True)
class PredictionGate:
    """Whether to predict in a step. ``used`` and ``wasted`` are told as they are counted, and how
    many experts each layer ``missed``."""

    mode: Prediction
    _used: float = 1.0
    _read: float = 1.0
    _step: int = 0
    _used_now: int = 0  # in this step
    _read_now: int = 0
    _missed: int = 0  # in this step, in the one before, and in the last one that was in vain
    _missed_before: int = 0
    _missed_in_vain: int = 0

    @property
    def open(self) -> bool:
        if self.mode != "auto":
            return self.mode == "on"
        more = self._missed_before > MORE * max(1, self._missed_in_vain)
        worth = self._used >= LEAST_USED * self._read
        return worth or more or self._step % TRIED_EVERY == 0

    def begin_step(self) -> None:
        self._step += 1
        if self._used_now < LEAST_USED * self._read_now:
            self._missed_in_vain = self._missed
        self._missed_before, self._missed = self._missed, 0
        self._used_now = self._read_now = 0

    def count(self, used: int, wasted: int) -> None:
        """Of what was predicted for one layer."""
        self._used_now += used
        self._read_now += used + wasted
        keep = 0.5 ** ((used + wasted) / HALF_LIFE)
        self._used = self._used * keep + used
        self._read = self._read * keep + used + wasted

    def miss(self, experts: int) -> None:
        """That one layer needs, and that were not there before it was predicted."""
        self._missed += experts
