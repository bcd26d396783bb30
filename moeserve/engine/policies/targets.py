"""Steps that keep targets of latency: prompts beside newest tokens, as many as the gap allows.

After Nexus (Shi et al. 2025), within one step of one device. What a step takes is learnt
(``step_cost.MixedCost``). Beside newest tokens a step gets no more tokens of prompts than make it
take as long as the target between tokens (TPOT), but never less than ``LEAST_TOKENS``, so prompts
advance also where the target cannot be kept. This budget is lowered at once where the target would
be missed, and raised only by a quarter or more, or once in a while (hysteresis).

Which prompt is next: the shortest, by what is left of it, less ``aging`` tokens for each second
since it came; so one is overtaken only by those that come within its length / ``aging`` seconds.
With a target to the first token (TTFT), those that can still be in time go before those that cannot
any more, until these have waited ``OVERDUE`` times as long. Priorities come first, then answers
that were interrupted. Who is in the middle of its prompt may be overtaken as well. Whether there is
room for the next one is asked of another ``Admission``. Which prompt runs when changes no token.
Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice

from moeserve.core import BudgetBy, RequestId
from moeserve.engine.blocks import BlockPool
from moeserve.engine.policies.choices import Admission
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.step_cost import MixedCost
from moeserve.engine.waiting import WaitingQueue

# Of prompts in a step, whatever the targets are.
LEAST_TOKENS = 16
# Of the requests that wait, the first so many are looked at.
LOOK = 256
# Who is late goes before those that are not when it has waited for so many times the target.
OVERDUE = 4
# When it has waited for so long, the longest prompt goes before any that comes.
PATIENCE_S = 10.0
# A budget that could be larger by less than a quarter is left as it is, for so many steps at most.
RAISE = 1.25
STEADY_STEPS = 64


@dataclass(frozen=True, slots=True)
class LatencyTargets:
    """Seconds to a request's first token, and between two; None where there is no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None


NO_TARGETS = LatencyTargets()


class StepBudget:
    """How many tokens of prompts a step may have beside newest tokens, to take ``seconds``."""

    def __init__(self, seconds: float, cost: MixedCost) -> None:
        self._seconds = seconds
        self._cost = cost
        self._now = 0.0
        self._steps = 0

    def tokens(self, decode_tokens: int, most: int) -> int:
        """Of at most so many."""
        within = self._cost.prompts_within(self._seconds, decode_tokens)
        wanted = min(max(within, LEAST_TOKENS), most)
        self._steps += 1
        if wanted < self._now or wanted >= RAISE * self._now or self._steps >= STEADY_STEPS:
            self._now, self._steps = wanted, 0
        return int(self._now)


class TargetAdmission:
    """An ``Admission`` that asks ``room`` whether the next one may start. ``limit`` is the longest
    sequence there may be."""

    def __init__(
        self, room: Admission, targets: LatencyTargets, cost: MixedCost, limit: int
    ) -> None:
        self.aging = limit / PATIENCE_S
        self._room = room
        self._ttft_s, self._now, self._token_s = targets.ttft_s, 0.0, 0.0
        self._cost = cost
        self._budget = None if targets.tpot_s is None else StepBudget(targets.tpot_s, cost)
        self._builder: StepBuilder | None = None
        self._queue: list[SequenceState] = []  # whoever is next last

    @property
    def spare(self) -> int:
        return self._room.spare

    def begin(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None:
        self._room.begin(builder, running, waiting, pool)
        self._builder, self._queue = builder, []
        self._now = builder.now
        if not (waiting or builder.prompts):
            return
        decode_tokens = builder.decodes + builder.drafted
        # Where nobody decodes, nobody waits for the step.
        if self._budget is not None and decode_tokens and self._cost.known:
            tokens = self._budget.tokens(decode_tokens, builder.budget)
            builder.limit(tokens, BudgetBy.TPOT)
        if self._ttft_s is not None and self._cost.known and builder.budget:
            self._token_s = self._cost.gap(builder.budget, decode_tokens) / builder.budget
        queue = sorted(islice(waiting.values(), LOOK), key=self._place)
        prompts = sorted(builder.prompts, key=self._place)
        first = self._place(queue[0]) if queue else None
        builder.prompts = [seq for seq in prompts if first is None or self._place(seq) <= first]
        builder.later = prompts[len(builder.prompts) :]
        self._queue = queue[::-1]

    def pick(self, waiting: WaitingQueue, now: float) -> SequenceState | None:
        """The shortest, by what is left of it and since when it waits, if there is room; of those
        that are asked about, which may be one that another admission has chosen."""
        builder, seq = self._builder, self._next(waiting)
        if seq is None:
            return None
        assert builder is not None, "begin comes first"
        while builder.later and self._place(builder.later[0]) <= self._place(seq):
            builder.add(builder.later.pop(0))
        if not builder.budget:
            return seq  # the scheduler says so
        one = WaitingQueue()
        one.put(seq)
        return self._room.pick(one, now)

    def victim(self, running: Collection[SequenceState]) -> SequenceState:
        return self._room.victim(running)

    def _next(self, waiting: Mapping[RequestId, SequenceState]) -> SequenceState | None:
        if len(waiting) == 1:
            return next(iter(waiting.values()))
        while self._queue and self._queue[-1].request.id not in waiting:
            self._queue.pop()
        return self._queue[-1] if self._queue else None

    def _place(self, seq: SequenceState) -> tuple[int, bool, bool, float]:
        left, come = seq.uncomputed, seq.request.arrival
        return (
            seq.request.priority,
            not seq.output_ids,
            self._too_late(left, self._now - come),
            left + self.aging * come,
        )

    def _too_late(self, left: int, waited_s: float) -> bool:
        """Whether a prompt cannot have its first token in time any more, but is not overdue."""
        if self._ttft_s is None or waited_s > OVERDUE * self._ttft_s:
            return False
        return waited_s + left * self._token_s > self._ttft_s
