"""TTFT against the share of a prompt that was computed before, by whichever member.

    python bench/pools/reuse.py [--rounds 12] [--length 960]

For each share a beginning is asked for once, then a prompt that begins with it; the time to the
first token of the second is measured, with and without members that keep KV, and beside them one
process with its prefix cache. Prefill goes to whichever member is free, so half of the beginnings
are another's. Prints JSON: medians with least and most in milliseconds, and tokens that the answers
say were cached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import started, started_alone
from prompts import FIRST, LAST
from streams import ask, request

SETUPS = {
    "pool": ("prefill", "prefill", "decode", "cache"),
    "no pool": ("prefill", "prefill", "decode"),
    "serve": (),
}
SHARES = (0.0, 0.5, 0.9)
# Pages are put behind an answer: what this bench asks next must find them.
SETTLE_S = 0.5


@contextmanager
def served(setup: str, model: str) -> Iterator[int]:
    roles = SETUPS[setup]
    if roles:
        with started(roles, model=model) as cluster:
            yield cluster.grpc["gateway-0"]
    else:
        with started_alone(model) as port:
            yield port


def ids(seed: str, count: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(FIRST, LAST) for _ in range(count)]


async def measure(port: int, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await ask(channel, request(ids("warm", options.length), 2))
        for share in SHARES:
            times, cached = [], []
            for i in range(options.rounds):
                begins = ids(f"{share} {i}", int(share * options.length))
                if begins:
                    await ask(channel, request(begins, 1))
                    await asyncio.sleep(SETTLE_S)
                rest = ids(f"{share} {i} rest", options.length - len(begins))
                answer = await ask(channel, request(begins + rest, 2))
                assert not answer.error, answer.error
                times.append(1e3 * answer.ttft_s)
                cached.append(answer.cached_tokens)
            found[f"{share:.0%}"] = {
                "ttft_ms": round(statistics.median(times), 2),
                "min": round(min(times), 2),
                "max": round(max(times), 2),
                "cached": round(statistics.mean(cached), 1),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--length", type=int, default=960)
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    rows = {}
    for setup in options.setups:
        with served(setup, options.model) as port:
            rows[setup] = asyncio.run(measure(port, options))
        print(setup, json.dumps(rows[setup]), file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
