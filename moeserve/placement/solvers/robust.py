"""Plans for traffic that was not seen: how cautious to be is chosen on what was not fitted.

Grouping makes devices uneven as soon as traffic shifts. Three things hold it back, together a
``Caution``: the limit on the load of the mixture, that on each single workload (or part of a lone
one, ``folds``), and a price on the variance of a device's load (``covariance``). Where there are
more slots than experts, copies then go to what is heavy in any part.

1. Every caution of a ladder is fitted with one part left out, each in turn, and judged on it:
   copies, max/mean load and the predicted step (``step_time``), beside experts in order and EPLB.
   That is the frontier.
2. What is worse balanced than experts in order by more than ``max_imbalance`` allows (a factor) is
   out, and so is what is slower than a baseline or not near the fastest predicted step; of the
   rest, the fewest copies are chosen.
3. The chosen caution is fitted on everything, and judged once more on sequences held apart, where
   there are any. Where it does not stand there, more cautious plans, EPLB and experts in order are
   tried on them, under the same rule; experts in order always stand.

So the plan is never predicted slower than either baseline on what it was judged on last. Where
moves from a previous plan are weighed, that plan is in the place of both baselines: it always
stands, and is kept where no other is predicted to be faster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.baselines import BASELINES, baselines
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.folds import Fold, folds_of, in_parts, thinned
from moeserve.placement.solvers.portfolio import Budget, Progress, Solver, solve, solve_bounded
from moeserve.placement.step_time import PlacementRates, StepFigures, step_figures

F64 = NDArray[np.float64]

_JUDGED_TOKENS, _JUDGED_LAYERS = 8192, 24
_LEAST_LAYERS, _LAYERS_A_SECOND = 6, 2  # where judging has few seconds
_SWAPS, _MORE_SWAPS = 100, 400  # per slot: of a fit on folds; of one that replaces the chosen
_JUDGING = 0.35  # of the time limit
NEAR = 1.03  # predictions are no better than that
PREVIOUS = "previous"
_ALWAYS = (Solver.CONTIGUOUS.value, PREVIOUS)  # stand, however they are balanced


@dataclass(frozen=True, slots=True)
class Caution:
    """``mixture`` and ``workload`` limit max/mean load, ``variance`` is ``variance_price``."""

    mixture: float
    workload: float
    variance: float

    @property
    def name(self) -> str:
        return f"mixture {self.mixture:g}, each {self.workload:g}, variance {self.variance:g}"

    def applied(self, problem: Problem) -> Problem:
        return replace(
            problem,
            max_imbalance=self.mixture,
            max_workload_imbalance=self.workload,
            variance_price=self.variance,
        )


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """What a way of planning does on parts it did not see, mean over them: max/mean load, priced
    copies per token-layer, predicted step. ``admissible``: balanced enough beside experts in order.
    ``caution`` is None for the baselines."""

    name: str
    imbalance: float
    copies: float
    step: float
    admissible: bool
    caution: Caution | None = None


@dataclass(frozen=True, slots=True)
class Frontier:
    """``points``: the baselines, then cautions from the least to the most careful that there was
    time for. ``judged_on`` are the parts left out."""

    points: tuple[FrontierPoint, ...]
    judged_on: tuple[str, ...]

    @property
    def chosen(self) -> FrontierPoint:
        """The fewest copies of those that are admissible, not slower than a baseline that is, and
        within ``NEAR`` of the fastest; the faster of equals."""
        standing = [p for p in self.points if p.admissible]
        limit = min(NEAR * min(p.step for p in standing), self._baseline)
        return min((p for p in standing if p.step <= limit), key=lambda p: (p.copies, p.step))

    @property
    def _baseline(self) -> float:
        return min(p.step for p in self.points if p.admissible and p.caution is None)


@dataclass(frozen=True, slots=True, eq=False)
class RobustPlacement:
    """``chosen`` names what the plan is. ``bound_L`` as in ``SolvedPlacement``; ``frontier`` is
    None where nothing can be left out."""

    plan: Plan
    chosen: str
    frontier: Frontier | None = None
    bound_L: F64 | None = None


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def ladder(problem: Problem) -> tuple[Caution, ...]:
    """From no caution beyond the problem's own to the most; limits are never below its own."""
    own = Caution(problem.max_imbalance, problem.max_workload_imbalance, problem.variance_price)
    steps = (
        (1.10, 1.50, 0.5), (1.15, 1.35, 0.5), (1.15, 1.25, 0.5), (1.15, 1.15, 0.5),
        (1.15, 1.15, 1.0), (1.10, 1.25, 1.0), (1.10, 1.25, 2.0), (1.10, 1.15, 2.0),
        (1.10, 1.15, 4.0),
    )  # fmt: skip
    careful = tuple(Caution(max(own.mixture, m), w, v) for m, w, v in steps)
    return (own, *careful)


