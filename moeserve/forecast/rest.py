"""What steps cost beside products and attention, from steps that were timed. Pure.

What is left of them once products and attention are taken off: norms, rotations, routing, rounding,
the combine, small products that many tokens make large, and what Python takes more where caches are
full of weights. What two depths do not share comes with every layer. How it grows with the tokens
of a step is kept as it was measured, so that what kernels by themselves do not show is in it, as
far as it was measured clearly; else a straight line through all steps is taken, of which each is
off by less than a step by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from moeserve.forecast.steps import LONG, NOISE, PROMPT, ProbedStep, TimedStep
from moeserve.forecast.timing import nearest_costs
from moeserve.offload.model.overheads import LEAST_FACTOR, MOST_FACTOR, Overheads, RestCurve
from moeserve.offload.model.predict import StepPredictor

# Of what kernels take by themselves, the least and the most that steps may be found to take for
# them; and how far from 1 that is likely to be.
LEAST_SHARE, MOST_SHARE, LIKELY_OFF = 0.5, 2.0, 0.15
# The least that a timed step is taken to be off, of its seconds.
LEAST_NOISE = 1e-3


@dataclass(frozen=True, slots=True)
class RestRule:
    """Beside kernels a step takes ``step`` seconds, ``row`` for each of its rows, and in each layer
    ``layer`` and ``number`` for each number that passes through it."""

    step: float
    row: float
    layer: float
    number: float

    def of_layer(self, one: TimedStep) -> float:
        return self.layer + self.number * numbers_of(one)

    def of(self, one: TimedStep) -> float:
        return self.step + self.row * one.kind.rows + one.layers * self.of_layer(one)


def numbers_of(step: TimedStep) -> int:
    return (step.kind.decoding or step.kind.prompt) * step.hidden


def parts_of(step: TimedStep) -> tuple[float, ...]:
    """How often it has each part of a ``RestRule``."""
    return (1.0, step.kind.rows, step.layers, step.layers * numbers_of(step))


def share_of_kernels(python: Overheads, steps: Sequence[TimedStep], noise: float) -> float:
    """How many times as long as by themselves kernels take in ``steps``, each of which is off by
    ``noise`` of its seconds: more where caches are full of other things, less where the machine was
    slower as kernels were looked at. Least squares, of that and of a ``RestRule`` for the rest."""
    asked = [step for step in steps if step.kind.prompt != LONG]
    if len(asked) < 2:
        return 1.0
    likely = 1.0 / LIKELY_OFF
    parts: list[Sequence[float]] = [(0.0, 0.0, 0.0, 0.0, likely)]
    sums = [likely]
    for one in asked:
        weight = 1.0 / one.seconds / max(noise, LEAST_NOISE)
        beside = python.step + python.row * one.kind.rows
        kernels = one.seconds - one.left - beside
        parts.append(tuple(weight * part for part in (*parts_of(one), kernels)))
        sums.append(weight * (one.seconds - beside))
    return max(LEAST_SHARE, min(MOST_SHARE, nearest_costs(parts, sums)[-1]))


def nearest_rule(steps: Sequence[TimedStep]) -> RestRule:
    """For what is left of them, each as a share of its seconds."""
    parts = [tuple(part / one.seconds for part in parts_of(one)) for one in steps]
    return RestRule(*nearest_costs(parts, [one.left / one.seconds for one in steps]))


def with_what_is_left(
    python: Overheads,
    steps: Sequence[TimedStep],
    predictors: Sequence[StepPredictor],
    noise: float,
) -> Overheads:
    """``python`` and what ``steps`` took beyond it; ``predictors`` are of each depth, the deepest
    last. These are met as they were measured, as far as nothing is below 0 and as far as they are
    further from a ``RestRule`` for all of them than the ``noise`` that they have: what is seen less
    clearly than what all have in common is taken to be that."""
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
    rule = nearest_rule(without)
    off = [one.left - rule.of(one) for one in without]
    seen = fmean((o / one.seconds) ** 2 for o, one in zip(off, without, strict=True))
    clear = max(0.0, 1.0 - noise**2 / seen) if seen > 0 else 0.0
    each = {
        one: max(0.0, rule.of_layer(one) + clear * o / depth)
        for o, one in zip(off, without, strict=True)
        if one.layers == depth
    }
    layer = min(each.values())
    decode, prompt = (
        rest_curve(
            {
                numbers_of(one): seconds - layer
                for one, seconds in each.items()
                if bool(one.kind.decoding) == decoding
            }
        )
        for decoding in (True, False)
    )
    return Overheads(
        python.step + rule.step, python.row + rule.row, layer, decode, prompt, attention
    )


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
