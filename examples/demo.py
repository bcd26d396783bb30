"""The main job in one command: start a server on the shipped model, ask it over gRPC, stop it.

``python examples/demo.py`` streams a story and solves some sums, each with its time to first
token (TTFT), time per output token (TPOT) and tokens per second as the client saw them. ``--json``
prints the same as one JSON object. Every wait has a deadline; the exit status is 0 only when the
server answered everything and then stopped cleanly.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub
from moeserve.process.child import Process, StartOptions, start, status_in_words

READY_S = 60.0
ANSWER_S = 120.0
STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """``answer`` is what a right completion contains; empty where any text is right."""

    text: str
    max_tokens: int
    temperature: float = 0.0
    stop: str = ""
    answer: str = ""


STORY = Prompt(
    "Once upon a time, there was a little girl named Lily. One day, she found a small box",
    max_tokens=160,
    temperature=0.6,
)
SUMS = (
    Prompt("35 + 48 =", 8, stop="\n", answer="83"),
    Prompt("62 - 27 =", 8, stop="\n", answer="35"),
    Prompt("240 + 135 =", 8, stop="\n", answer="375"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds as this client measured them."""

    prompt: str
    text: str
    tokens: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    right: bool | None


@contextmanager
def server() -> Iterator[str]:
    """A moeserve process on a free port of this host; yields its gRPC address once it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--model", "demo"]
    command += ["--grpc-port", str(port), "--http-port", "none", "--log-level", "warning"]
    # It shares our session and standard output: Ctrl-C is for both.
    process = Process("the server", start(command, StartOptions(own_session=False)))
    with process:
        wait_until_serving(process, f"127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        if not process.wait(STOP_S):
            raise SystemExit(f"the server did not stop within {STOP_S:.0f} s")
        if process.status:
            raise SystemExit(f"the server ended {status_in_words(process.status)}")


def wait_until_serving(process: Process, address: str) -> None:
    deadline = time.monotonic() + READY_S
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            if process.status is not None:
                raise SystemExit(f"the server ended {status_in_words(process.status)}")
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.05)
    raise SystemExit(f"the server was not ready within {READY_S:.0f} s")


def ask(stub: InferenceStub, prompt: Prompt, console: Console) -> Answer:
    """Streams one completion to ``console``."""
    console.print(prompt.text, style="bold", end="", markup=False, highlight=False)
    request = pb.GenerateRequest(
        text=prompt.text,
        sampling=pb.SamplingParams(
            max_tokens=prompt.max_tokens,
            temperature=prompt.temperature,
            seed=7,
            stop=[prompt.stop] if prompt.stop else [],
        ),
    )
    began = time.monotonic()
    first, tokens, text = 0.0, 0, ""
    for chunk in stub.Generate(request, timeout=ANSWER_S):
        if not tokens and chunk.token_ids:
            first = time.monotonic()
        tokens += len(chunk.token_ids)
        text += chunk.text_delta
        console.print(chunk.text_delta, end="", markup=False, highlight=False)
    ended = time.monotonic()
    answer = Answer(
        prompt=prompt.text,
        text=text,
        tokens=tokens,
        ttft_s=first - began,
        tpot_s=(ended - first) / max(1, tokens - 1),
        tokens_per_s=tokens / (ended - began),
        right=prompt.answer in text if prompt.answer else None,
    )
    verdict = "" if answer.right is None else "  right" if answer.right else "  wrong"
    console.print(
        f"\n  [{tokens} tokens, TTFT {answer.ttft_s * 1e3:.1f} ms, TPOT "
        f"{answer.tpot_s * 1e3:.2f} ms, {answer.tokens_per_s:.0f} tokens/s{verdict}]\n",
        style="dim",
        markup=False,
        highlight=False,
    )
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve the shipped model and ask it over gRPC.",
        epilog="example: python examples/demo.py --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()
    console = Console(quiet=args.json, soft_wrap=True)
    console.print("starting the server on the shipped model ...", style="dim")
    with server() as address, grpc.insecure_channel(address) as channel:
        stub = InferenceStub(channel)
        answers = [ask(stub, prompt, console) for prompt in (STORY, *SUMS)]
    console.print("the server stopped cleanly", style="dim")
    if args.json:
        print(json.dumps({"answers": [asdict(a) for a in answers]}))


if __name__ == "__main__":
    main()
