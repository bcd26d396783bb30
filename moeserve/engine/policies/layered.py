"""Prompts that go through the layers in groups, one group a step (Layered Prefill, 2510.08055).

A long prompt in chunks goes through every layer once for each chunk, and each time its experts are
loaded again. Here it goes through the layers once: a step runs the newest tokens of all requests in
all layers, and the prompt's tokens in the next few layers only. Its rows between two steps are kept
(``engine.layer_states``); its KV counts as computed when it is there in all layers.

How many tokens, through how many layers a step, follows from the prompt and the step's budget B (in
tokens through all L layers). With n layers a step there are ceil(L / n) groups, and B * L / n
tokens can go together, so that no step is larger than one with a chunk; what is left of the prompt
goes after them, in groups again or in all layers. n is the least with which that takes no more
steps than the ceil(P / B) chunks of the P tokens; where L divides badly, one more. There are
``MOST_GROUPS`` at most. Shorter prompts behind the first join as far as there is room. As a step's
budget changes, so does the number of its layers.

One batch is under way at a time, and nobody else's prompt runs beside it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moeserve.core import Counters, LayerGroup, RequestId
from moeserve.engine.sequence import SequenceState

# Groups of a batch at most, and tokens: rows between two layers are memory.
MOST_GROUPS = 8
MOST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """What is known when a prompt of ``tokens`` tokens is to start: it would take ``groups`` steps
    of ``layers`` layers, ``together`` of its tokens at a time, beside ``beside`` tokens that run in
    all layers. ``budget`` tokens through all layers are left of the step."""

    tokens: int
    budget: int
    beside: int
    groups: int
    layers: int
    together: int


Chooses = Callable[[PrefillChoice], bool]


def always(choice: PrefillChoice) -> bool:
    """Whatever does not fit into a step goes in groups."""
    return True


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """The next tokens of a sequence, up to position ``stop``; in all layers unless ``layers`` says
    which. ``budget`` is what is left then, for prompts of its kind."""

    stop: int
    layers: LayerGroup | None
    budget: int


@dataclass(frozen=True, slots=True)
class _Member:
    seq: SequenceState
    start: int
    stop: int

    @property
    def alive(self) -> bool:
        """Whether its rows are still on their way: it has neither ended nor given up its blocks."""
        seq = self.seq
        return seq.finish is None and bool(seq.blocks) and seq.computed == self.start


@dataclass(slots=True)
class _Batch:
    """Tokens that go through the layers together; ``group`` is this step's, None before it is
    chosen, ``done`` layers are behind them."""

    members: dict[RequestId, _Member] = field(default_factory=dict)
    done: int = 0
    group: LayerGroup | None = None

    @property
    def tokens(self) -> int:
        return sum(member.stop - member.start for member in self.members.values())


class LayeredPrefill:
    """``begin`` a step, then ask for the ``part`` of each prompt, in order. ``chooses`` says which
    prompts go in groups of the model's ``layers``, of those that do not fit into a step."""

    def __init__(
        self,
        layers: int,
        counters: Counters,
        chooses: Chooses = always,
        most_groups: int = MOST_GROUPS,
    ) -> None:
        self.layers = layers
        self.counters = counters
        self._chooses = chooses
        self._most_groups = min(most_groups, layers)
        self._batch: _Batch | None = None
        self._joins = False  # whether the batch was begun in this step

    def begin(self) -> None:
        """The last step that was planned has run, or its requests have left."""
        batch, self._joins = self._batch, False
        if batch is None:
            return
        if batch.group is not None:
            self.counters.layered_steps += 1
            self.counters.layered_tokens += batch.tokens if batch.group.last else 0
            batch.done, batch.group = batch.group.stop, None
        batch.members = {name: one for name, one in batch.members.items() if one.alive}
        if not batch.members or batch.done == self.layers:
            self._batch = None

    def part(self, seq: SequenceState, budget: int, beside: int) -> PrefillPart:
        """What of a prompt runs in this step, which has ``beside`` tokens in all layers already."""
        left, batch = seq.length - seq.computed, self._batch
        if batch is None:
            choice = self._choice(left, budget, beside)
            if choice is None or not self._chooses(choice):
                taken = min(left, budget)
                return PrefillPart(seq.computed + taken, None, budget - taken)
            group = LayerGroup(0, choice.layers, self.layers)
            batch = self._batch = _Batch(group=group)
            self._joins, budget = True, choice.together
        if self._joins:
            taken = min(left, budget)
            if taken:
                joined = _Member(seq, seq.computed, seq.computed + taken)
                batch.members[seq.request.id] = joined
            return PrefillPart(seq.computed + taken, batch.group, budget - taken)
        member = batch.members.get(seq.request.id)
        if member is None or member.seq is not seq:
            return PrefillPart(seq.computed, None, budget)
        if batch.group is None and budget:
            layers = max(1, min(self.layers - batch.done, budget * self.layers // batch.tokens))
            batch.group = LayerGroup(batch.done, batch.done + layers, self.layers)
        if batch.group is None:
            return PrefillPart(seq.computed, None, 0)
        return PrefillPart(member.stop, batch.group, 0)

    def whole(self, seq: SequenceState, budget: int) -> int:
        """Where the part ends of one that has to run in all layers: it takes nothing of what those
        have that begin together."""
        return seq.computed if self._joins else min(seq.length, seq.computed + budget)

    def _choice(self, tokens: int, budget: int, beside: int) -> PrefillChoice | None:
        """How a prompt would go in groups; None where it fits into a step, or there is no room."""
        if budget < 1 or tokens <= budget:
            return None
        found, fewest = None, 0
        for layers in range(1, self.layers):
            groups = -(-self.layers // layers)
            if groups > self._most_groups:
                continue
            together = min(budget * self.layers // layers, MOST_TOKENS)
            steps = groups - (min(together, tokens) - tokens) // budget
            if together <= budget or (found is not None and steps >= fewest):
                continue
            found, fewest = PrefillChoice(tokens, budget, beside, groups, layers, together), steps
            if steps <= -(-tokens // budget):
                break
        return found


def most_kept(budget: int, prefill: str) -> int:
    """Rows that are kept between two steps of ``budget`` tokens through all layers, at most, with
    ``--prefill-mode`` of that name. In one layer of a step run so many more than in all."""
    return 0 if prefill == "chunk" else min(MOST_GROUPS * budget, MOST_TOKENS)
