"""A prefix is fetched where that is cheaper, and what was dear is tried again now and then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.pools.cache.recompute import MARGIN, PROBE_EVERY, RecomputePolicy


def measured(byte_s: float, token_s: float, latency: float = 0.0) -> RecomputePolicy:
    policy = RecomputePolicy()
    policy.asked(latency)
    policy.fetched(1000, latency + 1000 * byte_s)
    policy.computed(1000, 1000 * token_s)
    return policy


times = st.floats(1e-9, 1e-2)


@given(times, times, st.floats(0, 0.1), st.integers(1, 10_000), st.integers(1, 10**7))
def test_what_is_clearly_cheaper_is_chosen(
    byte_s: float, token_s: float, latency: float, tokens: int, nbytes: int
) -> None:
    policy = measured(byte_s, token_s, latency)
    fetch, compute = policy.fetch_cost(nbytes), policy.compute_cost(tokens)
    chosen = policy.choose_fetch(tokens, nbytes)
    if fetch > compute * (1 + MARGIN):
        assert not chosen
    if fetch < compute:
        assert chosen


def test_nothing_is_known_so_it_is_fetched() -> None:
    policy = RecomputePolicy()
    assert policy.choose_fetch(10, 10**9)
    policy.computed(1, 1e-9)
    assert policy.choose_fetch(10, 10**9)


def test_a_choice_is_kept_within_the_margin() -> None:
    policy = measured(1e-3, 1e-3)
    assert policy.choose_fetch(100, 115)
    assert not policy.choose_fetch(100, 125)
    assert not policy.choose_fetch(100, 90)
    assert policy.choose_fetch(100, 80)
    assert policy.choose_fetch(100, 115)
    assert (policy.counts.fetched, policy.counts.recomputed) == (3, 2)
    assert policy.counts.recomputed_tokens == 200


def test_a_path_that_has_become_fast_is_found_out() -> None:
    policy = measured(1.0, 1e-6)
    choices = [policy.choose_fetch(10, 10) for _ in range(PROBE_EVERY)]
    assert choices == [False] * (PROBE_EVERY - 1) + [True]
    assert policy.counts.probes == 1
    for _ in range(100):
        policy.fetched(1000, 1e-6)
    assert policy.choose_fetch(10, 10)
    assert policy.counts.fetched == 2


def test_a_long_way_pays_only_for_long_prefixes() -> None:
    policy = measured(1e-9, 1e-3, latency=0.1)
    assert not policy.choose_fetch(50, 1000)
    assert policy.choose_fetch(5000, 100_000)
