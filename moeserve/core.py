"""The data that scheduler, executor and doors exchange. Imports nothing of ours, no torch.

A request goes ``Request`` -> (scheduler) ``StepPlan`` of ``Chunk`` -> (executor) ``StepResult``
of ``Sampled`` -> (engine loop) ``Event`` to whoever asked.

What every request has one of in every step (``Chunk``, ``Sampled``, ``TokenOut``, ``Event``) are
named tuples, which are made in a tenth of the time of a frozen dataclass, and whose fields ``zip``
turns into columns. Code that makes one for each token calls ``tuple.__new__``, which again halves
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, NewType

# Stands for a token that the step before will make (``StepPlan.ahead``).
UNKNOWN = -1

RequestId = NewType("RequestId", str)
BlockId = NewType("BlockId", int)


class FinishReason(StrEnum):
    """Why a stream ended. ``STOP`` and ``LENGTH`` are successes; the rest end with an error:
    ``INVALID`` where what the request asks for cannot be followed any further."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    INVALID = "invalid"
    ERROR = "error"


class GrammarKind(StrEnum):
    """How the text of a ``Grammar`` is written.

    ``JSON_SCHEMA``: a JSON Schema, as JSON. ``REGEX``: in the syntax of Rust's ``regex``, matched
    as a whole. ``CHOICE``: a JSON list of strings, one of which is the answer. ``LARK``: Lark as
    llguidance reads it, or GBNF. ``STRUCTURAL_TAG``: vLLM's ``{"structures": [...], "triggers":
    [...]}`` as JSON: free text in which a trigger begins what a schema describes.
    """

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an answer must be, from its first character to its last.

    ``whitespace`` is for JSON alone: the regular expression of the blanks between its tokens.
    None is the server's choice, which is bounded; empty is none.
    """

    kind: GrammarKind
    text: str
    whitespace: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Bounds are checked at the doors (``gateway.limits``), not here.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 are off. Penalties follow
    OpenAI (presence, frequency: on generated tokens) and CTRL (repetition: prompt and generated).
    ``logprobs`` None is off; N asks for the chosen token's and the N best tokens'.
    ``seed`` None lets the door draw one; the same seed gives the same tokens whatever the batch.
    ``grammar`` None allows every text.
    ``prompt_logprobs`` is ``logprobs`` for the tokens of the prompt, of which the first has none.
    ``allowed_token_ids`` are the only ones that can be chosen, unless there are none. None of
    ``bad_token_ids`` comes to stand in the answer, each a sequence of one or more. ``only_prompt``
    shows nothing of the answer, for whoever asks about the prompt alone.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    only_prompt: bool = False


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What a request's KV depends on besides its tokens, and who may share it.

    The prefix cache shares blocks between requests of equal scopes only. ``salt`` is the tenant's;
    ``adapter`` names weights that are added to the model's own, empty for none.
    """

    salt: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate; ``n`` > 1 at a door is n of these with different seeds.

    Times are seconds of the caller's monotonic clock. ``scope`` bounds the prefix cache.
    ``domain`` labels recorded routing, and may choose a home. ``trace`` is the span that it belongs
    to, as W3C's ``traceparent``; empty where nobody traces it. Of those that wait, who has the
    lowest ``priority`` is first, and who has the highest yields first where memory is short.
    ``tenant`` is whose it is: the name of the key that it came with, empty where there are none.
    """

    id: RequestId
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    arrival: float = 0.0
    deadline: float | None = None
    scope: CacheScope = CacheScope()
    domain: str = ""
    trace: str = ""
    priority: int = 0
    tenant: str = ""


class LayerGroup(NamedTuple):
    """Layers ``start .. stop - 1`` of a model that has ``of``."""

    start: int
    stop: int
    of: int

    @property
    def last(self) -> bool:
        """Whether no layers come after it."""
        return self.stop == self.of


class Chunk(NamedTuple):
    """Consecutive tokens of one request to run in this step.

    ``token_ids`` sit at positions ``start .. start + len - 1``; the KV of everything before
    ``start`` is already in ``blocks``, which also hold room for these tokens. The logits after
    each of the last ``samples`` tokens choose a next one. Where that is 1 or more, the tokens end
    with the newest of ``prompt_ids`` + ``output_ids``, followed by ``samples - 1`` draft tokens,
    which are guesses of what comes next. ``output_ids`` are the scheduler's own and valid only
    during the step: the same list in all chunks of a request, which grows. ``blocks`` are the same
    tuple as in the chunk before, as long as nothing was added or freed. Tokens at positions below
    ``reached`` were computed by an earlier step too, before a preemption. ``rank`` is the request's
    home: it holds the KV, so ``blocks`` are of its pool, and attention runs there.

    With ``layers`` these alone are run: the steps before ran the same tokens in all layers that
    come before, and only the step with the last layer may sample. All chunks of a step that have
    ``layers`` have the same ones, and stand behind those that have none.
    """

    request: Request
    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[BlockId, ...]
    samples: int
    output_ids: Sequence[int] = ()
    rank: int = 0
    reached: int = 0
    layers: LayerGroup | None = None

    @property
    def computed(self) -> int:
        """How many tokens have their KV in all layers when the step is over, drafts among them."""
        done = self.layers is None or self.layers.last
        return len(self.token_ids) if done else 0

    @property
    def work(self) -> int:
        """The tokens; those of a group of layers by the share of all layers that it is, rounded
        up."""
        if self.layers is None:
            return len(self.token_ids)
        start, stop, of = self.layers
        return -(-len(self.token_ids) * (stop - start) // of)

    @property
    def scored(self) -> range:
        """Positions of the chunk whose logits give log-probabilities of the prompt: each that has
        a token of the prompt behind it and was not ``reached`` before, if the request wants them.
        """
        if self.request.params.prompt_logprobs is None:
            return range(0)
        stop = min(self.start + len(self.token_ids), len(self.request.prompt_ids) - 1)
        return range(max(self.start, self.reached), stop)

    @property
    def draft_ids(self) -> tuple[int, ...]:
        """The tokens at the end that are not the request's yet."""
        return self.token_ids[len(self.token_ids) - self.samples + 1 :] if self.samples else ()

    def kept(self, accepted: int) -> int:
        """How many of the tokens stay computed where ``accepted`` ones followed: the drafts that
        were not right are lost."""
        return len(self.token_ids) + min(0, accepted - self.samples)


