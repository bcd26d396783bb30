"""Members are killed and stopped at random while clients ask; every answer is compared.

    python bench/pools/chaos.py [--minutes 30] [--every 20] [--prefill 2 --decode 2 --cache 1]

What each prompt's tokens are is asked of one process first. Then clients ask the cluster, at any of
its gateways, for as long as it runs; a client whose gateway dies asks another. Meanwhile, every
``--every`` seconds, one member is killed (and started anew after a moment), or stopped for a while
and let go on. Prints one JSON object: answers that were right, refused (with the status and reason)
and wrong, the longest pause between two tokens of a right answer by kind of fault, and of each
process resident memory and descriptors over time. The exit status is 1 if an answer was wrong or a
call got no end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import Cluster, Process, started, started_alone
from prompts import prompt
from streams import Answer, ask, request

RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
CALL_S = 90.0
STOPPED_S = 6.0
ANEW_S = 2.0
MEASURE_S = 10.0


@dataclass(slots=True)
class Tally:
    """What became of the calls. ``pauses_s`` are of right answers that a fault overlapped."""

    right: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    late: int = 0
    pauses_s: dict[str, list[float]] = field(default_factory=dict)
    faults: list[tuple[float, float, str]] = field(default_factory=list)

    def take(self, answer: Answer, expected: Sequence[int], ended_s: float) -> None:
        same = answer.token_ids == list(expected[: len(answer.token_ids)])
        if not same or (not answer.error and len(answer.token_ids) != len(expected)):
            self.wrong.append({"got": answer.token_ids, "expected": list(expected)})
        elif answer.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.late += 1
        elif answer.error:
            self.refused[answer.error] += 1
        else:
            self.right += 1
            self._pause(answer, ended_s)

    def _pause(self, answer: Answer, ended_s: float) -> None:
        longest = max([answer.ttft_s, *answer.gaps_s])
        for began, over, what in self.faults:
            if began < ended_s and answer.sent_s < over:
                self.pauses_s.setdefault(what, []).append(longest)


class Clients:
    """``count`` of them, each asking one request after another until ``stop`` is set."""

    def __init__(self, cluster: Cluster, expected: Mapping[int, Sequence[int]], tally: Tally):
        self._channels = {
            name: grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            for name, port in cluster.grpc.items()
        }
        self._expected = expected
        self._tally = tally
        self.stop = asyncio.Event()

    async def run(self, count: int, seed: int) -> None:
        await asyncio.gather(*(self._ask(random.Random(f"{seed}/{i}")) for i in range(count)))
        for channel in self._channels.values():
            await channel.close()

    async def _ask(self, chance: random.Random) -> None:
        while not self.stop.is_set():
            which = chance.choice([*self._expected])
            gateway = chance.choice([*self._channels])
            answer = await ask(self._channels[gateway], wanted(which), CALL_S)
            self._tally.take(answer, self._expected[which], time.monotonic())
            if answer.error:
                await asyncio.sleep(0.2)


def wanted(which: int) -> Any:
    """Lengths differ, and half of the requests are sampled."""
    sampled = {"temperature": 0.9, "seed": which} if which % 2 else {}
    shared = 128 if which % 3 == 0 else 0
    return request(prompt(which, 48 + 37 * (which % 12), min(shared, 40)), TOKENS, **sampled)


TOKENS = 48


async def references(prompts: int, model: str) -> dict[int, list[int]]:
    """The tokens of each prompt, by one process."""
    with started_alone(model) as port:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            found = {}
            for which in range(prompts):
                answer = await ask(channel, wanted(which))
                assert not answer.error, answer.error
                found[which] = answer.token_ids
        return found


async def harm(cluster: Cluster, process: Process, kind: str, tally: Tally) -> None:
    """One fault, from its beginning to when the member is as it was."""
    began = time.monotonic()
    tally.faults.append((began, began + 60, f"{kind} {process.name.partition('-')[0]}"))
    if kind == "kill":
        process.kill()
        await asyncio.sleep(ANEW_S)
        process.start()
    else:
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        process.signal(signal.SIGCONT)
    tally.faults[-1] = (began, time.monotonic() + 5, tally.faults[-1][2])


async def run(options: argparse.Namespace) -> dict[str, Any]:
    expected = await references(options.prompts, options.model)
    roles = [
        *["prefill"] * options.prefill,
        *["decode"] * options.decode,
        *["unified"] * options.unified,
        *["cache"] * options.cache,
    ]
    chance, tally = random.Random(options.seed), Tally()
    with started(roles, gateways=options.gateways, model=options.model) as cluster:
        clients = Clients(cluster, expected, tally)
        asking = asyncio.create_task(clients.run(options.clients, options.seed))
        measured: list[dict[str, Any]] = []
        began = time.monotonic()
        next_fault, next_look = began + options.every, began
        while (now := time.monotonic()) - began < 60 * options.minutes:
            if now >= next_look:
                next_look = now + MEASURE_S
                alive = {n: p.measures() for n, p in cluster.all.items() if p.alive}
                measured.append({"s": round(now - began), "of": alive, "right": tally.right})
                print(
                    f"\r{now - began:6.0f} s  right {tally.right}  wrong {len(tally.wrong)}  "
                    f"refused {sum(tally.refused.values())}  faults {len(tally.faults)}",
                    end="", file=sys.stderr, flush=True,
                )  # fmt: skip
            if now >= next_fault:
                next_fault = now + options.every
                name = chance.choice(
                    [n for n in cluster.all if options.gateways_too or n in cluster.peers]
                )
                await harm(cluster, cluster.all[name], chance.choice(options.kinds), tally)
            await asyncio.sleep(0.2)
        clients.stop.set()
        await asyncio.wait_for(asking, 2 * CALL_S)
        await asyncio.sleep(2)
        pages = {name: cluster.metrics(name) for name in cluster.gateways}
    print(file=sys.stderr)
    return {
        "seconds": 60 * options.minutes,
        "faults": dict(collections.Counter(what for _, _, what in tally.faults)),
        "right": tally.right,
        "wrong": tally.wrong,
        "late": tally.late,
        "refused": dict(tally.refused),
        "pauses_s": {what: spread(found) for what, found in sorted(tally.pauses_s.items())},
        "processes": measured,
        "pages": {
            name: [line for line in page.splitlines() if line.startswith("moeserve")]
            for name, page in pages.items()
        },
    }


def spread(found: Sequence[float]) -> dict[str, float]:
    ordered = sorted(found)
    return {
        "n": len(ordered),
        "median": round(ordered[len(ordered) // 2], 3),
        "max": round(ordered[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--kinds", nargs="+", default=["kill", "stop"], choices=["kill", "stop"])
    parser.add_argument("--gateways-too", action="store_true", help="gateways are harmed as well")
    for role, count in (("prefill", 2), ("decode", 2), ("unified", 0), ("cache", 1)):
        parser.add_argument(f"--{role}", type=int, default=count)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=1)
    found = asyncio.run(run(parser.parse_args()))
    print(json.dumps(found))
    return 1 if found["wrong"] or found["late"] else 0


if __name__ == "__main__":
    sys.exit(main())
