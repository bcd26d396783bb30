"""How the ranks of a launch meet: they reach the notes, say who they are, and learn who shares a
host with whom.

Rank 0 keeps the notes (``note_store``), on loopback where all ranks are on one host, else for those
whom it trusts. Under torchrun its agent does, in a TCPStore of torch, which anybody who reaches its
port may write to: what rests on notes is checked again (``control``). Under MPI without MASTER_ADDR
rank 0's address goes around by a broadcast. A rank of another version, of a group of another size,
or that is there twice, is refused on every rank.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from google.protobuf.message import DecodeError
from torch.distributed import DistError, HashStore, Store, TCPStore  # type: ignore[attr-defined]

import moeserve
from moeserve.comm.control.rpc import Trust, require_trust
from moeserve.comm.exchange.base import Alarm
from moeserve.comm.group import (
    NOTICE_S,
    POLL_S,
    START_S,
    Group,
    PrefixedStore,
    Topology,
    backing_off,
    print_notice,
    spoiled,
)
from moeserve.comm.launch.environment import LOOPBACK, Launch
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.config.variables import HOST_ID
from moeserve.errors import ConfigError, LateRankError, UnavailableError
from moeserve.host import allowed_cores
from moeserve.pb import ep_pb2 as pb

# Of the messages between ranks: raised whenever an older rank would not understand them.
PROTOCOL = 3
# CPU time of an interpreter until it meets the others, with a margin for a slow host: 2 to 3 s.
START_CPU_S = 10.0
# The longest pause between two tries to reach rank 0, which many do while its interpreter starts.
_SLOWEST_TRY_S = 0.5
_SIOCGIFADDR = 0x8915
_ADDRESS_BYTES = 256


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """``address`` is of the interface on which the others reach this rank; ``sharing`` is how many
    ranks, this one included, may run on some of its cores."""

    group: Group
    topology: Topology
    address: str
    sharing: int


def open_group(
    launch: Launch,
    *,
    environ: Mapping[str, str],
    store: Store | None = None,
    trust: Trust | None = None,
    alarm: Alarm | None = None,
    timeout_s: float | None = None,
    notify: Callable[[str], None] = print_notice,
) -> Rendezvous:
    """Meet all others, within ``patience_of(launch)`` unless told otherwise. ``store`` is given
    where this process keeps the notes already, ``trust`` says who may share those of rank 0.

    LateRankError names those that do not come, ConfigError what does not fit.
    """
    timeout_s = patience_of(launch) if timeout_s is None else timeout_s
    if store is None:
        store = _reach(launch, trust or Trust(), timeout_s, notify)
    shared = PrefixedStore(f"moeserve/{launch.attempt}", store)
    group = Group(
        launch.rank, launch.world, shared, alarm=alarm, patience_s=timeout_s, notify=notify
    )
    try:
        return _meet(group, launch, environ, timeout_s)
    except (ConfigError, LateRankError) as error:
        group.give_up(error.message)
        raise


def patience_of(launch: Launch) -> float:
    """Seconds: ``START_S``, and what this host's interpreters take to start one after another on
    its cores. They are started together, so that the first is ready long before the last."""
    return START_S + START_CPU_S * (launch.local_world or 1) / len(allowed_cores())


def _meet(group: Group, launch: Launch, environ: Mapping[str, str], timeout_s: float) -> Rendezvous:
    if group.store.add(f"arrived/{group.rank}", 1) > 1:
        raise ConfigError(f"rank {group.rank} is there twice: the launcher numbered two alike")
    mine = pb.Arrival(
        version=moeserve.__version__,
        protocol=PROTOCOL,
        world=group.world,
        host=host_identity(environ),
        cpus=allowed_cores(),
    )

    def fits(rank: int, note: bytes) -> None:
        refuse(group.rank, mine, rank, _read_arrival(rank, note))

    group.leave("arrival", mine.SerializeToString())  # where ranks of protocol 1 look
    notes = group.all_gather("arrival", mine.SerializeToString(), timeout_s, fits)
    arrivals = [_read_arrival(rank, note) for rank, note in enumerate(notes)]
    hosts = list(dict.fromkeys(a.host for a in arrivals))
    topology = Topology(tuple(hosts.index(a.host) for a in arrivals))
    cpus = set(mine.cpus)
    sharing = sum(a.host == mine.host and not cpus.isdisjoint(a.cpus) for a in arrivals)
    near = topology.num_nodes == 1 or launch.one_host
    return Rendezvous(group, topology, LOOPBACK if near else listen_address(launch), sharing)


def _read_arrival(rank: int, note: bytes) -> pb.Arrival:
    try:
        return pb.Arrival.FromString(note)
    except DecodeError as error:
        raise spoiled("arrival", f"no arrival of rank {rank}") from error


def refuse(rank: int, mine: pb.Arrival, other: int, theirs: pb.Arrival) -> None:
    """ConfigError where two ranks cannot work together."""
    if mine.version != theirs.version or mine.protocol != theirs.protocol:
        raise ConfigError(
            f"rank {other} runs moeserve {theirs.version} (protocol {theirs.protocol}), rank "
            f"{rank} {mine.version} (protocol {mine.protocol}): install one version on all hosts"
        )
    if mine.world != theirs.world:
        raise ConfigError(
            f"rank {other} was started as one of {theirs.world} ranks, rank {rank} as one of "
            f"{mine.world}: give all the same number"
        )


def host_identity(environ: Mapping[str, str]) -> str:
    """Equal for processes that see one another's network, processes and memory."""
    if environ.get(HOST_ID):
        return environ[HOST_ID]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "pid")]
    except OSError:  # not on Linux, which alone has namespaces: the network card's number
        boot, spaces = f"{uuid.getnode():x}", []
    return " ".join([platform.node(), boot, *spaces])


