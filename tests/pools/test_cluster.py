"""A gateway's requests over members that come, go, give back and fall silent: every position once,
in order, the same tokens as of one process; and every request ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import Event, FinishReason, Logprobs, Request, RequestId, SamplingParams
from moeserve.engine.loop import Unobserved
from moeserve.engine.ranks.door_requests import Return
from moeserve.engine.ranks.rank_links import RankListener
from moeserve.engine.request_state import EachEvent
from moeserve.engine.sequence import History, KvSource
from moeserve.errors import ExhaustedError, InvalidRequestError, UnavailableError
from moeserve.pools.cluster import SETTLE_S, ClusterEngine
from moeserve.pools.cluster_links import MemberLinks
from moeserve.pools.cluster_requests import ASIDE_S, MOST_ASIDE_S, MOST_LOSSES, SetAside
from moeserve.pools.members import Member, MemberLoad, Report, Role

LONGEST = 6


def token_at(prompt: Sequence[int], position: int) -> int:
    """What any member makes there."""
    return (sum(prompt) * 31 + position * 7) % 997


def answer(request: Request) -> list[int]:
    return [token_at(request.prompt_ids, i) for i in range(request.params.max_tokens)]


@dataclass
class Running:
    request: Request
    history: History
    made: int
    scored: int

    def step(self) -> Event:
        """Its next token, with the log-probabilities of the prompt before the first."""
        request = self.request
        last = self.made + 1 == request.params.max_tokens
        event = Event(
            request.id,
            (token_at(request.prompt_ids, self.made),),
            finish=FinishReason.LENGTH if last else None,
        )
        self.made += 1
        return event

    def scores(self) -> Event:
        """Those of the prompt that were not ``reached`` before."""
        wanted = range(self.scored, len(self.request.prompt_ids) - 1)
        self.scored = len(self.request.prompt_ids) - 1
        return Event(self.request.id, prompt_logprobs=tuple(Logprobs(-float(i)) for i in wanted))


class FakeMember:
    """The member and the link to it."""

    def __init__(self, name: str, listener: Callable[[], RankListener]) -> None:
        self.member = Member(name, name, Role.DECODE, f"{name}:1")
        self.listener = listener
        self.running: dict[RequestId, Running] = {}
        self.broken = False
        self.closed = False
        self.seen: list[RequestId] = []

    def submit(self, request: Request, history: History) -> None:
        assert request.id not in self.seen, "an id is of one attempt"
        self.seen.append(request.id)
        reached = history.reached if request.params.prompt_logprobs is not None else 0
        self.running[request.id] = Running(request, history, len(history.output_ids), reached)

    def end(self, request_id: RequestId, reason: FinishReason) -> None:
        if request_id in self.running and not self.broken:
            running = self.running.pop(request_id)
            asyncio.get_running_loop().call_soon(
                self.listener().on_events, 0, [Event(running.request.id, finish=reason)]
            )

    async def close(self) -> None:
        self.closed = True
        self.lose("this end closed")

    def lose(self, why: str) -> list[Running]:
        """The stream breaks; what ran there may go on unheard."""
        lost, self.running = list(self.running.values()), {}
        self.listener().on_events(
            0, [Event(r.request.id, finish=FinishReason.UNAVAILABLE, error=why) for r in lost]
        )
        return lost

    def step(self, request_id: RequestId) -> None:
        running = self.running[request_id]
        events = []
        if running.request.params.prompt_logprobs is not None and not running.made:
            events.append(running.scores())
        events.append(running.step())
        if events[-1].finish is not None:
            del self.running[request_id]
        self.listener().on_events(0, events)


@dataclass(frozen=True)
class Picked:
    decode: Member
    prefill: Member | None = None
    alternates: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Change:
    put: tuple[Report, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass
class House:
    """Members, what the gateway sees of them, and what clients got."""

    capacity: int = 8
    now: float = 0.0
    members: dict[str, FakeMember] = field(default_factory=dict)
    present: dict[str, FakeMember] = field(default_factory=dict)
    got: dict[RequestId, list[int]] = field(default_factory=dict)
    scored: dict[RequestId, list[float]] = field(default_factory=dict)
    ends: dict[RequestId, Event] = field(default_factory=dict)
    prefill: Member | None = None
    answered: list[int] = field(default_factory=list)
    cluster: ClusterEngine = field(init=False)
    observed: Unobserved = field(default_factory=Unobserved)

    def __post_init__(self) -> None:
        self.cluster = ClusterEngine(
            self.View(self),
            self.route,
            MemberLinks(lambda member, listener: self.members[member.id]),
            self.observed,
            name="g",
            max_queue=4,
            clock=lambda: self.now,
            on_answer=self.answered.append,
        )

    @dataclass
    class View:
        house: House

        def members(self) -> tuple[Report, ...]:
            return tuple(Report(m.member) for m in self.house.present.values())

    def route(
        self, request: Request, made: int, exclude: frozenset[str], now: float
    ) -> Picked | None:
        free = [
            m
            for m in self.present.values()
            if m.member.id not in exclude and len(m.running) < self.capacity
        ]
        if not free:
            return None
        return Picked(min(free, key=lambda m: len(m.running)).member, self.prefill)

    def join(self, name: str) -> FakeMember:
        member = FakeMember(name, lambda: self.cluster)
        self.members[name] = self.present[name] = member
        self.look(put=(Report(member.member),))
        return member

    def leave(self, name: str) -> None:
        del self.present[name]
        self.look(gone=(name,))

    def drain(self, name: str) -> None:
        member = self.present.pop(name)
        self.look(put=(Report(member.member, MemberLoad(draining=True)),))

    def look(self, put: tuple[Report, ...] = (), gone: tuple[str, ...] = ()) -> None:
        self.cluster.on_change(Change(put, gone))

    def submit(self, request: Request) -> None:
        self.got[request.id], self.scored[request.id] = [], []
        self.cluster.submit(request, EachEvent(self.take))

    def take(self, event: Event) -> None:
        assert event.request_id not in self.ends, "nothing comes after the end"
        self.got[event.request_id] += event.token_ids
        self.scored[event.request_id] += [scores.chosen for scores in event.prompt_logprobs]
        if event.finish is not None:
            self.ends[event.request_id] = event

    def finish_all(self) -> None:
        """Everything that is with a member runs to its end."""
        for member in self.members.values():
            while member.running:
                member.step(next(iter(member.running)))


def asked(name: str, prompt: Sequence[int] = (1, 2, 3), **params: int) -> Request:
    params.setdefault("max_tokens", LONGEST)
    return Request(RequestId(name), tuple(prompt), SamplingParams(**params))


def test_a_request_goes_to_a_member_and_its_tokens_to_the_client() -> None:
    async def run() -> None:
        house = House()
        member = house.join("a")
        house.submit(asked("r"))
        house.finish_all()
        assert house.got["r"] == answer(asked("r"))
        assert house.ends["r"].finish is FinishReason.LENGTH
        assert house.cluster.counters.finished == {FinishReason.LENGTH: 1}
        assert house.cluster.counters.generated_tokens == LONGEST
        assert len(member.seen) == 1
        assert house.cluster.load().running == house.cluster.load().waiting == 0
        await house.cluster.close()
        assert member.closed

    asyncio.run(run())


def test_who_is_to_prefill_is_told_to_the_one_who_decodes() -> None:
    async def run() -> None:
        house = House(prefill=Member("p", "p", Role.PREFILL, "p:1", server_name="cert"))
        member = house.join("a")
        house.submit(asked("r"))
        (running,) = member.running.values()
        assert running.history == History(sources=(KvSource("p:1", "cert"),))
        assert house.cluster.counts.sent_with_sources == 1
        await house.cluster.close()

    asyncio.run(run())


def test_another_member_goes_on_where_a_lost_one_was() -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        house.submit(asked("r"))
        (inner,) = first.running
        first.step(inner)
        first.step(inner)
        second = house.join("b")
        (late,) = first.lose("killed")
        (running,) = second.running.values()
        assert running.history.output_ids == tuple(answer(asked("r"))[:2])
        assert running.history.moved
        house.cluster.on_events(0, [late.step()])  # what the first one says once it is back
        house.finish_all()
        assert house.got["r"] == answer(asked("r"))
        assert house.cluster.counts.lost == house.cluster.counts.late_events == 1
        await house.cluster.close()

    asyncio.run(run())


def test_a_member_whose_lease_ends_is_lost_with_what_it_ran() -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        house.submit(asked("r"))
        first.step(next(iter(first.running)))
        house.leave("a")
        assert house.cluster.load().waiting == 1
        house.join("b")
        await asyncio.sleep(0)
        assert first.closed
        house.finish_all()
        assert house.got["r"] == answer(asked("r"))
        await house.cluster.close()

    asyncio.run(run())


def test_a_request_that_is_lost_too_often_ends_with_what_was_said() -> None:
    async def run() -> None:
        house = House()
        house.join("a")
        house.submit(asked("r"))
        for turn in range(MOST_LOSSES + 1):
            assert "r" not in house.ends
            house.members["a"].lose(f"loss {turn}")
            house.now += MOST_ASIDE_S
            house.look()
        end = house.ends[RequestId("r")]
        assert end.finish is FinishReason.UNAVAILABLE
        assert f"{MOST_LOSSES + 1} members were lost" in end.error
        assert f"a: loss {MOST_LOSSES}" in end.error
        assert house.cluster.counts.given_up == 1
        await house.cluster.close()

    asyncio.run(run())


def test_losses_with_tokens_in_between_are_no_end() -> None:
    async def run() -> None:
        house = House()
        member = house.join("a")
        house.submit(asked("r"))
        for _ in range(LONGEST - 1):
            member.step(next(iter(member.running)))
            member.lose("again")
            house.now += MOST_ASIDE_S
            house.look()
        house.finish_all()
        assert house.got["r"] == answer(asked("r"))
        await house.cluster.close()

    asyncio.run(run())


def test_scores_of_a_prompt_come_once_also_when_members_are_lost() -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        request = asked("r", (5, 6, 7, 8), prompt_logprobs=0)
        house.submit(request)
        running = first.running[next(iter(first.running))]
        all_scores = running.scores().prompt_logprobs
        part = Event(running.request.id, prompt_logprobs=all_scores[:2])
        house.cluster.on_events(0, [part])
        second = house.join("b")
        first.lose("killed")
        assert next(iter(second.running.values())).history.reached == 2
        house.finish_all()
        assert house.scored["r"] == [s.chosen for s in all_scores]
        assert house.got["r"] == answer(request)
        await house.cluster.close()

    asyncio.run(run())


def test_a_request_waits_in_order_and_no_longer_than_its_deadline() -> None:
    async def run() -> None:
        house = House(capacity=1)
        house.submit(replace(asked("late"), deadline=1.0))
        house.submit(asked("first"))
        house.submit(asked("second"))
        assert house.cluster.load().waiting == 3
        house.now = 1.0
        member = house.join("a")
        assert house.ends["late"].finish is FinishReason.DEADLINE
        assert next(iter(member.running.values())).request.id.startswith("first ")
        house.finish_all()
        assert list(house.ends) == ["late", "first", "second"]
        await house.cluster.close()

    asyncio.run(run())


def test_a_member_that_does_not_end_a_late_request_is_not_waited_for() -> None:
    async def run() -> None:
        house = House()
        member = house.join("a")
        house.submit(replace(asked("r"), deadline=1.0))
        member.broken = True
        for house.now in (1.0, 4.0):
            assert "r" not in house.ends
            house.look()
        assert house.ends["r"].finish is FinishReason.DEADLINE
        await house.cluster.close()

    asyncio.run(run())


def test_what_cannot_be_taken_in_is_refused() -> None:
    async def run() -> None:
        house = House()
        house.submit(asked("r"))
        with pytest.raises(InvalidRequestError, match="in use"):
            house.submit(asked("r"))
        for i in range(3):
            house.submit(asked(f"more {i}"))
        with pytest.raises(ExhaustedError, match="4 requests are waiting"):
            house.submit(asked("one more"))
        await house.cluster.close()
        with pytest.raises(UnavailableError):
            house.submit(asked("later"))
        assert {e.finish for e in house.ends.values()} == {FinishReason.UNAVAILABLE}

    asyncio.run(run())


def test_a_cancelled_request_ends_wherever_it_is() -> None:
    async def run() -> None:
        house = House(capacity=1)
        member = house.join("a")
        house.submit(asked("runs"))
        house.submit(asked("waits"))
        house.cluster.abort(RequestId("waits"))
        assert house.ends["waits"].finish is FinishReason.ABORT
        house.cluster.abort(RequestId("runs"), FinishReason.STOP)
        await asyncio.sleep(0)
        assert house.ends["runs"].finish is FinishReason.STOP
        assert not member.running
        house.submit(asked("lost while it ends"))
        member.broken = True
        house.cluster.abort(RequestId("lost while it ends"))
        member.lose("killed")
        assert house.ends["lost while it ends"].finish is FinishReason.ABORT
        await house.cluster.close()

    asyncio.run(run())


def test_members_that_fail_again_are_left_alone_for_longer() -> None:
    aside = SetAside()
    aside.failed("a", 0.0)
    aside.failed("a", 0.1)  # the same failure
    assert aside.members(ASIDE_S - 0.01) == {"a"}
    assert aside.members(ASIDE_S) == frozenset()
    aside.failed("a", 1.0)
    assert aside.members(1.0 + 2 * ASIDE_S - 0.01) == {"a"}
    aside.worked("a")
    assert aside.members(1.0) == frozenset()
    for turn in range(20):
        aside.failed("b", 100.0 * turn)
    assert aside.members(1900.0 + MOST_ASIDE_S) == frozenset()


def test_what_runs_at_a_member_that_drains_moves_to_another_while_it_runs() -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        house.submit(asked("r"))
        (inner,) = first.running
        first.step(inner)
        second = house.join("b")
        house.drain("a")
        first.step(inner)  # it goes on until the other has its KV
        (taking,) = second.running.values()
        assert taking.history.sources == (KvSource("a:1", "", running=inner),)
        second.step(taking.request.id)  # tells again what the first one told
        assert house.got["r"] == answer(asked("r"))[:2]
        del first.running[inner]
        house.cluster.on_returned(0, Return(inner, 0))
        house.finish_all()
        assert house.got["r"] == answer(asked("r"))
        assert (house.cluster.counts.moves, house.cluster.counts.moved) == (1, 1)
        await house.cluster.close()

    asyncio.run(run())


@pytest.mark.parametrize("lost", ["a", "b"])
def test_while_a_request_moves_either_member_may_be_lost(lost: str) -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        house.submit(asked("r"))
        first.step(next(iter(first.running)))
        second = house.join("b")
        assert house.cluster.move(RequestId("r"))
        assert not house.cluster.move(RequestId("r")), "it is on its way"
        house.leave(lost)
        assert len(first.seen) + len(second.seen) == 2, "the other one goes on"
        await asyncio.sleep(0)
        house.finish_all()
        assert house.got["r"] == answer(asked("r"))
        await house.cluster.close()

    asyncio.run(run())


def test_a_request_that_ends_where_it_was_is_ended_where_it_went() -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        house.submit(asked("r"))
        first.step(next(iter(first.running)))
        second = house.join("b")
        assert house.cluster.move(RequestId("r"))
        while first.running:
            first.step(next(iter(first.running)))
        assert house.got["r"] == answer(asked("r"))
        assert not second.running
        await asyncio.sleep(0)
        assert list(house.ends) == ["r"]
        await house.cluster.close()

    asyncio.run(run())


def test_one_that_has_no_token_yet_does_not_move() -> None:
    async def run() -> None:
        house = House()
        house.join("a")
        house.submit(asked("r"))
        house.join("b")
        assert not house.cluster.move(RequestId("r"))
        assert not house.cluster.move(RequestId("none"))
        await house.cluster.close()

    asyncio.run(run())


def test_of_a_crowded_member_the_shortest_request_that_goes_on_moves_and_then_stays() -> None:
    async def run() -> None:
        house = House()
        first = house.join("a")
        for name, prompt, tokens in (("long", 9, 40), ("short", 3, 40), ("ends", 2, 10)):
            house.submit(asked(name, range(1, prompt), max_tokens=tokens))
        assert not house.cluster.move_from("a", "b"), "none has a token"
        for inner in list(first.running):
            first.step(inner)
        second, third = house.join("b"), house.join("c")
        house.now = 10.0
        assert house.cluster.move_from("a", "c")
        assert not second.seen
        assert [inner.split()[0] for inner in third.running] == ["short"]
        (taken,) = (inner for inner in first.running if inner.startswith("short"))
        del first.running[taken]
        house.cluster.on_returned(0, Return(taken, 0))
        third.step(next(iter(third.running)))
        house.now += SETTLE_S / 2
        assert not house.cluster.move_from("c", "b"), "it has just come"
        house.now += SETTLE_S / 2
        assert house.cluster.move_from("c", "b")
        assert house.cluster.move_from("a", "b")
        assert not house.cluster.move_from("a", "b"), "of the last one too little is left"
        assert not house.cluster.move_from("nobody", "b")
        house.finish_all()
        assert all(house.got[name] for name in ("long", "short", "ends"))
        await house.cluster.close()

    asyncio.run(run())


def test_how_long_answers_were_is_told_of_those_that_ended_well() -> None:
    async def run() -> None:
        house = House()
        house.join("a")
        house.submit(asked("r"))
        house.submit(asked("aborted"))
        house.cluster.abort(RequestId("aborted"))
        await asyncio.sleep(0)
        house.finish_all()
        assert house.answered == [LONGEST]
        await house.cluster.close()

    asyncio.run(run())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            "submit step step step lose late return leave drain join abort move".split()
        ),
        st.integers(0, 1 << 16),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_every_position_comes_once_and_every_request_ends(actions: list[tuple[str, int]]) -> None:
    asyncio.run(drive(actions))


async def drive(actions: list[tuple[str, int]]) -> None:
    house = House(capacity=3)
    house.join("m0")
    requests: dict[RequestId, Request] = {}
    lost: list[Running] = []
    aborted: set[RequestId] = set()
    for count, (action, drawn) in enumerate(actions):
        await act(house, action, drawn, count, requests, lost, aborted)
        house.now += 0.2
    # In the end there is a member that works, and everything is over.
    house.join("last")
    for _ in range(20):
        house.finish_all()
        await asyncio.sleep(0)
        house.now += MOST_ASIDE_S
        house.look()
    assert house.ends.keys() == requests.keys()
    for request_id, request in requests.items():
        end, got = house.ends[request_id], house.got[request_id]
        assert got == answer(request)[: len(got)]
        if end.finish is FinishReason.LENGTH:
            assert got == answer(request)
        else:
            assert request_id in aborted or end.finish is FinishReason.UNAVAILABLE
    load = house.cluster.load()
    assert (load.running, load.waiting) == (0, 0)
    await house.cluster.close()


async def act(
    house: House,
    action: str,
    drawn: int,
    count: int,
    requests: dict[RequestId, Request],
    lost: list[Running],
    aborted: set[RequestId],
) -> None:
    names = sorted(house.present)
    member = house.present[names[drawn % len(names)]] if names else None
    running = list(member.running) if member else []
    if action == "submit" and house.cluster.load().waiting < 4:
        request = asked(f"r{count}", (drawn % 50, count), max_tokens=1 + drawn % LONGEST)
        requests[request.id] = request
        house.submit(request)
    elif action == "step" and member and running:
        member.step(running[drawn % len(running)])
    elif action == "lose" and member:
        lost += member.lose("killed")
    elif action == "late" and lost:
        one = lost[drawn % len(lost)]
        if one.made < one.request.params.max_tokens:
            house.cluster.on_events(0, [one.step()])
    elif action == "return" and member and running:
        gone = member.running.pop(running[drawn % len(running)])
        house.cluster.on_returned(0, Return(gone.request.id, 0))
    elif action == "leave" and member:
        lost += list(member.running.values())
        house.leave(member.member.id)
    elif action == "drain" and member:
        house.drain(member.member.id)
    elif action == "move" and requests:
        house.cluster.move(sorted(requests)[drawn % len(requests)])
    elif action == "join":
        house.join(f"m{count + 1}")
    elif action == "abort" and requests:
        chosen = sorted(requests)[drawn % len(requests)]
        aborted.add(chosen)
        house.cluster.abort(chosen)
        await asyncio.sleep(0)
