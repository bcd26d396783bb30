"""Which members have a checkpoint, and which checkpoint is meant.

Members that serve a model say which (``offers``); so does the cache pool for one that was put
there, which is asked while no member has it. Where members have several, one that is the same as
the folder here is meant, if there is one; else the name has to say (ConfigError).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from moeserve.errors import ConfigError, InvalidRequestError, UnavailableError
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.calls import CacheCalls
from moeserve.pools.cache.keys import PageKey
from moeserve.pools.members import Member, Report, Role
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.weights.fetch import ANSWER_S, WeightSource
from moeserve.pools.weights.manifest import Manifest, offer_key, read_manifest

log = logging.getLogger(__name__)

# Members that are asked; more sources than these bring nothing more.
MOST_ASKED = 16
MOST_SOURCES = 4
LOOK_S = 0.2
# Owners of a key that are asked: one more than keep it, for the ring may have grown since.
POOL_REPLICAS = 2


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """A checkpoint, and who has it: members that serve it, and those of the cache pool."""

    manifest: Manifest
    neighbours: tuple[Member, ...]
    cache: CacheMembers

    def sources(self) -> list[WeightSource]:
        """Whom to ask, each only for what it may have."""
        members = self.cache.owners(offer_key(""), MOST_ASKED)
        pool = [WeightSource(member, _Keeper(self.cache, member)) for member in members]
        return [*(WeightSource(m) for m in self.neighbours[:MOST_SOURCES]), *pool]


class WeightSearch:
    """``view`` is followed by its owner. ``name`` is that of the model, or empty; ``here`` the id
    of the checkpoint that this host has, or empty."""

    def __init__(self, view: ClusterView, calls: CacheCalls, name: str, here: str) -> None:
        self._view = view
        self._calls = calls
        self._key = offer_key(name)
        self._here = here
        self._offers: dict[str, Manifest] = {}
        self._cache = CacheMembers()
        self._cache.follow(view)

    async def find(self, wait_s: float) -> FoundWeights | None:
        """As soon as a member has it; after ``wait_s`` what the pool has, or None."""
        end = time.monotonic() + wait_s
        self._offers.clear()
        while True:
            await self._ask_members()
            found = self._chosen()
            if found is not None:
                return found
            manifest = await self._in_pool()
            if manifest is not None and self._here in ("", manifest.id):
                return FoundWeights(manifest, (), self._cache)
            if time.monotonic() > end:
                return None
            await asyncio.sleep(LOOK_S)

    def _serving(self) -> list[Member]:
        reports: Sequence[Report] = self._view.members()
        return [
            report.member
            for report in reports
            if report.member.role is not Role.CACHE and not report.load.draining
        ]

    async def _ask_members(self) -> None:
        serving = self._serving()
        new = [m for m in serving if m.id not in self._offers][:MOST_ASKED]
        answers = await asyncio.gather(*(self._offer(member) for member in new))
        self._offers |= {m.id: a for m, a in zip(new, answers, strict=True) if a is not None}
        there = {member.id for member in serving}
        self._offers = {i: offer for i, offer in self._offers.items() if i in there}

    def _chosen(self) -> FoundWeights | None:
        manifests = {offer.id: offer for offer in self._offers.values()}
        if self._here:
            manifests = {i: offer for i, offer in manifests.items() if i == self._here}
        if not manifests:
            return None
        if len(manifests) > 1:
            names = ", ".join(sorted({offer.name for offer in manifests.values()}))
            raise ConfigError(
                f"members of the cluster have {len(manifests)} checkpoints ({names}): say by "
                "--model which one is meant"
            )
        (manifest,) = manifests.values()
        having = [m for m in self._serving() if self._has(m, manifest)]
        return FoundWeights(manifest, tuple(having), self._cache)

    def _has(self, member: Member, manifest: Manifest) -> bool:
        offer = self._offers.get(member.id)
        return offer is not None and offer.id == manifest.id

    async def _in_pool(self) -> Manifest | None:
        for owner in self._cache.owners(self._key, POOL_REPLICAS):
            manifest = await self._offer(owner)
            if manifest is not None:
                return manifest
        return None

    async def _offer(self, member: Member) -> Manifest | None:
        deadline = time.monotonic() + ANSWER_S
        keys: list[PageKey] = [self._key]
        try:
            async with aclosing(self._calls.get(member, keys, deadline)) as pages:
                async for page in pages:
                    return read_manifest(bytes(page.body)) if page.is_whole() else None
        except (UnavailableError, InvalidRequestError) as error:
            log.info("weights: %s", error.message)
        return None


@dataclass(frozen=True, slots=True)
class _Keeper:
    """Whether a member of the pool keeps the batch whose first chunk has this key."""

    cache: CacheMembers
    member: Member

    def __call__(self, key: PageKey) -> bool:
        return self.member in self.cache.owners(key, POOL_REPLICAS)
