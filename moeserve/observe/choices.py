"""Why steps had their shape: what their ``StepChoice`` said, counted.

Labels are the members of its enumerations, so there are never more than these. One thread notes;
what another reads meanwhile may lack the newest step.
"""

from __future__ import annotations

from collections.abc import Iterator

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


# Whether it has tokens of prompts and newest tokens, who set its budget, who was refused, and
# whether its prompts cross some of the layers only.
_Reason = tuple[bool, bool, BudgetBy, Refusal, bool]


class StepChoices:
    """How often each choice was made."""

    def __init__(self) -> None:
        self._reasons: dict[_Reason, int] = {}
        self._sums = dict.fromkeys(_SUMMED, 0)
        self._budget = 0

    def note(self, choice: StepChoice) -> None:
        """Of a step that is over."""
        reason = (
            choice.prefill_tokens > 0,
            choice.decodes > 0,
            choice.budget_by,
            choice.refused,
            choice.group is not None,
        )
        self._reasons[reason] = self._reasons.get(reason, 0) + 1
        self._budget = choice.budget
        if choice.prefill_tokens or choice.admitted or choice.preempted:
            for name in self._sums:
                self._sums[name] += getattr(choice, name)

    def families(self, model: str) -> Iterator[Metric]:
        by_kind = dict.fromkeys(KINDS, 0)
        by_budget = {by.value: 0 for by in BudgetBy}
        by_refusal = {why.value: 0 for why in Refusal}
        layered = 0
        for (prompts, decodes, budget_by, refused, some), count in self._reasons.copy().items():
            by_kind[_kind(prompts, decodes)] += count
            by_budget[budget_by] += count
            by_refusal[refused] += count
            layered += count * some
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
    return _kind(choice.prefill_tokens > 0, choice.decodes > 0)


def _kind(prompts: bool, decodes: bool) -> str:
    if prompts:
        return "mixed" if decodes else "prefill"
    return "decode" if decodes else "none"


def said(choice: StepChoice) -> dict[str, object]:
    """What is not as in most steps, and how many tokens there are; as JSON has it."""
    usual = StepChoice()._asdict()
    shown = {name: value for name, value in choice._asdict().items() if value != usual[name]}
    return {"decodes": choice.decodes, "prefill_tokens": choice.prefill_tokens} | shown
