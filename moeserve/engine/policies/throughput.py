"""The policy of ``--objective throughput``: whoever generates first, then prompts up to what pays.

A step has no more tokens than are worthwhile (``step_cost``): where reading the weights is what it
costs, as where they stream, that is many. Requests start so that KV holds out: one is admitted if
all that run then are predicted to find blocks until they end, each as many as it will have when
most are needed (as LightLLM's past-future scheduler looks ahead). Where many more wait than KV
holds, they start evenly, q in a step (eq 3 of MoE-Lens: q * g * (p + g / 2) tokens of KV for
prompts of p and answers of g tokens): so some are long while others are short, more of them fit
than if all grew together, and prompts are there to fill every step. A prediction that was wrong
costs a preemption, and makes the next ones more careful. Pure.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from moeserve.core import BudgetBy, FinishReason, RequestId
from moeserve.engine.blocks import BlockPool
from moeserve.engine.policies.choices import last_admitted, most_tokens, room_of
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.engine.step_cost import StepCost, worthwhile_tokens

# A step is at least so large where prompts wait: chunks of few tokens cost more than they bring.
LEAST_TOKENS = 32
# Of the waiting requests, those that are looked at for how long they are.
SAMPLE = 64
# Ended answers before their lengths count, and what a new one counts.
LEARNED = 8
FADE = 0.1


class AnswerLengths:
    """Of the tokens that answers may have, what they do have: all, until some have ended."""

    def __init__(self) -> None:
        self._ended = 0
        self._share = 1.0
        self._spread = 0.0
        self._caution = 0.0

    @property
    def share(self) -> float:
        """Few answers are longer than this share of what they may be."""
        if self._ended < LEARNED:
            return 1.0
        return min(1.0, self._share + self._spread + self._caution)

    def note(self, made: int, allowed: int) -> None:
        """One has ended."""
        self._ended += 1
        found, step = made / max(1, allowed), max(FADE, 1 / self._ended)
        self._spread += step * (abs(found - self._share) - self._spread)
        self._share += step * (found - self._share)
        self._caution *= 0.99

    def fell_short(self) -> None:
        """Blocks were missing: answers are longer than was thought."""
        self._caution = min(1.0, self._caution + 0.1)

    def left(self, seq: SequenceState, limit: int) -> int:
        """Tokens that a sequence is still expected to make, at least one."""
        return max(1, round(self.share * most_tokens(seq, limit)) - len(seq.output_ids))


@dataclass(frozen=True, slots=True, order=True)
class Stay:
    """A sequence of ``length`` tokens that is there for ``left`` more steps, negated: sorted, those
    that stay longest come first."""

    minus_left: int
    length: int


class Outlook:
    """What those that run will hold of KV, in blocks, until they have ended."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._stays: list[Stay] = []
        self._longest = 0  # blocks, were all at their longest together

    def add(self, length: int, left: int) -> None:
        insort(self._stays, Stay(-left, length))
        self._longest += self._blocks(length + left - 1)

    def has_room(self, length: int, left: int, blocks: int) -> bool:
        """Whether one more leaves all with what they need of so many blocks."""
        if self._longest + self._blocks(length + left - 1) <= blocks:
            return True
        return self.peak(length, left) <= blocks

    def peak(self, length: int = 0, left: int = 0) -> int:
        """Blocks at the worst moment, which is when one of them ends; with one more, if ``left``.

        Of those that stay as long, ``full`` counts whole blocks, ``rests`` how many have so many
        tokens behind them: a step fills the block of those with the largest rest.
        """
        size = self._block_size
        full = most = 0
        rests = [0] * size
        stays: Iterable[Stay] = self._stays
        if left:
            stays = sorted([*self._stays, Stay(-left, length)])
        for count, stay in enumerate(stays, start=1):
            whole, rest = divmod(stay.length + size - 1, size)
            full += whole
            rests[rest] += 1
            rounds, steps = divmod(-stay.minus_left - 1, size)
            most = max(most, full + count * rounds + sum(rests[size - steps :]))
        return most

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


