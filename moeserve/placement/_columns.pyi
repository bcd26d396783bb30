import numpy as np
from numpy.typing import NDArray

def price(
    item_PK: NDArray[np.int32],
    weight_P: NDArray[np.int32],
    load_E: NDArray[np.int64],
    price_E: NDArray[np.int64],
    size: int,
    at_most: bool,
    least_load: int,
    most_load: int,
    threshold: int,
    most: int,
    fewer: bool,
    nodes: int,
    seconds: float,
    cpu: bool,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], bool, int]: ...
def descend(
    item_PK: NDArray[np.int32],
    weight_P: NDArray[np.int32],
    load_E: NDArray[np.int64],
    price_E: NDArray[np.int64],
    size: int,
    at_most: bool,
    least_load: int,
    most_load: int,
    start_CM: NDArray[np.int32],
    threshold: int,
    most: int,
    seed: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
def cover(
    item_PK: NDArray[np.int32],
    weight_P: NDArray[np.int32],
    load_E: NDArray[np.int64],
    price_E: NDArray[np.int64],
    size: int,
    least_load: int,
    most_load: int,
    item_CM: NDArray[np.int32],
    reduced_C: NDArray[np.int64],
    whole: int,
    budget: int,
    nodes: int,
    seconds: float,
    cpu: bool,
) -> tuple[NDArray[np.int32], int, bool, int]: ...

class Simplex:
    def __init__(
        self, size: int, places: int, alone_E: NDArray[np.float64], counted: bool
    ) -> None: ...
    def add(self, item_CM: NDArray[np.int32], cost_C: NDArray[np.float64]) -> None: ...
    def dearer(self, factor: float) -> None: ...
    def solve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
