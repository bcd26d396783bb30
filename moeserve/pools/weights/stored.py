"""A checkpoint put into the cache pool, chunk by chunk, so that it outlives those who serve it.

Owners of a batch say first what they lack: what is there already is neither read nor sent. A model
that would take more than ``SHARE`` of the pool is not put, for the pool is for KV first; chunks go
there when they are used least, as pages of KV do. The manifest lies under the model's name, and
under no name; one of another checkpoint is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from functools import partial
from itertools import islice

from moeserve.errors import CheckpointError, DataLossError, UnavailableError
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.calls import CacheCalls, Offered
from moeserve.pools.cache.keys import PageKey
from moeserve.pools.cache.pages import StoredPage
from moeserve.pools.cache.store import PutOutcome
from moeserve.pools.members import Member
from moeserve.pools.weights.fetch import ANSWER_S, BATCH
from moeserve.pools.weights.manifest import NAMESPACE, offer_key
from moeserve.pools.weights.offers import HeldCheckpoint

log = logging.getLogger(__name__)

SHARE = 0.5
# Members that keep one chunk: another copy is with each who serves the model.
REPLICAS = 1


async def put_checkpoint(
    held: HeldCheckpoint, members: CacheMembers, calls: CacheCalls, capacity: int
) -> int:
    """How many bytes were new to the pool, whose members have ``capacity`` in all; what cannot be
    put is left out."""
    manifest = held.manifest
    if not len(members) or manifest.nbytes > SHARE * capacity:
        log.info("weights: not put into a cache pool of %d bytes", capacity)
        return 0
    new = 0
    chunks = iter(list(manifest.chunks()))
    while batch := tuple(islice(chunks, BATCH)):
        pages = [
            Offered(chunk.key, NAMESPACE, chunk.nbytes, partial(_made, held, chunk.key))
            for chunk in batch
        ]
        for owner in members.owners(batch[0].key, REPLICAS):
            for page, outcome in zip(pages, await _put(calls, owner, pages), strict=False):
                new += page.nbytes if outcome == PutOutcome.STORED else 0
    # Last, so that whoever finds it finds the chunks.
    for name in (manifest.name, ""):
        await _put_manifest(held, members, calls, offer_key(name))
    return new


async def _put_manifest(
    held: HeldCheckpoint, members: CacheMembers, calls: CacheCalls, key: PageKey
) -> None:
    body = held.manifest.to_json()
    for owner in members.owners(key, REPLICAS):
        try:
            async with aclosing(calls.get(owner, [key], time.monotonic() + ANSWER_S)) as pages:
                async for page in pages:
                    if page.body != body:
                        await calls.doubt(owner, [key], drop=True)
        except UnavailableError as error:
            log.info("weights: %s", error.message)
            continue
        await _put(calls, owner, [Offered(key, NAMESPACE, len(body), partial(_made, held, key))])


async def _put(calls: CacheCalls, owner: Member, pages: list[Offered]) -> list[str]:
    try:
        return await calls.put(owner, pages)
    except (UnavailableError, DataLossError, CheckpointError) as error:
        log.info("weights: not put into the cache pool: %s", error.message)
        await asyncio.sleep(0.1)
        return []


def _made(held: HeldCheckpoint, key: PageKey) -> StoredPage:
    page = held.read(key)
    assert page is not None, "the checkpoint has its own chunks"
    return page
