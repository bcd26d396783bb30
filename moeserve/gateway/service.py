"""What a request means, whatever door it came through.

A ``ClientRequest`` is checked, tokenised and becomes one engine request per prompt and sequence; a
``ResponseStream`` yields what they produce. Knows no transport: doors translate to and from it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from moeserve.core import CacheScope, Request, RequestId, SamplingParams
from moeserve.engine.loop import ServingEngine
from moeserve.errors import (
    DeadlineError,
    InvalidRequestError,
    MoeserveError,
    NotFoundError,
    TokenizerError,
    UnavailableError,
)
from moeserve.gateway import limits
from moeserve.gateway.grammars import GrammarGate
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.parsers.styles import PLAIN, AnswerStyle
from moeserve.gateway.records import record_of, refusal, traced
from moeserve.gateway.stream import ResponseStream
from moeserve.gateway.text_work import TextWork
from moeserve.gateway.trust.identity import TenantUsage, tenant, tenant_salt
from moeserve.models.tokenizer import Tokenizer
from moeserve.observe.requests import RequestRecord
from moeserve.observe.spans import UNTRACED, DoorSpan, RequestSpans, served_trace


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind the doors. ``tokenizer`` None serves token ids only. ``style`` is how it
    writes tool calls and reasoning. Without ``grammars`` answers have any form."""

    name: str
    engine: ServingEngine
    tokenizer: Tokenizer | None
    limits: limits.ModelLimits
    architecture: str = ""
    eos_ids: tuple[int, ...] = ()
    style: AnswerStyle = PLAIN
    grammars: GrammarGate = field(default_factory=GrammarGate)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """What a client wants. ``params`` holds only the fields it gave.

    ``fill`` makes the rest of the context the default of ``max_tokens``. ``special_tokens`` adds
    the model's own to a text (chat templates write them themselves). Of a prompt the last
    ``truncate`` tokens are kept, see ``limits.truncation``. ``ignored`` says, each with the name of
    a field first, what of the request changes nothing. The first ``resume_from`` tokens of the
    answer are not sent, for the client has them. ``operation`` is how OpenTelemetry calls it. The
    lowest ``priority`` is served first.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    params: Mapping[str, object] = field(default_factory=dict)
    n: int = 1
    request_id: str = ""
    model: str = ""
    salt: str = ""
    domain: str = ""
    timeout_s: float | None = None
    fill: bool = False
    special_tokens: bool = True
    truncate: int | None = None
    ignored: tuple[str, ...] = ()
    resume_from: int = 0
    operation: str = "text_completion"
    priority: int = 0


class ServiceState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class _TenantStream(NamedTuple):
    """A stream that runs, and whose it is."""

    tenant: str
    stream: ResponseStream


class InferenceService:
    """Owns the running streams of one model, from loading to draining.

    ``strict`` refuses requests of which something would be ignored. ``observe`` gets a record of
    each request when it has ended, or was refused.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[RequestRecord], None] = lambda record: None,
        *,
        strict: bool = False,
        spans: RequestSpans | None = None,
    ) -> None:
        self._spans = spans
        self.state = ServiceState.LOADING
        self.texts = TextWork()
        self._strict = strict
        self._served: ServedModel | None = None
        self._mailbox = mailbox
        self._clock = clock
        self._observe = observe
        self._streams: dict[str, _TenantStream] = {}
        self.usage: dict[str, TenantUsage] = {}  # by tenant
        self._idle = asyncio.Event()
        self._idle.set()

    def serve(self, served: ServedModel) -> None:
        """Opens for requests."""
        self._served = served
        self.texts.serve(served.name, served.tokenizer, served.limits)
        self.state = ServiceState.READY

    @property
    def served(self) -> ServedModel:
        """The model, also while draining."""
        if self._served is None:
            raise UnavailableError("the model is loading: try again shortly")
        return self._served

    @property
    def ready(self) -> bool:
        """Whether a request that came now would be served: the model is there, and every rank."""
        return (
            self.state is ServiceState.READY
            and self._served is not None
            and self._served.engine.alive
        )

    @property
    def model_name(self) -> str:
        """Empty while it loads."""
        return "" if self._served is None else self._served.name

    @property
    def running(self) -> int:
        return len(self._streams)

    @property
    def tokens(self) -> tuple[int, int]:
        """Taken in and made since the start, by all tenants; answers under way count as far as
        they are."""
        used = self.usage.values()
        made = sum(usage.generated_tokens for usage in used)
        return (
            sum(usage.prompt_tokens for usage in used),
            made + sum(held.stream.made for held in self._streams.values()),
        )

    def model(self, name: str) -> ServedModel:
        """The served model, if that is its name or no name is given."""
        served = self.served
        if name and name != served.name:
            raise NotFoundError(
                f"model {name!a:.100} is not served here; {served.name!r} is", param="model"
            )
        return served

    async def open(self, wanted: ClientRequest) -> ResponseStream:
        """Checks and submits; the caller must enter the stream at once."""
        arrival = self._clock()
        span = UNTRACED if self._spans is None else self._spans.open(served_trace())
        try:
            stream = await self._prepare(wanted, arrival, span)
        except (MoeserveError, asyncio.CancelledError) as error:
            waited = self._clock() - arrival
            name = None if self._served is None else self._served.name
            record = replace(refusal(wanted, name, error, waited), tenant=tenant())
            span.end(record, traced(wanted))
            self._observe(record)
            raise
        stream.start()
        return stream

    async def _prepare(
        self, wanted: ClientRequest, arrival: float, span: DoorSpan
    ) -> ResponseStream:
        """Checked and tokenised, not yet submitted."""
        served = self._admit(wanted.model)
        self.allow(wanted.ignored)
        n = limits.BOUNDS["n"].check("n", wanted.n)
        params = _sampling(wanted.params, served)
        salt = limits.label("cache_salt", wanted.salt, limits.MAX_SALT_BYTES)
        domain = limits.label("domain", wanted.domain, limits.MAX_DOMAIN_BYTES)
        request_id = limits.request_id(wanted.request_id) or f"req-{secrets.token_hex(12)}"
        if wanted.timeout_s is not None and wanted.timeout_s <= 0:
            raise DeadlineError("the deadline has passed before the request arrived")
        if not 1 <= len(wanted.prompts) <= limits.MAX_PROMPTS:
            raise InvalidRequestError(
                f"{len(wanted.prompts)} prompts: expected 1 to {limits.MAX_PROMPTS}", param="prompt"
            )
        if params.grammar is not None:
            await served.grammars.admit(params.grammar)
        requests: list[Request] = []
        seed = params.seed if "seed" in wanted.params else secrets.randbits(63)
        for p, prompt in enumerate(wanted.prompts):
            ids = await self._ids(served, prompt, wanted, params)
            fitted = _fit(params, len(ids), wanted, served.limits)
            for i in range(n):
                child = p * n + i
                requests.append(
                    Request(
                        RequestId(request_id if not child else f"{request_id} {child}"),
                        ids,
                        replace(fitted, seed=child_seed(seed, i)),
                        arrival=arrival,
                        deadline=None if wanted.timeout_s is None else arrival + wanted.timeout_s,
                        scope=CacheScope(tenant_salt(tenant(), salt)),
                        domain=domain,
                        trace=span.trace,
                        priority=wanted.priority,
                        tenant=tenant(),
                    )
                )
        _require_resumable(wanted, requests)
        limits.require_scorable(params, sum(len(request.prompt_ids) for request in requests))
        # Tokenising may have let others in: look again.
        self._admit(wanted.model)
        return self._opened(request_id, served, requests, wanted, span)

    def allow(self, ignored: Sequence[str]) -> None:
        """What is ignored of a request is an error where that is ``strict``."""
        if self._strict and ignored:
            raise InvalidRequestError(
                f"{ignored[0]}; this server is strict: leave it out",
                param=ignored[0].partition(":")[0],
            )

    def _admit(self, model: str) -> ServedModel:
        if self.state is ServiceState.DRAINING:
            raise UnavailableError("the server is draining: send the request elsewhere")
        return self.model(model)

    def _opened(
        self,
        request_id: str,
        served: ServedModel,
        requests: list[Request],
        wanted: ClientRequest,
        span: DoorSpan,
    ) -> ResponseStream:
        if request_id in self._streams:
            raise InvalidRequestError(
                f"request_id={request_id!r} is already running: choose another", param="request_id"
            )
        stream = ResponseStream(
            request_id,
            served.engine,
            requests,
            served.tokenizer,
            self._mailbox,
            self._clock,
            functools.partial(self._closed, wanted, requests, span),
            wanted.resume_from,
        )
        self._streams[request_id] = _TenantStream(tenant(), stream)
        self._idle.clear()
        usage = self.usage.setdefault(tenant(), TenantUsage())
        usage.requests += 1
        if not wanted.resume_from:  # else it was counted the first time
            usage.prompt_tokens += sum(len(request.prompt_ids) for request in requests)
        return stream

    def _closed(
        self,
        wanted: ClientRequest,
        requests: list[Request],
        span: DoorSpan,
        stream: ResponseStream,
        error: BaseException | None,
    ) -> None:
        who = self._streams.pop(stream.request_id).tenant
        self.usage.setdefault(who, TenantUsage()).generated_tokens += stream.made
        if not self._streams:
            self._idle.set()
        took = self._clock() - requests[0].arrival
        record = record_of(wanted, requests, stream, self.served.name, error, took)
        record = replace(record, tenant=who)
        span.end(record, traced(wanted))
        self._observe(record)

    async def _ids(
        self,
        served: ServedModel,
        prompt: str | tuple[int, ...],
        wanted: ClientRequest,
        params: SamplingParams,
    ) -> tuple[int, ...]:
        kept = wanted.truncate
        if kept == -1:
            kept = max(1, served.limits.max_len - params.max_tokens)
        if isinstance(prompt, str):
            text = limits.prompt_text(prompt)
            if kept is None:
                return await self.encode(text, wanted.special_tokens, served.limits)
            ids = await self.texts.encode(text, wanted.special_tokens, most=limits.MAX_IDS)
            return tuple(ids[-kept:])
        if kept is not None:
            prompt = prompt[-kept:]
        limits.room_for_answer(len(prompt), served.limits)
        return limits.token_ids(prompt, served.limits)

    async def encode(
        self, text: str, special_tokens: bool, model: limits.ModelLimits
    ) -> tuple[int, ...]:
        """The ids of a prompt, which leaves room for an answer."""
        return tuple(await self.texts.encode(text, special_tokens, model=model))

    async def tokenize(self, model: str, text: str, special_tokens: bool = True) -> list[int]:
        self.model(model)
        if not text:
            return []
        return await self.texts.encode(limits.prompt_text(text, "text"), special_tokens)

    async def detokenize(self, model: str, ids: object, skip_special_tokens: bool = True) -> str:
        served = self.model(model)
        checked = limits.token_ids(ids, served.limits, "token_ids", served.limits.max_len)
        return await self.texts.decode(checked, skip_special_tokens)

    def abort(self, request_id: str) -> None:
        found = self._streams.get(request_id)
        if found is None or found.tenant != tenant():
            raise NotFoundError(
                f"request {request_id!a:.150} is not running here", param="request_id"
            )
        found.stream.abort()

    def drain(self) -> None:
        """From now on new requests are refused; running ones go on."""
        self.state = ServiceState.DRAINING

    async def idle(self) -> None:
        """Waits until no stream is open; callers bound the wait."""
        await self._idle.wait()


