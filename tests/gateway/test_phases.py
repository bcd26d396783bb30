"""Connections by what they wait for: who is late, who gives way, how much is held."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moeserve.gateway.http.phases import FRESH_S, HELD_S, ConnectionPhase, Phases

LIMITS = {ConnectionPhase.IDLE: 10.0, ConnectionPhase.HEAD: 2.0, ConnectionPhase.BODY: 5.0}
KEYS = st.integers(0, 7)


class Model(RuleBasedStateMachine):
    """Beside it the slow and obvious: a dict of (phase, since), and one of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: Phases[int] = Phases(LIMITS)
        self.now = 0.0
        self.at: dict[int, tuple[ConnectionPhase, float]] = {}
        self.bytes: dict[int, int] = {}

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=KEYS, phase=st.sampled_from(ConnectionPhase))
    def enter(self, key: int, phase: ConnectionPhase) -> None:
        self.phases.enter(key, phase, self.now)
        if self.at.get(key, (None,))[0] is not phase:
            self.at[key] = (phase, self.now)

    @rule(key=KEYS)
    def leave(self, key: int) -> None:
        self.phases.leave(key)
        self.at.pop(key, None)
        self.bytes.pop(key, None)

    @rule(key=KEYS, count=st.integers(0, 100))
    def hold(self, key: int, count: int) -> None:
        if key in self.at:
            self.phases.hold(key, count)
            self.bytes[key] = count

    @invariant()
    def equals_the_obvious(self) -> None:
        assert len(self.phases) == len(self.at)
        for key in range(8):
            assert (key in self.phases) == (key in self.at)
            assert self.phases.held(key) == self.bytes.get(key, 0)
        assert self.phases.held_bytes == sum(self.bytes.values())
        late = {
            key
            for key, (phase, since) in self.at.items()
            if phase in LIMITS and since + LIMITS[phase] <= self.now
        }
        assert {key for key, _ in self.phases.late(self.now)} == late
        unasked = (
            ConnectionPhase.OPENING,
            ConnectionPhase.IDLE,
            ConnectionPhase.HEAD,
            ConnectionPhase.LEAVING,
        )
        free = {
            k: since
            for k, (phase, since) in self.at.items()
            if phase in unasked and since < self.now - FRESH_S
        }
        held = {
            k: since
            for k, (phase, since) in self.at.items()
            if phase in (ConnectionPhase.BODY, ConnectionPhase.STALLED)
            and since < self.now - HELD_S
        }
        gone = self.phases.least_missed(self.now)
        candidates = free or held
        if not candidates:
            assert gone is None
        else:
            assert gone is not None
            assert candidates[gone] == min(candidates.values())


TestPhases = Model.TestCase
TestPhases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_new_connection_has_a_moment_before_it_gives_way() -> None:
    phases: Phases[int] = Phases(LIMITS)
    phases.enter(1, ConnectionPhase.IDLE, 7.0)
    assert phases.least_missed(7.0) is None
    assert phases.least_missed(7.0 + FRESH_S) is None
    assert phases.least_missed(7.1 + FRESH_S) == 1
