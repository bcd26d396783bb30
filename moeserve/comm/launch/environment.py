"""Who this process is among the ranks, read from its launcher's environment. Pure.

    launcher       variables
    torchrun,      RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE (deepspeed: LOCAL_SIZE)
    deepspeed      MASTER_ADDR MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE, TORCHELASTIC_RESTART_COUNT
    Open MPI       OMPI_COMM_WORLD_RANK .._SIZE .._LOCAL_RANK .._LOCAL_SIZE
    MPICH (hydra)  PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS
    Slurm (srun)   SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_STEP_NODELIST (or SLURM_NODELIST,
                   SLURM_JOB_NODELIST), SLURM_NTASKS_PER_NODE or .._STEP_TASKS_PER_NODE

The first that is there wins, since launchers run inside one another in this order; an allocation
of Slurm without ``srun`` is no launcher. MOESERVE_LAUNCHER names who else set the first row's.

MASTER_ADDR and MASTER_PORT say where rank 0 is to be met under any of them. Without: under Slurm
the first node of the step and a port made of the job's number; under MPI rank 0 sends it by a
broadcast (``host`` is None).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from moeserve.config.variables import LAUNCHER
from moeserve.errors import ConfigError

# Below the ports that Linux hands out by itself, so that none of them is taken by chance.
SLURM_PORTS = range(12_000, 32_000)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launch:
    """Rank ``rank`` of ``world``, the ``local_rank``-th of ``local_world`` on its host, where None
    is unknown.

    Rank 0 is met at ``host``:``port``. With ``agent_store`` the launcher keeps the notes there
    itself; ``attempt`` tells its restarts apart.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int | None
    host: str | None
    port: int | None
    launcher: str
    agent_store: bool = False
    attempt: str = "0"

    @property
    def one_host(self) -> bool:
        return self.local_world == self.world or self.host in (LOOPBACK, "localhost", "::1")


ALONE = Launch(0, 1, 0, 1, LOOPBACK, None, "none")


@dataclass(frozen=True, slots=True)
class _Names:
    """The variables of a launcher. Several for one figure: the first that is set."""

    launcher: str
    rank: str
    world: str
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]


