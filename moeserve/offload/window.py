"""A window of layers: trunks of N layers in memory, the others on disk.

Layer l always lies in place l mod N, so what was made over that memory once holds for every visit.
When a layer is done, the next layer of its place is read ahead; layers are visited in order, round
and round. Of a visit, all that waits has a deadline.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeserve.errors import DataLossError, DeadlineError
from moeserve.offload.arena import Pages
from moeserve.offload.disk_file import DiskRegion
from moeserve.offload.mover import DiskMover, Read, Ticket

READ_DEADLINE_S = 60.0


class TrunkWindow:
    """``regions`` are those of all layers; ``places`` of them are in memory. For one thread."""

    def __init__(
        self,
        regions: Sequence[DiskRegion],
        places: int,
        mover: DiskMover,
        *,
        check_always: bool = False,
        deadline_s: float = READ_DEADLINE_S,
    ) -> None:
        assert 0 < places <= len(regions), (places, len(regions))
        self.places = places
        self._regions, self._mover = tuple(regions), mover
        self._check_always, self._deadline_s = check_always, deadline_s
        sizes = [max(r.nbytes for r in regions[place::places]) for place in range(places)]
        self._pages = [Pages(size) for size in sizes]
        self._there: list[int | None] = [None] * places
        self._reading: list[tuple[int, Ticket] | None] = [None] * places
        self._checked: set[int] = set()

    @property
    def nbytes(self) -> int:
        return sum(pages.nbytes for pages in self._pages)

    def memory(self, layer: int) -> Tensor:
        """uint8, where the layer's region lies while it is there."""
        return self._pages[layer % self.places].memory[: self._regions[layer].nbytes]

    def has(self, layer: int) -> bool:
        """Whether it is there now."""
        return self._there[layer % self.places] == layer

    def need(self, layer: int) -> None:
        """Returns when the layer is there, until ``done`` with it. Raises as ``DiskMover.wait`` and
        the checks of ``DiskFile``."""
        place = layer % self.places
        if self.has(layer):
            return
        reading = self._reading[place]
        if reading is not None and reading[0] != layer:
            self._end(place)  # of a visit that was broken off
            reading = None
        if reading is None:
            self._begin(layer, ahead=False)
        else:
            self._mover.promote(reading[1])
        self._end(place)
        region = self._regions[layer]
        region.file.require_unchanged()
        if region.digest and (self._check_always or layer not in self._checked):
            data = self._pages[place].data[: region.nbytes]
            region.file.require_digest(data, region.offset, region.digest)
            self._checked.add(layer)
        self._there[place] = layer

    def done(self, layer: int) -> None:
        """The step is past it: the next layer of its place may come."""
        following = layer + self.places
        if following >= len(self._regions):
            following = layer % self.places
        if following != layer:
            self._begin(following, ahead=True)

    def _begin(self, layer: int, *, ahead: bool) -> None:
        place, region = layer % self.places, self._regions[layer]
        self._there[place] = None
        address = self._pages[place].address
        read = Read(region.file, region.offset, region.nbytes, address)
        (ticket,) = self._mover.submit([read], ahead=ahead)
        self._reading[place] = layer, ticket

    def _end(self, place: int) -> None:
        """Wait for what is being read into the place."""
        reading = self._reading[place]
        assert reading is not None, place
        try:
            self._mover.wait(reading[1], self._deadline_s)
        except DeadlineError:  # it is still being read
            raise
        except DataLossError:
            self._reading[place] = None
            raise
        self._reading[place] = None
