"""Which runs of a sequence are still to come: each position of each layer once, and in order.

Whoever sends KV begins at the same position in every layer and leaves nothing out; only what it was
asked for again comes later. So what has arrived is told by one number per layer and a few
exceptions, and a run that comes twice, too early, or overlaps another is refused.

Pure. InvalidRequestError where a run is not due.
"""

from __future__ import annotations

from moeserve.errors import DataLossError, InvalidRequestError

# Runs that are asked for again at one time.
MOST_MISSING = 64


class RunOrder:
    """Of ``layers`` layers, from position ``have`` to ``length - 1``."""

    def __init__(self, layers: int, have: int, length: int) -> None:
        self._next = [have] * layers
        self._length = length
        self._missing: dict[tuple[int, int], int] = {}
        self._again: set[tuple[int, int]] = set()  # ever

    @property
    def length(self) -> int:
        return self._length

    @property
    def complete(self) -> bool:
        return not self._missing and min(self._next) == self._length

    @property
    def awaits_again(self) -> bool:
        """Whether nothing is left but what is to come again."""
        return bool(self._missing) and min(self._next) == self._length

    @property
    def arrived(self) -> int:
        """So many positions, from the first on, have come in all layers."""
        return min(*self._next, *(start for _, start in self._missing), self._length)

    @property
    def most_arrived(self) -> int:
        """No position from here on has come in any layer."""
        return max(self._next)

    def resize(self, length: int) -> None:
        """So many positions are wanted now; none beyond has come."""
        assert length >= self.most_arrived, (length, self._next)
        self._length = length

    def take(self, layer: int, start: int, count: int) -> None:
        """A run has come."""
        if not 0 <= layer < len(self._next):
            raise InvalidRequestError(f"a run of layer {layer}: there are {len(self._next)}")
        if self._missing.get((layer, start)) == count:
            del self._missing[layer, start]
            return
        due = self._next[layer]
        if start != due or count < 1 or start + count > self._length:
            raise InvalidRequestError(
                f"a run of positions {start}..{start + count - 1} of layer {layer}: "
                f"{due}..{self._length - 1} are to come"
            )
        self._next[layer] = start + count

    def miss(self, layer: int, start: int, count: int) -> None:
        """A run that was taken cannot be used: it will come again. DataLossError where it is not
        the first time, or there are too many."""
        self._missing[layer, start] = count
        if (layer, start) in self._again or len(self._again) >= MOST_MISSING:
            raise DataLossError(
                f"positions {start}..{start + count - 1} of layer {layer} were sent wrong "
                f"{1 + ((layer, start) in self._again)} times, {len(self._again)} others once"
            )
        self._again.add((layer, start))
