"""Keys find their members: evenly, on distinct instances, and little moves."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.pools.cache.ring import HashRing, RingMember

KEYS = [sha256(bytes([i % 256, i // 256])).digest() for i in range(2000)]


def places(count: int, instances: int | None = None) -> list[RingMember]:
    return [RingMember(f"m{i}", f"i{i % (instances or count)}") for i in range(count)]


names = st.lists(
    st.builds(RingMember, st.text("abcdef", min_size=1, max_size=3), st.sampled_from("xyz")),
    max_size=6,
    unique_by=lambda place: place.id,
)


@given(names, st.binary(max_size=32), st.integers(0, 4))
@settings(max_examples=60)
def test_owners_are_distinct_and_on_as_many_instances_as_there_are(
    members: list[RingMember], key: bytes, count: int
) -> None:
    owners = HashRing.of(members, points=8).owners(key, count)
    assert len(owners) == min(count, len(members))
    assert len(set(owners)) == len(owners)
    assert set(owners) <= set(members)
    instances = {place.instance for place in members}
    assert len({place.instance for place in owners}) == min(len(owners), len(instances))


@given(names, st.randoms())
@settings(max_examples=40)
def test_the_order_of_members_means_nothing(members: list[RingMember], random: object) -> None:
    other = list(reversed(members))
    assert HashRing.of(members, points=8) == HashRing.of(other, points=8)


@given(names, names, st.binary(max_size=32))
@settings(max_examples=60)
def test_who_goes_leaves_only_own_keys_to_others(
    members: list[RingMember], more: list[RingMember], key: bytes
) -> None:
    """The owners that stay, stay in their order."""
    ids = {place.id for place in members}
    whole = members + [p for p in more if p.id not in ids]
    before = HashRing.of(whole, points=8).owners(key, 1)
    after = HashRing.of(members, points=8).owners(key, 1)
    if before and before[0] in members:
        assert after == before


def test_keys_are_spread_evenly_and_one_more_member_takes_its_share() -> None:
    ten, eleven = HashRing.of(places(10)), HashRing.of(places(11))
    counts = Counter(ten.owners(key, 1)[0].id for key in KEYS)
    assert len(counts) == 10
    assert max(counts.values()) < 1.5 * len(KEYS) / 10
    moved = [key for key in KEYS if ten.owners(key, 1) != eleven.owners(key, 1)]
    assert all(eleven.owners(key, 1)[0].id == "m10" for key in moved)
    assert len(moved) < 2 * len(KEYS) / 11


def test_nobody_owns_anything_in_an_empty_ring() -> None:
    assert HashRing.of([]).owners(b"key", 2) == ()


def test_ranks_of_one_instance_come_last() -> None:
    ring = HashRing.of(places(6, instances=3))
    for key in KEYS[:100]:
        owners = ring.owners(key, 6)
        assert len({place.instance for place in owners[:3]}) == 3
        assert len(set(owners)) == 6


def test_ranks_of_a_single_instance_are_found_at_once() -> None:
    """Not after a walk around the ring for an instance that is not there."""
    ring = HashRing.of(places(8, instances=1))
    walked = 0

    class Counting(tuple[RingMember, ...]):
        __slots__ = ()

        def __getitem__(self, at: object) -> RingMember:  # type: ignore[override]
            nonlocal walked
            walked += 1
            return ring.owner[at]  # type: ignore[index]

    counted = HashRing(ring.end, Counting(ring.owner), ring.members, ring.instances)
    for key in KEYS[:100]:
        assert len(set(counted.owners(key, 2))) == 2
    assert walked < 100 * 10
