"""What idle connections cost a door: tokens a second to those that ask, with and without them.

    python bench/connections.py [--idle 4000] [--active 1000] [--kinds http grpc] [--tokens N]
                                [--rounds N] [--json]

A door process (``door_process.py``: the real doors before an engine without a model) streams
``tokens`` to each of ``active`` clients (``door_clients.py``): over HTTP a connection each, over
gRPC 16 calls on one. Rounds without and with ``idle`` connections are interleaved. Of the idle half
have never said anything (over gRPC: nothing but HTTP/2's greeting, for silent sockets are closed
after seconds), and half have asked once and stay. All of them must still be open when a round ends:
a door that got rid of them would have an easy time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import struct
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from doors import Case, Door, run

HERE = Path(__file__).resolve().parent
WAIT_S = 30.0
SPARE = 1024
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
SETTINGS, SETTINGS_ACK = (struct.pack(">IBBI", 0, 4, flags, 0)[1:] for flags in (0, 1))
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS + SETTINGS_ACK
PING = struct.pack(">IBBI", 8, 6, 0, 0)[1:] + bytes(8)


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens a second, and CPU microseconds of the door for each."""

    kind: str
    idle: int
    rate: float
    cpu_us: float


class Idle:
    """So many connections to a port that stay. Use as a context."""

    def __init__(self, kind: str, port: int, count: int) -> None:
        self._stack = ExitStack()
        self._sockets: list[socket.socket] = []
        for i in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
            self._stack.enter_context(connection)
            self._sockets.append(connection)
            if kind == "grpc":
                connection.sendall(GREETING + (PING if i % 2 else b""))
            elif i % 2:
                connection.sendall(HEALTH)
            if kind == "grpc" or i % 2:
                assert connection.recv(65536), "the door greets"

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def assert_open(self) -> None:
        for connection in self._sockets:
            connection.setblocking(False)
            try:
                while True:
                    assert connection.recv(65536), "an idle connection was closed"
            except BlockingIOError:
                pass


def measure(args: argparse.Namespace) -> list[Round]:
    found = []
    with Door(HERE.parent) as door:
        for number in range(args.rounds + 1):
            for kind in args.kinds:
                case = Case(kind, args.active, 0.0, 1, args.tokens)
                for count in (0, args.idle):
                    with Idle(kind, door.ports[kind], count) as idle:
                        taken = run([door], case)
                        idle.assert_open()
                    if number:  # the first one warms up
                        found.append(Round(kind, count, taken.rate, taken.cpu_us))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/connections.py --json",
    )
    parser.add_argument("--idle", type=int, default=4000, help="connections that rest [4000]")
    parser.add_argument("--active", type=int, default=1000, help="streams beside them [1000]")
    parser.add_argument("--kinds", nargs="+", choices=("http", "grpc"), default=["http", "grpc"])
    parser.add_argument("--tokens", type=int, default=64, help="of a stream [64]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    files = args.idle + args.active + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))  # door and clients inherit it
    rounds = measure(args)
    ratios = {}
    for kind in args.kinds:
        without, beside = (
            statistics.median(r.rate for r in rounds if (r.kind, r.idle) == (kind, count))
            for count in (0, args.idle)
        )
        ratios[kind] = beside / without
        if not args.json:
            print(
                f"{kind}: {without:,.0f} tokens/s to {args.active}, {beside:,.0f} beside "
                f"{args.idle} idle connections: {beside / without:.3f}"
            )
    if args.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "files": files}
        print(
            json.dumps(
                {
                    "machine": machine,
                    "active": args.active,
                    "idle": args.idle,
                    "tokens": args.tokens,
                    "ratio_of_medians": ratios,
                    "rounds": [asdict(r) for r in rounds],
                }
            )
        )


if __name__ == "__main__":
    main()
