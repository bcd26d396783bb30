"""How a rank starts, whichever it is: ranks meet, find that they will serve the same, and have what
each needs to reach the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

from moeserve.comm.control.handshake import Identity, agree
from moeserve.comm.control.rpc import Tls, Trust
from moeserve.comm.exchange.base import Alarm
from moeserve.comm.group import Group
from moeserve.comm.launch.environment import Launch
from moeserve.comm.launch.rendezvous import Rendezvous, open_group
from moeserve.comm.libraries.promise import asked_for
from moeserve.config.options import EpOptions, LoadOptions, ProcessOptions, RankOptions
from moeserve.engine.rank_model import EpContext
from moeserve.errors import MoeserveError
from moeserve.host import read_cpu
from moeserve.models.fingerprint import fingerprint
from moeserve.models.library import resolve_model
from moeserve.observe.progress import Progress
from moeserve.observe.timeline import Timeline
from moeserve.placement.plan import load as load_plan

# What the slowest rank gets to load.
LOAD_S = 3600.0
# Settings in which ranks must not differ: results or the size of messages depend on them.
COMMON = (
    *LoadOptions.model_fields,
    "ep_backend",
    "dispatcher",
    "block_size",
    "max_num_batched_tokens",
    "prefill_mode",
    "microbatches",
    "replan",
    "ep_deadline",
    "doors",
    "max_num_seqs",
    "prefix_cache",
)


@dataclass(frozen=True, slots=True)
class RankStart:
    """What a rank has before it has met the others. ``store`` where this process keeps the notes,
    ``alarm`` where it knows of ranks by other means."""

    launch: Launch
    environ: Mapping[str, str]
    store: Store | None = None
    alarm: Alarm | None = None


def meet(options: RankOptions, start: RankStart) -> Rendezvous:
    """All ranks are there, and will serve the same; ConfigError that names who differs, and where a
    library was asked for that does not combine as was asked."""
    asked_for(options.dispatcher, options.combine)
    met = open_group(
        start.launch,
        environ=start.environ,
        store=start.store,
        trust=trust_of(options),
        alarm=start.alarm,
    )
    with giving_up(met.group):
        agree(met.group, identity_of(options))
    return met


@contextlib.contextmanager
def giving_up(group: Group) -> Iterator[None]:
    """What goes wrong inside is told to those who wait for this rank's notes."""
    try:
        yield
    except MoeserveError as error:
        group.give_up(error.message)
        raise


def identity_of(options: RankOptions) -> Identity:
    settings = {name: str(getattr(options, name)) for name in COMMON}
    model = fingerprint(resolve_model(options.model))
    return Identity(model, settings, plan_digest(options.plan))


def plan_digest(file: Path | None) -> str:
    """Equal for plans that put the same experts into the same slots."""
    if file is None:
        return "experts in order"
    plan = load_plan(file)
    shape = f"{plan.expert_LS.shape} {plan.num_experts} {plan.num_devices} {plan.moe_layers}"
    return "digest " + sha256(shape.encode() + plan.expert_LS.tobytes()).hexdigest()[:16]


def trust_of(options: EpOptions) -> Trust:
    """What the others must prove, and by what control is hidden from strangers."""
    secret = options.ep_secret
    return Trust(
        None if secret is None else secret.get_secret_value().encode(),
        None if options.ep_tls is None else Tls.load(options.ep_tls),
    )


def progress_of(options: EpOptions, rank: int) -> Progress:
    """What the rank is doing in a step; with ``ep_trace`` it is also drawn."""
    return Progress(None if options.ep_trace is None else Timeline(options.ep_trace, rank))


def threads_of(options: ProcessOptions, met: Rendezvous) -> int:
    """The cores that this rank may use, shared evenly with the ranks that may use them too."""
    return options.threads or max(1, read_cpu().usable // met.sharing)


def ep_context(options: EpOptions, met: Rendezvous, alarm: Alarm, progress: Progress) -> EpContext:
    """Loading may take long: from here on whoever waits trusts the heartbeats."""
    group = replace(met.group, alarm=alarm, patience_s=LOAD_S)
    return EpContext(group, met.topology, progress, options, alarm, met.address)
