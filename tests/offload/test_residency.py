"""Which experts stay: what is held is never given up, and the books are those of a plain model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moeserve.offload.residency import EMPTY, LEAST_P, PRIOR_STEPS, UNMEASURED_P, Residency

LAYERS = (4, 0, 6, 5)
KEYS = [(layer, expert) for layer, count in enumerate(LAYERS) for expert in range(count)]


class Books(RuleBasedStateMachine):
    """Against dictionaries that say who has which slot, and how often each is held."""

    @initialize(slots=st.integers(1, 12))
    def begin(self, slots: int) -> None:
        self.residency = Residency(LAYERS, slots, half_life=3.0)
        self.slot_of: dict[tuple[int, int], int] = {}
        self.held: Counter[int] = Counter()
        self.evicted = 0

    @rule()
    def next_step(self) -> None:
        self.residency.begin_step()

    @rule(layer=st.sampled_from((0, 2, 3)), data=st.data())
    def use(self, layer: int, data: st.DataObject) -> None:
        some = data.draw(st.sets(st.integers(0, LAYERS[layer] - 1), min_size=1))
        self.residency.use(layer, np.array(sorted(some)))

    @rule(layer=st.sampled_from((0, 2, 3)), now=st.integers(0, 3), data=st.data())
    def place(self, layer: int, now: int, data: st.DataObject) -> None:
        absent = [e for e in range(LAYERS[layer]) if (layer, e) not in self.slot_of]
        if not absent:
            return
        wanted = data.draw(st.lists(st.sampled_from(absent), unique=True))
        room = self.residency.slots - sum(count > 0 for count in self.held.values())
        slots = self.residency.place(layer, wanted, now)
        assert len(slots) == min(len(wanted), room) == len(set(slots))
        empty = set(range(self.residency.slots)) - set(self.slot_of.values())
        if len(slots) <= sum(not self.held[slot] for slot in empty):
            assert set(slots) <= empty, "nobody goes while there is an empty slot"
        for expert, slot in zip(wanted, slots, strict=False):
            assert not self.held[slot], "what is held is never given up"
            self.evicted += slot in self.slot_of.values()
            self.slot_of = {k: s for k, s in self.slot_of.items() if s != slot}
            self.slot_of[layer, expert] = slot
            self.held[slot] += 1

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        slots = data.draw(st.sets(st.integers(0, self.residency.slots - 1)))
        self.residency.hold(np.array(sorted(slots), np.int32))
        self.held.update(slots)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = sorted(slot for slot, count in self.held.items() if count)
        if held:
            slots = data.draw(st.sets(st.sampled_from(held)))
            self.residency.release(np.array(sorted(slots), np.int32))
            self.held.subtract(slots)

    @rule(data=st.data())
    def vacate(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, self.residency.slots - 1))
        self.residency.vacate(slot)
        self.slot_of = {key: s for key, s in self.slot_of.items() if s != slot}

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "residency"):
            return
        residency = self.residency
        found = {key: int(residency.slot_LE[key]) for key in KEYS}
        assert {key: slot for key, slot in found.items() if slot != EMPTY} == self.slot_of
        for slot in range(residency.slots):
            owners = [key for key, s in self.slot_of.items() if s == slot]
            assert residency.occupant(slot) == (owners[0] if owners else None)
        assert residency.free == residency.slots - sum(c > 0 for c in self.held.values())
        assert residency.evictions == self.evicted


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=30)


def residents(residency: Residency, layer: int) -> set[int]:
    return set(np.flatnonzero(residency.slot_LE[layer] != EMPTY).tolist())


def bring(residency: Residency, layer: int, experts: list[int]) -> None:
    """As a step does that uses them: what is not there is read."""
    residency.use(layer, np.array(experts))
    absent = [e for e in experts if residency.slot_LE[layer, e] == EMPTY]
    residency.release(residency.place(layer, absent, layer))


class Policy:
    """What the module says of who goes, in its words: uses by step, and their weights."""

    def __init__(self, layers: Sequence[int], half_life: float) -> None:
        self.layers, self.half_life, self.step = layers, half_life, 0
        self.used: dict[tuple[int, int], set[int]] = {}

    def off(self, key: tuple[int, int], now: int) -> float:
        """How many steps its next use is away."""

        def weight(step: int) -> float:
            return 0.5 ** ((self.step - step) / self.half_life)

        used = sum(weight(step) for step in self.used.get(key, ()))
        steps = sum(weight(step) for step in range(1, self.step + 1))
        p = (used + PRIOR_STEPS * UNMEASURED_P) / (steps + PRIOR_STEPS)
        p = min(1.0, max(LEAST_P, p))
        return (key[0] - now) % len(self.layers) / len(self.layers) + 1 / p - 1


CALLS = st.lists(
    st.tuples(st.sampled_from((0, 2, 3)), st.sets(st.integers(0, 3), min_size=1), st.booleans()),
    max_size=40,
)


@given(CALLS, st.integers(4, 9), st.sampled_from((1e12, 4.0)))
def test_those_go_whose_next_use_is_farthest_off(
    calls: list[tuple[int, set[int], bool]], slots: int, most_unit: float
) -> None:
    """Also where what is counted is brought back to small numbers again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeserve.offload.residency.MOST_UNIT", most_unit)
        residency, policy = Residency(LAYERS, slots, half_life=3.0), Policy(LAYERS, 3.0)
        for layer, experts, new_step in calls:
            if new_step or not policy.step:
                residency.begin_step()
                policy.step += 1
            residency.use(layer, np.array(sorted(experts)))
            for expert in experts:
                policy.used.setdefault((layer, expert), set()).add(policy.step)
            absent = [e for e in sorted(experts) if residency.slot_LE[layer, e] == EMPTY]
            before = {key for key in KEYS if residency.slot_LE[key] != EMPTY}
            residency.release(residency.place(layer, absent, layer))
            gone = {key for key in before if residency.slot_LE[key] == EMPTY}
            farthest = max((policy.off(key, layer) for key in before - gone), default=0.0)
            assert all(policy.off(key, layer) >= farthest - 1e-6 for key in gone)


