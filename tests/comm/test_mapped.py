"""Segments in memory of devices: what each device does it does later, in its own order.

The devices here are lists of things to do, which hypothesis takes up in any order that fences
allow. What a device reads must be what its round sent, whatever the order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.exchange.base import Lanes
from moeserve.comm.exchange.mapped import CudaSharing, MappedExchange, ThreadSharing
from moeserve.comm.exchange.streams import NoWork
from moeserve.comm.group import Group
from moeserve.errors import ConfigError, LateRankError, UnavailableError

WORLD, MOST = 3, 256
CPU = torch.device("cpu")


@dataclass
class Device:
    """What it has been given and not done; None where something has to be done elsewhere first."""

    given: list[tuple[Callable[[], bool], Callable[[], None]]] = field(default_factory=list)

    def give(self, do: Callable[[], None], when: Callable[[], bool] = lambda: True) -> None:
        self.given.append((when, do))

    def step(self) -> bool:
        """The next thing, if it may be done."""
        if not self.given or not self.given[0][0]():
            return False
        self.given.pop(0)[1]()
        return True


class LateFence:
    """An event: ``recorded`` is the last record that a host has asked for, ``done`` the last that
    its device has come to."""

    def __init__(self, device: Device, calling: list[Device]) -> None:
        self.device, self.calling = device, calling
        self.recorded = self.done = 0

    def record(self) -> None:
        self.recorded += 1
        number = self.recorded

        def reached() -> None:
            self.done = number

        self.device.give(reached)

    def wait(self) -> None:
        number = self.recorded
        self.calling[0].give(lambda: None, lambda: self.done >= number)


def opened(
    devices: list[Device], calling: list[Device], lanes: Lanes, world: int = WORLD
) -> list[MappedExchange]:
    store, shared = HashStore(), {}

    def rank(r: int) -> MappedExchange:
        sharing = ThreadSharing(CPU, shared, lambda: LateFence(devices[r], calling))
        return MappedExchange(Group(r, world, store), lanes, "mapped", sharing)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


def content(source: int, target: int, lane: int, number: int, size: int) -> torch.Tensor:
    start = 7 * source + 31 * target + 101 * lane + 13 * number
    return ((torch.arange(size) + start) % 256).to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_devices_that_lag_read_what_was_sent_to_them(data: st.DataObject) -> None:
    """Rounds of two lanes; hosts run as far ahead as rounds let them."""
    devices = [Device() for _ in range(WORLD)]
    calling = [devices[0]]
    exchanges = opened(devices, calling, Lanes((MOST, MOST), 5.0))
    checked = 0

    def lag() -> None:
        for r in data.draw(st.lists(st.integers(0, WORLD - 1), max_size=6)):
            devices[r].step()

    def send(r: int, lane: int, number: int, sizes_RR: list[list[int]]) -> None:
        areas = exchanges[r].areas(lane, sizes_RR[r])
        for target, (area, size) in enumerate(zip(areas, sizes_RR[r], strict=True)):
            found = content(r, target, lane, number, size)
            devices[r].give(lambda area=area, found=found: area[: len(found)].copy_(found))
        exchanges[r].send(lane, sizes_RR[r])

    def receive(r: int, lane: int, number: int, sizes_RR: list[list[int]]) -> None:
        nonlocal checked
        for source, segment in enumerate(exchanges[r].receive(lane)):
            wanted = content(source, r, lane, number, sizes_RR[source][r])

            def check(segment: torch.Tensor = segment, wanted: torch.Tensor = wanted) -> None:
                nonlocal checked
                assert torch.equal(segment, wanted)
                checked += 1

            devices[r].give(check)

    rounds = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
    size = st.integers(0, MOST)
    for number, lane in enumerate(rounds):
        sizes_RR = [[data.draw(size) for _ in range(WORLD)] for _ in range(WORLD)]
        for do in (send, receive):
            for r in data.draw(st.permutations(range(WORLD))):
                calling[0] = devices[r]
                do(r, lane, number, sizes_RR)
                lag()
    while any(device.step() for device in devices):
        pass
    assert not any(device.given for device in devices)
    assert checked == len(rounds) * WORLD * WORLD
    for exchange in exchanges:
        exchange.close()


def test_who_never_comes_is_named_and_the_exchange_closed() -> None:
    one, other = opened([Device()] * 2, [Device()], Lanes((MOST,), 0.2), 2)
    one.areas(0, [8, 8])
    one.send(0, [8, 8])
    with pytest.raises(LateRankError, match="rank 1 did not send round 1 of lane 0"):
        one.receive(0)
    with pytest.raises(UnavailableError, match="rank 1 did not send"):
        one.fetch(torch.zeros(1))
    other.close()


class StuckWork(NoWork):
    """Of a device that waits for an event that never comes."""

    def passed(self, mark: object, wait_s: float) -> bool:
        time.sleep(wait_s)
        return False


def test_a_device_that_does_not_go_on_is_not_waited_for_beyond_the_deadline() -> None:
    store, shared = HashStore(), {}

    def rank(r: int) -> None:
        sharing = ThreadSharing(CPU, shared, work=StuckWork())
        exchange = MappedExchange(Group(r, 2, store), Lanes((MOST,), 0.2), "mapped", sharing)
        with pytest.raises(LateRankError) as late:
            exchange.fetch(torch.zeros(1))
        assert list(late.value.ranks) == [1 - r]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))


def test_a_torch_without_cuda_is_told_so_by_all_ranks_in_one_line() -> None:
    store = HashStore()

    def rank(r: int) -> str:
        group, cuda = Group(r, 2, store), torch.device("cuda", r)
        with pytest.raises(ConfigError) as told:
            MappedExchange(group, Lanes((64,)), "mapped", CudaSharing(cuda))
        return told.value.message

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rank, range(2))
    assert one == other
    assert one.startswith("no memory of cards between ranks: rank 0: 256 bytes of cuda:0 cannot be")
    assert "choose 'nccl' or 'shm'" in one and "\n" not in one
