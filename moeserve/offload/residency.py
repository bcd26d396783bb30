"""Which experts stay in memory: decisions over a number of slots that all layers share.

Pure: what is used comes in, places go out; it knows no bytes, files or clocks. A slot is empty, or
bears one expert of one layer; it is held while it is read into or computed with, and what is held
is never given up. Otherwise the expert goes whose next use is farthest off, as far as is known:
layer l comes (l - now) mod L layers from now in this step, and an expert that a step uses with
probability p is used 1/p - 1 steps after that on average. p is measured: the share of steps that
used the expert, of which the newer weigh more (half of what was known is forgotten in ``half_life``
steps). So the hottest stay, of equals those whose layer is nearest, and what was read ahead until
its layer is done. What is known beforehand counts as ``PRIOR_STEPS`` steps: ``prior_LE``, from
counts of earlier routing, else the same for all.

Letters: L layers (all of the model, also those without experts), E experts of the layer with most,
S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EMPTY = -1
# Of recorded routing of GPT-OSS-20B, 8 to 16 miss least, and 32 up to a fifth more: what a new
# request prefers comes late then (``bench/residency.py``).
HALF_LIFE = 12.0
LEAST_P = 1e-3
MOST_UNIT = 1e12
UNMEASURED_P = 0.05
PRIOR_STEPS = 2.0


class Residency:
    """``experts_L`` counts the experts of each layer, 0 where there are none."""

    def __init__(
        self,
        experts_L: Sequence[int],
        slots: int,
        *,
        half_life: float = HALF_LIFE,
        prior_LE: NDArray[np.float64] | None = None,
    ) -> None:
        layers, most = len(experts_L), max(experts_L, default=0)
        assert slots > 0, slots
        assert prior_LE is None or prior_LE.shape == (layers, most), prior_LE
        self.slots = slots
        self._grow = 2.0 ** (1.0 / half_life)
        self._slot_LE = np.full((layers, most), EMPTY, np.int32)
        prior_LE = np.full((layers, most), UNMEASURED_P) if prior_LE is None else prior_LE
        self._prior_LE = PRIOR_STEPS * prior_LE
        # Uses and steps count as much as ``_unit`` when they come, which grows from step to step.
        self._unit = 1.0
        self._used_LE = np.zeros((layers, most))
        self._steps = 0.0
        self._when_LE = np.zeros((layers, most), np.int64)
        self._layer_S = np.full(slots, EMPTY, np.int32)
        self._expert_S = np.full(slots, EMPTY, np.int32)
        self._held_S = np.zeros(slots, np.int32)
        # Of the expert that a slot bears: so that what goes is found by one pass over the slots.
        self._used_S = np.zeros(slots)
        self._prior_S = np.ones(slots)
        self._step = 0
        self.experts_L = tuple(experts_L)
        self.evictions = 0  # experts that gave their slot to another

    @property
    def slot_LE(self) -> NDArray[np.int32]:
        """The slot of each expert, ``EMPTY`` where it has none; to be read only."""
        return self._slot_LE

    def occupant(self, slot: int) -> tuple[int, int] | None:
        """Layer and expert."""
        layer = int(self._layer_S[slot])
        return None if layer == EMPTY else (layer, int(self._expert_S[slot]))

    @property
    def free(self) -> int:
        """Slots that are not held."""
        return int((self._held_S == 0).sum())

    def begin_step(self) -> None:
        self._step += 1
        self._unit *= self._grow
        self._steps += self._unit
        if self._unit > MOST_UNIT:
            for counted in (self._used_LE, self._used_S):
                counted /= self._unit
            self._steps /= self._unit
            self._unit = 1.0

    def use(self, layer: int, experts: NDArray[np.int64]) -> None:
        """This step uses these experts of the layer, which are distinct."""
        new = experts[self._when_LE[layer, experts] != self._step]
        self._used_LE[layer, new] += self._unit
        self._when_LE[layer, new] = self._step
        slots = self._slot_LE[layer, new]
        there = slots != EMPTY
        self._used_S[slots[there]] = self._used_LE[layer, new[there]]

    def place(self, layer: int, experts: Sequence[int], now: int) -> list[int]:
        """Slots for experts that have none, in their order, held from here on; fewer than there are
        experts where all others are held. ``now`` is the layer that runs."""
        chosen = self._victims(min(len(experts), self.slots), now)
        for slot, expert in zip(chosen, experts, strict=False):
            assert self._slot_LE[layer, expert] == EMPTY, (layer, expert)
            self.evictions += self.occupant(slot) is not None
            self.vacate(slot)
            self._slot_LE[layer, expert] = slot
            self._layer_S[slot], self._expert_S[slot] = layer, expert
            self._used_S[slot] = self._used_LE[layer, expert]
            self._prior_S[slot] = self._prior_LE[layer, expert]
            self._held_S[slot] += 1
        return chosen

    def hold(self, slots: Sequence[int] | NDArray[np.int32]) -> None:
        """They are distinct; each is to be released as often as it was held."""
        self._held_S[slots] += 1

    def release(self, slots: Sequence[int] | NDArray[np.int32]) -> None:
        self._held_S[slots] -= 1
        assert (self._held_S[slots] >= 0).all(), slots

    def release_one(self, slot: int) -> None:
        self._held_S[slot] -= 1
        assert self._held_S[slot] >= 0, slot

    def vacate(self, slot: int) -> None:
        """What it bears is no longer there. Whoever holds it still releases it."""
        if (before := self.occupant(slot)) is not None:
            self._slot_LE[before] = EMPTY
            self._layer_S[slot] = self._expert_S[slot] = EMPTY

    def _victims(self, count: int, now: int) -> list[int]:
        """The slots to give up first, empty ones before all others."""
        layers = len(self.experts_L)
        away_L = (np.arange(layers) - now) % layers / layers - 1.0
        counted_S = self._used_S / self._unit + self._prior_S
        every_S = np.clip((self._steps / self._unit + PRIOR_STEPS) / counted_S, 1.0, 1.0 / LEAST_P)
        off_S = away_L[self._layer_S] + every_S
        off_S[self._layer_S == EMPTY] = np.inf
        off_S[self._held_S > 0] = -np.inf
        if count < self.slots:
            first_N = np.argpartition(-off_S, count - 1)[:count]
        else:
            first_N = np.arange(self.slots)
        ordered = first_N[np.lexsort((first_N, -off_S[first_N]))]
        return [int(slot) for slot in ordered if off_S[slot] > -np.inf]
