"""One rank of several: ``python -m moeserve.worker`` with the settings of ``moeserve serve``, under
any launcher that ``comm.launch`` reads; and ``moeserve serve --ep N``, which launches its own.

Rank 0 opens the doors and decides; the others follow it until it ends the run. A rank that is told
to stop asks rank 0 to, which drains and ends them all. What happens when a rank is lost is decided
in one place, ``FailurePolicy``: the run ends, requests with UNAVAILABLE, every process with status
1.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pydantic import SecretStr
from torch.distributed import Store  # type: ignore[attr-defined]

from moeserve.comm.control import channels as control
from moeserve.comm.control.channels import Follower, Leader
from moeserve.comm.control.handshake import Identity, agree
from moeserve.comm.control.link import Tls, Trust
from moeserve.comm.exchange.base import Alarm
from moeserve.comm.group import Group, host_store
from moeserve.comm.launch.environment import ALONE, LOOPBACK, Launch, read_launch
from moeserve.comm.launch.rendezvous import Rendezvous, open_group
from moeserve.comm.launch.spawn import Children, child_environ, worker_command
from moeserve.config import ServeConfig, add_options, config_from_args, to_environ, to_yaml
from moeserve.engine.build import LoadedModel, load_tokenizer
from moeserve.engine.rank_model import EpContext, load_rank_model
from moeserve.errors import CancelledError, ConfigError, LateRankError, MoeserveError
from moeserve.gateway.server import LOG_FORMAT, ProgressCallback, StopCallback, load_model, serve
from moeserve.host import read_cpu
from moeserve.models.fingerprint import fingerprint
from moeserve.models.library import resolve_model
from moeserve.observe.metrics import Metrics
from moeserve.observe.progress import Progress
from moeserve.observe.timeline import Timeline
from moeserve.placement.plan import load as load_plan

log = logging.getLogger("moeserve.worker")

# What a process gets to end by itself once the run has broken, beyond the deadline.
LAST_S = 15.0
# What the slowest rank gets to load.
LOAD_S = 3600.0
# What children get to end by themselves once the run is over, and once it has broken.
GRACE_S = 5.0
HURRY_S = 1.0
# How long another rank waits for rank 0 to leave first.
LINGER_S = 5.0
# Settings in which ranks must not differ: results or the size of messages depend on them.
COMMON = (
    "dtype",
    "kv_dtype",
    "quantization",
    "quantize_attention",
    "combine",
    "ep_backend",
    "block_size",
    "max_num_batched_tokens",
    "microbatches",
    "replan",
    "ep_deadline",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this rank; the exit status, as of ``moeserve serve``."""
    parser = argparse.ArgumentParser(
        prog="moeserve.worker",
        description="Serve as one of several ranks, started by torchrun, mpirun, deepspeed or srun "
        "with the same settings on all; rank 0 opens the doors.",
        epilog="example: torchrun --nproc-per-node 2 -m moeserve.worker --model demo",
        allow_abbrev=False,
    )
    # The deepspeed launcher adds it, unless told --no_local_rank; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        config = config_from_args(args, os.environ)
        if args.print_config:
            print(to_yaml(config), end="")
            return 0
        return run_rank(config, read_launch(os.environ), os.environ)
    except ConfigError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 2
    except MoeserveError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run_rank(config: ServeConfig, launch: Launch, environ: Mapping[str, str]) -> int:
    """This rank, whichever it is; the exit status."""
    if config.ep is not None and config.ep != launch.world:
        raise ConfigError(
            f"ep={config.ep}, and the launcher ({launch.launcher}) started {launch.world} ranks: "
            "leave --ep away, it takes as many as were launched"
        )
    if launch.world == 1:
        return serve(config)
    if launch.rank == 0:
        return lead(config, RankStart(launch, environ))
    return follow(config, RankStart(launch, environ))


def serve_local(config: ServeConfig, environ: Mapping[str, str]) -> int:
    """Rank 0 in this process, ``ep`` - 1 others as its children."""
    world = config.ep or 1
    if world == 1:
        return serve(config)
    if config.ep_secret is None:
        config = config.model_copy(update={"ep_secret": SecretStr(secrets.token_hex(32))})
    store, port = host_store(LOOPBACK)
    settings = to_environ(config, environ)
    children = Children(
        worker_command(),
        {rank: settings | child_environ(rank, world, port) for rank in range(1, world)},
        sys.stderr,
    )
    grace_s = HURRY_S
    try:
        launch = replace(ALONE, world=world, local_world=world, port=port, launcher="moeserve")
        status = lead(config, RankStart(launch, environ, store, children.alarm))
        grace_s = GRACE_S if status == 0 else HURRY_S
        return status
    finally:
        children.end(grace_s)


