"""Sums and differences that can be marked right or wrong, and whether two marks really differ.

Both runs answer the same problems, so what counts is where exactly one of them is right: the sign
test over those (McNemar's, exact, two-sided) says how likely a difference as great as the one seen
is between two runs that are equally good.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import Request, RequestId, SamplingParams
from moeserve.models.tokenizer import Tokenizer

KINDS = (
    ("addition, two digits", "+", 100),
    ("subtraction, two digits", "-", 100),
    ("addition, three digits", "+", 1000),
    ("subtraction, three digits", "-", 1000),
)
ANSWER = re.compile(r"\s*(-?\d+)(?!\d)")
Z95 = 1.959964
# Enough for a sign and four digits, each a token with a space of its own.
ANSWER_TOKENS = 10
NOISE = 0.05


@dataclass(frozen=True, slots=True)
class ArithmeticProblem:
    """``prompt`` ends where the answer begins."""

    kind: str
    prompt: str
    answer: int


@dataclass(frozen=True, slots=True)
class Marks:
    """How many of ``problems`` were right."""

    right: int
    problems: int

    @property
    def share(self) -> float:
        return self.right / self.problems

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        n, p, z = self.problems, self.share, Z95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # At no or all right, rounding may leave an end a hair on the wrong side.
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


@dataclass(frozen=True, slots=True)
class Exam:
    """Marks of both runs on the same problems; ``only_*`` count those that one alone solved."""

    kind: str
    reference: Marks
    tested: Marks
    only_reference: int
    only_tested: int

    @property
    def p_value(self) -> float:
        """Of a difference this great or greater, were both runs equally good."""
        n = self.only_reference + self.only_tested
        ways = tail = 1
        for i in range(min(self.only_reference, self.only_tested)):
            ways = ways * (n - i) // (i + 1)
            tail += ways
        return min(1.0, 2 * tail / (1 << n))

    @property
    def within_noise(self) -> bool:
        return self.p_value >= NOISE


def draw_problems(count: int, seed: int) -> list[ArithmeticProblem]:
    """``count`` different problems, kinds in turn, no answer negative."""
    draw = random.Random(seed)
    found: dict[str, ArithmeticProblem] = {}
    while len(found) < count:
        kind, sign, limit = KINDS[len(found) % len(KINDS)]
        b, a = sorted(draw.randrange(limit // 10, limit) for _ in range(2))
        prompt = f"{a} {sign} {b} ="
        found[prompt] = ArithmeticProblem(kind, prompt, a + b if sign == "+" else a - b)
    return list(found.values())


def ask(problems: Sequence[ArithmeticProblem], tokenizer: Tokenizer) -> list[Request]:
    """Greedy requests, one per problem."""
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
    return [
        Request(RequestId(f"problem {i}"), tuple(tokenizer.encode(p.prompt)), params)
        for i, p in enumerate(problems)
    ]


def is_right(problem: ArithmeticProblem, text: str) -> bool:
    """The answer begins with the number, whole."""
    found = ANSWER.match(text)
    return found is not None and int(found[1]) == problem.answer


def mark(
    problems: Sequence[ArithmeticProblem],
    reference: Sequence[bool],
    tested: Sequence[bool],
    kind: str = "all",
) -> Exam:
    """Of the problems of one kind, or of all."""
    pairs = [
        (one, other)
        for problem, one, other in zip(problems, reference, tested, strict=True)
        if kind in ("all", problem.kind)
    ]
    return Exam(
        kind=kind,
        reference=Marks(sum(one for one, _ in pairs), len(pairs)),
        tested=Marks(sum(other for _, other in pairs), len(pairs)),
        only_reference=sum(one and not other for one, other in pairs),
        only_tested=sum(other and not one for one, other in pairs),
    )