def test_what_most_steps_use_stays_and_what_few_use_goes() -> None:
    residency = Residency((8,), 4)
    for step in range(40):
        residency.begin_step()
        bring(residency, 0, [0, 1, 2 + step % 6])
    assert {0, 1} <= residents(residency, 0)


def test_what_was_hot_long_ago_goes() -> None:
    residency = Residency((8,), 4, half_life=4.0)
    for _ in range(20):
        residency.begin_step()
        bring(residency, 0, [0, 1])
    for step in range(60):
        residency.begin_step()
        bring(residency, 0, [2, 3, 4 + step % 4])
    assert residents(residency, 0) >= {2, 3}
    assert not residents(residency, 0) & {0, 1}


def test_of_equals_the_layer_that_was_just_done_goes_first() -> None:
    residency = Residency((2, 2, 2), 6)
    residency.begin_step()
    for layer in range(3):
        bring(residency, layer, [0, 1])
    residency.begin_step()
    slots = residency.slot_LE.copy()
    residency.vacate(int(slots[1, 0]))
    residency.hold([int(slots[1, 0])])
    (given,) = residency.place(1, [0], 1)
    assert given in slots[0].tolist(), "layer 0 comes last of all"


def test_a_prior_says_who_stays_before_anything_is_measured() -> None:
    prior_LE = np.array([[0.9, 0.01, 0.9, 0.01]])
    residency = Residency((4,), 3, prior_LE=prior_LE)
    residency.release(residency.place(0, [0, 1, 2], 0))
    residency.release(residency.place(0, [3], 0))
    assert residents(residency, 0) == {0, 2, 3}


def test_more_hits_than_what_was_used_last_where_some_are_hotter_than_others() -> None:
    """Routing by a power law, each layer's own, in rooms of a quarter and a half."""
    random, layers, experts = np.random.default_rng(5), 6, 32
    order_LE = np.array([random.permutation(experts) for _ in range(layers)])
    p_E = 1.0 / np.arange(1, experts + 1)
    steps = [
        [order[random.choice(experts, 4, replace=False, p=p_E / p_E.sum())] for order in order_LE]
        for _ in range(150)
    ]
    for slots in (layers * experts // 4, layers * experts // 2):
        residency, hits = Residency((experts,) * layers, slots), 0
        recent: dict[tuple[int, int], None] = {}  # the least recently used first
        least = 0
        for step in steps:
            residency.begin_step()
            for layer, chosen in enumerate(step):
                hits += int((residency.slot_LE[layer, chosen] != EMPTY).sum())
                bring(residency, layer, chosen.tolist())
                for expert in chosen.tolist():
                    least += (layer, expert) in recent
                    recent.pop((layer, expert), None)
                    recent[layer, expert] = None
                    if len(recent) > slots:
                        del recent[next(iter(recent))]
        assert hits > 1.05 * least, (slots, hits, least)