_TORCH = _Names("torch", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OMPI = _Names(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_HYDRA = _Names("mpich", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",))
_SLURM = _Names("slurm", "SLURM_PROCID", "SLURM_NTASKS", ("SLURM_LOCALID",), ())
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
_TASKS_PER_NODE = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")


def read_launch(environ: Mapping[str, str]) -> Launch:
    """What the launcher set; ``ALONE`` where there was none."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torch(environ)
    if _OMPI.rank in environ:
        return _mpi(environ, _OMPI)
    by_srun = _SLURM.rank in environ
    # srun may speak PMI as well; hydra's own proxies are steps of srun with another size.
    same = by_srun and environ.get(_HYDRA.world) == environ.get(_SLURM.world)
    if _HYDRA.rank in environ and not same:
        return _mpi(environ, _HYDRA)
    return _slurm(environ) if by_srun else ALONE


def _torch(environ: Mapping[str, str]) -> Launch:
    rank, world, local_rank, local_world = _figures(environ, _TORCH)
    host, port = _master(environ)
    if host is None or port is None:
        missing = "MASTER_ADDR" if host is None else "MASTER_PORT"
        raise ConfigError(f"{missing} is not set beside RANK={rank}: say where rank 0 is to be met")
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Launch(
        rank,
        world,
        local_rank,
        local_world,
        host,
        port,
        environ.get(LAUNCHER, "torch"),
        agent_store=agent,
        attempt=attempt,
    )


def _mpi(environ: Mapping[str, str], names: _Names) -> Launch:
    return Launch(*_figures(environ, names), *_master(environ), names.launcher)


def _slurm(environ: Mapping[str, str]) -> Launch:
    rank, world, local_rank, _ = _figures(environ, _SLURM)
    listed = next((name for name in _NODE_LISTS if name in environ), None)
    if listed is None:
        raise ConfigError(f"{_NODE_LISTS[0]} is not set beside SLURM_PROCID={rank}: run under srun")
    nodes = expand_hosts(environ[listed], listed)
    per_node = _tasks_per_node(environ, len(nodes), world)
    node = _number(environ, "SLURM_NODEID", "0")
    if node >= len(nodes):
        raise ConfigError(f"SLURM_NODEID={node}: {listed}={environ[listed]!r} has {len(nodes)}")
    host, port = _master(environ)
    if port is None:
        job = _number(environ, "SLURM_JOB_ID", "0") * 31 + _number(environ, "SLURM_STEP_ID", "0")
        port = SLURM_PORTS[job % len(SLURM_PORTS)]
    return Launch(rank, world, local_rank, per_node[node], host or nodes[0], port, "slurm")


def _figures(environ: Mapping[str, str], names: _Names) -> tuple[int, int, int, int | None]:
    """Rank, world, local rank, local world. What no variable says of the host is 0 and None."""
    rank, world = _number(environ, names.rank), _number(environ, names.world)
    if not 0 <= rank < world:
        raise ConfigError(f"{names.rank}={rank}: must be less than {names.world}={world}")
    local_name = _first(environ, names.local_rank)
    local_rank = 0 if local_name is None else _number(environ, local_name)
    if local_rank > rank:
        raise ConfigError(f"{local_name}={local_rank}: cannot be beyond {names.rank}={rank}")
    among_name = _first(environ, names.local_world)
    if among_name is None:
        return rank, world, local_rank, None
    among = _number(environ, among_name)
    if not local_rank < among <= world:
        raise ConfigError(
            f"{among_name}={among}: must be more than {local_name or 'a local rank'}={local_rank} "
            f"and at most {names.world}={world}"
        )
    return rank, world, local_rank, among


def _master(environ: Mapping[str, str]) -> tuple[str | None, int | None]:
    host = environ.get("MASTER_ADDR") or None
    if "MASTER_PORT" not in environ:
        return host, None
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT={port}: expected 1 to 65535")
    return host, port


def _first(environ: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in environ), None)


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise ConfigError(f"{name} is not set: the launcher set other variables, but not this one")
    if not text.strip().isdecimal():
        raise ConfigError(f"{name}={text!r}: expected a whole number")
    return int(text)


def _tasks_per_node(environ: Mapping[str, str], nodes: int, world: int) -> list[int]:
    """``"2(x3),1"`` is 2, 2, 2, 1."""
    name = _first(environ, _TASKS_PER_NODE)
    if name is None:
        return [-(-world // nodes)] * nodes
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in environ[name].split(",")]
    counts = [int(m[1]) for m in found if m for _ in range(int(m[2] or 1))]
    if not all(found) or len(counts) != nodes or sum(counts) != world:
        raise ConfigError(
            f"{name}={environ[name]!r}: expected tasks of {nodes} nodes, {world} in all"
        )
    return counts


def expand_hosts(text: str, name: str) -> list[str]:
    """``"a[01-03,7]-x,b"`` is a01-x, a02-x, a03-x, a7-x, b; ``name`` is the variable it is from."""
    hosts: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", text):
        pieces = re.split(r"\[([^\]]*)\]", word)
        if any("[" in piece or "]" in piece for piece in pieces):
            raise ConfigError(f"{name}={text!r}: brackets do not close")
        # Every second piece stood in brackets.
        choices = [_ranges(p, name) if i % 2 else [p] for i, p in enumerate(pieces)]
        hosts += ["".join(chosen) for chosen in product(*choices)]
    if not hosts:
        raise ConfigError(f"{name}={text!r}: names no host")
    return hosts


def _ranges(text: str, name: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(f"{name}: [{text}] is no list of numbers and ranges")
        first, last = found[1], found[2] or found[1]
        # Leading zeros are part of a name: as wide as the first.
        numbers += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return numbers