class BudgetBy(StrEnum):
    """Who set a step's budget of tokens: ``MOST`` the bound of every step
    (``max_num_batched_tokens``), ``PAYS`` what larger steps bring (``--objective throughput``),
    ``TPOT`` the target of latency between tokens (``--tpot-target``)."""

    MOST = "most"
    PAYS = "pays"
    TPOT = "tpot"


class Refusal(StrEnum):
    """Why the one that is next did not start in a step: ``NONE`` waited; all ``TOKENS`` of the step
    were taken; as many ``SEQUENCES`` run as may; there are too few free ``BLOCKS``; KV would not
    hold out, as is ``FORESEEN``; or the step had ``PREEMPTED`` others."""

    NONE = "none"
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    BLOCKS = "blocks"
    FORESEEN = "foreseen"
    PREEMPTED = "preempted"


class StepChoice(NamedTuple):
    """Why a step has the shape that it has, said once by whoever planned it.

    Of ``budget`` tokens at most, which ``budget_by`` set, it has the newest token of ``decodes``
    requests, ``drafted`` guesses behind them, at most ``most_drafts`` of one request, and
    ``prefill_tokens`` of prompts. ``admitted`` requests start in it; ``refused`` is why the next
    one did not. ``preempted`` gave up their blocks, of which ``swapped_out`` keep a copy of their
    KV; ``swapped_in`` came back from theirs. Prompts cross the layers from ``group[0]`` to
    ``group[1]`` - 1 only, one of so many ``groups``; None where they cross all.
    """

    decodes: int = 0
    prefill_tokens: int = 0
    budget: int = 0
    budget_by: BudgetBy = BudgetBy.MOST
    admitted: int = 0
    refused: Refusal = Refusal.NONE
    preempted: int = 0
    drafted: int = 0
    most_drafts: int = 0
    group: tuple[int, int] | None = None
    groups: int = 1
    swapped_out: int = 0
    swapped_in: int = 0


