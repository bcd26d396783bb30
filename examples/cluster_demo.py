"""A cluster on this host: the same story as of one process, also when a member is killed over it.

``python examples/cluster_demo.py`` starts a gateway, a member that prefills, two that decode and
one that keeps KV, tells the story of ``demo.py``, then again while a member that decodes is killed,
and shows what the gateway counted. Every wait has a deadline; the exit status is 0 only when all
stories are that of one process by itself and the cluster stopped cleanly.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from demo import STOP_S, STORY, ask, server
from rich.console import Console

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub
from moeserve.process.child import Process, StartOptions, start, status_in_words

READY_S = 180.0
PARTS = ("--prefill", "1", "--decode", "2", "--cache", "1")
SHOWN = ("sent", "sent_with_sources", "lost", "moved", "given_up")


@dataclass
class Cluster:
    """``pids`` by name, and where clients connect."""

    pids: dict[str, int] = field(default_factory=dict)
    grpc: str = ""
    http: str = ""

    def read(self, line: str) -> bool:
        """What ``moeserve up`` printed; True when all is there."""
        if part := re.match(r"([a-z]+-\d+) \(process (\d+)\): ", line):
            self.pids[part[1]] = int(part[2])
        if not line.startswith("ready: "):
            return False
        found = dict(re.findall(r"(grpc|http)=(\S+)", line))
        self.grpc, self.http = found["grpc"], found["http"]
        return True


@contextmanager
def cluster(console: Console) -> Iterator[Cluster]:
    command = [sys.executable, "-m", "moeserve.cli", "up", "demo", *PARTS]
    command += ["--grpc-port", "0", "--http-port", "0", "--log-level", "warning"]
    popen = start(
        command,
        StartOptions(own_session=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with Process("the cluster", popen) as process:
        found, end = Cluster(), time.monotonic() + READY_S
        while line := process.read_line(end - time.monotonic()):
            console.print(f"  {line.strip()}", style="dim", markup=False, highlight=False)
            if found.read(line):
                break
        else:
            raise SystemExit("the cluster did not start")
        yield found
        process.send_signal(signal.SIGTERM)
        if not process.wait(2 * STOP_S):
            raise SystemExit(f"the cluster did not stop within {2 * STOP_S:.0f} s")
        if process.status:
            raise SystemExit(f"the cluster ended {status_in_words(process.status)}")


def story_over_a_grave(stub: InferenceStub, found: Cluster, console: Console) -> str:
    """The story, among others, while one of the two members that decode is killed."""
    request = pb.GenerateRequest(
        text=STORY.text,
        sampling=pb.SamplingParams(
            max_tokens=STORY.max_tokens, temperature=STORY.temperature, seed=7
        ),
        n=8,  # so that either member has some
    )
    text, tokens, killed = "", 0, False
    for chunk in stub.Generate(request, timeout=READY_S):
        tokens += len(chunk.token_ids)
        if chunk.index == 0:
            text += chunk.text_delta
        if tokens > 80 and not killed:
            killed = True
            os.kill(found.pids["decode-0"], signal.SIGKILL)
            console.print("  decode-0 is killed, and the story goes on", style="dim")
    return text


def main() -> None:
    console = Console(soft_wrap=True)
    console.print("one process by itself:", style="dim")
    with server() as address, grpc.insecure_channel(address) as channel:
        right = ask(InferenceStub(channel), STORY, console).text
    console.print("a cluster:", style="dim")
    with cluster(console) as found, grpc.insecure_channel(found.grpc) as channel:
        stub = InferenceStub(channel)
        told = ask(stub, STORY, console).text
        again = story_over_a_grave(stub, found, console)
        with urllib.request.urlopen(f"{found.http}/metrics", timeout=STOP_S) as page:
            lines = page.read().decode().splitlines()
        counts = [x for x in lines if x.startswith(tuple(f"moeserve_cluster_{s}_" for s in SHOWN))]
        console.print("\n".join(f"  {line}" for line in counts), style="dim", highlight=False)
    if not told == again == right:
        raise SystemExit("the stories differ: this is a bug")
    console.print("the three stories are the same; the cluster stopped cleanly", style="dim")


if __name__ == "__main__":
    main()
