"""How far a step is: of which layers the KV of a long chunk is there while it is still computed.

Every pass of attention over a layer's cache is counted when it has written its rows
(``Ops.kv_passes``). A layer is done when as many passes have gone over its cache since the step
began as the step has microbatches with tokens. Steps of single tokens are not looked at: they are
over soon.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeserve.core import Chunk, RequestId
from moeserve.engine.rates import is_decode
from moeserve.kernels.ops import KvCache, Ops

# Steps that failed lately: nobody reads of one for longer.
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class RunningStep:
    """``passes_L`` is what was counted before it, by layer."""

    number: int
    chunks: Mapping[RequestId, Chunk]
    passes_L: tuple[int, ...]
    parts: int


class StepProgress:
    """A ``model_runner.StepWatcher``: one thread begins and ends steps, any thread asks. ``begun``
    is called on the former when a step has begun that others may look at."""

    def __init__(self, ops: Ops, caches: Sequence[KvCache]) -> None:
        self.running: RunningStep | None = None
        self.begun: Callable[[], None] = _nobody
        self._ops = ops
        self._caches = caches
        self._begun = 0
        self._failed: deque[int] = deque(maxlen=REMEMBERED)

    def begin(self, chunks: Sequence[Chunk], parts: int) -> None:
        long = {chunk.request.id: chunk for chunk in chunks if not is_decode(chunk)}
        if long:
            self._begun += 1
            passes = tuple(map(self._ops.kv_passes, self._caches))
            self.running = RunningStep(self._begun, long, passes, parts)
            self.begun()

    def end(self, *, ok: bool) -> None:
        if self.running is not None and not ok:
            self._failed.append(self.running.number)
        self.running = None

    def layers_done(self, number: int) -> int:
        """The first so many layers of that step have all KV: all of them once it is over, none of
        one that has failed."""
        running = self.running
        if number in self._failed:
            return 0
        if running is None or running.number != number:
            return len(self._caches)
        for layer, (cache, before) in enumerate(zip(self._caches, running.passes_L, strict=True)):
            if self._ops.kv_passes(cache) - before < running.parts:
                return layer
        return len(self._caches)


def _nobody() -> None: ...