@dataclass(frozen=True, slots=True)
class RankStart:
    """What a rank has before it has met the others. ``store`` where this process keeps the notes,
    ``alarm`` where it knows of ranks by other means."""

    launch: Launch
    environ: Mapping[str, str]
    store: Store | None = None
    alarm: Alarm | None = None


class FailurePolicy:
    """The one place that decides what the loss of a rank leads to.

    Now: the run ends on all ranks. Whatever waits hears the same alarm by itself (exchange, orders,
    engine) and unwinds; should that get stuck, the process ends all the same.
    """

    def __init__(self, deadline_s: float) -> None:
        self.error: LateRankError | None = None
        self._limit_s = deadline_s + LAST_S

    def decide(self, error: LateRankError) -> None:
        self.error = error
        log.critical("the run ends: %s", error.message)
        last = threading.Timer(self._limit_s, os._exit, (1,))
        last.daemon = True
        last.start()


def lead(config: ServeConfig, arriving: RankStart) -> int:
    """Rank 0: the doors open at once, and serve when all ranks have loaded."""
    ending = FailurePolicy(config.ep_deadline)
    leaders: list[Leader] = []
    stops: list[StopCallback] = []
    progress = progress_of(config, 0)

    def load(config: ServeConfig, observer: Metrics, tell: ProgressCallback) -> LoadedModel:
        loading = Loading(tell)
        met = meet(config, replace(arriving, alarm=lambda: loading.halted(arriving.alarm)))
        with giving_up(met.group):
            leader = control.lead(met.group, met.address, trust_of(config), config.ep_deadline)
        leaders.append(leader)
        leader.heartbeat.subscribe(ending.decide, lambda: stops[0]())
        loading.alarm = leader.alarm
        leader.heartbeat.activity = "loading the model".__str__
        context = context_of(config, met, lambda: loading.halted(leader.alarm), progress)
        settings = config.model_copy(update={"threads": threads_of(config, met)})
        loaded = load_model(settings, observer, loading, context, leader)
        context.group.all_gather("ready", b"")
        loading.over = True
        leader.heartbeat.activity = progress.__str__
        return loaded

    in_peace = False
    try:
        with progress:
            status = serve(config, load, stops.append)
        in_peace = True
    except MoeserveError as error:
        for leader in leaders:
            leader.fail(error)
        raise
    finally:
        for leader in leaders:
            leader.close(in_peace)
    return 1 if ending.error is not None else status


class Loading:
    """Progress that stops where there is an ``alarm``, or where whoever is told says so."""

    def __init__(self, tell: ProgressCallback, alarm: Alarm | None = None) -> None:
        self.over = False
        self.alarm = alarm
        self._tell = tell
        self._last = (0, 1)

    def __call__(self, done: int, total: int) -> None:
        if self.alarm is not None and (error := self.alarm()) is not None:
            raise error
        self._last = (done, total)
        self._tell(done, total)

    def halted(self, alarm: Alarm | None) -> MoeserveError | None:
        """The alarm; while it loads also what stops that, which is raised."""
        if not self.over:
            self._tell(*self._last)
        return None if alarm is None else alarm()


def follow(config: ServeConfig, arriving: RankStart) -> int:
    """Every other rank: load, and run what rank 0 orders until it ends the run."""
    launch = arriving.launch
    who = "" if launch.launcher == "moeserve" else f"rank {launch.rank} "
    logging.basicConfig(
        level=config.log_level.upper(), format=LOG_FORMAT.replace("%(l", who + "%(l", 1)
    )
    ending = FailurePolicy(config.ep_deadline)
    met = meet(config, arriving)
    with giving_up(met.group):
        follower = control.follow(met.group, trust_of(config), config.ep_deadline)
    follower.heartbeat.subscribe(ending.decide)
    follower.heartbeat.activity = "loading the model".__str__
    try:
        with asking_rank_0(follower):
            _follow(config, met, follower)
    except CancelledError as ended:
        log.info("%s", ended.message)
    except MoeserveError as error:
        follower.fail(error)
        follower.linger(LINGER_S)
    finally:
        follower.close()
    return 1 if ending.error is not None else 0


