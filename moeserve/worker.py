"""One rank of several: ``python -m moeserve.worker``, under any launcher that ``comm.launch`` reads,
with the settings of ``moeserve serve``; and ``moeserve serve --ep N``, which launches its own.

Rank 0 opens the doors and decides; the others follow it until it ends the run. A rank that is told
to stop asks rank 0 to, which drains and ends them all. What happens when a rank is lost is decided
in one place, ``Ending``: the run ends, requests with UNAVAILABLE, every process with status 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from types import FrameType

from torch.distributed import Store

from moeserve.comm import control
from moeserve.comm.build import Meeting
from moeserve.comm.control import Follower, Leader
from moeserve.comm.exchange import Alarm
from moeserve.comm.group import host_store
from moeserve.comm.handshake import Identity, agree
from moeserve.comm.launch import ALONE, LOOPBACK, Launch, read_launch
from moeserve.comm.link import Tls, Trust
from moeserve.comm.progress import Progress
from moeserve.comm.rendezvous import Met, open_group
from moeserve.comm.spawn import Children, child_environ, worker_command
from moeserve.config import ServeConfig, add_options, config_from_args, to_environ, to_yaml
from moeserve.engine.build import LoadedModel, load_tokenizer
from moeserve.engine.rank import Rank, Seat, load_rank
from moeserve.errors import CancelledError, ConfigError, InternalError, LateRankError, MoeserveError
from moeserve.host import read_cpu
from moeserve.models.fingerprint import fingerprint
from moeserve.models.library import resolve_model
from moeserve.observe.metrics import Metrics
from moeserve.placement.plan import load as load_plan
from moeserve.pools.server import LOG_FORMAT, Stop, Tell, load_model, serve

log = logging.getLogger(__name__)

# What a process gets to end by itself once the run has broken, beyond the deadline.
LAST_S = 15.0
# What children get to end by themselves once the run is over.
GRACE_S = 5.0
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
        return lead(config, Arriving(launch, environ))
    return follow(config, Arriving(launch, environ))


def serve_local(config: ServeConfig, environ: Mapping[str, str]) -> int:
    """Rank 0 in this process, ``ep`` - 1 others as its children."""
    world = config.ep or 1
    if world == 1:
        return serve(config)
    if config.ep_secret is None:
        config = config.model_copy(update={"ep_secret": secrets.token_hex(32)})
        config = ServeConfig.model_validate(config.model_dump())
    store, port = host_store(LOOPBACK)
    settings = to_environ(config, environ)
    children = Children(
        worker_command(),
        {rank: settings | child_environ(rank, world, port) for rank in range(1, world)},
        sys.stderr,
    )
    grace_s = 0.0
    try:
        launch = replace(ALONE, world=world, local_world=world, port=port, launcher="moeserve")
        status = lead(config, Arriving(launch, environ, store, children.alarm))
        grace_s = GRACE_S
        return status
    except LateRankError:
        grace_s = GRACE_S
        raise
    finally:
        children.end(grace_s)


@dataclass(frozen=True, slots=True)
class Arriving:
    """What a rank has before it has met the others. ``store`` where this process keeps the notes,
    ``alarm`` where it knows of ranks by other means."""

    launch: Launch
    environ: Mapping[str, str]
    store: Store | None = None
    alarm: Alarm | None = None


class Ending:
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


def lead(config: ServeConfig, arriving: Arriving) -> int:
    """Rank 0: the doors open at once, and serve when all ranks have loaded."""
    ending = Ending(config.ep_deadline)
    leaders: list[Leader] = []
    stops: list[Stop] = []

    def load(config: ServeConfig, observer: Metrics, tell: Tell) -> LoadedModel:
        def alarm() -> MoeserveError | None:
            tell(0, 1)  # raises where loading was interrupted
            return None if arriving.alarm is None else arriving.alarm()

        met = meet(config, replace(arriving, alarm=alarm))
        leader = connected(met, lambda: control.lead(
            met.group, met.address, trust_of(config), config.ep_deadline
        ))  # fmt: skip
        leaders.append(leader)
        leader.pulse.heed(ending.decide, lambda: stops[0]())
        seat = take_seat(config, met, leader)
        config = config.model_copy(update={"threads": threads_of(config, met)})
        loaded = load_model(config, observer, heeding(tell, leader.alarm), seat, leader)
        met.group.all_gather("ready", b"", LOAD_S)
        leader.pulse.doing = seat.progress.__str__
        return loaded

    try:
        status = serve(config, load, stops.append)
    except MoeserveError as error:
        for leader in leaders:
            leader.fail(error)
        raise
    finally:
        for leader in leaders:
            leader.close()
    return 1 if ending.error is not None else status
