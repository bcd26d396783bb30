"""Weights of a member before it loads: this host's, or those of other members (``--weights``).

``pool`` takes them from others, and needs no model folder here: the name that is wanted is that of
``--model`` or ``--served-model-name``, or whatever the cluster serves. ``auto`` measures: a folder
that lies in this host's memory is read; else others are asked, a neighbour on this host whose
folder does is read in place, and a trial of ``TRIAL`` batches from others decides between them and
the disk. What was chosen and why is logged. Fails as ``pools.weights`` does; where there is a
folder here, with ``auto``, it is read instead.

``OfferedWeights`` is the other side: a member answers for the weights that it has loaded, and with
``auto`` and ``pool`` puts them into the cache pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from moeserve.config.cluster import PeerConfig
from moeserve.errors import (
    CheckpointError,
    ConfigError,
    DataLossError,
    DeadlineError,
    ExhaustedError,
    MoeserveError,
    UnavailableError,
)
from moeserve.models.gguf.places import gguf_of
from moeserve.models.hub import is_hub_id
from moeserve.models.library import DEMO, resolve_model, with_model_here
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.members import Role
from moeserve.pools.registry.base import Interest, Registry
from moeserve.pools.registry.follow import Follower
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.fetch import WeightFetch, weight_calls
from moeserve.pools.weights.folders import WeightFolder, WeightFolders, temporary_root
from moeserve.pools.weights.manifest import Manifest, manifest_of
from moeserve.pools.weights.offers import WeightServer
from moeserve.pools.weights.rates import IN_MEMORY, reading_rate
from moeserve.pools.weights.search import FoundWeights, WeightSearch
from moeserve.pools.weights.stored import put_checkpoint
from moeserve.worker.cluster_trust import RUN, joined_registry, trust_of_cluster

log = logging.getLogger("moeserve.worker")

# Until somebody who has the weights is found: where there are none here, and where there are.
WAIT_S, GLANCE_S = 15.0, 2.0
# For all of it, other processes of this host that fetch the same included.
WEIGHTS_S = 3600.0
# Batches whose time decides, and how often others are looked for when those found have failed.
TRIAL, SEARCHES = 4, 3
# After a member has loaded, before it looks who keeps KV.
SETTLE_S = 2.0
CLOSING_S = 1.0
# After which a folder that is here is read after all.
FAILURES = (UnavailableError, DataLossError, DeadlineError, ExhaustedError)


@dataclass(frozen=True, slots=True)
class ArrivedWeights:
    """``config`` has the folder; ``close`` when it is not read any more."""

    config: PeerConfig
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder on this host, and how fast it is read: bytes per second. ``name`` is what clients
    call the model, where it is another member's folder."""

    manifest: Manifest
    path: Path
    rate: float
    name: str | None = None


async def weights_here(config: PeerConfig, counts: WeightCounts) -> ArrivedWeights:
    """On the event loop that runs. DeadlineError after ``WEIGHTS_S``."""
    # A GGUF file is not handed on.
    if config.weights == "disk" or gguf_of(Path(config.model)) is not None:
        return ArrivedWeights(config)
    try:
        async with asyncio.timeout(WEIGHTS_S):
            return await _weights_of_cluster(config, counts)
    except TimeoutError as error:
        raise DeadlineError(f"weights have not come within {WEIGHTS_S:.0f} s") from error


async def _weights_of_cluster(config: PeerConfig, counts: WeightCounts) -> ArrivedWeights:
    here = await asyncio.to_thread(_local, config) if config.weights == "auto" else None
    if here is not None and here.rate >= IN_MEMORY:
        return _from_folder(config, here, counts, "which lies in memory")
    async with _search_of(config, here) as (search, channels):
        found = await search.find(WAIT_S if here is None else GLANCE_S)
        if found is None:
            return await asyncio.to_thread(_without_others, config, here, counts)
        try:
            return await _Arrival(config, counts, search, channels, here).get(found)
        except FAILURES as error:
            if here is None:
                raise
            log.warning("weights: %s; they are read from %s", error.message, here.path)
            return _from_folder(config, here, counts, "as others have failed")


class _Arrival:
    """One checkpoint that others have, which comes or does not."""

    def __init__(
        self,
        config: PeerConfig,
        counts: WeightCounts,
        search: WeightSearch,
        channels: ChannelPool,
        here: LocalFolder | None,
    ) -> None:
        self._config = config
        self._counts = counts
        self._search = search
        self._channels = channels
        self._here = here

    async def get(self, found: FoundWeights) -> ArrivedWeights:
        here, manifest, config = self._here, found.manifest, self._config
        if config.weights == "auto":
            beside = await asyncio.to_thread(_beside, manifest)
            if beside is not None and (here is None or beside.rate > here.rate):
                here = beside
            if here is not None and here.rate >= IN_MEMORY:
                return _from_folder(config, here, self._counts, "which lies in memory")
        folders = WeightFolders(config.weights_folder)
        folders.sweep()
        async with folders.fetching(manifest.id, WEIGHTS_S) as folder:
            if not folder.is_whole and not await self._fetch(folder, found, here):
                assert here is not None, "a trial needs something to be compared with"
                return _from_folder(config, here, self._counts, "which is faster")
            again = await asyncio.to_thread(manifest_of, folder.path, manifest.name)
            if again.id != manifest.id:
                raise DataLossError(f"{folder.path} is not what was fetched: remove it")
        return ArrivedWeights(_with_folder(config, folder.path, manifest.name), folder.close)

    async def _fetch(
        self, folder: WeightFolder, found: FoundWeights, here: LocalFolder | None
    ) -> bool:
        """Whether the folder is whole now; not where a trial says that ``here`` is faster."""
        manifest = found.manifest
        part = folder.begin(manifest)
        fetch = WeightFetch(manifest, part, weight_calls(self._channels), self._counts)
        began = time.perf_counter()
        if here is not None:
            await self._run(fetch, found, TRIAL)
            rate = fetch.came / (time.perf_counter() - began)
            log.info(
                "weights: %.0f MB/s from members, %.0f MB/s from %s",
                rate / 1e6, here.rate / 1e6, here.path,
            )  # fmt: skip
            if rate < here.rate and not fetch.done:
                return False
        await self._run(fetch, found, None)
        took = time.perf_counter() - began
        await asyncio.to_thread(folder.finish)
        log.info(
            "weights: %.0f MB of %s came from members in %.2f s",
            fetch.came / 1e6, manifest.name, took,
        )  # fmt: skip
        return True

    async def _run(self, fetch: WeightFetch, found: FoundWeights, batches: int | None) -> None:
        """From those that were found, and then from whoever is there by then."""
        for _ in range(SEARCHES - 1):
            try:
                await fetch.run(found.sources(), batches)
                return
            except UnavailableError as error:
                log.warning("weights: %s; others are looked for", error.message)
                again = await self._search.find(GLANCE_S)
                if again is None or again.manifest.id != found.manifest.id:
                    raise
                found = again
        await fetch.run(found.sources(), batches)


