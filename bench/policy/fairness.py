"""Service between tenants, by the production scheduler without a model.

Three tenants with requests of three sizes, and one that floods: ``FLOOD`` times as many of its own
wait before anybody else's. Counted while all of them have requests waiting: what was computed of
prompts, and twice what was made of answers (``policies.fairness``).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from policy.admission import BLOCK, EOS, STEP_S, TOKEN_S, Scripted
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.policies.choices import Admission, FirstComeFirstServed
from moeserve.engine.policies.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairTenants
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.scheduler import Scheduler

FLOOD = 3
BLOCKS, SEQS, STEP_TOKENS, LIMIT = 400, 24, 512, 1024
# Mean tokens of prompt and answer.
TENANTS = {"flood": (120, 150), "chat": (60, 120), "code": (300, 60), "stories": (30, 300)}
POLICIES = ("arrival", "tenants (arrival inside)", "tenants (as answers were inside)")


@dataclass(frozen=True, slots=True)
class Shared:
    """``service`` by tenant while all had requests waiting; ``seconds`` modelled of that time."""

    policy: str
    service: dict[str, int]
    seconds: float
    steps: int

    @property
    def ratio(self) -> float:
        least = min(self.service.values())
        return max(self.service.values()) / least if least else float("inf")


def requests_of(tenant: str, count: int, draw: random.Random) -> list[tuple[Request, int]]:
    """With the length of each one's answer."""
    prompt, answer = TENANTS[tenant]
    found = []
    for i in range(count):
        ids = tuple(range(1, 1 + draw.randint(prompt // 2, prompt + prompt // 2)))
        made = draw.randint(answer // 2, answer + answer // 2)
        params = SamplingParams(max_tokens=LIMIT - len(ids) - 1)
        found.append((Request(RequestId(f"{tenant}{i}"), ids, params, tenant=tenant), made))
    return found


def share(policy: str, count: int) -> Shared:
    chosen: dict[str, Admission] = {
        POLICIES[0]: FirstComeFirstServed(),
        POLICIES[1]: FairTenants(FirstComeFirstServed()),
        POLICIES[2]: FairTenants(PastFuture(LIMIT)),
    }
    draw, counters, answers = random.Random(5), Counters(), {}
    config = SchedulerConfig(
        LIMIT, SEQS, STEP_TOKENS, 1 << 20, frozenset({EOS}), prefix_cache=False
    )
    scheduler = Scheduler(config, BlockPool(BLOCKS, BLOCK, counters), counters, chosen[policy])
    waiting: Counter[str] = Counter()
    owners: dict[RequestId, str] = {}
    for tenant in TENANTS:
        number = FLOOD * count if tenant == "flood" else count
        for request, made in requests_of(tenant, number, draw):
            scheduler.add(request)
            answers[request.id], owners[request.id] = made, tenant
            waiting[tenant] += 1
    executor, started, service = (
        Scripted(answers),
        set[RequestId](),
        Counter(dict.fromkeys(TENANTS, 0)),
    )
    seconds = 0.0
    while min(waiting.values()) > 0:
        plan = scheduler.plan(seconds)
        seconds += STEP_S + TOKEN_S * plan.num_tokens
        for chunk in plan.chunks:
            if chunk.request.id not in started:
                started.add(chunk.request.id)
                waiting[chunk.request.tenant] -= 1
                service[chunk.request.tenant] += PROMPT_WEIGHT * len(chunk.request.prompt_ids)
        for out in scheduler.apply(executor.run(plan)):
            service[owners[out.request_id]] += OUTPUT_WEIGHT
    return Shared(policy, dict(service), seconds, counters.steps)


def fairness(count: int) -> list[Shared]:
    """With so many requests of each tenant, and more of the one that floods."""
    return [share(policy, count) for policy in POLICIES]


def show_shared(rows: Sequence[Shared]) -> None:
    table = Table(box=SIMPLE)
    for name in ("who is next", *TENANTS, "most to least", "steps", "seconds"):
        table.add_column(name, justify="left" if name == "who is next" else "right")
    for row in rows:
        table.add_row(
            row.policy,
            *(f"{row.service[tenant]:,}" for tenant in TENANTS),
            f"{row.ratio:.2f}",
            f"{row.steps:,}",
            f"{row.seconds:.1f}",
        )
    Console().print(table)
