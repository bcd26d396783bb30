"""Whether a prompt loads fewer experts in groups of layers (``--prefill-mode auto``) than chunks.

Each layer of a step loads the experts that its rows touch: by chance E * (1 - (1 - k / E)^n) of E,
where n rows choose k each (``offload.model.distinct``). In chunks of B tokens beside d others a
prompt loads f(B + d) in every layer, once for each chunk; in groups f(P + d) once, and f(d) in the
steps that run other layers. f grows ever slower, so groups never load more, as far as chance goes;
where nothing routes there is nothing to gain. Steps are no larger in groups (``layered``), so
neither are the gaps between tokens. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.engine.policies.layered import PrefillChoice
from moeserve.offload.model.distinct import expected_distinct


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """So many layers of ``experts`` experts, of which a token chooses ``top_k``."""

    count: int
    experts: int
    top_k: int

    def touched(self, rows: int) -> float:
        """Experts that are expected to be loaded, in all these layers together."""
        share = expected_distinct((self.top_k / self.experts,), rows)
        return self.count * self.experts * share


@dataclass(frozen=True, slots=True)
class FewerLoads:
    """A ``layered.Chooses``. ``layers`` are all of the model, ``routed`` those that route."""

    layers: int
    routed: Sequence[RoutedLayers]

    def __call__(self, choice: PrefillChoice) -> bool:
        return self.in_groups(choice) < self.in_chunks(choice)

    def in_chunks(self, choice: PrefillChoice) -> float:
        """Experts loaded until the prompt is computed."""
        whole, rest = divmod(choice.tokens, choice.budget)
        loads = whole * self._touched(choice.budget + choice.beside)
        return loads + self._touched(rest + choice.beside) * (rest > 0)

    def in_groups(self, choice: PrefillChoice) -> float:
        """The same in groups, over as many steps."""
        newest = self._touched(choice.beside)
        whole, rest = divmod(choice.tokens, choice.together)
        steps = -(-self.layers // choice.layers)
        loads = whole * (self._touched(choice.together + choice.beside) + (steps - 1) * newest)
        taken = whole * steps
        if rest:
            steps = min(steps, -(-rest // choice.budget))
            loads += self._touched(rest + choice.beside) + (steps - 1) * newest
            taken += steps
        return loads + (-(-choice.tokens // choice.budget) - taken) * newest

    def _touched(self, rows: int) -> float:
        return sum(kind.touched(rows) for kind in self.routed)
