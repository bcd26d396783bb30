"""``moeserve gateway``: the doors of a cluster, in a process without weights.

It keeps nothing that others need: several run side by side, and one that is started anew finds the
members that join it. Until a member is there that decodes, its doors answer UNAVAILABLE. The first
one found decides which model it serves, by ``compute_id``; tokenizer and chat template are read
from the model that ``--model`` names, else from where the member has it, on this host.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from moeserve.comm.control.on_loop import on_loop
from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.config.cluster import GatewayConfig
from moeserve.config.options import ServeConfig
from moeserve.engine.build import load_tokenizer
from moeserve.engine.loop import EngineObserver
from moeserve.engine.ranks.counted import RankCounts, ask_counts
from moeserve.engine.ranks.rank_links import RankListener, RemoteLink
from moeserve.errors import ConfigError
from moeserve.gateway.dashboard.cluster import ASK_S, show_cluster
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.grammars import GrammarGate
from moeserve.gateway.limits import ModelLimits
from moeserve.gateway.parsers.styles import style_of
from moeserve.gateway.routed import RoutedModel
from moeserve.gateway.server import StopCallback, serve
from moeserve.gateway.service import ServedModel
from moeserve.grammar.checking import GrammarChecker
from moeserve.grammar.worker import Vocabulary
from moeserve.models.library import resolve_model, with_model_here
from moeserve.models.tokenizer_parts import tokenizer_file
from moeserve.observe.loading import ProgressCallback
from moeserve.observe.metrics import Metrics
from moeserve.pools.cluster import ClusterEngine
from moeserve.pools.cluster_links import MemberLinks
from moeserve.pools.members import Member, ServedTerms, split_address
from moeserve.pools.rebalancing import Rebalancing
from moeserve.pools.registry.base import HEARTBEAT_S, MOST_MEMBERS, Registry
from moeserve.pools.registry.embedded import RegistryServer
from moeserve.pools.registry.follow import Follower
from moeserve.pools.registry.memory import MemoryRegistry
from moeserve.pools.registry.several import SeveralRegistries
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.routing.crowding import Crowding
from moeserve.pools.routing.named import WANT_KEYS, policy_named
from moeserve.pools.routing.router import RequestRouter
from moeserve.worker.cluster_trust import (
    RUN,
    joined_registry,
    place_to_listen,
    place_to_reach,
    trust_of_cluster,
)

log = logging.getLogger("moeserve.worker")

SOON_S = 30.0
LOOK_S = 0.05
# Five beats of a member: then its requests go to others, before its lease has ended.
SILENT_S = 5 * HEARTBEAT_S
# What calls get to end when the gateway closes.
CLOSING_S = 1.0


def run_gateway(config: GatewayConfig) -> int:
    """Serves until a signal; the exit status."""
    if "model" in config.model_fields_set:
        config = with_model_here(config)
    return serve(config.doors_config, GatewayProcess(config))


class GatewayProcess:
    """A ``ServedProcess``."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.members: GatewayMembers | None = None

    def on_stop(self, stop: StopCallback) -> None: ...

    def stopping(self) -> None: ...

    async def idle(self) -> None: ...

    def load(
        self,
        config: ServeConfig,
        observer: Metrics,
        progress: ProgressCallback,
        loop: asyncio.AbstractEventLoop,
    ) -> RoutedModel:
        """Members are found, and one of them decodes."""

        async def open_members() -> GatewayMembers:
            members = GatewayMembers(self._config)
            await members.open()
            return members

        members = self.members = on_loop(loop, open_members, SOON_S)
        try:
            print(f"registry: {members.address}", flush=True)
            while (terms := members.terms) is None:
                progress(0, 1)  # raises where the process is to stop
                time.sleep(LOOK_S)
            text = text_of(self._config, terms)

            async def route() -> ClusterEngine:
                return members.route(terms, observer, self._config.max_queue)

            engine = on_loop(loop, route, SOON_S)
        except BaseException:
            on_loop(loop, members.close, SOON_S)
            raise

        def stop(timeout: float) -> bool:
            stopped = engine.stop(timeout)
            on_loop(loop, members.close, SOON_S)
            text.checker.close()
            return stopped

        served = served_by(self._config, terms, text, engine)
        return RoutedModel(served, stop, members.show)


