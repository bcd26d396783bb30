"""What a tier of the cache pool holds: bytes, quotas, pins, and which page goes first.

One ledger is of one tier: memory, or the disk. It knows keys and sizes, not contents. Its pages
never come to more than ``capacity`` bytes, and those of one namespace to no more than ``quota``.
What goes to make room is what was used least recently: of the namespace itself where its quota is
full, else of all. A pinned page stays. A key is held once, whoever brings it.

Pure: no clock. Wrong use (unpinning what is not pinned) is an assertion.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeserve.pools.cache.keys import Namespace, PageKey


@dataclass(frozen=True, slots=True)
class Held:
    """A page of the tier: whose it is, and how many bytes it takes."""

    namespace: Namespace
    nbytes: int


class Ledger:
    """``quota`` is at most ``capacity``; both in bytes."""

    def __init__(self, capacity: int, quota: int) -> None:
        assert 0 <= quota <= capacity, (quota, capacity)
        self.capacity = capacity
        self.quota = quota
        self.nbytes = 0
        self.pinned_bytes = 0
        # Least recently used first, of all and of each namespace.
        self._held: OrderedDict[PageKey, Held] = OrderedDict()
        self._of: dict[Namespace, OrderedDict[PageKey, None]] = {}
        self._bytes_of: dict[Namespace, int] = {}
        self._pins: dict[PageKey, int] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def namespaces(self) -> int:
        return len(self._of)

    def get(self, key: PageKey) -> Held | None:
        return self._held.get(key)

    def bytes_of(self, namespace: Namespace) -> int:
        return self._bytes_of.get(namespace, 0)

    def make_room(self, namespace: Namespace, nbytes: int) -> tuple[PageKey, ...] | None:
        """What must go so that a page of this size fits; None if it cannot. Changes nothing."""
        if nbytes > self.quota:
            return None
        going: dict[PageKey, None] = {}
        own = self.bytes_of(namespace) + nbytes - self.quota
        freed = self._collect(self._of.get(namespace, ()), own, going)
        if freed < own:
            return None
        rest = self.nbytes + nbytes - self.capacity - freed
        return None if self._collect(self._held, rest, going) < rest else tuple(going)

    def add(self, key: PageKey, namespace: Namespace, nbytes: int) -> None:
        """There is room, and the page is not here."""
        assert key not in self._held, "the page is held already"
        assert self.nbytes + nbytes <= self.capacity, "the tier overflows"
        assert self.bytes_of(namespace) + nbytes <= self.quota, "the namespace overflows"
        self._held[key] = Held(namespace, nbytes)
        self._of.setdefault(namespace, OrderedDict())[key] = None
        self._bytes_of[namespace] = self.bytes_of(namespace) + nbytes
        self.nbytes += nbytes

    def remove(self, key: PageKey) -> Held:
        """The page is here; whoever has pinned it has lost it."""
        held = self._held.pop(key)
        if self._pins.pop(key, 0):
            self.pinned_bytes -= held.nbytes
        self.nbytes -= held.nbytes
        own = self._of[held.namespace]
        del own[key]
        if own:
            self._bytes_of[held.namespace] -= held.nbytes
        else:
            del self._of[held.namespace], self._bytes_of[held.namespace]
        return held

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Consecutive pages of one prefix are used: the last goes before the first, which more
        requests can share. Those that are not here are passed over."""
        for key in reversed(keys):
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                self._of[held.namespace].move_to_end(key)

    def pin(self, key: PageKey) -> None:
        """The page stays until it is unpinned as often."""
        self._pins[key] = self._pins.get(key, 0) + 1
        if self._pins[key] == 1:
            self.pinned_bytes += self._held[key].nbytes

    def unpin(self, key: PageKey) -> None:
        """Of a page that is here, and pinned."""
        assert self._pins.get(key), "the page is not pinned"
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self.pinned_bytes -= self._held[key].nbytes

    def is_pinned(self, key: PageKey) -> bool:
        return key in self._pins

    def oldest_first(self) -> tuple[PageKey, ...]:
        return tuple(self._held)

    def check(self) -> None:
        """Every invariant, slowly; for tests."""
        assert self.nbytes == sum(h.nbytes for h in self._held.values()) <= self.capacity
        of: dict[Namespace, int] = {}
        for held in self._held.values():
            of[held.namespace] = of.get(held.namespace, 0) + held.nbytes
        assert of == self._bytes_of, "bytes of namespaces are wrong"
        assert max(of.values(), default=0) <= self.quota
        assert {k: h.namespace for k, h in self._held.items()} == {
            key: namespace for namespace, keys in self._of.items() for key in keys
        }
        assert self.pinned_bytes == sum(self._held[key].nbytes for key in self._pins)

    def _collect(self, keys: Iterable[PageKey], least: int, going: dict[PageKey, None]) -> int:
        """Adds pages to ``going`` until they come to ``least`` bytes; how many they are."""
        freed = 0
        for key in keys:
            if freed >= least:
                break
            if key not in self._pins and key not in going:
                going[key] = None
                freed += self._held[key].nbytes
        return freed