def _follow(config: ServeConfig, met: Rendezvous, follower: Follower) -> None:
    def halted() -> MoeserveError | None:
        if follower.heartbeat.ended:
            return CancelledError("rank 0 ended the run")
        return follower.alarm()

    progress = progress_of(config, met.group.rank)
    context = context_of(config, met, halted, progress)
    path = resolve_model(config.model)
    tokenizer, _ = load_tokenizer(path)
    rank = load_rank_model(
        path,
        tokenizer_eos=tokenizer.eos_ids if tokenizer else (),
        name=config.served_model_name,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        quantization=config.quantization,
        quantize_attention=config.quantize_attention,
        combine=config.combine,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        kv_memory=config.kv_memory,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        threads=threads_of(config, met),
        record_routing=config.record_routing,
        context=context,
        progress=Loading(lambda done, total: None, halted),
    )
    try:
        context.group.all_gather("ready", b"")
        follower.heartbeat.activity = progress.__str__
        with progress:
            steps = rank.follow(follower, context)
        log.info("rank 0 ended the run after %d steps", steps)
    finally:
        rank.close()


def meet(config: ServeConfig, arriving: RankStart) -> Rendezvous:
    """All ranks are there, and will serve the same."""
    met = open_group(
        arriving.launch, environ=arriving.environ, store=arriving.store, alarm=arriving.alarm
    )
    with giving_up(met.group):
        agree(met.group, identity_of(config))
    return met


@contextlib.contextmanager
def giving_up(group: Group) -> Iterator[None]:
    """What goes wrong inside is told to those who wait for this rank's notes."""
    try:
        yield
    except MoeserveError as error:
        group.give_up(error.message)
        raise


def progress_of(config: ServeConfig, rank: int) -> Progress:
    return Progress(None if config.ep_trace is None else Timeline(config.ep_trace, rank))


def context_of(config: ServeConfig, met: Rendezvous, alarm: Alarm, progress: Progress) -> EpContext:
    """Loading may take long: from here on whoever waits trusts the heartbeats."""
    group = replace(met.group, alarm=alarm, patience_s=LOAD_S)
    return EpContext(
        group,
        met.topology,
        progress,
        alarm=alarm,
        backend=config.ep_backend,
        deadline_s=config.ep_deadline,
        address=met.address,
        plan=config.plan,
        microbatches=None if config.microbatches == "auto" else config.microbatches,
        replan=config.replan == "auto",
        near_experts=config.homes == "experts",
    )


def identity_of(config: ServeConfig) -> Identity:
    settings = {name: str(getattr(config, name)) for name in COMMON}
    return Identity(fingerprint(resolve_model(config.model)), settings, plan_digest(config.plan))


def plan_digest(file: Path | None) -> str:
    """Equal for plans that put the same experts into the same slots."""
    if file is None:
        return "experts in order"
    plan = load_plan(file)
    shape = f"{plan.expert_LS.shape} {plan.num_experts} {plan.num_devices} {plan.moe_layers}"
    return "digest " + sha256(shape.encode() + plan.expert_LS.tobytes()).hexdigest()[:16]


def trust_of(config: ServeConfig) -> Trust:
    secret = config.ep_secret
    return Trust(
        None if secret is None else secret.get_secret_value().encode(),
        None if config.ep_tls is None else Tls.load(config.ep_tls),
    )


def threads_of(config: ServeConfig, met: Rendezvous) -> int:
    """The cores that this rank may use, shared evenly with the ranks that may use them too."""
    return config.threads or max(1, read_cpu().usable // met.sharing)


@contextlib.contextmanager
def asking_rank_0(follower: Follower) -> Iterator[None]:
    """A signal to stop is passed on: rank 0 ends the run for all."""

    def told(number: int, frame: FrameType | None) -> None:
        # Not here: the signal may have interrupted whoever holds the connection.
        threading.Thread(target=follower.heartbeat.ask_to_stop, daemon=True).start()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """After a failure nothing is run at exit: MPI would wait there for ranks that are gone."""
    if status:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
