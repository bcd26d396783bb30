"""Our runtime beside its peers: the same checkpoint, prompts, cores and clock for all.

    python bench/peers/run.py [--model NAME] [--only PEER ...] [--rounds 3] [--json FILE]

Each peer is a process of its own, bound to ``--threads`` cores and stopped while others are
asked; rounds are interleaved. Measured: prefill (512 tokens), decode (prompt 128, 64 tokens, batch
1, 4, 16, 32), seconds to ready, peak memory, then 16 streams over HTTP through every server. A
peer that is absent is a row that says so. Samples are kept in FILE as they come: run it again and
only what is missing is measured. No round begins after ``--minutes``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from roster import HOME, Peer, roster
from streams import answers, measure

from moeserve.bench.generation import Case, prompts
from moeserve.bench.roofline import roofline
from moeserve.bench.rows import Row, notes, plot, summarise, table
from moeserve.bench.workers import LoggedProcess, Worker, session_peak_bytes
from moeserve.errors import MoeserveError
from moeserve.host import allowed_cores
from moeserve.kernels.probe import Machine, faster, probe_machine
from moeserve.models.library import resolve_model
from moeserve.models.survey import survey

MODEL = "qwen3-moe-1.2b"
LATE_S = 240.0
QUICK_S = 5.0
WIDTH = 150  # of tables that go to a file
UNITS = {"prefill": "tok/s", "decode": "tok/s", "ready": "s", "load": "s", "memory": "MB"}
SERVING = {"tok/s": "tok/s", "ttft p50": "ms", "ttft p99": "ms", "tpot p50": "ms", "tpot p99": "ms"}


@dataclass(slots=True)
class Samples:
    """What was measured so far, kept in a file; keys are (what, peer, size)."""

    file: Path
    found: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, settings: dict[str, Any]) -> Samples:
        """Those of the file, if they were taken with the same settings."""
        if file.exists():
            held = json.loads(file.read_text())
            if held.get("settings") == settings:
                return cls(file, held["samples"], held["limits"])
        return cls(file)

    def count(self, what: str, peer: str, size: int) -> int:
        return len(self.found.get(key(what, peer, size), ()))

    def add(self, what: str, peer: str, size: int, value: float) -> None:
        self.found.setdefault(key(what, peer, size), []).append(value)

    def save(self, settings: dict[str, Any], machine: Machine, rows: list[Row]) -> None:
        said = {
            "settings": settings,
            "machine": asdict(machine),
            "rows": [row.to_json() for row in rows],
            "samples": self.found,
            "limits": self.limits,
        }
        partial = self.file.with_suffix(".part")
        partial.write_text(json.dumps(said, indent=1))
        partial.replace(self.file)


def key(what: str, peer: str, size: int) -> str:
    return f"{what}|{peer}|{size}"


def show_progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Comparison:
    """Owns the samples and the clock of one comparison."""

    args: argparse.Namespace
    peers: list[Peer]
    samples: Samples
    settings: dict[str, Any]
    vocab: int
    machine: Machine
    end: float
    logs: Path

    def cases(self) -> Iterator[tuple[str, int, Case]]:
        for count in self.args.prefill:
            yield "prefill", count, Case(1, count, 1)
        for batch in self.args.batch:
            yield "decode", batch, Case(batch, self.args.prompt, self.args.tokens)

    def missing(self, peer: Peer, rounds: int) -> bool:
        return any(
            self.samples.count(what, peer.name, size) < rounds for what, size, _ in self.cases()
        )

    def generate(self) -> None:
        """Prefill and decode of every peer that is here."""
        with ExitStack() as stack:
            workers = {}
            for peer in self.peers:
                why = peer.absent()
                if why:
                    self.samples.problems[peer.name] = why
                elif self.missing(peer, self.args.rounds):
                    show_progress(f"starting {peer.name}")
                    self.start(stack, peer, workers)
            for peer, worker in list(workers.items()):
                self.warm(peer, worker, workers)
            for r in range(self.args.rounds):
                if time.monotonic() > self.end:
                    show_progress(f"time is up after {r} rounds")
                    break
                for what, size, case in self.cases():
                    for peer, worker in list(workers.items()):
                        if self.samples.count(what, peer.name, size) <= r:
                            self.sample(peer, worker, workers, what, size, case)
                self.save()
            for peer, worker in list(workers.items()):
                self.samples.found[key("memory", peer.name, 0)] = [
                    session_peak_bytes(worker.pid) / 1e6
                ]
                if peer.name.startswith("moeserve"):
                    self.bound(peer, worker, workers)
        self.save()

    def start(self, stack: ExitStack, peer: Peer, workers: dict[Peer, Worker]) -> None:
        """Several times where that is quick; the last one stays."""
        ready, load = [], []
        while True:
            try:
                worker = self.start_once(peer)
            except MoeserveError as failed:
                self.samples.problems[peer.name] = f"failed: {failed.message}"
                return
            ready.append(worker.ready_s)
            load.append(worker.ready_message["load_s"])
            if len(ready) >= self.args.rounds or worker.ready_s > QUICK_S:
                break
            worker.close()
        workers[peer] = stack.enter_context(worker)
        self.samples.found[key("ready", peer.name, 0)] = ready
        self.samples.found[key("load", peer.name, 0)] = load

    def start_once(self, peer: Peer) -> Worker:
        return Worker(
            peer.name,
            peer.worker,
            cpus=self.args.threads,
            log=self.logs / f"{peer.name.replace(' ', '-')}.log",
            env={"OMP_NUM_THREADS": str(self.args.threads), **peer.env},
            deadline=peer.start_s,
        )

    def warm(self, peer: Peer, worker: Worker, workers: dict[Peer, Worker]) -> None:
        """Untimed."""
        asked = prompts(Case(2, 32, 4), self.vocab)
        try:
            worker.request("decode", deadline=LATE_S, prompts=asked, tokens=4)
        except MoeserveError as failed:
            self.give_up(peer, workers, failed)

    def bound(self, peer: Peer, worker: Worker, workers: dict[Peer, Worker]) -> None:
        """One of our workers tells what the machine allows for each case."""
        limit = asdict(roofline(self.machine, peer.precision))
        try:
            for what, size, case in self.cases():
                shape = [case.streams, case.prompt, case.answer + (what == "decode")]
                least = worker.request("roofline", deadline=LATE_S, case=shape, limit=limit)
                self.samples.limits[key(what, peer.precision, size)] = least[what]
        except MoeserveError as failed:
            self.give_up(peer, workers, failed)

    def sample(
        self,
        peer: Peer,
        worker: Worker,
        workers: dict[Peer, Worker],
        what: str,
        size: int,
        case: Case,
    ) -> None:
        asked: dict[str, Any] = {"prompts": prompts(case, self.vocab)}
        if what == "decode":
            asked["tokens"] = case.answer
        try:
            took = worker.request(what, deadline=LATE_S, **asked)
        except MoeserveError as failed:
            self.give_up(peer, workers, failed)
            return
        rate = took["tokens"] / took["seconds"]
        show_progress(f"{peer.name}: {what} {size}: {rate:.0f} tok/s")
        self.samples.add(what, peer.name, size, rate)

    def give_up(self, peer: Peer, workers: dict[Peer, Worker], why: MoeserveError) -> None:
        show_progress(why.message)
        self.samples.problems[peer.name] = f"failed: {why.message}"
        workers.pop(peer).close()

    def serve(self) -> None:
        """All servers up, one awake at a time; the same client and prompts for each."""
        asked = prompts(Case(self.args.streams, self.args.prompt, self.args.tokens), self.vocab)
        rounds = self.args.rounds
        with ExitStack() as stack:
            servers: dict[Peer, tuple[LoggedProcess, str]] = {}
            for peer in self.peers:
                why = peer.absent(serving=True)
                if why:
                    self.samples.problems[f"{peer.name} server"] = why
                elif self.samples.count("serve tok/s", peer.name, len(asked)) < rounds:
                    show_progress(f"starting the server of {peer.name}")
                    self.start_server(stack, peer, servers)
            for r in range(rounds):
                if time.monotonic() > self.end:
                    show_progress(f"time is up after {r} rounds of serving")
                    break
                for peer, (server, url) in list(servers.items()):
                    if self.samples.count("serve tok/s", peer.name, len(asked)) <= r:
                        self.serve_once(peer, server, url, asked, servers)
                self.save()
            for peer, (server, _) in servers.items():
                held = session_peak_bytes(server.pid) / 1e6
                self.samples.found[key("serve memory", peer.name, len(asked))] = [held]
        self.save()

    def start_server(
        self, stack: ExitStack, peer: Peer, servers: dict[Peer, tuple[LoggedProcess, str]]
    ) -> None:
        port = free_port()
        env = {"OMP_NUM_THREADS": str(self.args.threads), **peer.env}
        env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        server = stack.enter_context(
            LoggedProcess(
                f"{peer.name} server",
                [word.replace("{port}", str(port)) for word in peer.server],
                cpus=self.args.threads,
                log=self.logs / f"{peer.name.replace(' ', '-')}-server.log",
                env=env,
            )
        )
        url = f"http://127.0.0.1:{port}"
        while not asyncio.run(answers(url + peer.health)):
            late = time.monotonic() - server.started > peer.start_s
            if late or not server.alive:
                why = f"not ready in {peer.start_s:.0f} s" if late else server.gone().message
                self.samples.problems[f"{peer.name} server"] = f"failed: {why}"
                server.close()
                return
            time.sleep(0.05)
        took = time.monotonic() - server.started
        self.samples.found[key("serve ready", peer.name, self.args.streams)] = [took]
        try:  # untimed: one request, and it answers as it will be asked to
            measure(url, prompts(Case(1, 32, 4), self.vocab), 4, LATE_S)
        except (httpx.HTTPError, TimeoutError) as failed:
            self.samples.problems[f"{peer.name} server"] = f"failed: {failed}"
            server.close()
            return
        server.pause()
        servers[peer] = server, url

    def serve_once(
        self,
        peer: Peer,
        server: LoggedProcess,
        url: str,
        asked: list[tuple[int, ...]],
        servers: dict[Peer, tuple[LoggedProcess, str]],
    ) -> None:
        server.resume()
        try:
            found = measure(url, asked, self.args.tokens, LATE_S)
        except (httpx.HTTPError, TimeoutError) as failed:
            self.samples.problems[f"{peer.name} server"] = f"failed: {failed}"
            servers.pop(peer)
            server.close()
            return
        server.pause()
        show_progress(f"{peer.name}: {len(asked)} streams: {found['tok/s']:.0f} tok/s")
        for name, value in found.items():
            self.samples.add(f"serve {name}", peer.name, len(asked), value)

    def save(self) -> None:
        self.machine = faster(self.machine, probe_machine(self.args.threads))
        self.samples.save(self.settings, self.machine, self.rows())

    def rows(self) -> list[Row]:
        made = []
        for peer in self.peers:
            why = self.samples.problems.get(peer.name, "")
            for what, size, _ in self.cases():
                limit = self.samples.limits.get(key(what, peer.precision, size))
                batch, tokens = (None, size) if what == "prefill" else (size, None)
                made.append(self.row(what, peer, UNITS[what], batch, tokens, limit, why))
            for what in ("ready", "load", "memory"):
                made.append(self.row(what, peer, UNITS[what], None, None, None, why))
            why = self.samples.problems.get(f"{peer.name} server", why)
            for name, unit in {**SERVING, "ready": "s", "memory": "MB"}.items():
                streams = self.args.streams
                made.append(self.row(f"serve {name}", peer, unit, streams, None, None, why))
        return made

    def row(
        self,
        what: str,
        peer: Peer,
        unit: str,
        batch: int | None,
        tokens: int | None,
        limit: float | None,
        why: str,
    ) -> Row:
        row = Row(what, peer.name, unit, self.args.threads, batch, tokens, roofline=limit, note=why)
        size = (tokens if batch is None else batch) or 0
        found = self.samples.found.get(key(what, peer.name, size))
        return summarise(row, found) if found else row


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='example: python bench/peers/run.py --only "moeserve int8" "llama.cpp Q8_0"',
    )
    parser.add_argument("--model", default=MODEL, help=f"a name or a folder [{MODEL}]")
    parser.add_argument("--home", type=Path, default=HOME, help=f"of the peers' venvs [{HOME}]")
    parser.add_argument("--only", nargs="+", metavar="PEER", help="names, or how they begin")
    parser.add_argument("--skip", nargs="+", default=[], choices=("generate", "serve"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=20.0, help="no round begins later")
    parser.add_argument("--threads", type=int, default=len(allowed_cores()))
    parser.add_argument("--prefill", type=int, nargs="+", default=[512], metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("peers.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def chosen(args: argparse.Namespace, model: Path) -> list[Peer]:
    longest = max(64, args.prompt + args.tokens + 8)
    everyone = roster(args.home, model, args.threads, longest)
    if not args.only:
        return [peer for peer in everyone if peer.default]
    wanted = [p for p in everyone if any(p.name.startswith(name) for name in args.only)]
    if not wanted:
        sys.exit(f"--only {' '.join(args.only)}: expected some of {[p.name for p in everyone]}")
    return wanted


def main() -> None:
    args = parse()
    model = args.home.parent / "models" / args.model
    if not model.exists():
        model = resolve_model(args.model)
    settings = {
        name: getattr(args, name) for name in ("threads", "prompt", "tokens", "streams")
    } | {"model": str(model)}
    with tempfile.TemporaryDirectory() as logs:
        comparison = Comparison(
            args,
            chosen(args, model),
            Samples.open(args.json, settings),
            settings,
            survey(model).spec.vocab,
            probe_machine(args.threads),
            time.monotonic() + 60 * args.minutes,
            Path(logs),
        )
        if "generate" not in args.skip:
            comparison.generate()
        if "serve" not in args.skip:
            comparison.serve()
        comparison.save()
        rows = comparison.rows()
    show(rows)
    if args.plot is not None:
        plot([row for row in rows if row.what in ("prefill", "decode")], args.plot)


def show(rows: list[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    serving = [row for row in rows if row.what.startswith("serve")]
    for title, part in (
        ("one process", [row for row in rows if row not in serving]),
        ("streams over HTTP", serving),
    ):
        console.print(table(title, part))
    for note in notes(rows):
        console.print(note, highlight=False)


if __name__ == "__main__":
    main()