def listen_address(launch: Launch) -> str:
    """An address of this machine which the other hosts reach: from where it would reach rank 0."""
    if launch.host is None:
        return own_address()
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            launch.host, launch.port or 1, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing: the kernel only chooses the source address
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={launch.host!r}: {error.strerror}; give an address of rank 0's host"
        ) from error
    if address.startswith("127.") or address == "::1":
        raise ConfigError(
            f"MASTER_ADDR={launch.host!r} is {address} on rank {launch.rank}'s host, which other "
            "hosts do not reach: give an address instead of the name"
        )
    return address


def own_address() -> str:
    """Of the interfaces' addresses the one that the host's name stands for, or the first; where the
    system does not list them (it is not Linux), what the name stands for."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    if sys.platform == "linux":
        found = interface_addresses()
    else:
        found = [named] if named and not named.startswith("127.") else []
    if not found:
        raise ConfigError("no interface of this host has an address: set MASTER_ADDR, MASTER_PORT")
    return named if named in found else found[0]


def interface_addresses() -> list[str]:
    """IPv4 addresses of this host's interfaces, loopback left out; on Linux."""
    import fcntl

    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("40s", name.encode()))
            except OSError:
                continue  # an interface without an address
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found.append(address)
    return found


def _reach(launch: Launch, trust: Trust, timeout_s: float, notify: Callable[[str], None]) -> Store:
    if launch.world == 1 and not launch.agent_store:
        return HashStore()
    if not launch.one_host and not launch.agent_store:
        # On every rank, so that none waits for a rank 0 that may not listen.
        require_trust(launch.host or "addresses of theirs", trust)
    if launch.host is None or launch.port is None:
        return _reach_by_mpi(launch, trust, timeout_s, notify)
    if launch.agent_store:

        def join_agent(host: str, port: int) -> Store:
            return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), False)

        return _join(join_agent, launch.host, launch.port, launch.rank, timeout_s, notify)
    host = LOOPBACK if launch.one_host else launch.host
    if launch.rank == 0:
        own = host if launch.one_host else listen_address(launch)
        try:
            return host_store(own, launch.port, timeout_s, trust)[0]
        except OSError as error:
            raise ConfigError(
                f"MASTER_PORT={launch.port}: rank 0 cannot listen on {own}:{launch.port} "
                f"({error}): choose another port"
            ) from error
    join = partial(join_store, timeout_s=timeout_s, trust=trust)
    return _join(join, host, launch.port, launch.rank, timeout_s, notify)


def _join(
    join: Callable[[str, int], Store],
    host: str,
    port: int,
    rank: int,
    timeout_s: float,
    notify: Callable[[str], None],
) -> Store:
    """As soon as somebody listens there: rank 0's interpreter may start long after this one."""
    begun = noticed = time.monotonic()
    pauses = backing_off(POLL_S, _SLOWEST_TRY_S)
    while True:
        try:
            with socket.create_connection((host, port), timeout=1.0) as found:
                address = str(found.getpeername()[0])
            return join(address, port)
        except (OSError, DistError, UnavailableError) as error:
            now = time.monotonic()
            if now - begun > timeout_s:
                raise LateRankError(
                    f"rank 0 did not answer at {host}:{port} within {timeout_s:g} s ({error})", [0]
                ) from error
            if now - noticed > NOTICE_S:
                noticed = now
                notify(f"rank {rank}: waiting for rank 0 at {host}:{port}")
        time.sleep(next(pauses))


def _reach_by_mpi(
    launch: Launch, trust: Trust, timeout_s: float, notify: Callable[[str], None]
) -> Store:
    """Rank 0 takes any free port and broadcasts where."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"under {launch.launcher} rank 0 is found by mpi4py, which does not load ({error}): "
            "install moeserve[mpi], or set MASTER_ADDR and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != launch.world:
        raise ConfigError(
            f"mpi4py sees {world.Get_size()} ranks and the launcher started {launch.world}: it is "
            "of another MPI; start with its own mpirun, or set MASTER_ADDR and MASTER_PORT"
        )
    note = bytearray(_ADDRESS_BYTES)
    store: Store | None = None
    if launch.rank == 0:
        own = LOOPBACK if launch.one_host else launch.host or own_address()
        store, port = host_store(own, launch.port or 0, timeout_s, trust)
        text = json.dumps([own, port]).encode()
        note[: len(text)] = text
    sent = world.Ibcast(note, root=0)
    begun = time.monotonic()
    pauses = backing_off(POLL_S, _SLOWEST_TRY_S)
    while not sent.Test():
        if time.monotonic() - begun > timeout_s:
            raise LateRankError(f"rank 0 sent no address within {timeout_s:g} s", [0])
        time.sleep(next(pauses))
    if store is not None:
        return store
    host, port = json.loads(bytes(note).rstrip(b"\0"))
    join = partial(join_store, timeout_s=timeout_s, trust=trust)
    return _join(join, host, port, launch.rank, timeout_s, notify)
