"""The exchange of one rank with itself: a segment is read where it was written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.comm.exchange.backend import ExchangeBackend
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import Group


class LocalExchange(ExchangeBackend):
    name = "local"

    def __init__(self, group: Group, lanes: Lanes) -> None:
        assert group.world == 1, group.world
        super().__init__(group, lanes)
        self._area_L = [torch.empty(0, dtype=torch.uint8) for _ in lanes.bytes_L]
        self._size_L = [0] * len(lanes.bytes_L)

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        if len(self._area_L[lane]) < sizes_R[0]:
            self._area_L[lane] = torch.empty(sizes_R[0], dtype=torch.uint8)
        return [self._area_L[lane]]

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._size_L[lane] = sizes_R[0]
        self._count_sent(sizes_R)

    def receive(self, lane: int) -> list[Tensor]:
        return [self._area_L[lane][: self._size_L[lane]]]

    def _release(self) -> None:
        self._area_L = []