def can_be_judged(problem: Problem, routing: Routing) -> bool:
    """Whether parts can be left out and plans be chosen freely."""
    return _free(problem) and problem.dataflow.moved_by_grouping and routing.has_tokens


def _free(problem: Problem) -> bool:
    """Whether the baselines, or the previous plan in their place, do what is asked."""
    moves = problem.moves
    kept = moves is None or moves.previous.dataflow is problem.dataflow
    return kept and not (problem.apart or problem.together)


def frontier(
    problem: Problem,
    routing: Routing,
    rates: PlacementRates,
    budget: Budget,
    progress: Progress = _silent,
) -> Frontier | None:
    """Step 1 on ``routing`` (workloads, or one to be cut); None where nothing can be left out.

    ``budget.seconds`` limits it: cautions from the middle outwards while there is time. While none
    stands beside the baselines, it goes on for as long again, towards the most careful.
    """
    if not can_be_judged(problem, routing):
        return None
    small = thinned(in_parts(routing), _JUDGED_TOKENS, _judged_layers(budget))
    folds = tuple(folds_of(small))
    if not folds:
        return None
    began = time.monotonic()
    kept_L = np.searchsorted(routing.moe_layers, small.moe_layers)
    problem = _on_layers(problem, kept_L)
    beside = {s.value: _judged(problem, folds, s, budget, rates) for s in BASELINES}
    limit = problem.max_imbalance * _mean([f.imbalance for f in beside[Solver.CONTIGUOUS.value]])
    if problem.moves is not None:
        previous = [problem.moves.previous] * len(folds)
        beside = {PREVIOUS: _figures(problem, folds, previous, rates)}
    points = [_point(name, None, figures, limit) for name, figures in beside.items()]
    least = min(p.step for p in points if p.admissible)
    cautions = ladder(problem)
    found: dict[int, FrontierPoint] = {}
    for at in _while_there_is_time(len(cautions), found, least, began, budget.seconds):
        asked = cautions[at].applied(problem)
        figures = _judged(asked, folds, Solver.AUTO, replace(budget, swaps=_SWAPS), rates)
        found[at] = _point(cautions[at].name, cautions[at], figures, limit)
        progress("judging", len(found), len(cautions))
    points += [found[at] for at in sorted(found)]
    return Frontier(tuple(points), tuple(fold.name for fold in folds))


def _while_there_is_time(
    count: int,
    found: Mapping[int, FrontierPoint],
    least: float,
    began: float,
    seconds: float | None,
) -> Iterator[int]:
    """Cautions to judge next, until ``seconds`` are over (twice, while no caution of ``found``
    stands: admissible, and not slower than ``least``)."""
    took = 0.0
    left = _from_the_middle(count)
    while left:
        now = time.monotonic()
        stands = any(p.admissible and p.step <= least for p in found.values())
        if seconds is not None and found and now + took > began + (1 if stands else 2) * seconds:
            return
        late = seconds is not None and now + took > began + seconds
        at = max(found) + 1 if late and found and max(found) + 1 in left else left[0]
        left.remove(at)
        yield at
        took = time.monotonic() - now


def _judged_layers(budget: Budget) -> int:
    """Fewer where there is little time, so that several cautions are judged in it."""
    if budget.seconds is None:
        return _JUDGED_LAYERS
    return min(_JUDGED_LAYERS, max(_LEAST_LAYERS, round(_LAYERS_A_SECOND * budget.seconds)))


def _on_layers(problem: Problem, kept_L: NDArray[np.intp]) -> Problem:
    """With the previous plan, if any, on some layers."""
    if problem.moves is None:
        return problem
    whole = problem.moves.previous
    layers = tuple(whole.moe_layers[l] for l in kept_L)
    some = replace(whole, expert_LS=whole.expert_LS[kept_L], moe_layers=layers, guide_LED=None)
    return replace(problem, moves=replace(problem.moves, previous=some))


def solve_robust(
    problem: Problem,
    fitted: Routing,
    held: Routing | None,
    *,
    rates: PlacementRates | None = None,
    budget: Budget | None = None,
    progress: Progress = _silent,
    beside: Mapping[str, Plan | str] | None = None,
) -> RobustPlacement:
    """Steps 1 to 3. ``held`` are sequences of the same workloads that nothing is fitted on,
    ``beside`` the ``baselines`` of ``fitted`` where they are known already."""
    rates, budget = rates or PlacementRates(), budget or Budget()
    began = time.monotonic()
    judging = replace(
        budget, branch=False, seconds=None if budget.seconds is None else _JUDGING * budget.seconds
    )
    front = frontier(problem, fitted, rates, judging, progress)
    left = budget.seconds
    if left is not None:
        left = max(0.2 * left, left - (time.monotonic() - began))
    budget = replace(budget, seconds=left)
    if front is None:
        solved = solve_bounded(problem, fitted, Solver.AUTO, budget, progress)
        found = RobustPlacement(solved.plan, Solver.AUTO.value, None, solved.bound_L)
    elif (caution := front.chosen.caution) is None:
        plan = _fallbacks(problem, beside or baselines(problem, fitted))[front.chosen.name]
        found = RobustPlacement(plan, front.chosen.name, front)
    else:
        asked = caution.applied(problem)
        solved = solve_bounded(asked, in_parts(fitted), Solver.AUTO, budget, progress)
        found = RobustPlacement(solved.plan, caution.name, front, solved.bound_L)
    if held is None or not _free(problem):
        return found
    plans = _fallbacks(problem, beside or baselines(problem, fitted))
    return _standing(problem, fitted, held, rates, budget, found, plans)


