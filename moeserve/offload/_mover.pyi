"""The native half, by raw addresses; only ``mover`` calls it."""

from collections.abc import Sequence

class Mover:
    """At most so many tickets at once."""

    def __init__(self, threads: int, most: int) -> None: ...
    def submit(self, wanted: Sequence[tuple[int, int, int, int, int]], ahead: bool) -> int:
        """Of (direct, buffered, offset, nbytes, address): the first ticket, or -1."""

    def wait(self, ticket: int, seconds: float) -> tuple[int, int, int]:
        """Outcome, the byte of the file where it failed, errno."""

    def promote(self, ticket: int) -> None: ...
    def cancel(self, ticket: int) -> bool: ...
    def counts(self) -> dict[str, int]: ...
