"""Send what a stranger may send to a server of its own, while others stream; say what came of it.

    python tests/tools/attack.py [--ep 4] [--json]

Each attack runs on a thread of its own. Meanwhile two clients ask for the same text over and over,
streamed, and ``/health`` is asked one time after the other, each with a deadline. The report has
what the attack was answered, how many of the others' answers were right, and how often health was
answered before the attack was over; in the end, memory and descriptors before and after, the status
that SIGTERM left, and processes that are still there. ``tests/gateway/test_attacks.py`` judges it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

JSON = {"content-type": "application/json"}
ASKED = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 48, "temperature": 0}
STREAMS = 2
SOCKETS = 1400
CALLS = 2000
DEADLINE_S = 10.0
START_S = 120.0
SETTLE_S = 20.0
PROBES = 3
PAGE = resource.getpagesize()


@dataclass(slots=True)
class Attack:
    """``answered`` counts what the attacker got; ``health`` and ``right`` what others did."""

    name: str
    answered: dict[str, int] = field(default_factory=dict)
    health: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """``rss`` (bytes of all processes) and ``descriptors`` (of the one with doors) are before and
    after; ``left`` are processes that outlived it."""

    attacks: list[Attack] = field(default_factory=list)
    rss: tuple[int, int] = (0, 0)
    descriptors: tuple[int, int] = (0, 0)
    status: int | None = None
    left: list[int] = field(default_factory=list)
    log: str = ""


class Server:
    """Owns the process; ``address`` and ``grpc`` are where it answers."""

    def __init__(self, ep: int, log: Path) -> None:
        command = [sys.executable, "-m", "moeserve.cli", "serve", "demo", "--threads", "1"]
        command += ["--ep", str(ep), "--grpc-port", "0", "--http-port", "0", "--num-blocks", "400"]
        command += ["--max-queue", "64"]
        with log.open("w") as err:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        found = re.fullmatch(r"ready: model=\S+ grpc=(\S+) http=(http://\S+)\n", ready)
        if found is None:
            self.kill()
            raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
        self.grpc, self.address = found[1], found[2]

    def pids(self) -> list[int]:
        """Of its session, ranks and workers of texts among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue  # it has ended
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def rss(self) -> int:
        total = 0
        for pid in self.pids():
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
            except OSError:
                continue
        return total

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Others:
    """Clients that stream, each the same request over and over; ``close`` ends them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.texts: list[str] = []
        self.expected = self.ask()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def ask(self) -> str:
        """The streamed text, or what went wrong. Asked again while the server says it is full."""
        text = ""
        try:
            with httpx.stream(
                "POST",
                f"{self._server.address}/v1/completions",
                json=ASKED | {"stream": True},
                timeout=6 * DEADLINE_S,
            ) as answer:
                if answer.status_code == 429:
                    time.sleep(0.1)
                    return self.ask()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        part = json.loads(line[6:])
                        text += part["choices"][0]["text"] if "choices" in part else line
        except httpx.HTTPError as error:
            return repr(error)
        return text

    def _run(self) -> None:
        while not self._over.is_set():
            self.texts.append(self.ask())

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=6 * DEADLINE_S) as found:
        yield found


def post(path: str, make: Callable[[], bytes]) -> Callable[[Server], dict[str, int]]:
    """One large body."""

    def attack(server: Server) -> dict[str, int]:
        with client(server) as http:
            return {str(http.post(path, content=make(), headers=JSON).status_code): 1}

    return attack


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "demo", "max_tokens": 4, **fields}).encode()


def idle_sockets(server: Server) -> dict[str, int]:
    """As many as can be had at both doors, then an ordinary question beside them."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for address in (server.address.removeprefix("http://"), server.grpc):
            host, port = address.rsplit(":", 1)
            for _ in range(SOCKETS):
                try:
                    place = (host.strip("[]"), int(port))
                    stack.enter_context(socket.create_connection(place, DEADLINE_S))
                except OSError as error:
                    found[type(error).__name__] += 1
                    break
        with client(server) as http:
            found[str(http.get("/v1/models").status_code)] += 1
        with grpc.insecure_channel(server.grpc) as channel:
            model = InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=30)
            found[f"grpc {model.model}"] += 1
    return found


def trickled_body(server: Server) -> dict[str, int]:
    """A body of which little comes."""
    host, port = server.address.removeprefix("http://").rsplit(":", 1)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-length: 1000\r\n\r\n"
    with socket.create_connection((host, int(port)), DEADLINE_S) as stream:
        stream.sendall(head.encode())
        for _ in range(20):
            stream.sendall(b" ")
            time.sleep(0.02)
    return {"left": 1}


