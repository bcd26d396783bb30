"""Homes near the experts that a request will use.

Prompts of one kind use much the same experts: of one ``domain`` if the client names it, else of one
tenant (``salt``), else with the same first tokens, as a system prompt gives them. So ranks count
whose experts the prompts of a kind use, and the next one goes where most of it would stay at home,
among the ranks that it does not overload: a rank may have ``SLACK`` of the mean more to do than the
one with the least. docs/parallel.md says what that saves.

Pure, like ``fleet``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from moeserve.core import Request
from moeserve.engine.ranks.fleet import LeastWork, RankLoad

FIRST_TOKENS = 16
SLACK = 0.25
ENOUGH = 64  # tokens times layers, before the counts of a kind are used
# Older counts weigh half as much after so many: traffic drifts, and plans change.
HALVED_AT = 1 << 18
MOST_KINDS = 1024


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """``tokens`` counts tokens times MoE layers; ``use_R[r]`` those that rank r has experts for."""

    kind: str
    tokens: int
    use_R: tuple[int, ...]


class ExpertUseSource(Protocol):
    """What a rank has counted of its own prompts."""

    def take(self) -> Iterable[ExpertUse]:
        """Since the last time."""
        ...


def kind_of(request: Request) -> str:
    if request.domain:
        return f"domain {request.domain}"
    if request.scope.salt:
        return f"salt {request.scope.salt}"
    first = ",".join(map(str, request.prompt_ids[:FIRST_TOKENS]))
    return f"beginning {sha256(first.encode()).hexdigest()[:16]}"


class NearExperts:
    """Homes by what was counted; by work alone (``fleet.LeastWork``) where too little was."""

    def __init__(self) -> None:
        self._uses: OrderedDict[str, ExpertUse] = OrderedDict()
        self._otherwise = LeastWork()

    def learn(self, use: ExpertUse) -> None:
        old = self._uses.pop(use.kind, None)
        if old is not None:
            shift = int(old.tokens >= HALVED_AT)
            use_R = zip(old.use_R, use.use_R, strict=True)
            use = ExpertUse(
                use.kind,
                (old.tokens >> shift) + use.tokens,
                tuple((a >> shift) + b for a, b in use_R),
            )
        self._uses[use.kind] = use
        if len(self._uses) > MOST_KINDS:
            self._uses.popitem(last=False)

    def pick(self, request: Request, loads: Sequence[RankLoad]) -> int:
        use = self._uses.get(kind_of(request))
        if use is None or use.tokens < ENOUGH:
            return self._otherwise.pick(request, loads)
        least = min(at.tokens - at.cached for at in loads)
        spare = SLACK * sum(at.tokens for at in loads) / len(loads)
        fit = [at for at in loads if at.tokens - at.cached <= least + spare]
        return min(fit, key=lambda at: (-use.use_R[at.rank], at.tokens - at.cached, at.rank)).rank
