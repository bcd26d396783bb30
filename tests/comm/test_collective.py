"""Collectives that no host waits for: begun in one order by all, given up when a rank is lost.

``Hub`` stands for the library and the devices: the n-th collective of every rank of a communicator
is one, and done once all have begun it; whoever begins another one in its place would wait for ever
on devices, and fails here. A device that is to read what comes is held up until it is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.exchange.base import Lanes
from moeserve.comm.exchange.collective import BeginningOrder, CollectiveExchange
from moeserve.comm.exchange.media import StreamMedium
from moeserve.comm.exchange.open import open_host_exchanges
from moeserve.comm.group import Group, Topology
from moeserve.errors import LateRankError, UnavailableError

WORLD, MOST = 3, 300
CPU = torch.device("cpu")
NAMES = ("outer", "inner")


@dataclass
class Collective:
    """One of all ranks, whose parts come one by one."""

    name: str
    parts: dict[int, tuple[Tensor, Tensor, list[int], list[int]]] = field(default_factory=dict)
    complete: bool = False

    def move(self) -> None:
        for target, (incoming, _, come_R, _) in self.parts.items():
            pieces = incoming.split(come_R)
            for source, (_, outgoing, _, go_R) in self.parts.items():
                pieces[source].copy_(outgoing.split(go_R)[target])
        self.complete = True


class Hub:
    """All devices: one sequence of collectives, over all communicators of a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sequence: list[Collective] = []
        self.begun = [0] * WORLD
        self.ended: list[tuple[int, str, bool]] = []

    def begin(self, rank: int, name: str, *part: Any) -> Collective:
        with self.lock:
            number = self.begun[rank]
            self.begun[rank] += 1
            if number == len(self.sequence):
                self.sequence.append(Collective(name))
            one = self.sequence[number]
            assert one.name == name, "ranks begin different collectives: on devices a deadlock"
            one.parts[rank] = part
            if len(one.parts) == WORLD:
                one.move()
            return one


class Moving:
    """A ``Transfer``: ``held_up`` are those that the rank's device waits for."""

    def __init__(self, one: Collective, held_up: list[Collective]) -> None:
        self.one, self.held_up = one, held_up

    def done(self, wait_s: float) -> bool:
        return self.one.complete

    def order_after(self) -> None:
        self.held_up.append(self.one)


class ModelMedium:
    """Of one rank; ``held_up`` is its device's, over all its communicators."""

    device, ordered = CPU, True

    def __init__(self, hub: Hub, rank: int, name: str, held_up: list[Collective]) -> None:
        self.name = name
        self.hub, self.rank, self.held_up = hub, rank, held_up

    def mark(self) -> list[Collective]:
        return list(self.held_up)

    def passed(self, mark: list[Collective], wait_s: float) -> bool:
        until = time.monotonic() + wait_s
        while not all(one.complete for one in mark):
            if time.monotonic() >= until:
                return False
            time.sleep(0.0005)
        return True

    def to_host(self, numbers: Tensor) -> Tensor:
        return numbers.clone()

    def begin(self, mark: list[Collective], *part: Any) -> Moving:
        return Moving(self.hub.begin(self.rank, self.name, *part), self.held_up)

    def end(self, failed: bool) -> None:
        self.hub.ended.append((self.rank, self.name, failed))


def as_ranks(
    hub: Hub, lanes: Lanes, run: Callable[[int, dict[str, CollectiveExchange]], Any]
) -> list[Any]:
    """Threads, each with two exchanges that share an order."""
    store = HashStore()

    def rank(r: int) -> Any:
        held_up: list[Collective] = []
        order, made = BeginningOrder(), dict[str, CollectiveExchange]()
        for name in NAMES:
            group = Group(r, WORLD, store)
            on_host = open_host_exchanges(group, Topology((0,) * WORLD), lanes, key=name)
            medium = ModelMedium(hub, r, name, held_up)
            made[name] = CollectiveExchange(group, lanes, *on_host, medium, order)
        try:
            return run(r, made)
        finally:
            for exchange in made.values():
                exchange.close()

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(rank, range(WORLD)))


def content(source: int, target: int, number: int, size: int) -> Tensor:
    return ((torch.arange(size) + 7 * source + 31 * target + 13 * number) % 256).to(torch.uint8)


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[str, str, int, int, list[list[int]]]]:
    """What all ranks call in turn: (verb, exchange, lane, number of the round, sizes)."""
    script, waiting = [], dict[tuple[str, int], tuple[int, list[list[int]]]]()
    for number in range(draw(st.integers(1, 7))):
        at = draw(st.sampled_from(NAMES)), draw(st.integers(0, 1))
        if at in waiting:
            script.append(("receive", *at, *waiting.pop(at)))
        sizes_RR = [[draw(st.integers(0, MOST)) for _ in range(WORLD)] for _ in range(WORLD)]
        script.append(("send", *at, number, sizes_RR))
        waiting[at] = number, sizes_RR
        if draw(st.booleans()):
            script.append(("fetch", *at, number, []))
    last = draw(st.permutations(sorted(waiting)))
    return script + [("receive", *at, *waiting[at]) for at in last]


