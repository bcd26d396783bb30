"""A page gives back the runs it was made of, or says that it is none."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import DataLossError
from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.pages import StoredPage, StoredRun, digest_of, full_pages, seal, unseal

KEY, NAMESPACE = PageKey(b"k" * 32), Namespace(b"n" * 16)

runs = st.lists(
    st.builds(
        StoredRun,
        layer=st.integers(0, 2**32 - 1),
        start=st.integers(0, 2**32 - 1),
        count=st.integers(0, 2**32 - 1),
        digest=st.binary(min_size=16, max_size=16),
        data=st.binary(max_size=40),
    ),
    max_size=5,
)


@given(runs)
def test_runs_come_back_as_they_were(given_runs: list[StoredRun]) -> None:
    assert unseal(seal(KEY, NAMESPACE, given_runs)) == tuple(given_runs)


def test_a_thousand_flips_are_all_found() -> None:
    page = seal(KEY, NAMESPACE, [StoredRun(0, 0, 64, b"d" * 16, bytes(range(256)))])
    draw = random.Random(1)
    for _ in range(1000):
        parts = [bytearray(part) for part in (page.key, page.namespace, page.digest, page.body)]
        part = draw.choice(parts)
        part[draw.randrange(len(part))] ^= 1 << draw.randrange(8)
        key, namespace, digest, body = map(bytes, parts)
        changed = StoredPage(PageKey(key), Namespace(namespace), digest, body)
        with pytest.raises(DataLossError):
            unseal(changed)


@given(st.binary(max_size=120))
def test_bytes_that_are_no_page_are_refused_or_read(body: bytes) -> None:
    """Also where somebody has made a digest for them."""
    page = StoredPage(KEY, NAMESPACE, digest_of(KEY, NAMESPACE, body), body)
    try:
        found = unseal(page)
    except DataLossError:
        return
    assert seal(KEY, NAMESPACE, found).body == body


def block_runs(blocks: range, size: int, layers: int) -> list[StoredRun]:
    return [
        StoredRun(layer, b * size, size, bytes(16), b"%d" % b)
        for layer in range(layers)
        for b in blocks
    ]


@given(st.integers(0, 9), st.integers(0, 20), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3))
def test_full_pages_are_those_all_of_whose_blocks_are_there(
    first: int, count: int, size: int, layers: int
) -> None:
    given_runs = block_runs(range(first, first + count), size, layers)
    random.Random(first).shuffle(given_runs)
    pages = dict(full_pages(given_runs, 8, layers))
    ends = (first + count) * size
    assert list(pages) == [p for p in range(30) if first * size <= 8 * p and 8 * (p + 1) <= ends]
    for page, own in pages.items():
        assert [(r.layer, r.start) for r in own] == [
            (layer, 8 * page + at) for layer in range(layers) for at in range(0, 8, size)
        ]


def test_a_page_that_lacks_a_layer_or_overlaps_is_not_full() -> None:
    whole = block_runs(range(2), 4, 2)
    assert [page for page, _ in full_pages(whole, 8, 2)] == [0]
    assert not list(full_pages(whole[:-1], 8, 2))
    assert not list(full_pages([*whole, whole[0]], 8, 2))
    assert not list(full_pages(whole, 8, 3))
    assert not list(full_pages(block_runs(range(1), 16, 2), 8, 2))
