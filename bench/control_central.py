"""What rank 0 cost when it decided for all ranks: microseconds of CPU in a decode step.

    python other_tree.py TREE control_central.py RANKS REQUESTS STEPS

Runs the classes of an earlier tree (``engine.ranks.fleet``, ``leader``, ``messages``), which this
one no longer has; ``control.py --checkout TREE`` starts it. The other ranks' part runs in this
process too, and is not counted.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from statistics import median
from typing import Any

PROMPT, BLOCK = 100, 16


class Others:
    """The channel of rank 0: the other ranks answer at once, off the clock."""

    def __init__(self, world: int, core: Any, messages: Any, pb: Any) -> None:
        self.spent_s = 0.0
        self._core, self._pb = core, pb
        self._decoders = {rank: messages.StepDecoder(rank) for rank in range(1, world)}
        self._replies: dict[int, bytes] = {}

    def send(self, rank: int, message: bytes) -> None:
        began = time.thread_time()
        order = self._pb.StepOrder.FromString(message)
        decoder = self._decoders[rank]
        plan = decoder.plan(order)
        report = decoder.report(order, plan, sampled(self._core, plan))
        self._replies[rank] = report.SerializeToString()
        self.spent_s += time.thread_time() - began

    def receive(self, rank: int, timeout_s: float) -> bytes:
        return self._replies[rank]

    def alarm(self) -> None:
        return None

    def fail(self, error: Exception) -> None:
        raise error


class TokenAtOnce:
    def __init__(self, core: Any) -> None:
        self._core = core

    def run(self, plan: Any, microbatches: int) -> Any:
        return sampled(self._core, plan)


def sampled(core: Any, plan: Any) -> Any:
    return core.StepResult(
        tuple(core.Sampled(c.request.id, (7,)) for c in plan.chunks if c.samples)
    )


def main() -> None:
    world, requests, steps = map(int, sys.argv[1:4])
    core = import_module("moeserve.core")
    fleets = import_module("moeserve.engine.ranks.fleet")
    messages = import_module("moeserve.engine.ranks.messages")
    leader = import_module("moeserve.engine.ranks.leader")
    scheduler = import_module("moeserve.engine.scheduler")
    blocks = import_module("moeserve.engine.blocks")
    counters = core.Counters()
    most = 8 * steps + 2 * requests  # who begins first makes tokens while the others' prompts run
    size = requests * (1 + (PROMPT + most) // BLOCK)
    pools = [blocks.BlockPool(size, BLOCK, counters) for _ in range(world)]
    config = scheduler.SchedulerConfig(
        1 << 16, requests, max(512, 2 * requests), max_queue=world * requests + 1
    )
    fleet = fleets.Fleet(config, pools, counters)
    others = Others(world, core, messages, import_module("moeserve.pb.step_pb2"))
    executor = leader.DistributedExecutor(TokenAtOnce(core), others, world)
    params = core.SamplingParams(max_tokens=most, ignore_eos=True)
    for i in range(world * requests):
        prompt = tuple((31 * i + 7 * t) % 50_000 for t in range(PROMPT))
        fleet.add(core.Request(core.RequestId(str(i)), prompt, params))
    costs: list[float] = []
    while len(costs) < steps:
        others.spent_s, began = 0.0, time.thread_time()
        plan = fleet.plan(0.0)
        fleet.apply(executor.run(plan))
        cost = time.thread_time() - began - others.spent_s
        if plan.num_tokens == len(plan.chunks) == world * requests:
            costs.append(1e6 * cost)
    print(median(costs))


if __name__ == "__main__":
    main()
