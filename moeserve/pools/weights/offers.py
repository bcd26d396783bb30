"""A member that has a checkpoint, as others ask it: for its manifest, and for chunks.

It answers ``CacheService.Get`` as a member of the cache pool does (``cache.proto``), for the keys
of its own chunks and for ``offer_key``; so whoever fetches asks both in one way. Chunks are read
from the folder when they are asked for, most often from the kernel's memory, and their digest is
made then; it is remembered, and bytes that are others the next time are not sent (DATA_LOSS,
counted).
Nothing is read before somebody asks. At most ``MOST_CALLS`` calls are answered at once, each of
which has one chunk in memory; one whose caller does not read for ``PROGRESS_S`` ends.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc

from moeserve.errors import (
    CheckpointError,
    DataLossError,
    DeadlineError,
    ExhaustedError,
    MoeserveError,
)
from moeserve.models.files import open_regular
from moeserve.pb import cache_pb2 as pb
from moeserve.pools.cache.keys import PageKey
from moeserve.pools.cache.messages import (
    SERVICE,
    head_of,
    parts_of,
    read_keys,
    read_message,
    write_part,
)
from moeserve.pools.cache.pages import StoredPage
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.manifest import (
    NAMESPACE,
    Manifest,
    WeightChunk,
    manifest_of,
    offer_key,
    sealed,
)

MOST_CALLS = 32
PROGRESS_S = 10.0

Context = grpc.aio.ServicerContext[Any, Any]


class HeldCheckpoint:
    """The pages that a model folder is, by key; ``read`` is for any thread."""

    def __init__(self, manifest: Manifest, counts: WeightCounts) -> None:
        self.manifest = manifest
        self._folder = Path(manifest.folder)
        self._counts = counts
        self._chunks = {chunk.key: chunk for chunk in manifest.chunks()}
        self._offers = {offer_key(manifest.name), offer_key("")}
        self._digests: dict[PageKey, bytes] = {}

    def read(self, key: PageKey) -> StoredPage | None:
        """None where it has no such page. DataLossError where it has changed, CheckpointError where
        the file cannot be read any more."""
        if key in self._offers:
            return sealed(key, self.manifest.to_json())
        chunk = self._chunks.get(key)
        if chunk is None:
            return None
        page = sealed(key, self._bytes_of(chunk))
        if self._digests.setdefault(key, page.digest) != page.digest:
            self._counts.changed += 1
            raise DataLossError(f"{chunk.file} has changed at byte {chunk.start} or behind it")
        return page

    def _bytes_of(self, chunk: WeightChunk) -> bytes:
        try:
            with open_regular(self._folder / chunk.file) as opened:
                opened.seek(chunk.start)
                body = opened.read(chunk.nbytes)
        except OSError as error:
            raise CheckpointError(f"{chunk.file}: cannot be read: {error}") from error
        if len(body) < chunk.nbytes:
            raise DataLossError(f"{chunk.file} is shorter than it was")
        return body


class WeightServer:
    """On the event loop that runs when it is asked."""

    def __init__(self, folder: Path, name: str, counts: WeightCounts) -> None:
        self._folder = folder
        self._name = name
        self._counts = counts
        self._held: asyncio.Task[HeldCheckpoint] | None = None
        self._calls = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        get: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(self._get)
        return grpc.method_handlers_generic_handler(SERVICE, {"Get": get})

    async def held(self) -> HeldCheckpoint:
        """Read once, when it is first wanted."""
        if self._held is None:
            self._held = asyncio.create_task(asyncio.to_thread(self._open))
        return await asyncio.shield(self._held)

    def _open(self) -> HeldCheckpoint:
        return HeldCheckpoint(manifest_of(self._folder, self._name), self._counts)

    async def _get(self, request: bytes, context: Context) -> None:
        try:
            keys = read_keys(read_message(pb.PageKeys, request).keys)
            if self._calls >= MOST_CALLS:
                raise ExhaustedError(f"{self._calls} calls read weights here: ask again later")
            self._calls += 1
            try:
                await self._send(keys, context)
            finally:
                self._calls -= 1
        except MoeserveError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)

    async def _send(self, keys: tuple[PageKey, ...], context: Context) -> None:
        held = await self.held()
        for key in keys:
            page = await asyncio.to_thread(held.read, key)
            if page is None:
                return
            head: pb.PageHead | None = head_of(key, NAMESPACE, page.nbytes)
            for digest, data in parts_of(page):
                part = write_part(pb.PagePart(head=head, digest=digest), data)
                try:
                    async with asyncio.timeout(PROGRESS_S):
                        await context.write(part)
                except TimeoutError:
                    raise DeadlineError(f"nothing was read for {PROGRESS_S:g} s") from None
                self._counts.sent_bytes += len(data)
                head = None