def _require_resumable(wanted: ClientRequest, requests: Sequence[Request]) -> None:
    """What an answer that is resumed takes, so that its tokens are those of the first time."""
    made = limits.RESUME.check("resume_from_token", wanted.resume_from)
    if not made:
        return
    params = requests[0].params
    problem = ""
    if "seed" not in wanted.params and params.temperature > 0:
        problem = "the tokens before it are made again: give the seed, or temperature 0"
    elif len(requests) > 1:
        problem = f"{len(requests)} sequences: resume them one by one"
    elif params.prompt_logprobs is not None or params.only_prompt:
        problem = "log-probabilities of the prompt come before the first token: leave them out"
    elif made >= params.max_tokens:
        problem = f"the answer has {params.max_tokens} tokens at most: nothing would follow"
    if problem:
        raise InvalidRequestError(f"resume_from_token={made}: {problem}", param="resume_from_token")


def _sampling(given: Mapping[str, object], served: ServedModel) -> SamplingParams:
    """The client's fields, less what depends on the prompt. Texts need a tokenizer."""
    fields = dict(given)
    words = limits.bad_words(fields.pop("bad_words", ()))
    params = limits.sampling_params(fields, served.limits)
    if params.stop and served.tokenizer is None:
        raise TokenizerError(
            f"model {served.name!r} has no tokenizer, which stop strings need: use stop_token_ids "
            "instead of stop",
            param="stop",
        )
    if words and served.tokenizer is None:
        raise TokenizerError(
            f"model {served.name!r} has no tokenizer, which bad_words need: leave them out",
            param="bad_words",
        )
    if words and served.tokenizer is not None:
        params = replace(params, bad_token_ids=_word_ids(served.tokenizer, words))
    limits.require_choice(params, served.eos_ids, served.limits)
    return params


def _word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text, and as it follows a space where that is another first token,
    as vLLM has it."""
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (
            tuple(tokenizer.encode(before + word.lstrip(), add_special_tokens=False))
            for before in ("", " ")
        )
        found.append(plain)
        if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
            found.append(spaced)
    return tuple(dict.fromkeys(filter(None, found)))


def child_seed(seed: int, index: int) -> int:
    """Sequence 0 has the seed itself, so that n = 1 is the first of n."""
    if not index:
        return seed
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _fit(
    params: SamplingParams, prompt_len: int, wanted: ClientRequest, model: limits.ModelLimits
) -> SamplingParams:
    room = limits.room_for_answer(prompt_len, model)
    if "max_tokens" in wanted.params:
        limits.require_fits(prompt_len, params.max_tokens, model)
        return params
    fitted = replace(params, max_tokens=room if wanted.fill else min(room, params.max_tokens))
    if fitted.min_tokens > fitted.max_tokens:
        raise InvalidRequestError(
            f"min_tokens={fitted.min_tokens} is more than the {fitted.max_tokens} tokens of the "
            "answer: set max_tokens too",
            param="min_tokens",
        )
    return fitted
