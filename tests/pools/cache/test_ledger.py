"""A tier never holds more than it may, of anybody; what goes is what was used least recently."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.ledger import Ledger

A, B = Namespace(b"a"), Namespace(b"b")


def key(number: int) -> PageKey:
    return PageKey(bytes([number]))


class LedgerModel(RuleBasedStateMachine):
    """Beside the slow way: a list of (key, namespace, bytes), least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(100, 60)
        self.held: list[tuple[int, Namespace, int]] = []
        self.pins: dict[int, int] = {}

    def slow_room(self, namespace: Namespace, nbytes: int) -> list[int] | None:
        left = list(self.held)
        going = []

        def total(of: Namespace | None) -> int:
            return sum(n for _, whose, n in left if of is None or whose == of)

        for of, most in ((namespace, 60), (None, 100)):
            for entry in list(left):
                if total(of) + nbytes <= most:
                    break
                if entry[0] not in self.pins and of in (None, entry[1]):
                    left.remove(entry)
                    going.append(entry[0])
            if total(of) + nbytes > most:
                return None
        return going

    @rule(number=st.integers(0, 30), namespace=st.sampled_from([A, B]), nbytes=st.integers(1, 70))
    def add(self, number: int, namespace: Namespace, nbytes: int) -> None:
        if any(number == n for n, _, _ in self.held):
            return
        room = self.ledger.make_room(namespace, nbytes)
        slow = self.slow_room(namespace, nbytes)
        assert room == (None if slow is None else tuple(key(n) for n in slow))
        if slow is None or room is None:
            return
        for gone in room:
            self.ledger.remove(gone)
        self.held = [e for e in self.held if e[0] not in slow]
        self.ledger.add(key(number), namespace, nbytes)
        self.held.append((number, namespace, nbytes))

    @rule(numbers=st.lists(st.integers(0, 30), max_size=4))
    def touch(self, numbers: list[int]) -> None:
        self.ledger.touch([key(n) for n in numbers])
        for number in reversed(numbers):
            for entry in [e for e in self.held if e[0] == number]:
                self.held.remove(entry)
                self.held.append(entry)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if self.held:
            number = data.draw(st.sampled_from([n for n, _, _ in self.held]))
            self.ledger.pin(key(number))
            self.pins[number] = self.pins.get(number, 0) + 1

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pins:
            number = data.draw(st.sampled_from(sorted(self.pins)))
            self.ledger.unpin(key(number))
            self.pins[number] -= 1
            if not self.pins[number]:
                del self.pins[number]

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.held:
            entry = data.draw(st.sampled_from(self.held))
            self.ledger.remove(key(entry[0]))
            self.held.remove(entry)
            self.pins.pop(entry[0], None)

    @invariant()
    def agrees(self) -> None:
        self.ledger.check()
        assert self.ledger.oldest_first() == tuple(key(n) for n, _, _ in self.held)
        assert all(self.ledger.is_pinned(key(n)) for n in self.pins)


TestLedger = LedgerModel.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_tenant_over_its_quota_loses_its_own_pages_alone() -> None:
    ledger = Ledger(100, 60)
    ledger.add(key(1), B, 30)
    for number in (2, 3):
        ledger.add(key(number), A, 30)
    assert ledger.make_room(A, 30) == (key(2),)
    assert ledger.make_room(B, 30) == (key(1),)


def test_pinned_pages_stay_and_what_cannot_fit_is_refused() -> None:
    ledger = Ledger(100, 100)
    ledger.add(key(1), A, 60)
    ledger.pin(key(1))
    assert ledger.make_room(A, 50) is None
    ledger.unpin(key(1))
    assert ledger.make_room(A, 50) == (key(1),)
    assert ledger.make_room(A, 101) is None
    with pytest.raises(AssertionError, match="not pinned"):
        ledger.unpin(key(1))


def test_ends_of_prefixes_go_first() -> None:
    ledger = Ledger(100, 100)
    for number in (1, 2, 3):
        ledger.add(key(number), A, 30)
    ledger.touch([key(1), key(2), key(3)])
    assert ledger.oldest_first() == (key(3), key(2), key(1))
