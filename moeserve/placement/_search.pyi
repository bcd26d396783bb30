from typing import Any

import numpy as np
from numpy.typing import NDArray

def group(
    slot_TK: NDArray[np.int32],
    device_S: NDArray[np.int32],
    node_D: NDArray[np.int32],
    weight_DT: NDArray[np.uint8],
    weight_NT: NDArray[np.uint8],
    load_SW: NDArray[np.int64],
    cap_DW: NDArray[np.int64],
    bond_SS: NDArray[np.int64],
    price_SD: NDArray[np.int64],
    draw: NDArray[np.int32],
    penalty: int,
    heat: int,
    steps: int,
    seed: int,
) -> tuple[int, int]: ...
def saved_bound(slot_TK: NDArray[np.int32], slots: int, partners: int) -> int: ...
def balance(
    load_EW: NDArray[np.float64],
    speed_D: NDArray[np.float64],
    recounts: int,
    expert_S: NDArray[np.int32],
) -> float: ...
def assign(cost_RC: NDArray[np.float64], column_R: NDArray[np.int32]) -> None: ...
def __getattr__(name: str) -> Any: ...
