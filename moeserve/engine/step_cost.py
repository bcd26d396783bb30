"""How long a step takes, as it is predicted or was measured; and how large one is worth making.

``StepCost`` is what a model of performance gives, ``FittedStepCost`` what the steps so far say of
all their tokens alike, ``PredictedFirst`` the one until there is the other, ``MixedCost`` of newest
tokens and of prompts beside them. Seconds and tokens; times are arguments. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import Protocol

# Before steps of two sizes have been measured, up to here a step costs the same.
FIRST_GUESS = 512
# Of the mean of a size, what a new measurement counts; of a size's weight in the fit, the most.
FADE = 0.2
MOST_WEIGHT = 8
# Up to here each number of tokens has a mean of its own; above, eighths of a power of two.
OWN_MEANS = 16
DECODE_FADE = 0.05
# A size that did not come for so many steps is forgotten: it may cost something else by now.
FORGOTTEN = 2048
# One that was measured less than so often, after so many: that may have been chance.
TRIES, DOUBTED = 3, 128
# How far steps are off what was predicted: what a new one counts, and so many times that is left.
SPREAD_FADE = 0.05
SPREADS = 2
# What a size that was never measured costs more, per token more, as a share of the step.
FIRST_SLOPE = 0.15


class StepCost(Protocol):
    """Predicts the seconds of a step."""

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        """Of a step with so many tokens of prompts, and so many newest ones, whose sequences have
        ``context_tokens`` together."""
        ...


class StepLine(Protocol):
    """What steps cost, as a straight line."""

    @property
    def line(self) -> tuple[float, float] | None:
        """Seconds of a step and of a token in it; None before it is known."""
        ...


class FittedStepCost:
    """``a + b * tokens``, least squares over the mean of every size (powers of two) that was
    measured. One thread notes and asks."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float, int]] = {}  # tokens, seconds, how many
        self._line: tuple[float, float] | None = None

    @property
    def line(self) -> tuple[float, float] | None:
        """Seconds of a step and of a token in it; None before two sizes were measured."""
        return self._line

    @property
    def share(self) -> tuple[float, float] | None:
        """0, and seconds of a token if a step by itself took none; None before the first."""
        if not self._means:
            return None
        tokens = sum(count * tokens for tokens, _, count in self._means.values())
        return 0.0, sum(count * taken for _, taken, count in self._means.values()) / tokens

    def note(self, tokens: int, seconds: float) -> None:
        """A step that is over and took so long."""
        if tokens < 1:
            return
        size = tokens.bit_length()
        mean_tokens, mean_seconds, count = self._means.get(size, (0.0, 0.0, 0))
        share = max(FADE, 1 / (count + 1))
        self._means[size] = (
            mean_tokens + share * (tokens - mean_tokens),
            mean_seconds + share * (seconds - mean_seconds),
            min(count + 1, MOST_WEIGHT),
        )
        self._line = _fit(list(self._means.values()))

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        tokens = prefill_tokens + decode_tokens
        if self._line is None:
            return float(max(tokens, FIRST_GUESS))
        step_s, token_s = self._line
        return step_s + token_s * tokens


class PredictedFirst:
    """A ``StepCost``: what was ``predicted``, until steps of two sizes were measured. Up to
    ``FIRST_GUESS`` tokens a step is taken to cost the same, as it is where nothing is predicted: a
    prediction makes steps larger, and none smaller."""

    def __init__(self, predicted: StepCost, measured: FittedStepCost) -> None:
        self._predicted, self._measured = predicted, measured

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        if self._measured.line is not None:
            return self._measured.seconds(prefill_tokens, decode_tokens, context_tokens)
        prompts = max(prefill_tokens, FIRST_GUESS - decode_tokens)
        return self._predicted.seconds(prompts, decode_tokens, context_tokens)


class DecodeCost:
    """Seconds of steps that only decode, by their tokens: the mean of every size that came lately,
    and between two sizes what lies between. One that is larger than all is taken to cost little
    more, and no more for each token than the largest two do, until it has been tried.

    The first step of a size after one of another costs more than those that follow: something is
    made for it, and caches hold other things. Such ones count until the size comes twice in a row.
    One thread notes and asks."""

    def __init__(self) -> None:
        # Of the newest step, seconds that went to guesses for the next one: whoever notes a step
        # leaves them out.
        self.drafting_s = 0.0
        # Seconds, how many, the step when it came last, and whether it came twice in a row.
        self._means: dict[int, tuple[float, int, int, bool]] = {}
        self._last = 0
        self._sizes: list[int] = []
        self._steps = 0

    @property
    def known(self) -> bool:
        return bool(self._sizes)

    def steady(self, tokens: int) -> bool:
        """Whether about so many, a quarter less or more, have come some times in a row."""
        near = (self._means[n] for n in self._sizes if 3 * tokens <= 4 * n <= 5 * tokens)
        return any(found[3] and found[1] >= 2 for found in near)

    @property
    def largest(self) -> int:
        """Tokens of the largest step that is known; 0 before the first."""
        return self._sizes[-1] if self._sizes else 0

    def note(self, tokens: int, seconds: float) -> None:
        """A step without prompts is over, and took so long."""
        self._steps += 1
        size = _rounded(tokens)
        mean, count, _, steady = self._means.get(size, (seconds, 0, 0, False))
        if not count:
            insort(self._sizes, size)
        again, self._last = size == self._last, size
        if again and not steady:
            count = 0
        if again or not steady:
            # Once in a while the machine does something else: that is not what a step costs.
            mean += max(DECODE_FADE, 1 / (count + 1)) * (min(seconds, 2 * mean) - mean)
            self._means[size] = (mean, count + 1, self._steps, again or steady)
        if self._steps % DOUBTED == 0:
            self._forget()

    def seconds(self, tokens: int) -> float:
        """Of a step of so many tokens; some step must have been noted."""
        sizes, tokens = self._sizes, _rounded(tokens)
        at = bisect_left(sizes, tokens)
        above = sizes[at] if at < len(sizes) else 0
        if above == tokens or not at:
            return self._means[above][0]
        below = sizes[at - 1]
        low = self._means[below][0]
        if not above:
            more = low * min(FIRST_SLOPE, 0.5 / below)
            if at > 1:
                less = sizes[at - 2]
                more = min(more, max(0.0, low - self._means[less][0]) / (below - less))
            return low + more * (tokens - below)
        high = self._means[above][0]
        return low + (high - low) * (tokens - below) / (above - below)

    def _forget(self) -> None:
        self._means = {
            size: found
            for size, found in self._means.items()
            if self._steps - found[2] < (FORGOTTEN if found[1] >= TRIES else DOUBTED)
        }
        self._sizes = sorted(self._means)


