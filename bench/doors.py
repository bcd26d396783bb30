"""What a door process can stream: tokens a second to many clients over gRPC and over HTTP.

    python bench/doors.py [--streams 64 512] [--step-ms 10 0] [--doors 1 2] [--kinds grpc http]
                          [--tokens N] [--rounds N] [--checkout FOLDER] [--json]

A door process has the real servers, service, streams and text of the shipped tokenizer before an
engine without a model (``door_process.py``); all clients are one other process that only counts
what it reads (``door_clients.py``). An engine makes a step every ``step-ms``, in which each stream
gets a token, or, with 0, as soon as it can: then the doors say how fast that is, and what waits for
a stream goes in one message. With several doors the streams are shared out among them, and their
tokens added up; doors and clients need a core each to show what they can do.

``--checkout`` measures the doors of another checkout beside this one's, in the same rounds. The
table shows medians with least and most: tokens a second from the first step until the last client
has its end; tokens a message; CPU time of the doors, by token and in cores, that of their engines'
threads included; and of the clients in cores (near 1, they are the limit).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
WAIT_S = 150.0


@dataclass(frozen=True, slots=True)
class Case:
    """``streams`` at once over all ``doors``, each of ``tokens``."""

    kind: str
    streams: int
    step_ms: float
    doors: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Of one run: tokens a second, tokens a message, CPU microseconds a token, cores."""

    rate: float
    per_message: float
    cpu_us: float
    door_cores: float
    client_cores: float


Spread = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """Median, least and most of all rounds."""

    code: str
    kind: str
    streams: int
    step_ms: float
    doors: int
    rate: Spread
    per_message: Spread
    cpu_us: Spread
    door_cores: Spread
    client_cores: Spread


class Door:
    """A door process with the code of ``checkout``. Use as a context."""

    def __init__(self, checkout: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, HERE / "other_tree.py", checkout, HERE / "door_process.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ports: dict[str, int] = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(WAIT_S if kind is None else 1.0)
        except subprocess.TimeoutExpired:
            self._child.kill()

    def ask(self, **command: float) -> dict[str, float]:
        """Sets up, or asks for the figures of the last gang."""
        assert self._child.stdin is not None
        print(json.dumps(command), file=self._child.stdin, flush=True)
        found: dict[str, float] = self._read()
        return found

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, f"a door process has ended with {self._child.wait(WAIT_S)}"
        return json.loads(line)


def run(doors: list[Door], case: Case) -> Taken:
    for d, door in enumerate(doors):
        gang = len(range(d, case.streams, len(doors)))
        door.ask(gang=gang, step_ms=case.step_ms)
    ports = ",".join(str(door.ports[case.kind]) for door in doors)
    clients = subprocess.run(
        [
            *(sys.executable, str(HERE / "door_clients.py")),
            *(case.kind, ports, str(case.streams), str(case.tokens)),
        ],
        stdout=subprocess.PIPE,
        check=True,
        timeout=WAIT_S,
    )
    came = json.loads(clients.stdout)
    taken = [door.ask() for door in doors]
    seconds = came["ended_at"] - min(t["began_at"] for t in taken)
    cpu = sum(t["cpu_s"] for t in taken)
    tokens = case.streams * case.tokens
    return Taken(
        rate=tokens / seconds,
        per_message=tokens / came["messages"],
        cpu_us=1e6 * cpu / tokens,
        door_cores=cpu / seconds,
        client_cores=came["cpu_s"] / seconds,
    )


def measure(cases: list[Case], codes: dict[str, Path], rounds: int) -> list[Row]:
    """Rounds are interleaved; the first one warms up and does not count."""
    taken: dict[tuple[str, Case], list[Taken]] = {}
    with ExitStack() as stack:
        most = max(case.doors for case in cases)
        doors = {
            code: [stack.enter_context(Door(folder)) for _ in range(most)]
            for code, folder in codes.items()
        }
        plan = [(r, case, code) for r in range(rounds + 1) for case in cases for code in codes]
        for r, case, code in track(plan, console=Console(stderr=True), transient=True):
            found = run(doors[code][: case.doors], case)
            if r:
                taken.setdefault((code, case), []).append(found)
    return [
        Row(code, case.kind, case.streams, case.step_ms, case.doors, *spreads(found))
        for (code, case), found in taken.items()
    ]


def spreads(found: list[Taken]) -> list[Spread]:
    columns = zip(*(asdict(taken).values() for taken in found), strict=True)
    return [(statistics.median(c), min(c), max(c)) for c in columns]


def shown(rows: list[Row]) -> Table:
    table = Table("code", "door", "streams", "step ms", "doors", title="moeserve doors")
    for name in ("tokens/s", "a message", "CPU us/token", "door cores", "client cores"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(row.code, row.kind, str(row.streams), f"{row.step_ms:g}", str(row.doors)),
            *("{:,.0f} [{:,.0f} {:,.0f}]".format(*row.rate), f"{row.per_message[0]:.1f}"),
            *("{:.1f} [{:.1f} {:.1f}]".format(*row.cpu_us), f"{row.door_cores[0]:.2f}"),
            f"{row.client_cores[0]:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/doors.py --streams 64 --doors 1 --rounds 3",
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[10.0, 0.0], metavar="T")
    parser.add_argument("--doors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=("grpc", "http"), default=["grpc", "http"])
    parser.add_argument("--tokens", type=int, default=128, help="of a stream [128]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--checkout", type=Path, metavar="FOLDER", help="other code beside this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    cases = [
        Case(kind, streams, step_ms, doors, args.tokens)
        for kind, streams, step_ms, doors in itertools.product(
            args.kinds, args.streams, args.step_ms, args.doors
        )
    ]
    codes = {"here": HERE.parent}
    if args.checkout is not None:
        codes[args.checkout.name] = args.checkout.resolve()
    rows = measure(cases, codes, args.rounds)
    if args.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}))
    else:
        Console().print(shown(rows))


if __name__ == "__main__":
    main()
