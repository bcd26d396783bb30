"""Answers of a cluster against those of one process, token by token.

    python bench/pools/equality.py [--prompts 200] [--prefill 2 --decode 2 --cache 1 --gateways 2]

Prompts of 48 to 500 tokens, a third of which share a beginning, half of them sampled; ``--clients``
ask at once, in turn at every gateway. They are asked ``--times`` times, so that the last time some
of their KV comes from the cache pool. Prints one JSON object: answers that were equal and those
that were not, tokens, and what gateways counted. The exit status is 1 where one differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import started, started_alone
from prompts import prompt
from streams import ask, request

TOKENS = 32
MEMBER = ("--threads", "1", "--num-blocks", "2048")
COUNTED = ("cluster_sent_total", "cluster_sent_with_sources_total", "cluster_lost_total")


def wanted(which: int) -> Any:
    sampled = {"temperature": 0.9, "seed": which} if which % 2 else {}
    shared = 40 if which % 3 == 0 else 0
    return request(prompt(which, 48 + (37 * which) % 452, shared), TOKENS, **sampled)


async def answers(ports: Sequence[int], count: int, clients: int) -> list[list[int]]:
    """The tokens of each prompt."""
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}") for port in ports]
    room = asyncio.Semaphore(clients)

    async def one(which: int) -> list[int]:
        async with room:
            answer = await ask(channels[which % len(channels)], wanted(which))
        assert not answer.error, answer.error
        return answer.token_ids

    try:
        return list(await asyncio.gather(*(one(which) for which in range(count))))
    finally:
        for channel in channels:
            await channel.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--times", type=int, default=2)
    for role, number in (("prefill", 2), ("decode", 2), ("unified", 0), ("cache", 1)):
        parser.add_argument(f"--{role}", type=int, default=number)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with started_alone(options.model) as port:
        right = asyncio.run(answers([port], options.prompts, options.clients))
    roles = [r for r in ("prefill", "decode", "unified", "cache") for _ in range(vars(options)[r])]
    equal, differ = 0, []
    with started(roles, gateways=options.gateways, model=options.model, options=MEMBER) as cluster:
        for _ in range(options.times):
            found = asyncio.run(answers([*cluster.grpc.values()], options.prompts, options.clients))
            same = [a == b for a, b in zip(found, right, strict=True)]
            equal += sum(same)
            differ += [which for which, alike in enumerate(same) if not alike]
        lines = [line for name in cluster.gateways for line in cluster.metrics(name).splitlines()]
    counts = {
        name: sum(float(line.split()[-1]) for line in lines if line.startswith(f"moeserve_{name}"))
        for name in COUNTED
    }
    tokens = sum(map(len, right))
    print(json.dumps({"equal": equal, "differ": differ, "tokens": tokens, "counts": counts}))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
