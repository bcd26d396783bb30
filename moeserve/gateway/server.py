"""One process, two doors, one model: bind, load, serve, drain.

Ports are bound before the model is loaded, so that a taken one costs nothing; while loading, both
doors answer UNAVAILABLE. The first SIGTERM or SIGINT drains, the second ends what still runs.
Either way every stream gets an end, and the exit status is 0. Should the engine die, the server
ends with status 1, for whoever started it to start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

from moeserve.config.options import AnswerOptions, ServeConfig
from moeserve.engine.build import LoadedModel, build_engine, targets_of
from moeserve.engine.observers import beside
from moeserve.errors import CancelledError
from moeserve.forecast.step_costs import predicted_steps
from moeserve.gateway.dashboard.history import SloTargets
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.dashboard.own import OwnProcess
from moeserve.gateway.descriptors import raise_descriptor_limit
from moeserve.gateway.door_metrics import door_metrics
from moeserve.gateway.entrance import Entrance
from moeserve.gateway.grammars import GrammarGate
from moeserve.gateway.http.server import address_of
from moeserve.gateway.limits import ModelLimits
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.parsers.styles import style_of
from moeserve.gateway.routed import RoutedModel
from moeserve.gateway.service import InferenceService, ServedModel
from moeserve.observe.families import CacheInfo
from moeserve.observe.loading import ProgressCallback, shown_progress
from moeserve.observe.logs import configure_log
from moeserve.observe.metrics import Metrics
from moeserve.observe.requests import RequestLog, RequestRecord
from moeserve.observe.spans import open_spans

log = logging.getLogger(__name__)

# What the doors get to send the last events after the engine has stopped.
FAREWELL_S = 5.0
STOP_S = 30.0
# How soon a dead engine is noticed.
ALIVE_POLL_S = 0.25

StopCallback = Callable[[], None]


class ServedProcess(Protocol):
    """What a process serves, and whom a stop concerns beside it."""

    def on_stop(self, stop: StopCallback) -> None:
        """Before it loads: ``stop`` asks to stop as the first signal does, from any thread."""
        ...

    def load(
        self,
        config: ServeConfig,
        observer: Metrics,
        progress: ProgressCallback,
        loop: asyncio.AbstractEventLoop,
    ) -> LoadedModel | RoutedModel:
        """On a thread beside the loop."""
        ...

    def stopping(self) -> None:
        """This process stops, for a signal or because it was asked."""
        ...

    async def idle(self) -> None:
        """Until no other process has requests here; who waits bounds it."""
        ...


class OneProcess:
    """A process by itself."""

    def on_stop(self, stop: StopCallback) -> None: ...

    def load(
        self,
        config: ServeConfig,
        observer: Metrics,
        progress: ProgressCallback,
        loop: asyncio.AbstractEventLoop,
    ) -> LoadedModel:
        watched = beside(observer, observer.spans)
        cost = predicted_steps(config)
        return build_engine(config, observer=watched, progress=progress, cost=cost)

    def stopping(self) -> None: ...

    async def idle(self) -> None: ...


def serve(config: ServeConfig, process: ServedProcess | None = None) -> int:
    """Serves until a signal; the exit status."""
    configure_log(config.log_level, config.log_format)
    raise_descriptor_limit()
    # Long texts go to processes of their own: no threads beside the model's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return asyncio.run(_serve(config, process or OneProcess()))


async def _serve(config: ServeConfig, process: ServedProcess) -> int:
    signals = _Signals()
    loop = asyncio.get_running_loop()
    process.on_stop(lambda: _ask(loop, signals.first))
    with signals.caught(), _thawed():
        async with Server(config, process) as server:
            try:
                await server.load(signals.first)
            except CancelledError as stopped:
                log.info("%s", stopped.message)
                return 0
            server.reread_plan_on_hangup()
            if server.has_doors:
                server.service.texts.warm_up()
                print(f"ready: {server}", flush=True)
            # What was made by now lives as long as the process: no collection looks at it again.
            gc.collect()
            gc.freeze()
            if not await server.outlived_by(signals.first):
                return 1
            process.stopping()
            log.info("draining %d requests", server.service.running)
            await server.drain(config.drain_timeout_s, signals.second)
    return 0


@contextlib.contextmanager
def _thawed() -> Iterator[None]:
    """What was frozen meanwhile is collected in the end, as native objects are to be."""
    try:
        yield
    finally:
        gc.unfreeze()


def _ask(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed: it has stopped already
        loop.call_soon_threadsafe(event.set)


def served_of(loaded: LoadedModel, form: AnswerOptions | None = None) -> ServedModel:
    """What the doors need to know of a model."""
    template = None if loaded.tokenizer is None else loaded.tokenizer.chat_template
    return ServedModel(
        name=loaded.name,
        engine=loaded.engine,
        tokenizer=loaded.tokenizer,
        limits=ModelLimits(loaded.spec.vocab, loaded.max_model_len, loaded.context),
        architecture=loaded.spec.architecture,
        eos_ids=tuple(sorted(loaded.config.eos_ids)),
        grammars=GrammarGate(loaded.own.grammars),
        style=style_of(template)
        if form is None
        else style_of(template, form.tool_parser, form.reasoning_parser),
    )


def cache_info(loaded: LoadedModel) -> CacheInfo:
    return CacheInfo(
        block_size=loaded.block_size,
        num_blocks=loaded.num_blocks,
        dtype=str(loaded.own.decoder.kv_dtype).removeprefix("torch."),
        prefix_cache=loaded.config.prefix_cache,
    )


class Server:
    """Owns sockets, doors and engine for the length of an ``async with``."""

    def __init__(self, config: ServeConfig, process: ServedProcess | None = None) -> None:
        self.config = config
        self.spans = open_spans(config.otlp_endpoint)
        self.metrics = Metrics(self.spans)
        self._log = RequestLog() if config.request_log else None
        mailbox = Mailbox(asyncio.get_running_loop())
        self.service = InferenceService(
            mailbox, observe=self._ended, strict=config.strict, spans=self.spans
        )
        targets = SloTargets(config.slo_ttft, config.slo_tpot)
        self.dashboard = Dashboard(self.service, targets, self.metrics.parts.totals)
        self.loaded: LoadedModel | RoutedModel | None = None
        self.grpc_port: int | None = None
        self.http_port: int | None = None
        self._process = process or OneProcess()
        self._entrance: Entrance | None = None

    @property
    def _own(self) -> LoadedModel | None:
        """The model, if this process runs it."""
        return None if isinstance(self.loaded, RoutedModel) else self.loaded

    @property
    def has_doors(self) -> bool:
        """Whether clients can connect; a rank may serve others' doors alone."""
        return self.grpc_port is not None or self.http_port is not None

    @property
    def _address(self) -> str:
        """One that clients connect to; empty where there is none."""
        port = self.grpc_port if self.http_port is None else self.http_port
        return "" if port is None else address_of(self.config.host, port)

    def __str__(self) -> str:
        parts = [f"model={self.service.served.name}"]
        if self.grpc_port is not None:
            parts.append(f"grpc={address_of(self.config.host, self.grpc_port)}")
        if self.http_port is not None:
            scheme = "http" if self.config.tls_cert is None else "https"
            parts.append(f"http={scheme}://{address_of(self.config.host, self.http_port)}")
        return " ".join(parts)

    async def __aenter__(self) -> Self:
        """Both doors are open, and answer UNAVAILABLE until ``load``."""
        self._entrance = entrance = Entrance(
            self.service, self.config, self._metrics_page, FAREWELL_S, self.dashboard
        )
        self.grpc_port = None if entrance.grpc is None else entrance.grpc.port
        self.http_port = None if entrance.http is None else entrance.http.port
        try:
            await entrance.open()
        except BaseException:  # whatever it is goes on up; the port must not stay taken
            entrance.release()
            raise
        self.metrics.also(lambda: door_metrics(entrance, self.service.usage))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what still runs with UNAVAILABLE, then closes engine and doors."""
        self.service.drain()
        if self.loaded is not None:
            # Ranks leave together, so this one may have to wait while others drain.
            together = self._own is not None and self._own.own_engine is not None
            wait_s = STOP_S + (self.config.drain_timeout_s if together else 0.0)
            if not await asyncio.to_thread(self.loaded.close, wait_s):
                log.error("the engine did not stop within %g s", wait_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.service.idle(), FAREWELL_S)
        if self._entrance is not None:
            await self._entrance.close()
        await self.service.texts.close()
        if self.spans is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self.spans.close), FAREWELL_S)

    async def load(self, interrupt: asyncio.Event | None = None) -> None:
        """Opens for requests when the model is there; CancelledError where ``interrupt`` came."""
        stopping = threading.Event()
        with shown_progress() as progress:

            def watched(done: int, total: int) -> None:
                if stopping.is_set():
                    raise CancelledError("stopped while loading")
                progress(done, total)

            loading = asyncio.create_task(
                asyncio.to_thread(
                    self._process.load,
                    self.config,
                    self.metrics,
                    watched,
                    asyncio.get_running_loop(),
                )
            )
            watching = asyncio.create_task((interrupt or asyncio.Event()).wait())
            await asyncio.wait({loading, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                stopping.set()
            watching.cancel()
            self.loaded = loaded = await loading
        if stopping.is_set():
            raise CancelledError("stopped while loading")
        if isinstance(loaded, RoutedModel):
            engine = loaded.engine
            self.metrics.bind(loaded.name, lambda: engine.counters, engine.load)
            self.service.serve(loaded.served)
            loaded.show(self.dashboard, self.metrics)
        else:
            self._show(loaded)
            self.service.serve(served_of(loaded, self.config))
            self.dashboard.show(OwnProcess(loaded, self._address))
        await self._announce(True)

    def _show(self, loaded: LoadedModel) -> None:
        """Its counts are this process's metrics."""
        cache = cache_info(loaded)
        for name, counts in loaded.counted.items():
            self.metrics.parts.add(name, counts)
        targets = targets_of(self.config)
        self.metrics.parts.add("target", lambda: targets, now=("ttft_s", "tpot_s"))
        if loaded.ranks is None:
            own = loaded.own_engine or loaded.engine
            self.metrics.bind(loaded.name, lambda: own.counters, own.load, cache=cache)
        else:
            ranks = loaded.ranks
            self.metrics.bind(loaded.name, lambda: ranks.counters, ranks.load, ranks, cache)

    async def _announce(self, serving: bool) -> None:
        if self._entrance is not None:
            await self._entrance.announce(serving)

    def _ended(self, record: RequestRecord) -> None:
        """A client's request has ended, or was refused."""
        self.metrics.on_request(record)
        self.dashboard.on_request(record)
        if self._log is not None:
            self._log.write(record)

    async def _metrics_page(self) -> tuple[bytes, str]:
        if self._own is not None and self._own.ranks is not None:
            await self._own.ranks.refresh()
        return self.metrics.render()

    def reread_plan_on_hangup(self) -> None:
        """SIGHUP: the file of --plan may hold another one."""
        live_plan = None if self._own is None else self._own.live_plan
        if live_plan is not None and self.config.plan is not None:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, live_plan.reread, self.config.plan)

    async def outlived_by(self, stop: asyncio.Event) -> bool:
        """Waits for ``stop``; False as soon as the engine has died."""
        while self.loaded is not None and self.loaded.engine.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), ALIVE_POLL_S)
                return True
        log.critical("the engine has died: the server ends")
        await self._announce(False)
        return False

    async def drain(self, timeout_s: float, hurry: asyncio.Event | None = None) -> None:
        """Refuses new requests and waits for running ones, no longer than until ``hurry``."""
        self.service.drain()
        await self._announce(False)
        idle = asyncio.create_task(self._idle())
        hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
        done, late = await asyncio.wait(
            {idle, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in late:
            task.cancel()
        if idle not in done:
            log.warning("ending %d requests that still run", self.service.running)

    async def _idle(self) -> None:
        await self.service.idle()
        await self._process.idle()


class _Signals:
    """The first and the second request to stop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def _caught(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._caught)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