UNSAID = StepChoice()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one forward pass runs, and why. ``expired`` hit their deadline and are already freed.

    ``ended`` are all requests that ended, for whatever reason, since the last plan that had
    chunks, and those that a plan without any preempted: an executor forgets them before it
    looks at the chunks, for their ids may return.

    One that is made ``ahead``, while the step before runs, has the newest token of each of that
    step's requests, which is ``UNKNOWN`` until that step is over. Some of these may have ended by
    then: what comes of their rows is nobody's.

    Behind the tokens that it samples, ``draft_next`` more of each request are guessed, if its
    executor can, for the step after it to check.
    """

    chunks: tuple[Chunk, ...]
    expired: tuple[RequestId, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    ended: tuple[RequestId, ...] = ()
    ahead: bool = False
    draft_next: int = 0
    choice: StepChoice = UNSAID

    @property
    def num_tokens(self) -> int:
        """How much is computed, in tokens through all layers (``Chunk.work``)."""
        if self.chunks and self.chunks[-1].layers is not None:
            return sum(chunk.work for chunk in self.chunks)
        return sum(len(c.token_ids) for c in self.chunks)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities before temperature and filters; ``top`` is best first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


class Sampled(NamedTuple):
    """The tokens that followed a chunk, 1 up to its ``samples``; each but the last is the draft
    that stood there. ``logprobs`` has one entry per token if the request wants them, else none."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()


class Scored(NamedTuple):
    """Log-probabilities of the prompt's tokens behind the positions that a chunk ``scored``.

    Over the steps of a request they come in order, each once: from the prompt's second token on.
    """

    request_id: RequestId
    logprobs: tuple[Logprobs, ...]


class Drafted(NamedTuple):
    """What a step guessed to follow the newest token that it sampled for a request, in order.

    Whoever guessed has ``read`` so many of the request's tokens for it, beside the newest ones.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    read: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per chunk with ``samples``, in the plan's order, less those that ``failed``.

    A failure belongs to one request alone (its logits are not numbers): id and explanation.
    ``scored`` has an entry for each chunk that scored something.
    ``told`` are those whose clients are told it, since what they asked for is the cause.
    ``drafted`` are the guesses that were asked for (``StepPlan.draft_next``), which took
    ``draft_s`` seconds of the step.
    """

    sampled: tuple[Sampled, ...]
    failed: tuple[tuple[RequestId, str], ...] = ()
    scored: tuple[Scored, ...] = ()
    told: frozenset[RequestId] = frozenset()
    drafted: tuple[Drafted, ...] = ()
    draft_s: float = 0.0


class TokenOut(NamedTuple):
    """A token that the scheduler accepted; ``finish`` set on the last of a request."""

    request_id: RequestId
    token_id: int
    logprobs: Logprobs | None
    finish: FinishReason | None


class Event(NamedTuple):
    """News of a request, for whoever holds its stream; text is made there.

    ``token_ids``, ``logprobs`` and ``prompt_logprobs`` are those since the last event; the
    prompt's come before its first token. The last event has ``finish``; ``error`` explains
    unsuccessful ends. ``queue_s``, which the first with a token has, is how long the request waited
    for its first step.
    """

    request_id: RequestId
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    cached_tokens: int = 0
    queue_s: float = 0.0
    prompt_logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one request, in seconds since it was submitted; None for what it did not reach. Its id and
    its ``trace`` say whose it is. The KV of ``received_tokens`` of the prompt was computed for it
    elsewhere."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    scheduled_s: float | None
    first_token_s: float | None
    elapsed_s: float
    request_id: str = ""
    trace: str = ""
    received_tokens: int = 0


@dataclass(slots=True)
class Counters:
    """Counted where it happens (law 8); read by metrics and tests, never reset.

    ``computed_tokens`` are those whose KV was kept, so without drafts that were not right;
    ``accepted_tokens`` are those of the ``drafted_tokens`` that were, ``drafts`` are the
    chunks that carried some; a draft model read ``draft_read_tokens`` of requests before it could
    guess what follows. Of ``swaps`` (``engine.swapping``) ``swap_copies`` are runs of one
    cache that were copied, out or in; ``swap_spared_bytes`` did not go out, since they were there.
    ``layered_steps`` ran prompts in a group of layers only, and ``layered_tokens`` of the computed
    ones went through the layers so.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_read_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    layered_steps: int = 0
    layered_tokens: int = 0
    preemptions: int = 0
    evicted_blocks: int = 0
    swaps: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    swap_copies: int = 0
    swap_spared_bytes: int = 0
    swap_recomputed: int = 0
    plan_changes: int = 0
    plan_layers_switched: int = 0
    plan_bytes_read: int = 0
    plan_paused_s: float = 0.0
    finished: dict[FinishReason, int] = field(default_factory=dict)
