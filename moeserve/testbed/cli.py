"""``moeserve testbed run | list | set | exec``: hosts for a command, and a look at those that run.

A bed lives as long as its ``run``; the other commands find it by its mark (``marks``).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from moeserve.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    # argparse has no public name for what ``add_subparsers`` gives.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example: moeserve testbed run --hosts 4 --rate 100mbit -- python -m moeserve.worker
from another terminal: moeserve testbed set --rate 1gbit; moeserve testbed set --host 3 --cut;
moeserve testbed exec --host 0 -- curl -s http://127.0.0.1:8000/health"""


def add_parser(commands: Commands, text: str) -> None:
    command = commands.add_parser(
        "testbed",
        help=text,
        description="Several hosts on this machine: namespaces on a switch, with links of a chosen "
        "rate. Needs root, iproute2 and util-linux.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_run(actions)
    listed = actions.add_parser("list", help="the beds of this machine, their hosts and counters")
    listed.add_argument("--json", action="store_true", help="print one JSON object")
    listed.set_defaults(run=_list)
    change = actions.add_parser("set", help="change the links of a running bed")
    change.add_argument("--host", type=int, metavar="N", help="[all]")
    what = change.add_mutually_exclusive_group(required=True)
    what.add_argument("--rate", metavar="RATE", help="such as 100mbit, or unlimited")
    what.add_argument("--cut", action="store_true", help="nothing passes any more")
    what.add_argument("--mend", action="store_true", help="everything passes again")
    change.set_defaults(run=_set)
    inside = actions.add_parser("exec", help="run a command on a host of a running bed")
    inside.add_argument("--host", type=int, default=0, metavar="N", help="[0]")
    inside.add_argument("command", nargs="+", metavar="COMMAND")
    inside.set_defaults(run=_exec)
    for action in (change, inside):
        action.add_argument(
            "--bed", type=int, metavar="PID", help="its owner, if there are several"
        )


def _add_run(actions: Commands) -> None:
    run = actions.add_parser("run", help="raise hosts, run a command as every rank, remove them")
    run.add_argument("--hosts", type=int, default=2, metavar="N", help="[2]")
    run.add_argument("--ranks-per-host", type=int, default=1, metavar="N", help="[1]")
    run.add_argument(
        "--rate", default="unlimited", metavar="RATE", help="of each link, such as 100mbit"
    )
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="end all after so long")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="after --: run by every rank")
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from moeserve.testbed.links import parse_rate
    from moeserve.testbed.network import Bed
    from moeserve.testbed.ranks import run_ranks

    if args.ranks_per_host < 1:
        raise ConfigError(f"--ranks-per-host={args.ranks_per_host}: must be at least 1")
    rate = parse_rate(args.rate)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with Bed(args.hosts, rate) as bed:
        end = run_ranks(bed, args.command, _show, args.ranks_per_host, timeout_s=args.timeout)
    if end.status:
        others = "; the others were ended" if args.hosts * args.ranks_per_host > 1 else ""
        print(f"moeserve: rank {end.rank} ended with {end.status}{others}", file=sys.stderr)
    return end.status


def _show(rank: int, line: str) -> None:
    sys.stdout.write(f"[{rank}] {line}")
    sys.stdout.flush()


def _list(args: argparse.Namespace) -> int:
    from moeserve.testbed.links import read_count
    from moeserve.testbed.marks import SWITCH, owner_of

    rows = [
        (owner_of(mark), int(kept), pid, read_count(pid))
        for mark, keepers in _beds().items()
        for kept, pid in keepers.items()
        if kept != SWITCH
    ]
    if args.json:
        names = ("bed", "host", "keeper", "sent_bytes", "received_bytes")
        found = [(b, h, pid, c.sent_bytes, c.received_bytes) for b, h, pid, c in sorted(rows)]
        print(json.dumps({"hosts": [dict(zip(names, row, strict=True)) for row in found]}))
        return 0
    for bed, host, pid, c in sorted(rows):
        print(
            f"bed {bed} host{host} (process {pid}): "
            f"sent {c.sent_bytes} bytes, received {c.received_bytes}"
        )
    return 0


def _set(args: argparse.Namespace) -> int:
    from moeserve.testbed.links import limit, parse_rate, set_port
    from moeserve.testbed.marks import SWITCH

    keepers = _keepers(args.bed)
    switch = keepers.pop(SWITCH)
    chosen = keepers if args.host is None else {str(args.host): _pid_of(keepers, args.host)}
    for host, pid in chosen.items():
        if args.rate is None:
            set_port(switch, int(host), up=args.mend)
        else:
            rate = parse_rate(args.rate)
            limit(pid, "eth0", rate)
            limit(switch, f"port{host}", rate)
    return 0


def _exec(args: argparse.Namespace) -> int:
    from moeserve.testbed.links import entering

    pid = _pid_of(_keepers(args.bed), args.host)
    command = [*entering(pid, os.getcwd()), *args.command]
    os.execvp(command[0], command)


def _beds() -> dict[str, dict[str, int]]:
    """By mark: the keepers of its hosts and of its switch."""
    from moeserve.testbed.marks import is_owned, marked

    found: dict[str, dict[str, int]] = {}
    for one in marked():
        if one.keeps and is_owned(one.bed):
            found.setdefault(one.bed, {})[one.keeps] = one.pid
    return found


def _keepers(owner: int | None) -> dict[str, int]:
    from moeserve.testbed.marks import owner_of

    beds = [
        keepers for mark, keepers in _beds().items() if owner is None or owner_of(mark) == owner
    ]
    if len(beds) > 1:
        raise ConfigError("several beds run here: choose one with --bed (`moeserve testbed list`)")
    if not beds:
        raise NotFoundError("no such bed runs here: start one with `moeserve testbed run`")
    return beds[0]


def _pid_of(keepers: dict[str, int], host: int) -> int:
    if str(host) not in keepers:
        raise ConfigError(f"--host={host}: the bed has hosts 0 to {len(keepers) - 2}")
    return keepers[str(host)]