class ThroughputAdmission:
    """An ``Admission``. ``cost`` predicts steps; ``limit`` is the longest sequence there may be."""

    spare = 0  # what those that run will need is looked at

    def __init__(self, cost: StepCost, limit: int) -> None:
        self.step_tokens = 0  # of the newest step, the most
        self.lengths = AnswerLengths()
        self._cost = cost
        self._limit = limit
        self._known: dict[RequestId, SequenceState] = {}
        self._outlook = Outlook(1)
        self._room = 0
        self._credit = 0.0
        self._staggers = False
        self._behind = 0  # tokens of prompts before the next one's
        self._prefill = 1  # of those, in a step
        self._picked: SequenceState | None = None

    def begin(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None:
        """A step has its newest tokens: limits its prompts, and looks at what KV there will be."""
        self._learn(running, bool(builder.preempted))
        newest = sum(len(chunk.token_ids) for chunk in builder.chunks)
        context = sum(seq.length for seq in builder.seqs)
        most = newest + builder.budget
        paid = worthwhile_tokens(self._cost, newest, context, most)
        self.step_tokens = min(most, max(paid, LEAST_TOKENS))
        builder.limit(max(0, self.step_tokens - newest), BudgetBy.PAYS)
        self._picked = None
        if waiting:
            self._look_ahead(builder, running, waiting, pool)

    def pick(self, waiting: Mapping[RequestId, SequenceState], now: float) -> SequenceState | None:
        """The first one, where KV will hold out; whoever is alone always."""
        if self._picked is not None and self._picked.request.id not in waiting:
            self._take(self._picked)
        self._picked = None
        seq = next(iter(waiting.values()), None)
        if seq is None:
            return None
        if self._known and not self._may_start(seq):
            return None
        self._picked = seq
        return seq

    def victim(self, running: Collection[SequenceState]) -> SequenceState:
        return last_admitted(running)

    def _learn(self, running: Collection[SequenceState], preempted: bool) -> None:
        for seq in self._known.values():
            if seq.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self.lengths.note(len(seq.output_ids), most_tokens(seq, self._limit))
        if preempted:
            self.lengths.fell_short()
        self._known = {seq.request.id: seq for seq in running}

    def _look_ahead(
        self,
        builder: StepBuilder,
        running: Collection[SequenceState],
        waiting: Mapping[RequestId, SequenceState],
        pool: BlockPool,
    ) -> None:
        self._outlook = Outlook(pool.block_size)
        self._behind, self._prefill = 0, max(1, builder.budget)
        self._room, shared = room_of(running, pool)
        for seq in running:
            self._outlook.add(max(1, seq.length - shared), self._left(seq))
        sample = list(islice(waiting.values(), SAMPLE))
        answer = sum(self.lengths.left(seq, self._limit) for seq in sample) / len(sample)
        length = sum(seq.length for seq in sample) / len(sample)
        tokens = self._room * pool.block_size
        wanted = (len(waiting) + len(running)) * (length + answer)
        self._staggers = wanted * answer > 2 * tokens * (length + answer)
        q = tokens / (answer * (length + answer / 2 + pool.block_size / 2))
        self._credit = min(self._credit + q, 1 + q) if self._staggers else 0.0

    def _left(self, seq: SequenceState) -> int:
        """Steps until it ends: of the prompts before it, of its own, of its answer."""
        if not seq.generating:
            self._behind += seq.length - seq.computed
        waits = self._behind // self._prefill if not seq.generating else 0
        return waits + self.lengths.left(seq, self._limit)

    def _may_start(self, seq: SequenceState) -> bool:
        if self._staggers and self._credit < 1:
            return False
        waits = (self._behind + seq.uncomputed) // self._prefill
        left = waits + self.lengths.left(seq, self._limit)
        return self._outlook.has_room(seq.length, left, self._room)

    def _take(self, seq: SequenceState) -> None:
        """It was admitted."""
        self._outlook.add(seq.length, self._left(seq))
        self._known[seq.request.id] = seq
        self._credit -= 1