def name_wanted(config: PeerConfig) -> str:
    """Of the model that others are asked for; empty for whatever there is."""
    if config.served_model_name is not None:
        return config.served_model_name
    if config.model == DEMO:
        return ""
    return config.model if is_hub_id(config.model) else Path(config.model).name


def _local(config: PeerConfig) -> LocalFolder | None:
    try:
        path = resolve_model(config.model)
    except CheckpointError:
        return None
    return LocalFolder(manifest_of(path, config.model), path, reading_rate(path))


def _beside(manifest: Manifest) -> LocalFolder | None:
    """The folder of a neighbour, if it is of this host, and is the same checkpoint."""
    path = Path(manifest.folder)
    try:
        # A temporary one would go with its last user: it is used as one of ours (``folders``).
        if not path.is_absolute() or not path.is_dir() or path.parent == temporary_root():
            return None
        if manifest_of(path, manifest.name).id != manifest.id:
            return None
        return LocalFolder(manifest, path, reading_rate(path), manifest.name)
    except (CheckpointError, OSError, ValueError):
        return None


def _from_folder(
    config: PeerConfig, here: LocalFolder, counts: WeightCounts, why: str
) -> ArrivedWeights:
    log.info("weights: read from %s at %.0f MB/s, %s", here.path, here.rate / 1e6, why)
    counts.disk_bytes += here.manifest.nbytes
    return ArrivedWeights(_with_folder(config, here.path, here.name))


def _with_folder(config: PeerConfig, path: Path, name: str | None) -> PeerConfig:
    name = config.served_model_name or name
    return config.model_copy(update={"model": str(path), "served_model_name": name})


def _without_others(
    config: PeerConfig, here: LocalFolder | None, counts: WeightCounts
) -> ArrivedWeights:
    if here is not None:
        return _from_folder(config, here, counts, "as no member has them")
    if config.weights == "auto" and is_hub_id(config.model):
        return ArrivedWeights(with_model_here(config))
    wanted = name_wanted(config) or "any model"
    raise UnavailableError(
        f"no member of the cluster, and no cache pool, has weights of {wanted}: start a member "
        "that reads them from its disk"
    )


@contextlib.asynccontextmanager
async def _search_of(
    config: PeerConfig, here: LocalFolder | None
) -> AsyncIterator[tuple[WeightSearch, ChannelPool]]:
    trust = trust_of_cluster(config)
    registry = joined_registry(config, trust)
    if registry is None:
        raise ConfigError("no cluster to take weights from: give --join HOST:PORT or --registry")
    channels = ChannelPool(trust, RUN)
    view = ClusterView()
    follower = Follower(registry, view, Interest(loads=False))
    follower.start()
    try:
        name, model = ("", here.manifest.id) if here is not None else (name_wanted(config), "")
        yield WeightSearch(view, weight_calls(channels), name, model), channels
    finally:
        await follower.close()
        await channels.close()
        with contextlib.suppress(TimeoutError, MoeserveError):
            await asyncio.wait_for(registry.close(), CLOSING_S)


class OfferedWeights:
    """What a member that serves a model does for those who want its weights; ``open`` and ``close``
    are of its life in the cluster."""

    def __init__(self, config: PeerConfig, folder: Path, name: str, counts: WeightCounts) -> None:
        self._server = WeightServer(folder, name, counts)
        self._puts = config.weights != "disk"
        self._counts = counts
        self._task: asyncio.Task[None] | None = None

    def handlers(self) -> grpc.GenericRpcHandler:
        return self._server.handlers()

    def open(self, registry: Registry, channels: ChannelPool) -> None:
        if self._puts:
            self._task = asyncio.create_task(self._put(registry, channels))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _put(self, registry: Registry, channels: ChannelPool) -> None:
        view, members = ClusterView(), CacheMembers()
        members.follow(view)
        follower = Follower(registry, view, Interest(frozenset({Role.CACHE}), loads=False))
        follower.start()
        try:
            await asyncio.sleep(SETTLE_S)
            capacity = sum(report.load.capacity_bytes for report in view.members())
            held = await self._server.held()
            new = await put_checkpoint(held, members, weight_calls(channels), capacity)
            self._counts.put_bytes += new
            log.info("weights: %.0f MB were new to the cache pool", new / 1e6)
        except MoeserveError as error:
            log.warning("weights: not put into the cache pool: %s", error.message)
        finally:
            await follower.close()
