"""How fast a rank computes, as lately measured: what others choose it by.

Means are weighted by how long ago a step ended, in time spent in steps of its kind: who idles
keeps the rates that it had. Pure: times are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moeserve.core import Chunk, FinishReason, StepPlan, Timing
from moeserve.engine.loop import EngineObserver
from moeserve.engine.step_cost import DecodeCost, FittedStepCost, MixedCost

# A step counts a third of what it did after so many seconds of such steps.
MEMORY_S = 5.0


@dataclass(slots=True)
class _Mean:
    """``amount`` per second of what was noted."""

    amount: float = 0.0
    seconds: float = 0.0

    def note(self, amount: float, seconds: float) -> None:
        fade = math.exp(-seconds / MEMORY_S)
        self.amount = self.amount * fade + amount
        self.seconds = self.seconds * fade + seconds

    @property
    def rate(self) -> float:
        return self.amount / self.seconds if self.seconds > 0 else 0.0


class StepRates:
    """One thread notes steps; any thread reads."""

    def __init__(self) -> None:
        self._prefill, self._decode = _Mean(), _Mean()

    def note(self, plan: StepPlan, seconds: float) -> None:
        """A step that is over and took so long."""
        if not plan.chunks:
            return
        prompts = 0
        if plan.num_tokens > len(plan.chunks):  # else nobody has more than one token
            prompts = sum(chunk.work for chunk in plan.chunks if not is_decode(chunk))
        if prompts:
            self._prefill.note(prompts, seconds)
        else:
            self._decode.note(1.0, seconds)

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts per second of the steps that have some; 0 before the first."""
        return self._prefill.rate

    @property
    def step_s(self) -> float:
        """Seconds of a step that only decodes; 0 before the first."""
        rate = self._decode.rate
        return 1.0 / rate if rate else 0.0


def is_decode(chunk: Chunk) -> bool:
    """Whether all that a chunk has of its request is its newest token, which was sampled."""
    return bool(chunk.output_ids) and len(chunk.token_ids) == max(1, chunk.samples)


class RatedSteps:
    """An ``EngineObserver`` that notes every step's rate, and what steps cost where somebody asks
    (``decodes``: those without prompts; ``mixed``: those with some), and passes all on."""

    def __init__(
        self,
        inner: EngineObserver,
        rates: StepRates,
        cost: FittedStepCost | None = None,
        decodes: DecodeCost | None = None,
        mixed: MixedCost | None = None,
    ) -> None:
        self._inner = inner
        self._rates = rates
        self._cost = cost
        self._decodes = decodes
        self._mixed = mixed

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        self._rates.note(plan, seconds)
        makes = self._decodes if plan.draft_next else None  # guesses for the next step
        alone = seconds - (0.0 if makes is None else makes.drafting_s)
        if self._cost is not None:
            self._cost.note(plan.num_tokens, alone)
        if self._decodes is not None and plan.chunks and all(map(is_decode, plan.chunks)):
            self._decodes.note(plan.num_tokens, alone)
        if self._mixed is not None and (choice := plan.choice).prefill_tokens:
            decode_tokens = choice.decodes + choice.drafted
            self._mixed.note(choice.prefill_tokens, decode_tokens, alone)
        self._inner.on_step(plan, seconds)

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        self._inner.on_gaps(gaps)

    def on_first_token(self, timing: Timing) -> None:
        self._inner.on_first_token(timing)

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        self._inner.on_finish(reason, timing)
