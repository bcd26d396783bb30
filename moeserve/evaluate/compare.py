"""Two runs of the same text, side by side.

Both models are in memory together; logits are not: a few rows of both at a time are compared and
forgotten. Each window is a sequence of its own; how it is cut into steps changes no bit (law 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.evaluate.answers import BLOCK, answer
from moeserve.evaluate.arithmetic import ArithmeticProblem, Exam, ask, is_right, mark
from moeserve.evaluate.divergence import Divergence, TokenScores, compare_logits, join, summarise
from moeserve.evaluate.routing import LayerAgreement, RoutingNotes, RoutingTally
from moeserve.evaluate.texts import Window
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache
from moeserve.models.tokenizer import Tokenizer

# Logits of one model at a time: 64 MiB.
MOST_LOGITS = 1 << 24
TOKENS_PER_STEP = 512

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``by_text`` has one entry per text, in order; ``kl`` is that of every scored token."""

    whole: Divergence
    by_text: dict[str, Divergence]
    kl: tuple[float, ...]
    routed_tokens: int
    routing: tuple[LayerAgreement, ...]


class Run:
    """One model with its cache: window after window, each from the beginning of the same blocks."""

    def __init__(self, decoder: Decoder, longest: int) -> None:
        self.notes = RoutingNotes()
        self._decoder = decoder
        self._blocks = range(-(-longest // BLOCK))
        self._cache: ModelKvCache = decoder.new_cache(len(self._blocks), BLOCK)

    def feed(self, ids: Sequence[int], start: int, *, logits: bool) -> Tensor:
        """The next tokens of the window; logits after each of them, or of none."""
        span = Span(ids, start, self._blocks, len(ids) if logits else 0)
        return self._decoder.forward(pack_spans([span], BLOCK), self._cache, self.notes)


@torch.inference_mode()
def compare(
    reference: Decoder, tested: Decoder, windows: Sequence[Window], progress: Progress
) -> Comparison:
    """``progress`` gets how many more tokens were scored."""
    longest = max(len(w.ids) for w in windows)
    runs = Run(reference, longest), Run(tested, longest)
    rows = max(1, min(TOKENS_PER_STEP, MOST_LOGITS // reference.spec.vocab))
    tally = RoutingTally()
    scores: dict[str, list[TokenScores]] = {}
    for window in windows:
        for start in range(0, window.context, TOKENS_PER_STEP):
            ids = window.ids[start : min(start + TOKENS_PER_STEP, window.context)]
            for run in runs:
                run.feed(ids, start, logits=False)
        for start in range(window.context, len(window.ids) - 1, rows):
            stop = min(start + rows, len(window.ids) - 1)
            one, other = (run.feed(window.ids[start:stop], start, logits=True) for run in runs)
            target = torch.tensor(window.ids[start + 1 : stop + 1])
            scores.setdefault(window.text, []).append(compare_logits(one, other, target))
            progress(stop - start)
        tally.add(*(run.notes.take() for run in runs))
    by_text = {text: join(parts) for text, parts in scores.items()}
    together = join(by_text.values())
    return Comparison(
        whole=summarise(together),
        by_text={text: summarise(part) for text, part in by_text.items()},
        kl=tuple(together.kl_R.tolist()),
        routed_tokens=tally.tokens,
        routing=tuple(tally.layers()),
    )


def examine(
    reference: Decoder,
    tested: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[ArithmeticProblem],
    progress: Progress,
) -> list[Exam]:
    """Marks on all problems, then kind by kind; ``progress`` gets tokens generated."""
    right = []
    for decoder in (reference, tested):
        eos = frozenset((*decoder.spec.eos_ids, *tokenizer.eos_ids))
        made = answer(decoder, ask(problems, tokenizer), eos, progress)
        texts = [tokenizer.decode(ids) for ids in made]
        right.append([is_right(p, text) for p, text in zip(problems, texts, strict=True)])
    kinds = ("all", *dict.fromkeys(p.kind for p in problems))
    return [mark(problems, right[0], right[1], kind) for kind in kinds]