class MixedCost:
    """What prompts cost beside newest tokens: a step takes what ``decodes`` says of those, and a
    line more, by the tokens of prompts. Until such steps were measured, a token of a prompt takes
    as long as in steps of prompts alone. One thread notes and asks."""

    def __init__(self, decodes: DecodeCost) -> None:
        self._decodes = decodes
        self._beside, self._alone = FittedStepCost(), FittedStepCost()
        self._spread = 0.0

    @property
    def known(self) -> bool:
        return self._prompts is not None

    def note(self, prefill_tokens: int, decode_tokens: int, seconds: float) -> None:
        """A step that had prompts is over, and took so long."""
        if not decode_tokens:
            self._alone.note(prefill_tokens, seconds)
        else:
            if self.known:
                off = abs(min(seconds / self.gap(prefill_tokens, decode_tokens), 2) - 1)
                self._spread += SPREAD_FADE * (off - self._spread)
            self._beside.note(prefill_tokens, max(0.0, seconds - self._alone_s(decode_tokens)))

    def gap(self, prefill_tokens: int, decode_tokens: int) -> float:
        """Seconds of a step of both, if that is ``known``: the gap between two newest tokens."""
        line = self._prompts
        assert line is not None, "asked before anything was measured"
        beside_s, token_s = line
        more = beside_s + token_s * prefill_tokens if prefill_tokens else 0.0
        return self._alone_s(decode_tokens) + more

    def _alone_s(self, decode_tokens: int) -> float:
        return self._decodes.seconds(decode_tokens) if self._decodes.known else 0.0

    def prompts_within(self, seconds: float, decode_tokens: int) -> float:
        """The most tokens of prompts of a step that takes no longer, but for one in twenty, as far
        as steps lately were ``SPREADS`` mean deviations off; below 0 where none do."""
        seconds /= 1 + SPREADS * self._spread
        less, more = self.gap(1, decode_tokens), self.gap(2, decode_tokens)
        if more <= less:
            return math.inf if less <= seconds else -math.inf
        return 1 + (seconds - less) / (more - less)

    @property
    def _prompts(self) -> tuple[float, float] | None:
        """Seconds that prompts cost more, and each of their tokens."""
        return self._beside.line or self._beside.share or self._alone.share


def _rounded(tokens: int) -> int:
    if tokens <= OWN_MEANS:
        return tokens
    shift = tokens.bit_length() - 4
    return tokens >> shift << shift


def worthwhile_tokens(
    cost: StepCost, decode_tokens: int, context_tokens: int, most: int, gain: float = 0.05
) -> int:
    """The least size of a step whose double would make no more than ``gain`` more tokens a second,
    the rest being prompts: n_real of MoE-Lens' profiler. ``most`` where there is none below."""

    def pays(tokens: int) -> bool:
        once = cost.seconds(tokens - decode_tokens, decode_tokens, context_tokens)
        twice = cost.seconds(2 * tokens - decode_tokens, decode_tokens, context_tokens)
        return 2 * once > (1 + gain) * twice

    less = least = max(1, decode_tokens)
    if least >= most or not pays(least):
        return min(least, most)
    while pays(more := min(2 * less, most)):
        if more == most:
            return most
        less = more
    while more - less > 1:
        middle = (less + more) // 2
        less, more = (middle, more) if pays(middle) else (less, middle)
    return more


def _fit(means: list[tuple[float, float, int]]) -> tuple[float, float] | None:
    """Weighted least squares, neither number below 0; None where all sizes are one."""
    weight = sum(count for _, _, count in means)
    x = sum(count * tokens for tokens, _, count in means) / weight
    y = sum(count * seconds for _, seconds, count in means) / weight
    spread = sum(count * (tokens - x) ** 2 for tokens, _, count in means)
    if spread <= 0:
        return None
    common = sum(count * (tokens - x) * (seconds - y) for tokens, seconds, count in means)
    token_s = max(0.0, common / spread)
    if y - token_s * x < 0:  # through the origin
        return 0.0, y / x
    return y - token_s * x, token_s