def many_calls(server: Server) -> dict[str, int]:
    """Calls on one channel, far more than are taken; ``bare`` are refusals without a detail.

    Each asks for so much that none is through before all have come, however fast the machine is.
    """
    found: Counter[str] = Counter()
    sampling = pb.SamplingParams(max_tokens=40, ignore_eos=True)
    request = pb.GenerateRequest(text="Once", sampling=sampling)
    with grpc.insecure_channel(server.grpc) as channel:
        generate = InferenceStub(channel).GenerateUnary
        futures = [generate.future(request, timeout=12 * DEADLINE_S) for _ in range(CALLS)]
        for future in futures:
            try:
                future.result()
                found["OK"] += 1
            except grpc.RpcError as error:
                refused: Any = error
                found[refused.code().name] += 1
                found["bare"] += not refused.details()
    return dict(found)


def other_site(server: Server) -> dict[str, int]:
    """A page of another site, whose name was bound to this address."""
    names = {"host": "evil.example", "origin": "http://evil.example"}
    with client(server) as http:
        asked = http.post("/v1/completions", content=completion(prompt="x"), headers=JSON | names)
    return {str(asked.status_code): 1}


ATTACKS: dict[str, Callable[[Server], dict[str, int]]] = {
    "4 MB of text": post("/v1/completions", lambda: completion(prompt="a b " * 1_000_000)),
    "15 MB of lists": post(
        "/v1/completions",
        lambda: b'{"model":"demo","prompt":"x","metadata":[' + b"[]," * 5_000_000 + b"[]]}",
    ),
    "2,000,000 ids": post("/v1/completions", lambda: completion(prompt=[1] * 2_000_000)),
    "600 KB of chat": post(
        "/v1/chat/completions",
        lambda: completion(messages=[{"role": "user", "content": "hi " * 200_000}]),
    ),
    "a regex of regexes": post(
        "/v1/completions",
        lambda: completion(prompt="x", guided_regex="((a{1,50}){1,50}){1,50}"),
    ),
    "idle sockets": idle_sockets,
    "a trickled body": trickled_body,
    "another site": other_site,
    "2,000 calls": many_calls,
}


def run(server: Server, others: Others, name: str) -> Attack:
    """One attack; health is asked until it is over, and a few times at least."""
    report = Attack(name)

    def attack() -> None:
        try:
            report.answered = dict(ATTACKS[name](server))
        except (httpx.HTTPError, grpc.RpcError, OSError) as error:
            report.answered = {repr(error): 1}

    others.texts.clear()
    attacking = threading.Thread(target=attack)
    attacking.start()
    asked = 0
    with httpx.Client(base_url=server.address, timeout=DEADLINE_S) as http:
        while attacking.is_alive() or asked < PROBES:
            asked += 1
            try:
                report.health += http.get("/health").status_code == 200
            except httpx.HTTPError as error:
                report.wrong.append(f"health: {error!r}")
            time.sleep(0.02)
    attacking.join()
    while not others.texts:
        time.sleep(0.02)  # one at least that was under way or began beside it
    texts = list(others.texts)
    report.right = texts.count(others.expected)
    report.wrong += [text[:200] for text in texts if text != others.expected]
    report.wrong += [f"health: {asked - report.health} without 200"] * (asked != report.health)
    return report


def settled(read: Callable[[], int], most: int) -> int:
    """What it comes to once it is no more than ``most``, or after a while."""
    until = time.monotonic() + SETTLE_S
    while (found := read()) > most and time.monotonic() < until:
        time.sleep(0.2)
    return found


def attack_all(ep: int, folder: Path) -> Report:
    report, log = Report(), folder / "said.txt"
    server = Server(ep, log)
    try:
        others = Others(server)
        try:
            before = server.rss(), server.descriptors()
            report.attacks = [run(server, others, name) for name in ATTACKS]
        finally:
            others.close()
        report.descriptors = before[1], settled(server.descriptors, before[1] + STREAMS)
        report.rss = before[0], settled(server.rss, before[0])
        server.process.send_signal(signal.SIGTERM)
        report.status = server.process.wait(3 * DEADLINE_S)
        settled(lambda: len(server.pids()), 0)
        report.left = server.pids()
        report.log = log.read_text()
    finally:
        server.kill()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ep", type=int, default=4, help="ranks of the server [4]")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    words = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="moeserve-attack-") as folder:
        report = attack_all(words.ep, Path(folder))
    if words.json:
        print(json.dumps(asdict(report)))
        return
    for one in report.attacks:
        print(f"{one.name}: {one.answered}; health {one.health}, right {one.right}, {one.wrong}")
    print(f"memory {report.rss}, descriptors {report.descriptors}, status {report.status}")
    print(f"left {report.left}")


if __name__ == "__main__":
    main()
