"""Why steps had their shape: what their ``StepChoice`` said, counted.

Labels are the members of its enumerations, so there are never more than these. One thread notes;
what another reads meanwhile may lack the newest step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.metrics_core import Metric

from moeserve.core import BudgetBy, Refusal, StepChoice
from moeserve.observe.families import by_label, counter, gauge

KINDS = ("decode", "prefill", "mixed", "none")

# Of steps, summed up over all: name and text by the field of ``StepChoice``.
_SUMMED = {
    "prefill_tokens": ("step_prefill_tokens", "tokens of prompts in steps"),
    "admitted": ("step_admitted_requests", "requests that started in a step"),
    "swapped_out": ("step_swapped_out_requests", "that gave up their blocks, and kept a copy"),
    "swapped_in": ("step_swapped_in_requests", "that came back from their copy"),
}


class _Reason(NamedTuple):
    kind: str
    budget_by: BudgetBy
    refused: Refusal
    layered: bool


class StepChoices:
    """How often each choice was made."""

    def __init__(self) -> None:
        self._reasons: Counter[_Reason] = Counter()
        self._sums = dict.fromkeys(_SUMMED, 0)
        self._budget = 0

    def note(self, choice: StepChoice) -> None:
        """Of a step that is over."""
        layered = choice.group is not None
        self._reasons[_Reason(kind_of(choice), choice.budget_by, choice.refused, layered)] += 1
        self._budget = choice.budget
        if choice.prefill_tokens or choice.admitted or choice.preempted:
            for name in self._sums:
                self._sums[name] += getattr(choice, name)

    def families(self, model: str) -> Iterator[Metric]:
        by_kind = dict.fromkeys(KINDS, 0)
        by_budget = {by.value: 0 for by in BudgetBy}
        by_refusal = {why.value: 0 for why in Refusal}
        layered = 0
        for reason, count in self._reasons.copy().items():
            by_kind[reason.kind] += count
            by_budget[reason.budget_by] += count
            by_refusal[reason.refused] += count
            layered += count * reason.layered
        kinds, budgets = "of newest tokens, of prompts, or of both", "by who set their most tokens"
        refusals = "by why the request that was next did not start"
        yield by_label(model, "steps_by_kind", f"steps {kinds}", "kind", by_kind)
        yield by_label(model, "steps_by_budget", f"steps {budgets}", "budget_by", by_budget)
        yield by_label(model, "steps_by_refusal", f"steps {refusals}", "refused", by_refusal)
        yield counter(model, "steps_layered", "whose prompts cross some of the layers", layered)
        yield gauge(model, "step_budget_tokens", "that the newest step may have", self._budget)
        for field, (name, text) in _SUMMED.items():
            yield counter(model, name, text, self._sums[field])


def kind_of(choice: StepChoice) -> str:
    """One of ``KINDS``."""
    if choice.prefill_tokens:
        return "mixed" if choice.decodes else "prefill"
    return "decode" if choice.decodes else "none"


def said(choice: StepChoice) -> dict[str, object]:
    """What is not as in most steps, and how many tokens there are; as JSON has it."""
    usual = StepChoice()._asdict()
    shown = {name: value for name, value in choice._asdict().items() if value != usual[name]}
    return {"decodes": choice.decodes, "prefill_tokens": choice.prefill_tokens} | shown
