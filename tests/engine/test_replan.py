"""Ranks switch a layer before the same step or not at all, whatever is late; and what they are told
survives the wire or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.engine.replan.messages import (
    ERROR_CHARS,
    MOST_SLOTS_OF_A_LAYER,
    PlanOrder,
    PlanReport,
    describe,
)
from moeserve.engine.replan.switch import RankTurns, agreed_turn, layers_to_change
from moeserve.errors import InternalError, PlacementError

OLD = {1: (0, 1, 2, 3), 3: (3, 2, 1, 0), 4: (0, 1, 2, 3)}
NEW = {1: (1, 0, 2, 3), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}
Message = tuple[str, int]


def test_the_layers_that_differ_change() -> None:
    assert layers_to_change(OLD, NEW) == [(1, NEW[1]), (4, NEW[4])]
    assert layers_to_change(OLD, dict(OLD)) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({1: (0, 1, 2, 3)}, r"layers \[1\], the model's are \[1, 3, 4\]"),
        ({**NEW, 1: (0, 1, 2, 3, 0, 1)}, "--slots 4"),
        ({**NEW, 4: (0, 1, 2, 2)}, r"experts \[3\] are in one plan only"),
    ],
)
def test_a_plan_that_ranks_cannot_change_to_is_refused(
    rows: dict[int, tuple[int, ...]], said: str
) -> None:
    with pytest.raises(PlacementError, match=said):
        layers_to_change(OLD, rows)


def prepared(turn: int) -> RankTurns:
    turns = RankTurns()
    assert turns.begin(turn)
    assert turns.finish(turn)
    return turns


def test_what_all_records_name_is_switched_once() -> None:
    turns = prepared(3)
    assert turns.promise() == 3
    assert turns.settle(agreed_turn(3, 3))
    assert (turns.switched, turns.prepared, turns.wanted) == (3, 0, 0)
    assert turns.promise() == 0
    assert not turns.settle(0)


def test_a_promise_is_kept_until_the_records_are_there() -> None:
    for others, switched in ((3, 3), (0, 0)):
        turns = prepared(3)
        turns.promise()
        turns.abandon(3)
        assert turns.prepared == 3
        assert turns.is_open(3)
        assert turns.settle(agreed_turn(min(3, others), 3)) == bool(switched)
        assert (turns.switched, turns.prepared) == (switched, 0)
        assert not turns.is_open(3)


def test_what_was_dropped_before_the_record_is_named_by_none() -> None:
    turns = prepared(3)
    turns.abandon(3)
    assert turns.promise() == 0
    assert not turns.settle(0)
    assert not turns.finish(3)
    assert not turns.begin(3)
    assert turns.begin(4)


def test_one_layer_at_a_time_is_held() -> None:
    turns = prepared(3)
    turns.promise()
    assert turns.begin(4)
    assert not turns.room
    assert turns.settle(3)
    assert turns.room
    assert turns.finish(4)
    assert turns.begin(5)  # 4 is not promised: it goes
    assert turns.room


def test_the_least_of_the_turns_is_not_enough() -> None:
    """One rank was told to drop turn 4 and has prepared 5, the other has not heard of it yet."""
    one, other = prepared(4), prepared(4)
    one.abandon(4)
    assert one.begin(5)
    assert one.finish(5)
    named = one.promise(), other.promise()
    assert named == (5, 4)
    agreed = agreed_turn(min(named), max(named))
    assert not one.settle(agreed)
    assert not other.settle(agreed)


def test_out_of_step_is_a_bug_that_shows() -> None:
    turns = prepared(1)
    assert turns.is_open(1)
    assert not turns.is_open(0)
    with pytest.raises(InternalError, match="without a record"):
        turns.settle(0)
    turns.promise()
    with pytest.raises(InternalError, match="before the last one was settled"):
        turns.promise()
    with pytest.raises(InternalError, match="named turn 1, and all agree on 2"):
        turns.settle(2)


@dataclass
class Rank:
    """Messages reach it in any order; it reads, posts a record and settles when it is its turn to.

    ``history[n]`` are the turns in use after the records of step n.
    """

    inbox: list[Message] = field(default_factory=list)
    turns: RankTurns = field(default_factory=RankTurns)
    reading: int = 0
    used: list[int] = field(default_factory=list)
    history: list[tuple[int, ...]] = field(default_factory=list)

    def deliver(self, index: int) -> None:
        what, turn = self.inbox.pop(index)
        if what == "prepare":
            self.turns.begin(turn)
        else:
            self.turns.abandon(turn)

    def work(self, fails: bool) -> None:
        if not self.reading:
            self.reading = self.turns.wanted if self.turns.room else 0
        else:
            if fails and self.turns.wanted == self.reading:
                self.turns.abandon(self.reading)
            else:
                self.turns.finish(self.reading)
            self.reading = 0


@dataclass
class LockStep:
    """Ranks and the records of their steps; who settles a step may be late, nobody is early."""

    ranks: list[Rank]
    records: list[dict[int, int]] = field(default_factory=list)

    def advance(self, number: int) -> None:
        """Rank ``number`` posts its next record, or settles the one it posted."""
        rank = self.ranks[number]
        step = len(rank.history)
        if len(self.records) == step:
            self.records.append({})
        records = self.records[step]
        if number not in records:
            records[number] = rank.turns.promise()
        elif len(records) == len(self.ranks):
            agreed = agreed_turn(min(records.values()), max(records.values()))
            if rank.turns.settle(agreed):
                rank.used.append(agreed)
            rank.history.append(tuple(rank.used))

    def send(self, message: Message) -> None:
        for rank in self.ranks:
            rank.inbox.append(message)

    def finish(self, turn: int) -> None:
        """Everything arrives, everyone works, until all have switched ``turn``."""
        self.send(("prepare", turn))
        for rank in self.ranks:
            while rank.inbox:
                rank.deliver(0)
        for _ in range(12):
            for number, rank in enumerate(self.ranks):
                rank.work(fails=False)
                self.advance(number)


# What happens, to which ranks: often to all, or to all but one.
ACTIONS = st.tuples(
    st.sampled_from(["prepare", "abandon", "fail", *["deliver", "work", "step", "step"] * 2]),
    st.sampled_from([(0, 1, 2), (0, 1, 2), (0, 1), (1, 2), (0, 2), (0,), (1,), (2,)]),
)


@settings(deadline=None, max_examples=1000)
@given(world=st.integers(1, 3), actions=st.lists(ACTIONS, max_size=60), newest_first=st.booleans())
def test_whatever_is_late_all_ranks_switch_the_same_before_the_same_step(
    world: int, actions: list[tuple[str, tuple[int, ...]]], newest_first: bool
) -> None:
    group, turn = LockStep([Rank() for _ in range(world)]), 0
    first = group.ranks[0]
    dropped: set[int] = set()  # that rank 0 knew would not be switched any more
    for what, numbers in actions:
        if what == "prepare":
            turn += 1
            first.turns.begin(turn)
            group.send(("prepare", turn))
        elif what == "abandon":
            first.turns.abandon(turn)
            group.send(("abandon", turn))
        for number in (n for n in numbers if n < world):
            rank = group.ranks[number]
            if what == "deliver" and rank.inbox:
                rank.deliver(-1 if newest_first else 0)
            elif what in ("work", "fail"):
                rank.work(what == "fail")
            elif what == "step":
                group.advance(number)
        if first.turns.switched != turn and not first.turns.is_open(turn):
            dropped.add(turn)
    for histories in zip(*(rank.history for rank in group.ranks), strict=False):
        assert len(set(histories)) == 1
    group.finish(turn + 1)
    used = first.used
    assert all(rank.used == used for rank in group.ranks)
    assert used[-1] == turn + 1
    assert used == sorted(set(used))
    assert not dropped & set(used)


ROUND_TRIPS: list[PlanOrder | PlanReport] = [
    PlanOrder(1, 0, ()),
    PlanOrder(7, 3, (3, 0, 0, 2)),
    PlanReport(1),
    PlanReport(2, error="no such file"),
    PlanReport(3, pause_s=0.25),
    PlanReport(4, prepare_s=1.5, bytes_read=2**40),
]


@pytest.mark.parametrize("message", ROUND_TRIPS)
def test_messages_survive_json(message: PlanOrder | PlanReport) -> None:
    assert type(message).of_json(json.loads(json.dumps(message.as_json()))) == message


def test_errors_are_described_by_their_message_or_their_kind() -> None:
    assert describe(PlacementError("too many slots")) == "too many slots"
    assert describe(KeyError("x")) == "KeyError: 'x'"


def test_a_long_error_is_cut() -> None:
    said = PlanReport(1, error="x" * (ERROR_CHARS + 1)).as_json()
    assert len(PlanReport.of_json(said).error) == ERROR_CHARS


def test_a_layer_of_as_many_slots_as_may_be_is_an_order() -> None:
    most = PlanOrder(1, 0, (0,) * MOST_SLOTS_OF_A_LAYER).as_json()
    assert len(PlanOrder.of_json(most).expert_S) == 1 << 20
    with pytest.raises(PlacementError, match="at most 1048576 experts"):
        PlanOrder.of_json({**most, "expert_S": [0] * (MOST_SLOTS_OF_A_LAYER + 1)})


def without(message: PlanOrder | PlanReport, key: str) -> dict[str, Any]:
    return {k: v for k, v in message.as_json().items() if k != key}


HOSTILE: list[tuple[Callable[[Any], object], Any, str]] = [
    (PlanOrder.of_json, [], "has .* this one list"),
    (PlanOrder.of_json, without(ROUND_TRIPS[0], "turn"), "order has"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "more": 1}, "order has"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "turn": 0}, "turn: '0'"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "turn": True}, "turn: 'True'"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "turn": 2**60}, "turn"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "layer": -1}, "layer: '-1'"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "layer": 1.0}, "layer: '1.0'"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "expert_S": "abc"}, "list of at most"),
    (PlanOrder.of_json, {**ROUND_TRIPS[0].as_json(), "expert_S": [0, None]}, "expert_S: 'None'"),
    (PlanReport.of_json, without(ROUND_TRIPS[2], "error"), "report has"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "error": 1}, "at most 2000 letters"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "error": "x" * 2001}, "at most 2000"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "pause_s": -1.0}, "pause_s: '-1.0'"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "prepare_s": None}, "prepare_s: 'None'"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "prepare_s": float("nan")}, "no seconds"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "prepare_s": float("inf")}, "no seconds"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "bytes_read": "9" * 99}, "bytes_read"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "bytes_read": -1}, "bytes_read: '-1'"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "bytes_read": 2**53}, "bytes_read"),
    (PlanReport.of_json, {**ROUND_TRIPS[2].as_json(), "turn": 0}, "turn: '0'"),
]


@pytest.mark.parametrize(("read", "found", "said"), HOSTILE)
def test_what_no_rank_would_say_is_refused(
    read: Callable[[Any], object], found: Any, said: str
) -> None:
    with pytest.raises(PlacementError, match=said):
        read(found)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
KEYS = ("turn", "layer", "expert_S", "error", "pause_s", "prepare_s", "bytes_read")


@given(json_values | st.dictionaries(st.sampled_from(KEYS), json_values))
def test_any_json_is_a_message_or_refused(found: Any) -> None:
    for kind in (PlanOrder, PlanReport):
        try:
            message: PlanOrder | PlanReport = kind.of_json(found)
        except PlacementError:
            continue
        assert kind.of_json(message.as_json()) == message
