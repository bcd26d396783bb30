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

So the plan is never predicted slower than either baseline on what it was judged on last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.baselines import BASELINES
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.folds import Fold, folds_of, in_parts, thinned
from moeserve.placement.solvers.portfolio import Budget, Progress, Solver, solve, solve_bounded
from moeserve.placement.step_time import PlacementRates, StepFigures, step_figures

F64 = NDArray[np.float64]

_JUDGED_TOKENS, _JUDGED_LAYERS = 8192, 24
_SWAPS, _MORE_SWAPS = 100, 400  # per slot: of a fit on folds; of one that replaces the chosen
_JUDGING = 0.35  # of the time limit
NEAR = 1.03  # predictions are no better than that


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
    free = not (problem.apart or problem.together or problem.moves)
    return free and problem.dataflow.moved_by_grouping and routing.has_tokens


def frontier(
    problem: Problem,
    routing: Routing,
    rates: PlacementRates,
    budget: Budget,
    progress: Progress = _silent,
) -> Frontier | None:
    """Step 1 on ``routing`` (workloads, or one to be cut); None where nothing can be left out.

    ``budget.seconds`` limits it: cautions from the middle outwards while there is time.
    """
    if not can_be_judged(problem, routing):
        return None
    small = thinned(in_parts(routing), _JUDGED_TOKENS, _JUDGED_LAYERS)
    folds = tuple(folds_of(small))
    if not folds:
        return None
    ends = float("inf") if budget.seconds is None else time.monotonic() + budget.seconds
    baselines = [(s.value, None, _judged(problem, folds, s, budget, rates)) for s in BASELINES]
    cautions = ladder(problem)
    found: dict[int, list[StepFigures]] = {}
    took = 0.0
    for done, at in enumerate(_from_the_middle(len(cautions))):
        began = time.monotonic()
        if began + took > ends:
            break
        asked = cautions[at].applied(problem)
        found[at] = _judged(asked, folds, Solver.AUTO, replace(budget, swaps=_SWAPS), rates)
        took = time.monotonic() - began
        progress("judging", done + 1, len(cautions))
    careful = [(cautions[at].name, cautions[at], found[at]) for at in sorted(found)]
    limit = problem.max_imbalance * _mean([f.imbalance for f in baselines[0][2]])
    return Frontier(
        tuple(_point(name, caution, figures, limit) for name, caution, figures in
              [*baselines, *careful]),
        tuple(fold.name for fold in folds),
    )  # fmt: skip


def solve_robust(
    problem: Problem,
    fitted: Routing,
    held: Routing | None,
    *,
    rates: PlacementRates | None = None,
    budget: Budget | None = None,
    progress: Progress = _silent,
) -> RobustPlacement:
    """Steps 1 to 3. ``held`` are sequences of the same workloads that nothing is fitted on."""
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
        plan = solve(problem, fitted, Solver(front.chosen.name), budget)
        found = RobustPlacement(plan, front.chosen.name, front)
    else:
        asked = caution.applied(problem)
        solved = solve_bounded(asked, in_parts(fitted), Solver.AUTO, budget, progress)
        found = RobustPlacement(solved.plan, caution.name, front, solved.bound_L)
    return found if held is None else _standing(problem, fitted, held, rates, budget, found)


def solve_asked(
    problem: Problem,
    fitted: Routing,
    held: Routing | None,
    solver: Solver,
    budget: Budget,
    progress: Progress = _silent,
) -> RobustPlacement:
    """``solve_robust`` where no solver is named (``auto``), else that solver's plan."""
    if solver is Solver.AUTO:
        return solve_robust(problem, fitted, held, budget=budget, progress=progress)
    solved = solve_bounded(problem, fitted, solver, budget, progress)
    return RobustPlacement(solved.plan, solver.value, None, solved.bound_L)


def _standing(
    problem: Problem, fitted: Routing, held: Routing, rates: PlacementRates, budget: Budget,
    found: RobustPlacement,
) -> RobustPlacement:  # fmt: skip
    """Step 3: the plan where it stands on ``held``, else the best of what is tried then."""
    if problem.apart or problem.together or problem.moves:
        return found  # the others may not do what was asked

    def judged(plan: Plan) -> StepFigures:
        return step_figures(plan, held, problem.cluster, rates, problem.batch)

    plans = {s.value: solve(problem, fitted, s, budget) for s in BASELINES}
    figures = {name: judged(plan) for name, plan in plans.items()}
    limit = problem.max_imbalance * figures[Solver.CONTIGUOUS.value].imbalance

    def admissible(f: StepFigures) -> bool:
        return f.imbalance <= limit

    own = judged(found.plan)
    best = min((f.step for f in figures.values() if admissible(f)), default=float("inf"))
    if admissible(own) and own.step <= best:
        return found
    front, more = found.frontier, replace(budget, branch=False, swaps=_MORE_SWAPS)
    used = None if front is None else front.chosen.caution
    parts = in_parts(fitted)
    for caution in () if used is None else ladder(problem)[ladder(problem).index(used) + 1 :]:
        plans[caution.name] = solve(caution.applied(problem), parts, Solver.AUTO, more)
        figures[caution.name] = judged(plans[caution.name])
    standing = [name for name in plans if admissible(figures[name])]
    name = min(standing, key=lambda n: figures[n].step)
    return RobustPlacement(plans[name], name, front)


def _judged(
    problem: Problem, folds: Sequence[Fold], solver: Solver, budget: Budget, rates: PlacementRates
) -> list[StepFigures]:
    """A plan for each fold's seen part, on the part that is left out."""
    found = []
    for fold in folds:
        plan = solve(problem, fold.seen, solver, budget)
        found.append(step_figures(plan, fold.unseen, problem.cluster, rates, problem.batch))
    return found


def _point(
    name: str, caution: Caution | None, figures: Sequence[StepFigures], limit: float
) -> FrontierPoint:
    uneven = _mean([f.imbalance for f in figures])
    copies = _mean([f.copies for f in figures if f.copies is not None])
    step = _mean([f.step for f in figures])
    admissible = uneven <= limit or name == Solver.CONTIGUOUS.value
    return FrontierPoint(name, uneven, copies, step, admissible, caution)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _from_the_middle(count: int) -> list[int]:
    """0 .. count - 1, those nearest to the middle first."""
    return sorted(range(count), key=lambda at: (abs(2 * at - count + 1), at))
