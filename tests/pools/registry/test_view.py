"""A view shows whoever is in any registry, and forgets nobody for a registry's sake."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.pools.members import Member, MemberLoad, Report, Role
from moeserve.pools.registry.base import Changes
from moeserve.pools.registry.view import GRACE_S, LEFT_S, ClusterView, ViewChange


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def report(name: str, sequence: int = 1, role: Role = Role.DECODE) -> Report:
    return Report(Member(name, name, role, "127.0.0.1:80"), MemberLoad(sequence))


def shown(view: ClusterView) -> set[str]:
    return {r.member.id for r in view.members()}


def whole(*names: str, settle_s: float = 0.0) -> Changes:
    return Changes(tuple(report(n) for n in names), whole=True, settle_s=settle_s)


def test_who_leaves_is_gone_and_who_is_silent_has_a_moment() -> None:
    clock = Clock()
    view = ClusterView(clock)
    view.apply(0, whole("a", "b", "c"))
    view.apply(0, Changes(left=("a",), expired=("b",)))
    assert shown(view) == {"b", "c"}
    clock.now += GRACE_S / 2
    view.tick()
    assert shown(view) == {"b", "c"}
    clock.now += GRACE_S
    view.tick()
    assert shown(view) == {"c"}
    assert view.get("b") is None


def test_a_registry_that_was_stopped_and_dropped_all_changes_nothing() -> None:
    clock = Clock()
    view = ClusterView(clock)
    changes: list[ViewChange] = []
    view.apply(0, whole("a", "b"))
    view.subscribe(changes.append)
    view.apply(0, Changes(expired=("a", "b")))
    clock.now += GRACE_S / 2
    view.apply(0, Changes((report("a", 2), report("b", 2))))
    clock.now += 100
    view.tick()
    assert shown(view) == {"a", "b"}
    assert [change.gone for change in changes] == [(), ()]


def test_a_registry_that_begins_anew_gets_its_time() -> None:
    clock = Clock()
    view = ClusterView(clock)
    view.apply(0, whole("a", "b"))
    view.apply(0, whole("a", settle_s=3.0))
    clock.now += 2.9
    view.tick()
    assert shown(view) == {"a", "b"}
    clock.now += 0.2
    view.tick()
    assert shown(view) == {"a"}


def test_one_registry_of_two_is_enough() -> None:
    clock = Clock()
    view = ClusterView(clock)
    view.apply(0, whole("a"))
    view.apply(1, whole("a", "b"))
    view.apply(0, Changes(expired=("a",)))
    clock.now += 100
    view.tick()
    assert shown(view) == {"a", "b"}
    view.apply(1, whole())
    clock.now += 100
    view.tick()
    assert shown(view) == set()


def test_who_left_is_not_brought_back_by_a_registry_that_is_late() -> None:
    clock = Clock()
    view = ClusterView(clock)
    view.apply(0, whole("a"))
    view.apply(1, whole("a"))
    view.apply(0, Changes(left=("a",)))
    view.apply(1, Changes((report("a", 9),)))
    assert shown(view) == set()
    clock.now += LEFT_S
    view.apply(1, Changes((report("a", 10),)))
    assert shown(view) == {"a"}


def test_the_newest_report_is_shown() -> None:
    view = ClusterView()
    view.apply(0, Changes((report("a", 5),)))
    view.apply(1, Changes((report("a", 3),)))
    found = view.get("a")
    assert found is not None
    assert found.load.sequence == 5
    assert view.of_role(Role.DECODE) == (found,)
    assert view.of_role(Role.PREFILL) == ()


names = st.frozensets(st.sampled_from("abcde"))
happenings = st.tuples(st.integers(0, 1), names, names, names, st.booleans(), st.integers(0, 20))


@given(st.lists(happenings, max_size=30))
def test_listeners_know_what_the_view_shows(
    happened: list[tuple[int, frozenset[str], frozenset[str], frozenset[str], bool, int]],
) -> None:
    """And in the end it shows who is in a registry."""
    clock = Clock()
    view = ClusterView(clock)
    heard: dict[str, Report] = {}

    def listen(change: ViewChange) -> None:
        heard.update({r.member.id: r for r in change.put})
        for member_id in change.gone:
            del heard[member_id]

    end = view.subscribe(listen)
    held: list[frozenset[str]] = [frozenset(), frozenset()]
    left: dict[str, float] = {}
    for source, put, leaving, silent, is_whole, sequence in happened:
        leaving, silent = leaving - put, silent - put - leaving
        reports = tuple(report(n, sequence) for n in sorted(put))
        view.apply(source, Changes(reports, tuple(leaving), tuple(silent), is_whole))
        put = frozenset(n for n in put if left.get(n, 0.0) <= clock.now)
        left.update(dict.fromkeys(leaving, clock.now + LEFT_S))
        held[source] = put | (frozenset() if is_whole else held[source] - silent)
        held = [names - leaving for names in held]
        clock.now += sequence / 10
        view.tick()
        assert tuple(heard.values()) == view.members()
        assert held[0] | held[1] <= shown(view)
    clock.now += GRACE_S
    view.tick()
    assert shown(view) == held[0] | held[1]
    end()
    view.apply(0, Changes(left=tuple("abcde")))
    assert shown(view) == set()
