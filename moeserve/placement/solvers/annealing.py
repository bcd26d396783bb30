"""What the annealed search over one layer is given, and what it gives back. Plain data.

``grouping`` states a layer as a ``LayerGrouping``; ``search`` anneals it; ``twin`` and the native
loop take the same decisions on it. Letters are those of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class AnnealingSchedule:
    """Swaps tried per slot and round; heat is the share of a slot's tokens risked at first."""

    swaps_per_slot: int = 400
    rounds: int = 2
    heat: float = 0.04
    seed: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class LayerGrouping:
    """One layer's problem: swap slots between devices so that tokens occupy cheap places.

    Each token pays ``weight_DT`` for every device it occupies and ``weight_NT`` for every node
    (with one node, nothing). ``load_SW`` above ``cap_DW`` is charged ``penalty`` per unit.
    ``bond_SS`` (or empty) is the price of two slots sharing a device, ``price_SD`` (or empty) that
    of a slot lying on a device.
    """

    slot_TK: I32
    node_D: I32
    weight_DT: U8
    weight_NT: U8
    load_SW: I64
    cap_DW: I64
    penalty: int
    bond_SS: I64
    price_SD: I64

    def require_shapes(self, slots: int) -> None:
        """``AssertionError`` unless every array has the shape its name says, for ``slots`` slots.

        The loops behind ``search`` rely on it: the native one reads no shape but these.
        """
        devices, tokens = len(self.node_D), len(self.slot_TK)
        assert self.weight_DT.shape == (devices, tokens)
        assert self.weight_NT.shape == (self.node_D.max() + 1, tokens)
        assert self.cap_DW.shape == (devices, self.load_SW.shape[1])
        assert len(self.load_SW) == slots
        assert self.bond_SS.shape in {(slots, slots), (0, 0)}
        assert self.price_SD.shape in {(slots, devices), (0, 0)}
        assert self.slot_TK.max(initial=-1) < slots
        assert self.slot_TK.shape[1] <= 255


@dataclass(frozen=True, slots=True, eq=False)
class GroupedLayer:
    """The best arrangement met: its device per slot, its cost, and its load above the caps."""

    device_S: I32
    cost: int
    excess: int
