"""What a gateway adds: one unified peer behind a gateway beside ``serve``, in turn.

    python bench/pools/gateway.py [--rounds 5]

TTFT of a short prompt while nothing else runs, and tokens per second of ``--streams`` streams.
Prints JSON: medians over rounds with least and most, and the differences.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import started, started_alone
from prompts import prompt
from streams import ask, request


async def measure(port: int, options: argparse.Namespace, seed: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        firsts = []
        for i in range(options.firsts):
            answer = await ask(channel, request(prompt(seed + i, 16), 2))
            assert not answer.error, answer.error
            firsts.append(1e3 * answer.ttft_s)
        began = time.monotonic()
        answers = await asyncio.gather(
            *(
                ask(channel, request(prompt(seed + 100 + i, 16), options.tokens))
                for i in range(options.streams)
            )
        )
        took = time.monotonic() - began
        tokens = sum(len(answer.token_ids) for answer in answers)
        assert tokens == options.streams * options.tokens, [a.error for a in answers]
    return {"ttft_ms": statistics.median(firsts), "tokens_per_s": tokens / took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--firsts", type=int, default=20)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"serve": [], "gateway": []}
    with ExitStack() as stack:
        ports = {
            "serve": stack.enter_context(started_alone(options.model)),
            "gateway": stack.enter_context(started(("unified",), model=options.model)).grpc[
                "gateway-0"
            ],
        }
        for port in ports.values():
            asyncio.run(measure(port, options, 1))  # warm
        for round_ in range(options.rounds):
            for which, port in ports.items():
                rows[which].append(asyncio.run(measure(port, options, 1000 * (round_ + 1))))
    print(
        json.dumps(
            {
                name: {which: spread([row[name] for row in rows[which]]) for which in rows}
                for name in rows["serve"][0]
            }
        )
    )


def spread(found: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(found), 2),
        "min": round(min(found), 2),
        "max": round(max(found), 2),
    }


if __name__ == "__main__":
    main()
