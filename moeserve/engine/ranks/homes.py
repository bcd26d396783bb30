"""Which of the ranks with room becomes a request's home.

``LeastWork`` is the rule: the rank with the least to do, where a cached prefix counts as done.
``NearExperts`` chooses by experts. Prompts of one kind use much the same experts: of one ``domain``
if the client names it, else of one tenant (``salt``), else with the same first tokens, as a system
prompt gives them. So ranks count whose experts the prompts of a kind use, and the next one goes
where most of it would stay at home, among the ranks that it does not overload: a rank may have
``SLACK`` of the mean more to do than the one with the least. docs/parallel.md says what that saves.
``GivenHome`` asks the caller; ``RandomHomes`` is for tests, since no choice may change a token.

C in names is the shape of candidates. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Request

FIRST_TOKENS = 16
SLACK = 0.25
ENOUGH = 64  # tokens times layers, before the counts of a kind are used
# Older counts weigh half as much after so many: traffic drifts, and plans change.
HALVED_AT = 1 << 18
MOST_KINDS = 1024


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ranks that have room for a request, in ascending order, one or more.

    ``tokens`` are those of the requests that run there, computed or not; ``cached`` those of the
    request in question whose KV is there.
    """

    rank_C: NDArray[np.int64]
    running_C: NDArray[np.int64]
    tokens_C: NDArray[np.int64]
    cached_C: NDArray[np.int64]

    @property
    def work_C(self) -> NDArray[np.int64]:
        """Tokens, where each that need not be computed counts as one less."""
        return self.tokens_C - self.cached_C


class HomePolicy(Protocol):
    """Chooses one of the candidates."""

    def pick(self, request: Request, candidates: Candidates) -> int: ...


class LeastWork:
    """The rank with the least work, of equal ones that with the fewest requests.

    So requests follow their prefix for as long as that saves more than it overloads the rank.
    """

    def pick(self, request: Request, candidates: Candidates) -> int:
        work_C = candidates.work_C
        least = np.flatnonzero(work_C == work_C.min())
        return int(candidates.rank_C[least[candidates.running_C[least].argmin()]])


class RandomHomes:
    """Any candidate, drawn from the seed and the request's id."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def pick(self, request: Request, candidates: Candidates) -> int:
        drawn = sha256(f"{self._seed} {request.id}".encode()).digest()
        index = int.from_bytes(drawn[:8], "little") % len(candidates.rank_C)
        return int(candidates.rank_C[index])


class GivenHome:
    """The rank that ``given`` names, where it is a candidate; what ``otherwise`` picks, where it
    is not or None is given."""

    def __init__(self, given: Callable[[Request], int | None], otherwise: HomePolicy) -> None:
        self._given = given
        self._otherwise = otherwise

    def pick(self, request: Request, candidates: Candidates) -> int:
        rank = self._given(request)
        if rank is not None and rank in candidates.rank_C:
            return rank
        return self._otherwise.pick(request, candidates)


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
    """Homes by what was counted; by work alone where too little was."""

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

    def pick(self, request: Request, candidates: Candidates) -> int:
        use = self._uses.get(kind_of(request))
        if use is None or use.tokens < ENOUGH:
            return self._otherwise.pick(request, candidates)
        work_C = candidates.work_C
        fit = np.flatnonzero(work_C <= work_C.min() + SLACK * candidates.tokens_C.mean())
        rank_C = candidates.rank_C[fit]
        use_C = np.array([use.use_R[rank] for rank in rank_C])
        return int(rank_C[np.lexsort((work_C[fit], -use_C))[0]])
