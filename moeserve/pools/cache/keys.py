"""What a page of the cache pool is called, whose it is, and which pages lie together.

A page is the KV of ``page_tokens`` consecutive tokens, in all layers. Its key is a SHA-256 chain
over all tokens up to its end, from a root that holds the request's ``CacheScope`` (tenant salt and
adapter), the ``compute_id`` of those who compute equal bits, and the size of pages: equal keys mean
equal KV, and nobody finds what belongs to another scope. Only full pages have keys.

``GROUP`` consecutive pages of a prefix lie on the same members, so that a request asks as few
members as its length has it, however many there are. Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import NewType

from moeserve.core import CacheScope
from moeserve.engine.blocks import root_key
from moeserve.errors import ConfigError

PageKey = NewType("PageKey", bytes)
Namespace = NewType("Namespace", bytes)

KEY_BYTES = 32
NAMESPACE_BYTES = 16
# Tokens of a page by default. A multiple of the block size of every peer.
PAGE_TOKENS = 64
MOST_PAGE_TOKENS = 4096
# Pages of a prefix that lie together.
GROUP = 16


def page_keys(
    token_ids: Sequence[int], scope: CacheScope, compute_id: str, page_tokens: int = PAGE_TOKENS
) -> tuple[PageKey, ...]:
    """Of each full page of these tokens, from the first on. ConfigError for an impossible size."""
    if not 0 < page_tokens <= MOST_PAGE_TOKENS:
        raise ConfigError(f"page_tokens={page_tokens}: expected 1 to {MOST_PAGE_TOKENS}")
    size = page_tokens.to_bytes(8, "little")
    key = sha256(b"moeserve.page.v1" + size + root_key(scope) + compute_id.encode()).digest()
    content = array("q", token_ids).tobytes()
    step = page_tokens * 8
    found = []
    for start in range(0, len(content) - step + 1, step):
        key = sha256(key + content[start : start + step]).digest()
        found.append(PageKey(key))
    return tuple(found)


def namespace_of(scope: CacheScope) -> Namespace:
    """Whose quota counts: the tenant's, by its salt, which this does not give away."""
    digest = sha256(b"moeserve.namespace.v1" + scope.salt.encode()).digest()
    return Namespace(digest[:NAMESPACE_BYTES])


def groups_of(count: int, start: int = 0) -> tuple[range, ...]:
    """The pages ``start`` to ``count`` of one prefix, by group: those of a range lie on the members
    that own the key of the group's first page, ``range.start // GROUP * GROUP``."""
    first = range(start // GROUP * GROUP, count, GROUP)
    found = (range(max(at, start), min(at + GROUP, count)) for at in first)
    return tuple(group for group in found if group)
