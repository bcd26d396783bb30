"""Keys of pages say all that their KV depends on; pages that follow one another lie together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import CacheScope
from moeserve.errors import ConfigError
from moeserve.pools.cache.keys import GROUP, groups_of, namespace_of, page_keys

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(tokens, tokens, st.integers(1, 9))
def test_equal_beginnings_share_keys_and_others_none(a: list[int], b: list[int], size: int) -> None:
    first, second = (page_keys(t, CacheScope(), "m", size) for t in (a, b))
    assert len(first) == len(a) // size
    equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    shared = (min(len(a), len(b)) if equal is None else equal) // size
    assert first[:shared] == second[:shared]
    assert not set(first[shared:]) & set(second[shared:])


def test_keys_depend_on_scope_model_and_size() -> None:
    ids = list(range(64))
    scopes = [
        CacheScope(),
        CacheScope(salt="a"),
        CacheScope(adapter="a"),
        CacheScope("a", "b"),
        CacheScope("ab", ""),
    ]
    found = [key for scope in scopes for key in page_keys(ids, scope, "m", 16)]
    found += page_keys(ids, CacheScope(), "other", 16)
    found += page_keys(ids, CacheScope(), "m", 32)
    assert len(set(found)) == len(found)


def test_a_namespace_is_the_tenants_and_does_not_give_the_salt_away() -> None:
    assert namespace_of(CacheScope("t", "x")) == namespace_of(CacheScope("t", "y"))
    assert namespace_of(CacheScope("t")) != namespace_of(CacheScope("u"))
    assert b"secret" not in namespace_of(CacheScope("secret"))


@given(st.integers(0, 100), st.integers(0, 100))
def test_groups_are_every_page_once_in_order(count: int, start: int) -> None:
    groups = groups_of(count, start)
    assert [page for group in groups for page in group] == list(range(start, count))
    assert all(g.start // GROUP == (g.stop - 1) // GROUP for g in groups)
    assert len(groups) <= max(count - start, 0) // GROUP + 2


@pytest.mark.parametrize("size", [0, -1, 4097])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"page_tokens={size}"):
        page_keys([1], CacheScope(), "m", size)
