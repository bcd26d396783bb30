"""What members of the cache pool and those who ask them say to one another, read with suspicion.

Readers of messages raise InvalidRequestError where one is none, or names more than it may.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from moeserve.errors import InvalidRequestError
from moeserve.pb import cache_pb2 as pb
from moeserve.pools.cache.keys import KEY_BYTES, NAMESPACE_BYTES, Namespace, PageKey
from moeserve.pools.cache.pages import DIGEST_BYTES, MOST_PAGE_BYTES, PageBytes, StoredPage

SERVICE = "moeserve.cache.CacheService"
# Keys of one call, and pages of one offer.
MOST_KEYS = 4096
MOST_OFFERED = 64
# Bytes of a page in one message.
PART_BYTES = 1 << 20
WANTED = "wanted"

_HEAD = struct.Struct("<I")

M = TypeVar("M", bound=Message)


def read_message(kind: type[M], content: bytes) -> M:
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise InvalidRequestError(f"these bytes are no {kind.__name__}: {error}") from error


def write_part(message: Message, data: PageBytes = b"") -> bytes:
    """A message with bytes of a page behind it, which are copied once."""
    head = message.SerializeToString()
    return b"".join((_HEAD.pack(len(head)), head, data))


def read_part(kind: type[M], content: bytes) -> tuple[M, memoryview]:
    """The message, and what is behind it, which is not copied."""
    if len(content) < _HEAD.size:
        raise InvalidRequestError(f"{len(content)} bytes are no {kind.__name__}")
    end = _HEAD.size + _HEAD.unpack_from(content)[0]
    if end > len(content):
        raise InvalidRequestError(f"{len(content)} bytes of a {kind.__name__} of {end}")
    return read_message(kind, content[_HEAD.size : end]), memoryview(content)[end:]


def read_keys(content: bytes) -> tuple[PageKey, ...]:
    count, rest = divmod(len(content), KEY_BYTES)
    if rest or not 0 < count <= MOST_KEYS:
        raise InvalidRequestError(
            f"{len(content)} bytes of keys: expected 1 to {MOST_KEYS} times {KEY_BYTES}"
        )
    starts = range(0, len(content), KEY_BYTES)
    return tuple(PageKey(content[at : at + KEY_BYTES]) for at in starts)


def write_keys(keys: Iterable[PageKey]) -> bytes:
    return b"".join(keys)


def read_head(head: pb.PageHead) -> tuple[PageKey, Namespace, int]:
    """Key, namespace and bytes of a page."""
    if len(head.key) != KEY_BYTES or len(head.namespace) != NAMESPACE_BYTES:
        raise InvalidRequestError(
            f"a key of {len(head.key)} bytes in a namespace of {len(head.namespace)}: expected "
            f"{KEY_BYTES} and {NAMESPACE_BYTES}"
        )
    if not 0 < head.nbytes <= MOST_PAGE_BYTES:
        raise InvalidRequestError(
            f"a page of {head.nbytes} bytes: expected 1 to {MOST_PAGE_BYTES}; with fewer tokens in "
            "a page it is smaller"
        )
    return PageKey(head.key), Namespace(head.namespace), head.nbytes


class PageGathering:
    """One page whose parts come one after the other. Takes memory for what has come, not for what
    was claimed; or none where it fits into ``room``, in which the page then lies."""

    def __init__(
        self, key: PageKey, namespace: Namespace, nbytes: int, room: bytearray | None = None
    ) -> None:
        self._room = None if room is None or len(room) < nbytes else memoryview(room)
        self._key = key
        self._namespace = namespace
        self._nbytes = nbytes
        self._digest = b""
        self._parts: list[memoryview] = []
        self._came = 0

    def add(self, digest: bytes, data: memoryview) -> StoredPage | None:
        """The page, when this was its last part; nobody has checked it."""
        if digest:
            if len(digest) != DIGEST_BYTES or self._digest:
                raise InvalidRequestError(f"a second digest, or one of {len(digest)} bytes")
            self._digest = digest
        if not self._digest or not data.nbytes:
            raise InvalidRequestError("a part of a page without digest or bytes")
        start, self._came = self._came, self._came + data.nbytes
        if self._came > self._nbytes:
            raise InvalidRequestError(f"a page has more than its {self._nbytes} bytes")
        if self._room is None:
            self._parts.append(data)
        else:
            self._room[start : self._came] = data
        if self._came < self._nbytes:
            return None
        body = b"".join(self._parts) if self._room is None else self._room[: self._nbytes]
        return StoredPage(self._key, self._namespace, self._digest, body)


def parts_of(page: StoredPage) -> Iterator[tuple[bytes, memoryview]]:
    """(digest, data) of each message that a page is sent in."""
    digest, body = page.digest, memoryview(page.body)
    for start in range(0, body.nbytes, PART_BYTES):
        yield digest, body[start : start + PART_BYTES]
        digest = b""


def head_of(key: PageKey, namespace: Namespace, nbytes: int) -> pb.PageHead:
    return pb.PageHead(key=key, namespace=namespace, nbytes=nbytes)


def leading(held: Sequence[int]) -> int:
    """How many are here from the first on."""
    for at, here in enumerate(held):
        if not here:
            return at
    return len(held)
