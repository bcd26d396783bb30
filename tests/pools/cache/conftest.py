"""Pages to keep, and what makes them."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import pytest

from moeserve.pools.cache.keys import Namespace, PageKey
from moeserve.pools.cache.pages import StoredPage, StoredRun, seal

MakePage = Callable[..., StoredPage]


def page_of(number: int, nbytes: int = 1000, namespace: bytes = b"tenant") -> StoredPage:
    content = sha256(number.to_bytes(4, "little")).digest()
    data = (content * (nbytes // 64 + 1))[: nbytes // 2]
    runs = [StoredRun(layer, 64 * number, 64, content[:16], data) for layer in (0, 1)]
    return seal(PageKey(content), Namespace(namespace.ljust(16, b"\0")), runs)


@pytest.fixture(scope="session")
def make_page() -> MakePage:
    """A page by number: of two layers, its bytes follow from its number."""
    return page_of