def _fallbacks(problem: Problem, beside: Mapping[str, Plan | str]) -> dict[str, Plan]:
    """Plans that are there in any case, by name: the baselines, or the previous plan."""
    if problem.moves is not None:
        return {PREVIOUS: replace(problem.moves.previous, figures={})}
    return {name: plan for name, plan in beside.items() if isinstance(plan, Plan)}


def solve_asked(
    problem: Problem,
    fitted: Routing,
    held: Routing | None,
    solver: Solver,
    budget: Budget,
    progress: Progress = _silent,
    *,
    rates: PlacementRates | None = None,
    beside: Mapping[str, Plan | str] | None = None,
) -> RobustPlacement:
    """``solve_robust`` where no solver is named (``auto``), else that solver's plan."""
    if solver is Solver.AUTO:
        return solve_robust(
            problem, fitted, held, rates=rates, budget=budget, progress=progress, beside=beside
        )
    solved = solve_bounded(problem, fitted, solver, budget, progress)
    return RobustPlacement(solved.plan, solver.value, None, solved.bound_L)


def _standing(
    problem: Problem, fitted: Routing, held: Routing, rates: PlacementRates, budget: Budget,
    found: RobustPlacement, plans: dict[str, Plan],
) -> RobustPlacement:  # fmt: skip
    """Step 3: the plan where it stands on ``held``, else the best of ``plans`` and what is tried
    then."""

    def judged(plan: Plan) -> StepFigures:
        return step_figures(plan, held, problem.cluster, rates, problem.batch)

    figures = {name: judged(plan) for name, plan in plans.items()}
    in_order = plans.get(Solver.CONTIGUOUS.value) or solve(
        replace(problem, moves=None), fitted, Solver.CONTIGUOUS
    )
    limit = problem.max_imbalance * judged(in_order).imbalance

    def stands(name: str, f: StepFigures) -> bool:
        return f.imbalance <= limit or name in _ALWAYS

    own = judged(found.plan)
    best = min(f.step for name, f in figures.items() if stands(name, f))
    if stands(found.chosen, own) and own.step <= best:
        return found
    front, more = found.frontier, replace(budget, branch=False, swaps=_MORE_SWAPS)
    used = None if front is None else front.chosen.caution
    parts = in_parts(fitted)
    for caution in () if used is None else ladder(problem)[ladder(problem).index(used) + 1 :]:
        plans[caution.name] = solve(caution.applied(problem), parts, Solver.AUTO, more)
        figures[caution.name] = judged(plans[caution.name])
    standing = [name for name in plans if stands(name, figures[name])]
    name = min(standing, key=lambda n: figures[n].step)
    return RobustPlacement(plans[name], name, front)


def _judged(
    problem: Problem, folds: Sequence[Fold], solver: Solver, budget: Budget, rates: PlacementRates
) -> list[StepFigures]:
    """A plan for each fold's seen part, on the part that is left out."""
    plans = [solve(problem, fold.seen, solver, budget) for fold in folds]
    return _figures(problem, folds, plans, rates)


def _figures(
    problem: Problem, folds: Sequence[Fold], plans: Sequence[Plan], rates: PlacementRates
) -> list[StepFigures]:
    return [
        step_figures(plan, fold.unseen, problem.cluster, rates, problem.batch)
        for plan, fold in zip(plans, folds, strict=True)
    ]


def _point(
    name: str, caution: Caution | None, figures: Sequence[StepFigures], limit: float
) -> FrontierPoint:
    uneven = _mean([f.imbalance for f in figures])
    copies = _mean([f.copies for f in figures if f.copies is not None])
    step = _mean([f.step for f in figures])
    admissible = uneven <= limit or name in _ALWAYS
    return FrontierPoint(name, uneven, copies, step, admissible, caution)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _from_the_middle(count: int) -> list[int]:
    """0 .. count - 1, those nearest to the middle first."""
    return sorted(range(count), key=lambda at: (abs(2 * at - count + 1), at))
