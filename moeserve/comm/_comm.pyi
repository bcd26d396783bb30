"""The native half, by raw addresses; ``table``, ``exchange.shm``, ``exchange.tcp`` and
``control.mesh`` call it."""

from collections.abc import Sequence

class AssignmentTable:
    """The slots of a layer."""

    def __init__(self, expert_of_slot: list[int], experts: int, world: int) -> None: ...
    def assign(
        self,
        ids: int,
        tokens: int,
        chosen: int,
        home: int,
        ranks_per_unit: int,
        start: int,
        token: int,
        slot: int,
    ) -> list[int]:
        """Copies for each unit; fills start, token and slot."""

def relay(
    segments: list[int],
    rows: list[int],
    row_bytes: int,
    slots_at: int,
    chosen: int,
    ranks: int,
    slots_per_rank: int,
    start: int,
    token: int,
    slot: int,
) -> list[int]:
    """Copies for each rank; fills start, token and slot."""

def block_bytes(world: int, lane_bytes: list[int]) -> int:
    """What a rank's block of shared memory takes."""

def area_offset(world: int, lane_bytes: list[int], lane: int, parity: int, source: int) -> int:
    """Where the source's segments of every other round lie in a block."""

class Mailboxes:
    """The blocks of all ranks, as one of them uses them."""

    def __init__(
        self, rank: int, blocks: list[int], lane_bytes: list[int], spin_ns: int, yield_ns: int
    ) -> None: ...
    def begin(self, lane: int) -> int:
        """The lane's next round; its parity."""

    def send(self, lane: int, lengths: Sequence[int]) -> None: ...
    def receive(self, lane: int) -> list[int] | None:
        """Lengths by source; None where some are missing after a moment of looking."""

    def sleep(self, lane: int, ns: int) -> bool:
        """Until the round is complete, or for so long; whether it is."""

    def missing(self, lane: int) -> list[int]: ...

class Streams:
    """One connected socket for every other rank, not owned; addresses by [lane][parity][rank]."""

    def __init__(
        self,
        rank: int,
        fds: Sequence[int],
        lane_bytes: Sequence[int],
        outgoing: Sequence[int],
        incoming: Sequence[int],
    ) -> None: ...
    def begin(self, lane: int) -> int:
        """The lane's next round; its parity."""

    def send(self, lane: int, lengths: Sequence[int]) -> None: ...
    def receive(self, lane: int, ns: int) -> list[int]:
        """Lengths by rank; none where some are missing after so long, or can never come."""

    def missing(self, lane: int) -> list[int]: ...
    def disconnected(self) -> list[int]:
        """Ranks whose connection has ended."""

    def violation(self, rank: int) -> str:
        """What the rank sent that broke the protocol, if its connection was ended for that."""

    def silent(self, ns: int) -> list[int]:
        """Those who did not answer within so long."""

class Silence:
    """The native twin of ``control.silence``. Seconds."""

    def __init__(
        self, ranks: Sequence[int], now: float, limit_s: float, period_s: float
    ) -> None: ...
    def record(self, rank: int, now: float) -> None: ...
    def late(self, now: float) -> list[tuple[int, float]]:
        """Late ranks and how long they have been silent."""

class Mesh:
    """One rank's end of the mesh; owns the connected sockets, and a copy of ``news``, to
    which it writes when there is an alarm, when a rank has to stop, and on closing."""

    def __init__(
        self,
        rank: int,
        names: Sequence[int],
        record_bytes: int,
        dialled: Sequence[int],
        accepted: Sequence[int],
        limit_s: float,
        period_s: float,
        news: int,
    ) -> None: ...
    def watch(self) -> None:
        """From now on silence is an alarm, and rounds are counted."""

    def post(self, record: bytes) -> None: ...
    def collect(self, ns: int) -> bytes | None:
        """The records of all; None where some are missing after so long, or there is an alarm."""

    def missing(self) -> list[int]:
        """Ranks whose record of the posted round has not come."""

    def absent(self, ns: int) -> list[int]:
        """Ranks that answer within so long that they have not posted this rank's round."""

    def wait_begun(self, ns: int) -> bool: ...
    def wake(self) -> None: ...
    def set_activity(self, text: str) -> None: ...
    def fail(self, reason: str, ranks: Sequence[int]) -> None: ...
    def end(self) -> None: ...
    def ask_to_stop(self) -> None: ...
    def alarm(self) -> tuple[bytes, list[int]] | None:
        """Its reason in UTF-8, and the ranks that it blames."""

    def ended(self) -> bool: ...
    def stop_asked(self) -> bool: ...
    def posted(self) -> int:
        """The number of the round that was posted last, from 1 on since ``watch``."""

    def counters(self) -> list[int]:
        """Rounds, messages and bytes of rounds, other messages and bytes."""

    def close(self) -> None: ...