@settings(max_examples=20, deadline=None)
@given(scripts())
def test_all_ranks_begin_the_same_collectives_whatever_they_call_for_next(
    script: list[tuple[str, str, int, int, list[list[int]]]],
) -> None:
    hub = Hub()

    def run(r: int, made: dict[str, CollectiveExchange]) -> int:
        checked = 0
        for verb, name, lane, number, sizes_RR in script:
            exchange = made[name]
            if verb == "fetch":
                assert exchange.fetch(torch.tensor([number])).tolist() == [number]
            elif verb == "send":
                areas = exchange.areas(lane, sizes_RR[r])
                for target, (area, size) in enumerate(zip(areas, sizes_RR[r], strict=True)):
                    area[:size] = content(r, target, number, size)
                exchange.send(lane, sizes_RR[r])
            else:
                segments = exchange.receive(lane)
                exchange.fetch(torch.zeros(1))  # the device has come so far
                for source, segment in enumerate(segments):
                    wanted = content(source, r, number, sizes_RR[source][r])
                    assert torch.equal(segment, wanted)
                    checked += 1
        return checked

    rounds = sum(verb == "send" for verb, *_ in script)
    assert as_ranks(hub, Lanes((MOST, MOST), 20.0), run) == [rounds * WORLD] * WORLD
    assert len(hub.sequence) == rounds
    assert sorted(hub.ended) == [(r, n, False) for r in range(WORLD) for n in sorted(NAMES)]


def test_a_rank_lost_between_sizes_and_bytes_is_named_and_the_communicator_aborted() -> None:
    """Rank 2 has sent, and does not come to begin: the others' devices are held up."""
    hub, over = Hub(), threading.Barrier(WORLD)

    def run(r: int, made: dict[str, CollectiveExchange]) -> str:
        exchange = made["inner"]
        exchange.areas(0, [8] * WORLD)
        exchange.send(0, [8] * WORLD)
        if r == 2:
            over.wait(20)
            return ""
        exchange.receive(0)  # no host waits
        with pytest.raises(LateRankError) as late:
            exchange.fetch(torch.zeros(1))
        with pytest.raises(UnavailableError, match="rank 2 did not send"):
            exchange.areas(0, [8] * WORLD)
        over.wait(20)
        assert list(late.value.ranks) == [2]
        return late.value.message

    one, other, _ = as_ranks(hub, Lanes((MOST,), 0.4), run)
    assert one == other == "rank 2 did not send round 1 of lane 0 within 0.4 s"
    assert {(0, "inner", True), (1, "inner", True)} <= set(hub.ended)


def test_a_communicator_that_breaks_names_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own error says no rank: rank 2 has sent and answers no more."""
    hub, over = Hub(), threading.Barrier(WORLD)

    def broken(*_: Any) -> None:
        raise RuntimeError("remote process exited")

    monkeypatch.setattr(ModelMedium, "begin", broken)

    def run(r: int, made: dict[str, CollectiveExchange]) -> str:
        exchange = made["inner"]
        exchange.areas(0, [8] * WORLD)
        exchange.send(0, [8] * WORLD)
        if r == 2:
            over.wait(20)
            return ""
        with pytest.raises(LateRankError) as late:
            exchange.receive(0)
        with pytest.raises(UnavailableError, match="rank 2 did not send"):
            exchange.areas(0, [8] * WORLD)
        over.wait(20)
        return late.value.message

    one, other, _ = as_ranks(hub, Lanes((MOST,), 0.2), run)
    assert one == other == "rank 2 did not send round 1 of lane 0 within 0.2 s"


class Stream:
    """Of a device that stands still: what it is given, in order."""

    def __init__(self, *_: Any) -> None:
        self.given: list[str] = []

    def wait_event(self, event: Any) -> None:
        self.given.append("wait")


def test_a_collective_has_come_when_the_device_says_so_not_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL calls the work of a communicator that failed completed, while its kernel waits on."""
    come, own, current = threading.Event(), Stream(), Stream()
    event = SimpleNamespace(record=lambda stream: stream.given.append("mark"), query=come.is_set)
    module = SimpleNamespace(
        Stream=lambda _: own,
        Event=lambda: event,
        stream=nullcontext,
        current_stream=lambda _: current,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    work = SimpleNamespace(is_completed=lambda: True, wait=lambda: own.given.append("collective"))
    group = SimpleNamespace(alltoall_base=lambda *_: work)
    medium, none = StreamMedium("nccl", group, CPU), torch.empty(0)
    transfer = medium.begin(medium.mark(), none, none, [0], [0])
    assert own.given == ["wait", "collective", "mark"]
    assert not transfer.done(0.0)
    transfer.order_after()
    assert current.given == ["mark", "wait"]
    come.set()
    assert transfer.done(0.0)
