"""Members are harmed at random while clients ask; every answer is compared.

    python bench/pools/chaos.py [--minutes 30] [--every 20] [--prefill 2 --decode 2 --cache 1]
                                [--bed] [--kinds kill stop cut slow] [--no-gateways]

What each prompt's tokens are is asked of one process first. Then clients ask the cluster, at any of
its gateways, for as long as it runs; a client whose gateway dies asks another. Meanwhile, every
``--every`` seconds, one part, member or gateway, is killed (and started anew after a moment), or
stopped for a while and let go on. With ``--bed`` every part has a host of its own, as network
namespaces (needs root), and a part's link may also be ``cut`` for a while, or ``slow``. Harm goes
through all parts in turn, each time in another order. Prints one JSON object: answers that were
right, refused (with the status and reason) and wrong, the longest pause between two tokens of a
right answer by kind of fault, of each process resident memory and descriptors over time, and of
each role blocks that were not free in the end. The exit status is 1 if an answer was wrong, a call
got no end, or a block is missing.
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
from cluster import ASKING, FIRST_HOST, Cluster, Process, started, started_alone
from prompts import prompt
from streams import Answer, ask, request

from moeserve.testbed.network import Bed

RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
CALL_S = 90.0
STOPPED_S = CUT_S = 6.0
SLOW_S, SLOW_RATE = 8.0, 8_000_000
PROCESS_KINDS, LINK_KINDS = ("kill", "stop"), ("cut", "slow")
CLIENTS_HOST = 0
MEMBER = ("--threads", "1", "--num-blocks", "2048")
ANEW_S = 2.0
MEASURE_S = 10.0


@dataclass(slots=True)
class Tally:
    """What became of the calls. ``pauses_s`` are of right answers that a fault overlapped, or
    ``several``."""

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
        met = {w for began, over, w in self.faults if began < ended_s and answer.sent_s < over}
        if met:
            what = met.pop() if len(met) == 1 else "several"
            self.pauses_s.setdefault(what, []).append(longest)


class Clients:
    """``count`` of them, each asking one request after another until ``stop`` is set."""

    def __init__(self, cluster: Cluster, expected: Mapping[int, Sequence[int]], tally: Tally):
        self._channels = {
            name: grpc.aio.insecure_channel(cluster.door(name, cluster.grpc))
            for name in cluster.gateways
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
            answer = await ask(self._channels[gateway], wanted(which), CALL_S, ASKING)
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
    elif kind == "stop":
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        process.signal(signal.SIGCONT)
    else:
        assert process.bed is not None, "links are harmed on a test bed"
        if kind == "cut":
            process.bed.cut(process.host)
            await asyncio.sleep(CUT_S)
            process.bed.mend(process.host)
        else:
            process.bed.set_rate(SLOW_RATE, process.host)
            await asyncio.sleep(SLOW_S)
            process.bed.set_rate(None, process.host)
    tally.faults[-1] = (began, time.monotonic() + 5, tally.faults[-1][2])


async def run(options: argparse.Namespace, bed: Bed | None) -> dict[str, Any]:
    expected = await references(options.prompts, options.model)
    roles = [
        *["prefill"] * options.prefill,
        *["decode"] * options.decode,
        *["unified"] * options.unified,
        *["cache"] * options.cache,
    ]
    chance, tally = random.Random(options.seed), Tally()
    with started(
        roles, gateways=options.gateways, model=options.model, options=MEMBER, bed=bed
    ) as cluster:
        clients = Clients(cluster, expected, tally)
        asking = asyncio.create_task(clients.run(options.clients, options.seed))
        measured: list[dict[str, Any]] = []
        turn: list[str] = []
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
                if not turn:
                    turn = [n for n in cluster.all if options.gateways_too or n in cluster.peers]
                    chance.shuffle(turn)
                name = turn.pop()
                await harm(cluster, cluster.all[name], chance.choice(options.kinds), tally)
            await asyncio.sleep(0.2)
        clients.stop.set()
        await asyncio.wait_for(asking, 2 * CALL_S)
        for name in cluster.gateways:  # one may just have been started anew
            await asyncio.to_thread(cluster.ready, name)
            await asyncio.to_thread(cluster.joined, name, roles)
        held = await blocks_held(cluster)
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
        "blocks_held": held,
        "processes": measured,
        "pages": {
            name: [line for line in page.splitlines() if line.startswith("moeserve")]
            for name, page in pages.items()
        },
    }


async def blocks_held(cluster: Cluster) -> dict[str, float]:
    """By role, KV blocks that are not free when nobody asks any more, after a while at least."""
    held: dict[str, float] = {}
    for _ in range(20):
        await asyncio.sleep(1)
        page = await asyncio.to_thread(cluster.metrics, next(iter(cluster.gateways)))
        found = {
            line.split()[0]: float(line.split()[-1])
            for line in page.splitlines()
            if line.startswith("moeserve_members_kv_blocks")
        }
        held = {
            role: total - found.get(f'moeserve_members_kv_blocks_free{{role="{role}"}}', 0.0)
            for role in ("prefill", "decode", "unified")
            if (total := found.get(f'moeserve_members_kv_blocks{{role="{role}"}}', 0.0))
        }
        if not any(held.values()):
            break
    return held


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
    parser.add_argument("--bed", action="store_true", help="each part on a host of its own")
    parser.add_argument("--kinds", nargs="+", choices=[*PROCESS_KINDS, *LINK_KINDS])
    parser.add_argument(
        "--no-gateways", dest="gateways_too", action="store_false", help="members alone are harmed"
    )
    for role, count in (("prefill", 2), ("decode", 2), ("unified", 0), ("cache", 1)):
        parser.add_argument(f"--{role}", type=int, default=count)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.kinds = options.kinds or [*PROCESS_KINDS, *(LINK_KINDS if options.bed else ())]
    if not options.bed and set(options.kinds) & set(LINK_KINDS):
        parser.error("links are harmed on a test bed alone: give --bed")
    if options.bed:
        counts = (options.gateways, options.prefill, options.decode)
        parts = sum((*counts, options.unified, options.cache))
        with Bed(FIRST_HOST + parts) as bed, bed.inside(CLIENTS_HOST):
            found = asyncio.run(run(options, bed))
    else:
        found = asyncio.run(run(options, None))
    print(json.dumps(found))
    return 1 if found["wrong"] or found["late"] or any(found["blocks_held"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
