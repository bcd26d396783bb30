"""Every policy, on every table: who is chosen may have the request, and less load is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import CacheScope, Request, RequestId, SamplingParams
from moeserve.errors import InvalidRequestError
from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms
from moeserve.pools.registry.view import ViewChange
from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.choosing import FEW
from moeserve.pools.routing.freeness import MostFree, Move, freeness, rebalance
from moeserve.pools.routing.kv_local import KvLocal, _remembered
from moeserve.pools.routing.loads import (
    LATE_S,
    MOST_NOTES,
    NOTED_S,
    SHOWN_S,
    LoadRow,
    LoadTable,
    PoolKind,
    Sent,
)
from moeserve.pools.routing.locality_free import LocalityFree
from moeserve.pools.routing.predict import decode_s, prefill_s
from moeserve.pools.routing.router import RequestRouter, note, page_keys

POLICIES: list[Callable[[], RoutingPolicy]] = [LocalityFree, KvLocal, MostFree]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)
MODEL = "a model"
WANTED = RouteWanted(512, 128, 128, compute_id=MODEL)
IDLE = MemberLoad(free_blocks=1000, total_blocks=1000, prefill_rate=1000.0, step_s=0.02)


def member(name: str, role: Role, model: str = MODEL) -> Member:
    terms = ServedTerms(compute_id=model, block_size=16, kv_bytes_per_token=1000)
    return Member(name, name, role, "127.0.0.1:80", terms=terms)


def table_of(*reports: Report, now: float = 0.0) -> LoadTable:
    table = LoadTable()
    table.update(reports, now)
    return table


def chosen(policy: RoutingPolicy, table: LoadTable, wanted: RouteWanted = WANTED) -> Route:
    route = policy.choose(wanted, table, 0.0)
    assert route is not None
    return route


loads = st.builds(
    MemberLoad,
    running=st.integers(0, 50),
    waiting=st.integers(0, 50),
    waiting_tokens=st.integers(0, 10_000),
    free_blocks=st.integers(0, 1000),
    total_blocks=st.just(1000),
    prefill_rate=st.sampled_from([0.0, 100.0, 1000.0]),
    step_s=st.sampled_from([0.0, 0.01, 0.1]),
    leans=st.sampled_from([Role.UNIFIED, Role.PREFILL, Role.DECODE]),
    draining=st.booleans(),
    urgent=st.integers(0, 2),
)
clusters = st.lists(
    st.tuples(st.sampled_from(Role), st.sampled_from([MODEL, "another"]), loads, st.booleans()),
    max_size=24,
)
keys = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3, unique=True).map(tuple)


@every_policy
@given(clusters, st.lists(keys, min_size=1, max_size=4))
def test_whoever_is_chosen_may_have_the_request(
    policy: Callable[[], RoutingPolicy],
    cluster: list[tuple[Role, str, MemberLoad, bool]],
    prompts: list[tuple[bytes, ...]],
) -> None:
    """And there is a route wherever a member that decodes can be had."""
    reports = [Report(member(f"m{i}", role, m), load) for i, (role, m, load, _) in
               enumerate(cluster)]  # fmt: skip
    exclude = frozenset(f"m{i}" for i, row in enumerate(cluster) if row[3])
    usable = {
        r.member.id: r
        for r in reports
        if not r.load.draining and r.member.terms.compute_id == MODEL
    }
    able = {i for i, r in usable.items() if r.member.role.decodes} - exclude
    table, router = table_of(*reports), policy()
    # A member that was used and is lost is not chosen for what is remembered of it.
    for prompt in prompts:
        wanted = replace(WANTED, keys=prompt)
        route = router.choose(wanted, table, 0.0)
        if route is not None:
            router.note(wanted, route)
            note(table, wanted, route, 0.0)
        wanted = replace(wanted, exclude=exclude)
        route = router.choose(wanted, table, 0.0)
        assert (route is not None) == bool(able)
        if route is None:
            continue
        assert route.decode.id in able
        sources = [m for m in (route.prefill, *route.alternates) if m is not None]
        assert all(m.id in usable.keys() - exclude and m.role.prefills for m in sources)
        assert len({m.id for m in sources} | {route.decode.id}) == len(sources) + 1
        assert route.prefill is not None or not route.alternates


@every_policy
@pytest.mark.parametrize(
    "worse",
    [
        {"running": 20},
        {"waiting": 20},
        {"free_blocks": 10, "waiting_tokens": 1},
        {"waiting_tokens": 50_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("role", [Role.DECODE, Role.UNIFIED])
def test_less_load_is_chosen(
    policy: Callable[[], RoutingPolicy], worse: dict[str, int], role: Role
) -> None:
    loaded = replace(IDLE, **worse)
    reports = [Report(member(f"m{i}", role), loaded) for i in range(5)]
    reports.insert(3, Report(member("best", role), IDLE))
    router = policy()
    for _ in range(6):
        assert chosen(router, table_of(*reports)).decode.id == "best"


@every_policy
@given(
    clusters.filter(lambda cluster: len(cluster) > 1),
    st.integers(0, 23),
    st.sampled_from(["running", "waiting", "waiting_tokens", "free_blocks", "draining"]),
    st.integers(1, 5000),
)
@settings(max_examples=50)
def test_more_load_elsewhere_changes_no_choice(
    policy: Callable[[], RoutingPolicy],
    cluster: list[tuple[Role, str, MemberLoad, bool]],
    place: int,
    field: str,
    more: int,
) -> None:
    """Also: none of the predictions falls with any part of a load."""
    reports = [
        Report(member(f"m{i}", role, model), replace(load, draining=False))
        for i, (role, model, load, _) in enumerate(cluster[:FEW])
    ]
    worse = reports[place % len(reports)]
    before = policy().choose(WANTED, table_of(*reports), 0.0)
    amount = getattr(worse.load, field)
    raised = {"free_blocks": amount - more, "draining": True}.get(field, amount + more)
    loaded = replace(worse, load=replace(worse.load, **{field: raised}))
    after_table = table_of(*reports)
    after_table.update([loaded], 0.0)
    row, table = after_table.rows[worse.member.id], table_of(*reports)
    old = table.rows[worse.member.id]
    assert prefill_s(row, 100, table) >= prefill_s(old, 100, table)
    assert decode_s(row, WANTED, table) >= decode_s(old, WANTED, table)
    if before is None or worse.member in (before.decode, before.prefill):
        return
    after = policy().choose(WANTED, table_of(*(loaded if r is worse else r for r in reports)), 0.0)
    assert after is not None
    if field != "draining" or len(reports) == 1:
        assert (after.decode, after.prefill) == (before.decode, before.prefill)


@every_policy
def test_the_shortest_queue_prefills_and_the_next_are_alternates(
    policy: Callable[[], RoutingPolicy],
) -> None:
    queues = {"p0": 900, "p1": 100, "p2": 5000, "p3": 300}
    prefills = [
        Report(member(name, Role.PREFILL), replace(IDLE, waiting_tokens=tokens))
        for name, tokens in queues.items()
    ]
    route = chosen(policy(), table_of(*prefills, Report(member("d", Role.DECODE), IDLE)))
    assert route.decode.id == "d"
    assert route.prefill is not None
    assert [route.prefill.id, *(m.id for m in route.alternates)] == ["p1", "p3", "p0"]


@every_policy
@pytest.mark.parametrize("count", [3, 40])
def test_equal_members_share(policy: Callable[[], RoutingPolicy], count: int) -> None:
    """With notes and, as if reports never showed anything, without."""
    reports = [Report(member(f"m{i}", Role.UNIFIED), IDLE) for i in range(count)]
    for noted in (True, False):
        table, router = table_of(*reports), policy()
        taken: Counter[str] = Counter()
        for _ in range(3 * count):
            route = chosen(router, table)
            taken[route.decode.id] += 1
            if noted:
                note(table, WANTED, route, 0.0)
        assert max(taken.values()) <= (3 if noted or count == 3 else 24)
        assert len(taken) == count or not noted


@every_policy
def test_a_burst_between_two_reports_is_spread(policy: Callable[[], RoutingPolicy]) -> None:
    prefills = [Report(member(f"p{i}", Role.PREFILL), IDLE) for i in range(4)]
    decodes = [Report(member(f"d{i}", Role.DECODE), IDLE) for i in range(4)]
    table, router = table_of(*prefills, *decodes), policy()
    taken: Counter[str] = Counter()
    for _ in range(40):
        route = chosen(router, table)
        note(table, WANTED, route, 0.0)
        assert route.prefill is not None
        taken.update([route.decode.id, route.prefill.id])
    assert set(taken.values()) == {10}


@every_policy
def test_a_member_whose_reports_stopped_is_for_when_there_is_no_other(
    policy: Callable[[], RoutingPolicy],
) -> None:
    silent = Report(member("silent", Role.DECODE), IDLE)
    busy = Report(member("busy", Role.DECODE), replace(IDLE, running=30))
    table, router = table_of(silent, busy), policy()
    assert chosen(router, table).decode.id == "silent"
    table.update([busy], LATE_S + 1)
    assert chosen(router, table).decode.id == "busy"
    table.remove(["busy"])
    assert chosen(router, table).decode.id == "silent"


@every_policy
def test_who_turns_to_drain_is_chosen_no_more_and_back(policy: Callable[[], RoutingPolicy]) -> None:
    reports = [Report(member(f"m{i}", Role.UNIFIED), IDLE) for i in range(3)]
    table, router = table_of(*reports), policy()
    table.update([replace(reports[1], load=replace(IDLE, draining=True))], 0.0)
    assert {chosen(router, table).decode.id for _ in range(9)} == {"m0", "m2"}
    table.update([reports[1]], 0.0)
    assert {chosen(router, table).decode.id for _ in range(9)} == {"m0", "m1", "m2"}


@every_policy
def test_unified_members_that_lean_are_used_for_what_they_lean_to(
    policy: Callable[[], RoutingPolicy],
) -> None:
    table = table_of(
        Report(member("p", Role.UNIFIED), replace(IDLE, leans=Role.PREFILL)),
        Report(member("d", Role.UNIFIED), replace(IDLE, leans=Role.DECODE, running=30)),
    )
    route = chosen(policy(), table)
    assert (route.decode.id, route.prefill and route.prefill.id) == ("d", "p")
    table.remove(["d"])
    assert chosen(policy(), table) == Route(member("p", Role.UNIFIED))


def test_two_members_are_used_where_that_is_sooner() -> None:
    """A unified member that has a queue leaves the prompt to one that has none."""
    prefill = Report(member("p", Role.PREFILL), IDLE)
    unified = Report(member("u", Role.UNIFIED), IDLE)
    policy = LocalityFree()
    assert chosen(policy, table_of(prefill, unified)) == Route(unified.member)
    unified = replace(unified, load=replace(IDLE, waiting_tokens=5000))
    assert chosen(policy, table_of(prefill, unified)) == Route(unified.member, prefill.member)


def test_a_prefix_draws_requests_until_the_queue_costs_more() -> None:
    reports = [Report(member(f"p{i}", Role.PREFILL), IDLE) for i in range(20)]
    reports.append(Report(member("d", Role.DECODE), IDLE))
    table, router = table_of(*reports), KvLocal()
    wanted = replace(WANTED, keys=tuple(bytes([i]) for i in range(8)))
    first = chosen(router, table, wanted).prefill
    assert first is not None
    router.note(wanted, Route(reports[-1].member, first))
    longer = replace(wanted, prompt_tokens=600, keys=(*wanted.keys, b"more"))
    assert {chosen(router, table, longer).prefill for _ in range(9)} == {first}
    shorter = replace(wanted, prompt_tokens=128, keys=wanted.keys[:2])
    assert {chosen(router, table, shorter).prefill for _ in range(9)} == {first}
    table.note(first.id, Sent(prefill_tokens=10_000), 0.0)
    assert first not in {chosen(router, table, longer).prefill for _ in range(9)}


def test_what_is_remembered_of_prefixes_is_bounded() -> None:
    table = table_of(Report(member("u", Role.UNIFIED), IDLE))
    router = KvLocal(most_pages=10)
    for i in range(100):
        wanted = replace(WANTED, keys=tuple(f"{i}-{page}".encode() for page in range(50)))
        router.note(wanted, chosen(router, table, wanted))
        assert len(router._holders) <= 10


@given(sent=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.integers(0, 90))),
       prompt=st.tuples(st.integers(0, 1), st.integers(0, 90)))  # fmt: skip
def test_the_last_member_of_a_prefix_is_found_as_if_every_page_were_looked_for(
    sent: list[tuple[str, int, int]], prompt: tuple[int, int]
) -> None:
    """Of two kinds of prompt, which share nothing, and two members, so nobody is displaced."""

    def keys_of(kind: int, pages: int) -> tuple[bytes, ...]:
        return tuple(bytes([kind, page]) for page in range(pages))

    router, longest = KvLocal(), dict[tuple[str, int], int]()
    for name, kind, pages in sent:
        wanted = replace(WANTED, keys=keys_of(kind, pages))
        router.note(wanted, Route(member(name, Role.UNIFIED)))
        longest[name, kind] = max(longest.get((name, kind), 0), pages)
    kind, pages = prompt
    remembered = [0, *_remembered(pages)]
    found = router._cached(replace(WANTED, keys=keys_of(kind, pages)))
    for name in "ab":
        known = [p + 1 for p in remembered[1:] if p < longest.get((name, kind), 0)]
        assert found.get(name, 0) == WANTED.page_tokens * max(known, default=0)


@given(running=st.lists(st.integers(0, 64), min_size=1, max_size=7), step_s=st.sampled_from(
    [0.001, 0.02, 0.5]))  # fmt: skip
def test_a_member_that_has_not_decoded_is_taken_for_one_like_the_others(
    running: list[int], step_s: float
) -> None:
    """A step of 0 s is no step: it costs what others of the pool have measured."""
    measured = [
        Report(member(f"m{i}", Role.DECODE), replace(IDLE, running=count, step_s=step_s))
        for i, count in enumerate(running)
    ]
    unknown = Report(member("new", Role.DECODE), replace(IDLE, running=running[0], step_s=0.0))
    table = table_of(*measured, unknown)
    rows = table.rows
    assert decode_s(rows["new"], WANTED, table) == pytest.approx(
        decode_s(rows["m0"], WANTED, table)
    )


@every_policy
def test_a_member_that_has_not_decoded_gets_its_share_and_no_more(
    policy: Callable[[], RoutingPolicy],
) -> None:
    """Between two reports, and where reports show requests that wait but no step yet."""
    new = Report(member("new", Role.DECODE), replace(IDLE, step_s=0.0, prefill_rate=0.0))
    others = [Report(member(f"d{i}", Role.DECODE), IDLE) for i in range(3)]
    table, router, taken = table_of(new, *others), policy(), Counter[str]()
    for turn in range(80):
        if turn == 40:
            shown = [replace(r, load=replace(r.load, running=10)) for r in (new, *others)]
            table.update(shown, 1.0)
        route = chosen(router, table)
        note(table, WANTED, route, 1.0 if turn >= 40 else 0.0)
        taken[route.decode.id] += 1
    assert taken == {"new": 20, "d0": 20, "d1": 20, "d2": 20}


def test_freeness_is_the_steps_that_are_left() -> None:
    def free(**load: int | bool) -> float:
        report = Report(member("m", Role.DECODE), replace(IDLE, **load))  # type: ignore[arg-type]
        return freeness(table_of(report).rows["m"])

    assert free() == 16_000
    assert free(running=8) == 2000
    assert free(running=8, free_blocks=500) == 1000
    assert free(running=8, free_blocks=500, waiting_tokens=4000, waiting=8) == 250
    assert free(running=8, free_blocks=500, urgent=1) == (8000 - 3200) / 8
    assert free(free_blocks=10, waiting_tokens=4000) < free(free_blocks=10, waiting_tokens=400) < 0
    assert free(draining=True) == float("-inf")


def test_urgent_requests_may_use_the_headroom() -> None:
    table = table_of(
        Report(member("urgent", Role.DECODE), replace(IDLE, running=9, urgent=1)),
        Report(member("plain", Role.DECODE), replace(IDLE, running=10)),
    )
    policy = MostFree()
    assert chosen(policy, table).decode.id == "plain"
    assert chosen(policy, table, replace(WANTED, priority=1)).decode.id == "urgent"


def test_rebalancing_pairs_the_fullest_with_the_freest() -> None:
    def row(name: str, running: int, free: int, **more: bool) -> Report:
        load = replace(
            IDLE, running=running, free_blocks=free, draining=more.get("draining", False)
        )
        return Report(member(name, Role.DECODE), load)

    table = table_of(
        row("full", 10, 10),
        row("fuller", 10, 1),
        row("middle", 10, 500),
        row("free", 2, 900),
        row("freest", 1, 990),
        row("leaving", 3, 900, draining=True),
        row("left", 0, 1000, draining=True),
        Report(member("prefill", Role.PREFILL), IDLE),
        Report(member("other", Role.DECODE, "another"), replace(IDLE, running=9, free_blocks=1)),
    )
    moves = rebalance(table.rows.values(), low=100.0, high=1000.0)
    assert moves == (Move("leaving", "freest"), Move("fuller", "free"))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["note", "hear", "remove", "drain"]),
            st.sampled_from("abc"),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_the_table_counts_what_no_report_has_shown(steps: list[tuple[str, str, int]]) -> None:
    table, now = LoadTable(), 0.0
    there: dict[str, bool] = {}  # draining
    notes: dict[str, list[tuple[float, int]]] = {}
    for step, name, number in steps:
        now += number / 10
        if step == "note":
            table.note(name, Sent(number, number, 1, 0), now)
            if name in there:
                kept = [n for n in notes[name] if n[0] > now - NOTED_S]
                notes[name] = [*kept, (now, number)]
        elif step == "remove":
            table.remove([name])
            there.pop(name, None)
            notes.pop(name, None)
        else:
            drains = step == "drain"
            table.update([Report(member(name, Role.DECODE), replace(IDLE, draining=drains))], now)
            there[name] = drains
            notes[name] = [n for n in notes.get(name, []) if n[0] > now - SHOWN_S]
        assert table.rows.keys() == there.keys()
        for i, row in table.rows.items():
            assert row.waiting_tokens == row.kv_tokens == sum(tokens for _, tokens in notes[i])
            assert row.batch == len(notes[i])
        found = [row.member.id for row in table.pool(MODEL, PoolKind.DECODE)]
        assert sorted(found) == sorted(i for i, drains in there.items() if not drains)


def test_notes_of_a_member_are_bounded() -> None:
    table = table_of(Report(member("a", Role.DECODE), IDLE))
    for _ in range(MOST_NOTES + 10):
        table.note("a", Sent(requests=1), 0.0)
    assert table.rows["a"].batch == MOST_NOTES


def test_a_router_makes_of_requests_what_policies_want_to_know() -> None:
    times = [0.0]
    router = RequestRouter(LocalityFree(), MODEL, clock=lambda: times[0])
    prompt = tuple(range(200))
    request = Request(RequestId("r"), prompt, SamplingParams(max_tokens=50))
    assert router(request, 0, frozenset(), 0.0) is None
    decode, prefill = member("d", Role.DECODE), member("p", Role.PREFILL)
    router.on_change(ViewChange((Report(decode, IDLE), Report(prefill, IDLE))))
    assert router(request, 10, frozenset(), 0.0) == Route(decode, prefill)
    rows = router.table.rows
    assert rows["p"].waiting_tokens == 210
    assert rows["d"].batch == 1
    assert rows["d"].kv_tokens == 250
    assert router(request, 0, frozenset({"p"}), 0.0) == Route(decode)
    assert router(request, 0, frozenset({"d"}), 0.0) is None
    times[0] = 1.0
    router.on_change(ViewChange((Report(prefill, IDLE),), ("d",)))
    assert rows["p"].waiting_tokens == 0
    assert router(request, 0, frozenset(), 0.0) is None
    assert (router.counts.chosen, router.counts.split, router.counts.none) == (2, 1, 3)


def test_a_router_takes_requests_of_low_priority_for_urgent() -> None:
    router = RequestRouter(LocalityFree(), MODEL, clock=lambda: 0.0)
    router.on_change(ViewChange((Report(member("d", Role.DECODE), IDLE),)))
    for priority, urgent in ((0, 0), (3, 0), (-2, 1)):
        request = Request(RequestId("r"), (1, 2), SamplingParams(), priority=priority)
        router(request, 0, frozenset(), 0.0)
        assert router.table.rows["d"].urgent == urgent


def test_a_router_expects_answers_as_they_lately_were() -> None:
    router = RequestRouter(LocalityFree(), MODEL, clock=lambda: 0.0)
    router.on_change(ViewChange((Report(member("d", Role.DECODE), IDLE),)))
    request = Request(RequestId("r"), (1, 2, 3), SamplingParams(max_tokens=100_000))
    row = router.table.rows["d"]
    router(request, 0, frozenset(), 0.0)
    assert row.kv_tokens == 3 + 256
    for _ in range(1000):
        router.on_answer(10)
    router(request, 0, frozenset(), 0.0)
    assert row.kv_tokens == 3 + 256 + 3 + 10
    router(request, 20, frozenset(), 0.0)
    assert row.kv_tokens == 3 + 256 + 3 + 10 + 23 + 1


def test_keys_are_of_all_tokens_before_and_of_the_scope() -> None:
    keys = page_keys(tuple(range(200)), CacheScope())
    assert len(keys) == 3
    assert keys[:2] == page_keys(tuple(range(130)), CacheScope())
    assert not set(keys) & set(page_keys(tuple(range(200)), CacheScope("salt")))
    assert not set(keys) & set(page_keys((7, *range(1, 200)), CacheScope()))


def test_a_route_for_less_than_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="negative"):
        RouteWanted(-1, 1, 1)


@every_policy
def test_a_decision_looks_at_a_few_members_however_many_there_are(
    policy: Callable[[], RoutingPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [
        Report(member(f"m{i}", Role.PREFILL if i % 2 else Role.DECODE), IDLE) for i in range(1000)
    ]
    table, router = table_of(*reports), policy()
    looked: Counter[str] = Counter()
    is_late = table.is_late

    def counted(row: LoadRow) -> bool:
        looked[row.member.id] += 1
        return is_late(row)

    monkeypatch.setattr(table, "is_late", counted)
    for _ in range(500):
        chosen(router, table, replace(WANTED, keys=(b"a", b"b")))
    assert sum(looked.values()) == 500 * 2 * FEW
    assert max(looked.values()) == min(looked.values())
