"""Every rank but 0: loads its share, and runs the steps that rank 0 orders until it ends the run.

A signal to stop is passed on: rank 0 drains, and ends the run for all.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from moeserve.comm.control import channels as control
from moeserve.comm.control.channels import Follower
from moeserve.comm.launch.environment import Launch
from moeserve.comm.launch.rendezvous import Rendezvous
from moeserve.config.options import FollowerOptions
from moeserve.engine.build import load_tokenizer
from moeserve.engine.rank_model import load_rank_model
from moeserve.errors import CancelledError, MoeserveError
from moeserve.gateway.server import LOG_FORMAT
from moeserve.models.library import resolve_model
from moeserve.worker.failure import FailurePolicy
from moeserve.worker.load_progress import LoadProgress
from moeserve.worker.start import (
    RankStart,
    ep_context,
    giving_up,
    meet,
    progress_of,
    threads_of,
    trust_of,
)

log = logging.getLogger("moeserve.worker")

# How long this rank waits for rank 0 to leave first.
LINGER_S = 5.0


def follow(options: FollowerOptions, start: RankStart) -> int:
    """Until rank 0 ends the run; the exit status."""
    configure_log(options, start.launch)
    failure = FailurePolicy(options.ep_deadline)
    met = meet(options, start)
    with giving_up(met.group):
        follower = control.follow(met.group, trust_of(options), options.ep_deadline)
    follower.heartbeat.subscribe(failure.decide)
    follower.heartbeat.activity = "loading the model".__str__
    try:
        with asking_rank_0_to_stop(follower):
            load_and_run(options, met, follower)
    except CancelledError as ended:
        log.info("%s", ended.message)
    except MoeserveError as error:
        follower.fail(error)
        follower.linger(LINGER_S)
    finally:
        follower.close()
    return 1 if failure.error is not None else 0


def configure_log(options: FollowerOptions, launch: Launch) -> None:
    """Lines name the rank, unless who started it does so."""
    who = "" if launch.launcher == "moeserve" else f"rank {launch.rank} "
    logging.basicConfig(
        level=options.log_level.upper(), format=LOG_FORMAT.replace("%(l", who + "%(l", 1)
    )


def load_and_run(options: FollowerOptions, met: Rendezvous, follower: Follower) -> None:
    """CancelledError where rank 0 ends the run while this rank loads."""

    def alarm() -> MoeserveError | None:
        if follower.heartbeat.ended:
            return CancelledError("rank 0 ended the run")
        return follower.alarm()

    progress = progress_of(options, met.group.rank)
    context = ep_context(options, met, alarm, progress)
    tokenizer, _ = load_tokenizer(resolve_model(options.model))
    rank = load_rank_model(
        options.model_copy(update={"threads": threads_of(options, met)}),
        tokenizer_eos=tokenizer.eos_ids if tokenizer else (),
        context=context,
        progress=LoadProgress(lambda done, total: None, alarm),
    )
    try:
        context.group.all_gather("ready", b"")
        follower.heartbeat.activity = progress.__str__
        with progress:
            steps = rank.follow(follower, context)
        log.info("rank 0 ended the run after %d steps", steps)
    finally:
        rank.close()


@contextlib.contextmanager
def asking_rank_0_to_stop(follower: Follower) -> Iterator[None]:
    """A signal to stop is passed on: rank 0 ends the run for all."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Not here: the signal may have interrupted whoever holds the connection.
        threading.Thread(target=follower.heartbeat.ask_to_stop, daemon=True).start()

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
