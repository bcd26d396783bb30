"""What steps cost beside products and attention, from steps that were timed. Pure.

What is left of them once products and attention are taken off: norms, rotations, routing, rounding,
the combine, small products that many tokens make large, and what Python takes more where caches are
full of weights. What two depths do not share comes with every layer; how it grows with the tokens
of a step is kept as it was measured, so that what kernels by themselves do not show is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, quantiles

from moeserve.forecast.steps import LONG, PROMPT, ProbedStep, TimedStep
from moeserve.forecast.timing import two_costs
from moeserve.offload.model.overheads import LEAST_FACTOR, MOST_FACTOR, Overheads, RestCurve
from moeserve.offload.model.predict import StepPredictor

# Of what kernels take by themselves, the least that steps may be found to take for them.
LEAST_SHARE = 0.5
# Of a step's seconds, by which it seems longer or shorter than it is.
NOISE = 0.1


def share_of_kernels(
    python: Overheads, steps: Sequence[TimedStep], predictor: StepPredictor
) -> float:
    """How many times as long as by themselves kernels take at most, so that three of four kinds of
    steps of the deepest layers take no less than their kernels (the least of all would be the one
    that was looked at in the best moments); 1 where that is so. ``predictor`` is of these, with no
    overheads but ``python``'s."""
    shares = []
    for step in steps:
        kind = step.kind
        if step.layers != predictor.model.num_layers or (kind.decoding and kind.prompt == LONG):
            continue
        ends = python.step + python.row * kind.rows
        kernels = predictor.step(kind.work).total - ends
        if kernels > 0:
            shares.append((step.seconds - ends) / kernels)
    if len(shares) < 2:
        return 1.0
    return max(LEAST_SHARE, min(1.0, quantiles(shares, n=4)[0]))


def with_what_is_left(
    python: Overheads, steps: Sequence[TimedStep], predictors: Sequence[StepPredictor]
) -> Overheads:
    """``python`` and what ``steps`` took beyond it; ``predictors`` are of each depth, the deepest
    last, whose steps are met as they were measured as far as nothing is below 0."""
    of_depth = {predictor.model.num_layers: predictor for predictor in predictors}
    depth, predictor = max(of_depth), predictors[-1]
    attention = attention_factor(
        {step.kind: step for step in steps if step.layers == depth}, predictor
    )
    without = [
        replace(
            step,
            left=step.left - (attention - 1) * attention_of(step.kind, of_depth[step.layers]),
        )
        for step in steps
        if step.kind.prompt != LONG
    ]
    deep = {step.kind: step for step in without if step.layers == depth}
    shallow = [step for step in without if step.layers != depth]
    step, row = ends_of(deep, shallow)
    each = {
        kind: max(0.0, (one.left - step - row * kind.rows) / depth) for kind, one in deep.items()
    }
    layer, hidden = min(each.values()), predictor.model.hidden
    decode, prompt = (
        rest_curve({h * hidden: s - layer for h, s in points})
        for points in (
            [(kind.decoding, s) for kind, s in each.items() if kind.decoding],
            [(kind.prompt, s) for kind, s in each.items() if not kind.decoding],
        )
    )
    return Overheads(python.step + step, python.row + row, layer, decode, prompt, attention)


def rest_curve(points: Mapping[int, float]) -> RestCurve:
    numbers = sorted(points)
    return RestCurve(
        tuple(float(n) for n in numbers), not_falling([max(0.0, points[n]) for n in numbers])
    )


def not_falling(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest ones, by least squares, of which none is less than the one before: neighbours
    that fall are pooled."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return tuple(fmean(pool) for pool in pools for _ in pool)


def attention_of(kind: ProbedStep, predictor: StepPredictor) -> float:
    """What attention of decoding tokens is predicted to take by itself in a step of this kind."""
    machine = predictor.machine

    def total(factor: float) -> float:
        overheads = replace(machine.overheads, attention=factor)
        other = replace(machine, overheads=overheads)
        return StepPredictor(other, predictor.model).step(kind.work).total

    return total(2.0) - total(1.0)


def attention_factor(deep: Mapping[ProbedStep, TimedStep], predictor: StepPredictor) -> float:
    """How many times as long as predicted attention takes: from steps of as many requests after
    short and after long prompts, by least squares, as far as what is seen of it is more than the
    ``NOISE`` that a look has. 1 where there are none."""
    seen = possible = 0.0
    for kind, long in deep.items():
        short = deep.get(ProbedStep(kind.decoding, PROMPT))
        if kind.prompt == LONG and kind.decoding and short is not None:
            left = (long.left - short.left) / short.seconds
            more = attention_of(kind, predictor) - attention_of(short.kind, predictor)
            more /= short.seconds
            seen += left * more
            possible += more**2 + NOISE**2
    if possible <= 0:
        return 1.0
    return min(MOST_FACTOR, max(LEAST_FACTOR, 1.0 + seen / possible))


def ends_of(
    deep: Mapping[ProbedStep, TimedStep], shallow: Iterable[TimedStep]
) -> tuple[float, float]:
    """Seconds of a step and of a row, from what two depths do not share: least squares over steps
    whose errors weigh by what they took, with nothing below 0."""
    points = []
    for few in shallow:
        many = deep[few.kind]
        layer = max(0.0, (many.left - few.left) / (many.layers - few.layers))
        ends = min(few.left - few.layers * layer, many.left - many.layers * layer)
        points.append((few.kind.rows, ends, 1.0 / few.seconds))
    return two_costs(points)
