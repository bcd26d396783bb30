"""The native half, by raw addresses; ``table`` and ``shm_exchange`` are the only callers."""

class Table:
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

def spread(
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
