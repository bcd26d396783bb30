"""What is counted of KV on its way, where it happens; read by metrics and tests, never reset."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from moeserve.engine.ranks.counted import ReceivedKv

# Members that are counted apart, of those that come and go.
MOST_ADDRESSES = 256


@dataclass(slots=True)
class KvCounters:
    """Of one member, both as who fetches and as who is fetched from.

    Who fetches: ``runs`` and ``bytes`` that were checked and imported, bytes by transport
    (``grpc``, ``memory``, ``pool``); ``bad_digests`` of runs, ``bad_frames`` whose head was not
    whole, ``retries`` of runs; ``sources_lost``, by what was wrong; tokens whose KV was
    ``fetched`` and those ``recomputed`` although a source was named; ``waited_s`` from submission
    until the engine had the request. ``calls`` and ``borrowed`` are under way now. ``from_bytes``
    and ``from_runs`` are what came, by the address it came from; beyond ``MOST_ADDRESSES`` of these
    it is ``others``.

    Who is fetched from: ``sent_runs``, ``sent_bytes`` by transport, ``sent_within`` bytes of layers
    that left while the step that computes their KV still ran; ``serving`` calls under way,
    ``handed`` requests that another member took over while they ran: what they made meanwhile left
    in ``rounds``, and ``last_positions`` when they had stopped, for which each has stalled.
    """

    runs: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    bad_digests: int = 0
    bad_frames: int = 0
    retries: int = 0
    sources_lost: dict[str, int] = field(default_factory=dict)
    fetched: int = 0
    recomputed: int = 0
    waited_s: float = 0.0
    calls: int = 0
    borrowed: int = 0
    from_bytes: dict[str, int] = field(default_factory=dict)
    from_runs: dict[str, int] = field(default_factory=dict)
    sent_runs: int = 0
    sent_bytes: dict[str, int] = field(default_factory=dict)
    sent_within: int = 0
    serving: int = 0
    handed: int = 0
    rounds: int = 0
    last_positions: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, name: str, count: float = 1) -> None:
        """From any thread."""
        with self.lock:
            setattr(self, name, getattr(self, name) + count)

    def add_to(self, name: str, key: str, count: int = 1) -> None:
        """The same, of what is counted by kind."""
        with self.lock:
            table: dict[str, int] = getattr(self, name)
            table[key] = table.get(key, 0) + count

    def add_from(self, address: str, nbytes: int, runs: int) -> None:
        """So much came from a member at this address."""
        known = address in self.from_runs or len(self.from_runs) < MOST_ADDRESSES
        key = address if known else "others"
        self.add_to("from_bytes", key, nbytes)
        self.add_to("from_runs", key, runs)

    def received(self) -> tuple[ReceivedKv, ...]:
        """What came, by where from."""
        with self.lock:
            return tuple(
                ReceivedKv(address, nbytes, self.from_runs.get(address, 0))
                for address, nbytes in self.from_bytes.items()
            )
