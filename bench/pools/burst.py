"""What a burst of long prompts does to running decodes: split pools, unified peers, one process.

    python bench/pools/burst.py [--rounds 3]

Every setup has two cores: a prefill and a decode peer with one each, two unified peers with one
each, or ``serve`` with both (chunked prefill). ``--streams`` decode all along; after a while
``--burst`` prompts of ``--long`` tokens come at once. TPOT is the time between two tokens of a
running stream. Prints JSON: p50 and p99 quiet and during the burst, and their ratio, medians over
rounds with least and most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import started, started_alone
from prompts import prompt
from streams import Answer, ask, request

SETUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "split": (("prefill", "decode"), ("0", "1")),
    "unified": (("unified", "unified"), ("0", "1")),
    "serve": ((), ()),
}


@contextmanager
def served(setup: str, model: str) -> Iterator[int]:
    """The port of gRPC."""
    roles, cores = SETUPS[setup]
    if roles:
        with started(roles, model=model, cores=cores, options=("--threads", "1")) as cluster:
            yield cluster.grpc["gateway-0"]
        return
    with started_alone(model) as port:
        yield port


async def measure(port: int, options: argparse.Namespace, seed: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        over = asyncio.Event()
        streams = [
            asyncio.create_task(decode(channel, seed + i, options.tokens, over))
            for i in range(options.streams)
        ]
        await asyncio.sleep(options.quiet_s)
        burst_from = time.monotonic()
        long = [
            asyncio.create_task(ask(channel, request(prompt(seed + 1000 + i, options.long), 4)))
            for i in range(options.burst)
        ]
        answers = await asyncio.gather(*long)
        burst_to = time.monotonic()
        over.set()
        running = [answer for found in await asyncio.gather(*streams) for answer in found]
    for answer in (*answers, *running):
        assert not answer.error, answer.error
    quiet = gaps(running, burst_from - options.quiet_s + 1, burst_from)
    during = gaps(running, burst_from, burst_to)
    assert quiet, "no token came before the burst: begin it later"
    assert during, "all streams had ended when the burst came: give them more tokens"
    return {
        "quiet_p50_ms": 1e3 * percentile(quiet, 50),
        "quiet_p99_ms": 1e3 * percentile(quiet, 99),
        "burst_p50_ms": 1e3 * percentile(during, 50),
        "burst_p99_ms": 1e3 * percentile(during, 99),
        "p99_ratio": percentile(during, 99) / percentile(quiet, 99),
        "burst_ttft_ms": 1e3 * statistics.median(a.ttft_s for a in answers),
        "burst_s": burst_to - burst_from,
    }


async def decode(
    channel: grpc.aio.Channel, seed: int, tokens: int, over: asyncio.Event
) -> list[Answer]:
    """One stream after another until it is ``over``."""
    found = []
    while not over.is_set():
        found.append(await ask(channel, request(prompt(seed, 32), tokens)))
    return found


def gaps(answers: Sequence[Answer], begin: float, end: float) -> list[float]:
    """Between tokens of which the second came within."""
    return sorted(
        b - a
        for answer in answers
        for a, b in zip(answer.times_s, answer.times_s[1:], strict=False)
        if begin <= b <= end
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=960)
    parser.add_argument("--burst", type=int, default=8)
    parser.add_argument("--long", type=int, default=960)
    parser.add_argument("--quiet-s", type=float, default=4.0)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {setup: [] for setup in options.setups}
    for round_ in range(options.rounds):
        for setup in options.setups:
            with served(setup, options.model) as port:
                asyncio.run(measure(port, options, 1))  # warm
                rows[setup].append(asyncio.run(measure(port, options, 10_000 * (round_ + 1))))
            print(setup, json.dumps(rows[setup][-1]), file=sys.stderr, flush=True)
    print(json.dumps({setup: summary(found) for setup, found in rows.items()}))


def summary(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        name: {
            "median": round(statistics.median(row[name] for row in found), 3),
            "min": round(min(row[name] for row in found), 3),
            "max": round(max(row[name] for row in found), 3),
        }
        for name in found[0]
    }


if __name__ == "__main__":
    main()
