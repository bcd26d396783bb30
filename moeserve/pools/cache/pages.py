"""A page as bytes: the runs of all layers that its tokens' KV consists of, behind one digest.

A run is the KV of consecutive positions of one layer, with the digest that it got when it left a
cache and that whoever imports it checks. A page keeps runs as they are, so several in a layer where
the block of the sender was smaller than a page. Its body is, little-endian and without gaps:

    number of runs     u32
    of each run        u32 layer, u32 start, u32 count, u64 bytes, 16 bytes of digest
    the runs' bytes    in the same order

The page's own digest is xxh3_128 over key, namespace, length and body: whoever takes a page from a
memory, a disk or a wire finds any change with it before anything of it is read. It guards against
faults, not against members that lie; those are kept out by ``comm.control.rpc``.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from moeserve.errors import DataLossError
from moeserve.pools.cache.keys import Namespace, PageKey

PageBytes: TypeAlias = bytes | bytearray | memoryview

DIGEST_BYTES = 16
# Of one page: 64 tokens of the largest dense models have an eighth of it.
MOST_PAGE_BYTES = 256 << 20
MOST_RUNS = 1 << 16

_COUNT = struct.Struct("<I")
_RUN = struct.Struct(f"<IIIQ{DIGEST_BYTES}s")
_OF_BODY = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class StoredRun:
    """Positions ``start`` to ``start + count`` of a sequence, in one layer."""

    layer: int
    start: int
    count: int
    digest: bytes
    data: PageBytes

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class StoredPage:
    """What stores keep: ``body`` means nothing to them. Made by ``seal``, or come from somewhere
    and then not ``is_whole`` before that was asked."""

    key: PageKey
    namespace: Namespace
    digest: bytes
    body: PageBytes

    @property
    def nbytes(self) -> int:
        return memoryview(self.body).nbytes

    def is_whole(self) -> bool:
        return self.digest == digest_of(self.key, self.namespace, self.body)


def seal(key: PageKey, namespace: Namespace, runs: Sequence[StoredRun]) -> StoredPage:
    """The runs as a page: one copy of their bytes."""
    table = [
        _RUN.pack(run.layer, run.start, run.count, memoryview(run.data).nbytes, run.digest)
        for run in runs
    ]
    body = b"".join((_COUNT.pack(len(runs)), *table, *(run.data for run in runs)))
    return StoredPage(key, namespace, digest_of(key, namespace, body), body)


def sealed_bytes(runs: Sequence[StoredRun]) -> int:
    """Of the body that ``seal`` makes of them."""
    data = sum(memoryview(run.data).nbytes for run in runs)
    return _COUNT.size + len(runs) * _RUN.size + data


def unseal(page: StoredPage) -> tuple[StoredRun, ...]:
    """The runs, whose data are views of the body. DataLossError where it is not whole, or nothing
    that ``seal`` made."""
    if not page.is_whole():
        raise DataLossError(f"page {page.key.hex()}: its bytes have changed since it was stored")
    body = memoryview(page.body).cast("B").toreadonly()
    try:
        (count,) = _COUNT.unpack_from(body)
        at = _COUNT.size + count * _RUN.size
        if count > MOST_RUNS or at > body.nbytes:
            raise DataLossError(f"page {page.key.hex()}: {count} runs in {body.nbytes} bytes")
        runs = []
        for fields in _RUN.iter_unpack(body[_COUNT.size : at]):
            layer, start, length, nbytes, digest = fields
            if nbytes > body.nbytes - at:
                raise DataLossError(f"page {page.key.hex()}: a run of {nbytes} bytes is cut off")
            runs.append(StoredRun(layer, start, length, digest, body[at : at + nbytes]))
            at += nbytes
    except struct.error as error:
        raise DataLossError(f"page {page.key.hex()}: no list of runs: {error}") from error
    if at != body.nbytes:
        raise DataLossError(f"page {page.key.hex()}: {body.nbytes - at} bytes belong to no run")
    return tuple(runs)


def full_pages(
    runs: Iterable[StoredRun], page_tokens: int, layers: int
) -> Iterator[tuple[int, tuple[StoredRun, ...]]]:
    """``(page, its runs)`` of those pages that the runs fill in all layers, ascending. Runs that
    reach over the end of a page fill none: pages are a multiple of the senders' blocks."""
    found: defaultdict[int, list[StoredRun]] = defaultdict(list)
    for run in runs:
        page = run.start // page_tokens
        if run.count > 0 and run.end <= (page + 1) * page_tokens:
            found[page].append(run)
    for page in sorted(found):
        own = sorted(found[page], key=lambda run: (run.layer, run.start))
        if _fills(own, page * page_tokens, page_tokens, layers):
            yield page, tuple(own)


def _fills(runs: Sequence[StoredRun], first: int, tokens: int, layers: int) -> bool:
    """Whether sorted runs are each position of each layer once."""
    layer, at = 0, first
    for run in runs:
        if (run.layer, run.start) != (layer, at):
            return False
        at = run.end
        if at == first + tokens:
            layer, at = layer + 1, first
    return layer == layers and at == first


def digest_of(key: PageKey, namespace: Namespace, body: PageBytes) -> bytes:
    """Of a page."""
    found = xxhash.xxh3_128(key + namespace + _OF_BODY.pack(memoryview(body).nbytes))
    found.update(body)
    return found.digest()