class GatewayMembers:
    """The members that this gateway knows, and the registry in it that they join. On the event
    loop that runs when it is made."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._trust = trust_of_cluster(config)
        self.view = ClusterView()
        self._own = MemoryRegistry()
        joined = joined_registry(config, self._trust)
        registries: list[Registry] = [self._own] if joined is None else [self._own, joined]
        self._registry = SeveralRegistries(registries)
        self._follower = Follower(self._registry, self.view)
        self._links = MemberLinks(connector(self._trust))
        self._routing: tuple[ClusterEngine, RequestRouter, Rebalancing] | None = None
        self._server: grpc.aio.Server | None = None
        self.address = ""

    @property
    def terms(self) -> ServedTerms | None:
        """Of the first member that decodes; None where none does yet."""
        found = (r.member for r in self.view.members() if r.member.role.decodes)
        return next((member.terms for member in found if member.terms.compute_id), None)

    async def open(self) -> None:
        """Members can join, and are followed."""
        host, port = place_to_listen(self._config)
        handlers = [RegistryServer(self._own).handlers()]
        self._server, port = open_server(host, self._trust, RUN, handlers, port)
        await self._server.start()
        self.address = place_to_reach(self._config, port)
        self._follower.start()

    def route(self, terms: ServedTerms, observer: EngineObserver, max_queue: int) -> ClusterEngine:
        """Requests to members of these terms. No two gateways begin to look at the same ones, so
        that they do not send everything to the same."""
        config = self._config
        policy = policy_named(config.routing, start=secrets.randbelow(MOST_MEMBERS))
        use_keys = config.routing in WANT_KEYS
        router = RequestRouter(policy, terms.compute_id, use_keys=use_keys)
        engine = ClusterEngine(
            self.view,
            router,
            self._links,
            observer,
            name=secrets.token_hex(4),
            max_queue=max_queue,
            on_answer=router.on_answer,
        )
        self.view.subscribe(router.on_change)  # before the engine asks it
        self.view.subscribe(engine.on_change)
        rebalancing = Rebalancing(router.table, engine, Crowding(config.moves_per_s))
        rebalancing.start()
        self._routing = engine, router, rebalancing
        return engine

    def show(self, dashboard: Dashboard, metrics: Metrics) -> None:
        """When requests are routed."""
        assert self._routing is not None
        engine, router, rebalancing = self._routing

        async def ask(member: Member) -> RankCounts:
            link = self._links.to(member, engine)
            assert isinstance(link, RemoteLink)
            return await ask_counts(link, ASK_S)

        counts = (engine.counts, router.counts, rebalancing.counts)
        show_cluster(dashboard, metrics, self.view.members, ask, counts)

    async def close(self) -> None:
        if self._routing is not None:
            self._routing[2].close()
        await self._follower.close()
        await self._registry.close()
        if self._server is not None:
            await self._server.stop(CLOSING_S)


def connector(trust: Trust) -> Callable[[Member, RankListener], RemoteLink]:
    """Makes links to members; nothing is connected before the first request."""
    metadata = proof_metadata(trust, RUN)

    def connect(member: Member, listener: RankListener) -> RemoteLink:
        host, port = split_address(member.address)
        channel = open_channel(host, port, trust, member.server_name)
        return RemoteLink(member.rank, channel, metadata, listener, silent_s=SILENT_S)

    return connect


@dataclass(frozen=True, slots=True)
class ServedText:
    """What makes tokens of texts and checks grammars here."""

    folder: Path
    checker: GrammarChecker


def text_of(config: GatewayConfig, terms: ServedTerms) -> ServedText:
    """ConfigError where the model is not on this host."""
    if "model" in config.model_fields_set:
        folder = resolve_model(config.model)
    else:
        folder = Path(terms.folder)
    if not folder.exists():
        raise ConfigError(
            f"the members' model is at {terms.folder!r}, which is not on this host: say with "
            "--model where its tokenizer is"
        )
    file = tokenizer_file(folder)
    vocabulary = None
    if file is not None and terms.eos_ids:
        vocabulary = Vocabulary(file, terms.vocab, terms.eos_ids)
    return ServedText(folder, GrammarChecker(vocabulary))


def served_by(
    config: GatewayConfig, terms: ServedTerms, text: ServedText, engine: ClusterEngine
) -> ServedModel:
    """What the doors show."""
    tokenizer, _ = load_tokenizer(text.folder, config.chat_template)
    template = None if tokenizer is None else tokenizer.chat_template
    return ServedModel(
        name=config.served_model_name or terms.name,
        engine=engine,
        tokenizer=tokenizer,
        limits=ModelLimits(terms.vocab, terms.max_model_len, terms.max_model_len),
        eos_ids=terms.eos_ids,
        grammars=GrammarGate(text.checker),
        style=style_of(template, config.tool_parser, config.reasoning_parser),
    )
