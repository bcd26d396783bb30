"""Seeds, wake-ups and endings, without a transport."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import CacheScope, Counters, Event, FinishReason, Logprobs, Request, RequestId
from moeserve.engine.loop import Engine
from moeserve.engine.request_state import EventSink
from moeserve.errors import (
    CancelledError,
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    MoeserveError,
    TokenizerError,
    UnavailableError,
)
from moeserve.gateway import stream as stream_module
from moeserve.gateway.limits import ModelLimits
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.service import ClientRequest, InferenceService, ServedModel, child_seed
from moeserve.gateway.stream import Durations, Usage

if TYPE_CHECKING:
    from moeserve.models.tokenizer import Tokenizer

seeds = st.integers(0, 2**63 - 1)


@dataclass
class FakeEngine:
    """Keeps what it is given; a test plays the engine's part. Refuses from ``room`` on."""

    room: int = 99
    sinks: dict[RequestId, EventSink] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    reasons: list[FinishReason] = field(default_factory=list)

    @property
    def counters(self) -> Counters:
        return Counters()

    def submit(self, request: Request, sink: EventSink) -> None:
        if len(self.requests) >= self.room:
            raise ExhaustedError("full")
        self.requests.append(request)
        self.sinks[request.id] = sink

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append(request_id)
        self.reasons.append(reason)

    def say(self, index: int, *tokens: int, **event: Any) -> None:
        request = self.requests[index]
        self.sinks[request.id].deliver([Event(request.id, tokens, **event)])


class Letters:
    """A tokenizer whose tokens are a .. z; it cannot read beyond."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if max(ids, default=0) >= 26:
            raise ValueError("cannot read that")
        return "".join(chr(97 + i) for i in ids)

    def byte_pieces(self, skip_special_tokens: bool = True) -> None:
        return None


class BusyEngine(FakeEngine):
    """Steps whenever it is looked at; the first request has its turn after ``turn`` looks."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self._turn = turn

    @property
    def counters(self) -> Counters:
        self._turn -= 1
        if not self._turn:
            self.say(0, 7)
        return Counters(steps=-self._turn)


def served_by(engine: FakeEngine, tokenizer: Letters | None = None) -> InferenceService:
    service = InferenceService(Mailbox(asyncio.get_running_loop()), clock=lambda: 100.0)
    model = ModelLimits(vocab_size=100, max_len=64)
    served = ServedModel("fake", cast("Engine", engine), cast("Tokenizer | None", tokenizer), model)
    service.serve(served)
    return service


@given(seeds, st.integers(0, 15), st.integers(0, 15))
def test_children_of_a_seed_have_their_own_and_always_the_same(seed: int, a: int, b: int) -> None:
    assert child_seed(seed, 0) == seed
    assert (child_seed(seed, a) == child_seed(seed, b)) == (a == b)
    assert 0 <= child_seed(seed, a) < 2**63


async def test_an_ask_becomes_one_request_per_prompt_and_sequence() -> None:
    engine = FakeEngine()
    ask = ClientRequest(
        prompts=((1, 2), (3,)),
        params={"seed": 5},
        n=2,
        request_id="r",
        salt="s",
        domain="d",
        timeout_s=2.5,
        priority=-3,
    )
    async with await served_by(engine).open(ask):
        found = engine.requests
    assert [r.prompt_ids for r in found] == [(1, 2), (1, 2), (3,), (3,)]
    assert [r.params.seed for r in found] == [5, child_seed(5, 1)] * 2
    assert [r.id for r in found] == ["r", "r 1", "r 2", "r 3"]
    assert {(r.scope, r.domain, r.arrival, r.deadline, r.priority) for r in found} == {
        (CacheScope("s"), "d", 100.0, 102.5, -3)
    }


async def test_max_tokens_defaults_to_16_or_fills_the_context_where_asked() -> None:
    engine = FakeEngine()
    service = served_by(engine)
    for prompt, fill in ((10, False), (60, False), (10, True)):
        async with await service.open(ClientRequest(prompts=((1,) * prompt,), fill=fill)):
            pass
    assert [r.params.max_tokens for r in engine.requests] == [16, 4, 54]


async def test_min_tokens_beyond_the_default_answer_asks_for_max_tokens() -> None:
    service = served_by(FakeEngine())
    with pytest.raises(InvalidRequestError, match=r"min_tokens=20 .*16 tokens.*max_tokens too"):
        await service.open(ClientRequest(prompts=((1,),), params={"min_tokens": 20}))
    async with await service.open(
        ClientRequest(prompts=((1,),), params={"min_tokens": 20}, fill=True)
    ):
        pass


async def test_leaving_a_stream_aborts_what_still_runs_and_only_that() -> None:
    engine = FakeEngine()
    service = served_by(engine)
    async with await service.open(ClientRequest(prompts=((1,),), n=3, request_id="r")) as stream:
        engine.say(1, 7, finish=FinishReason.LENGTH)
        assert (await anext(stream)).index == 1
        assert service.running == 1
    assert engine.aborted == ["r", "r 2"]
    assert service.running == 0


async def test_a_cancelled_reader_leaves_nothing_running() -> None:
    engine = FakeEngine()
    service = served_by(engine)

    async def read() -> None:
        async with await service.open(ClientRequest(prompts=((1,),), request_id="r")) as stream:
            async for _ in stream:
                pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    assert service.running == 1
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert engine.aborted == ["r"]
    assert service.running == 0


async def test_if_one_sequence_is_refused_none_runs() -> None:
    engine = FakeEngine(room=2)
    service = served_by(engine)
    with pytest.raises(ExhaustedError):
        await service.open(ClientRequest(prompts=((1,),), n=4, request_id="r"))
    assert engine.aborted == ["r", "r 1"]
    assert service.running == 0


async def test_what_a_slow_reader_missed_comes_at_once_and_the_failure_after_it() -> None:
    engine = FakeEngine()
    ask = ClientRequest(prompts=((1,),), n=2)
    async with await served_by(engine, Letters()).open(ask) as stream:
        engine.say(0, 0)
        engine.say(1, 23)
        engine.say(0, 1)
        engine.say(1, finish=FinishReason.DEADLINE)
        found = [await anext(stream) for _ in range(2)]
        assert [(d.index, d.text, d.token_ids) for d in found] == [
            (0, "ab", (0, 1)),
            (1, "x", (23,)),
        ]
        with pytest.raises(DeadlineError):
            await anext(stream)


async def test_the_end_of_a_sequence_counts_and_times_it() -> None:
    engine = FakeEngine()
    async with await served_by(engine).open(ClientRequest(prompts=((1, 2),))) as stream:
        engine.say(0, 5)
        engine.say(0, 6, finish=FinishReason.STOP, cached_tokens=1)
        delta = await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert delta.usage == Usage(prompt_tokens=2, completion_tokens=2, cached_tokens=1)
    assert delta.timing == Durations(ttft_s=0.0, tpot_s=0.0, total_s=0.0)


@pytest.mark.parametrize(
    ("finish", "error"),
    [
        (FinishReason.ABORT, CancelledError),
        (FinishReason.DEADLINE, DeadlineError),
        (FinishReason.UNAVAILABLE, UnavailableError),
        (FinishReason.INVALID, InvalidRequestError),
        (FinishReason.ERROR, InternalError),
    ],
)
async def test_endings_that_are_no_success_are_errors(
    finish: FinishReason, error: type[MoeserveError]
) -> None:
    engine = FakeEngine()
    async with await served_by(engine).open(
        ClientRequest(prompts=((1,),), n=2, request_id="r")
    ) as stream:
        engine.say(0, finish=finish, error="the reason")
        with pytest.raises(error, match="the reason"):
            await anext(stream)
    assert engine.aborted == ["r 1"], "the other sequence is of no use any more"


async def test_a_silent_engine_is_reported_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "SILENCE_S", 0.01)
    monkeypatch.setattr(stream_module, "DEADLINE_GRACE_S", 0.0)
    service = served_by(FakeEngine())
    async with await service.open(ClientRequest(prompts=((1,),))) as stream:
        with pytest.raises(InternalError, match="ended no step"):
            await anext(stream)
    async with await service.open(ClientRequest(prompts=((1,),), timeout_s=0.01)) as stream:
        with pytest.raises(DeadlineError, match="passed its deadline"):
            await anext(stream)


async def test_a_long_queue_is_waited_for_while_the_engine_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "SILENCE_S", 0.01)
    engine = BusyEngine(turn=5)
    async with await served_by(engine).open(ClientRequest(((1,),))) as stream:
        assert (await anext(stream)).token_ids == (7,)


async def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    engine = FakeEngine()
    with pytest.raises(DeadlineError, match="before the request arrived"):
        await served_by(engine).open(ClientRequest(prompts=((1,),), timeout_s=0.0))
    assert engine.requests == []


async def test_draining_ends_when_the_last_stream_does() -> None:
    engine = FakeEngine()
    service = served_by(engine)
    async with await service.open(ClientRequest(prompts=((1,),))):
        service.drain()
        idle = asyncio.create_task(service.idle())
        await asyncio.sleep(0)
        assert not idle.done()
        with pytest.raises(UnavailableError, match="draining"):
            await service.open(ClientRequest(prompts=((1,),)))
    await asyncio.wait_for(idle, 10)


async def test_prompts_are_bounded_in_number() -> None:
    service = served_by(FakeEngine())
    async with await service.open(ClientRequest(prompts=((1,),) * 64)):
        pass
    with pytest.raises(InvalidRequestError, match="65 prompts: expected 1 to 64"):
        await service.open(ClientRequest(prompts=((1,),) * 65))


def numbered(request_id: str, i: int, finish: FinishReason | None = None) -> Event:
    return Event(RequestId(request_id), (i,), finish=finish)


async def test_events_arrive_in_order_and_many_for_one_wake_up() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    read: list[int] = []
    done = asyncio.Event()
    mailbox.open(RequestId("r"), lambda event: read.extend(event.token_ids))
    mailbox.open(RequestId("s"), lambda event: done.set())

    def deliver_all() -> None:
        for i in range(0, 1000, 2):
            mailbox.deliver([numbered("r", i), numbered("r", i + 1)])

    mailbox.deliver([numbered("r", -1)])
    thread = threading.Thread(target=deliver_all)
    thread.start()
    thread.join(10)  # blocks the loop: everything waits in the box
    mailbox.deliver([numbered("s", 0)])
    await asyncio.wait_for(done.wait(), 10)
    assert read == [-1, *range(1000)]
    assert mailbox.wakeups == 1


async def test_a_route_ends_with_its_last_event_and_not_before() -> None:
    """So that no event of an aborted request reaches a later one of the same id."""
    mailbox = Mailbox(asyncio.get_running_loop())
    read: list[tuple[str, int]] = []
    name = RequestId("r")
    mailbox.open(name, lambda event: read.append(("first", *event.token_ids)))
    mailbox.deliver([numbered("r", 1), numbered("r", 2, FinishReason.ABORT), numbered("r", 3)])
    with pytest.raises(InvalidRequestError, match="request id 'r' is in use: choose another"):
        mailbox.open(name, lambda event: None)
    await asyncio.sleep(0)
    mailbox.open(name, lambda event: read.append(("second", *event.token_ids)))
    mailbox.deliver([numbered("r", 4), numbered("nobody", 5)])
    await asyncio.sleep(0)
    assert read == [("first", 1), ("first", 2), ("second", 4)]
    mailbox.close(name)
    mailbox.open(name, lambda event: None)


def letters(text: str) -> tuple[int, ...]:
    return tuple(ord(c) - 97 for c in text)


async def test_a_stop_string_ends_the_text_and_what_came_after_it_does_not_count() -> None:
    engine = FakeEngine()
    ask = ClientRequest(
        prompts=((1, 2),), params={"stop": ["dog"], "max_tokens": 20, "logprobs": 0}
    )
    async with await served_by(engine, Letters()).open(ask) as stream:
        engine.say(0, *letters("ado"), logprobs=(Logprobs(-1.0),) * 3, cached_tokens=1)
        assert ((await anext(stream)).text, engine.aborted) == ("a", [])
        tokens = letters("gma")
        probs = tuple(Logprobs(-float(i)) for i in range(3))
        engine.say(0, *tokens, logprobs=probs, cached_tokens=1)
        engine.say(0, *letters("t"), logprobs=probs[:1], cached_tokens=1)
        engine.say(0, finish=FinishReason.STOP)
        delta = await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert (delta.text, delta.token_ids, delta.logprobs) == ("", tokens[:1], probs[:1])
    assert delta.finish is FinishReason.STOP
    assert delta.usage == Usage(prompt_tokens=2, completion_tokens=4, cached_tokens=1)
    assert list(zip(engine.aborted, engine.reasons, strict=True)) == [
        (engine.requests[0].id, FinishReason.STOP)
    ]


async def test_a_stop_string_in_the_last_token_needs_no_abort() -> None:
    engine = FakeEngine()
    ask = ClientRequest(prompts=((1,),), params={"stop": ["b"], "include_stop": True})
    async with await served_by(engine, Letters()).open(ask) as stream:
        engine.say(0, *letters("ab"), finish=FinishReason.LENGTH)
        delta = await anext(stream)
    assert (delta.text, delta.finish) == ("ab", FinishReason.STOP)
    assert engine.aborted == []


async def test_what_may_be_a_stop_string_is_shown_where_the_sequence_ends() -> None:
    engine = FakeEngine()
    service = served_by(engine, Letters())
    for ending in (letters("d"), ()):
        ask = ClientRequest(prompts=((1,),), params={"stop": ["dog"]})
        async with await service.open(ask) as stream:
            index = len(engine.requests) - 1
            engine.say(index, *letters("ad"))
            assert (await anext(stream)).text == "a"
            engine.say(index, *ending, finish=FinishReason.LENGTH)
            assert (await anext(stream)).text == "d" * (1 + len(ending))


async def test_a_token_that_cannot_be_decoded_ends_its_sequence_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = FakeEngine()
    service = served_by(engine, Letters())
    async with (
        await service.open(ClientRequest(prompts=((1,),), request_id="bad")) as bad,
        await service.open(ClientRequest(prompts=((1,),), request_id="good")) as good,
    ):
        engine.say(0, *letters("ab"))
        engine.say(0, 26)
        engine.say(1, *letters("c"), finish=FinishReason.LENGTH)
        assert (await anext(bad)).text == "ab"
        with pytest.raises(InternalError, match="the server's log has the cause"):
            await anext(bad)
        assert (await anext(good)).text == "c"
    assert "cannot read that" in caplog.text
    assert (engine.aborted, engine.reasons) == (["bad"], [FinishReason.ERROR])


async def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    engine = FakeEngine()
    with pytest.raises(TokenizerError, match="stop_token_ids instead of stop"):
        await served_by(engine).open(ClientRequest(((1,),), {"stop": ["x"]}))
    assert engine.requests == []


@given(
    text=st.text("abc", min_size=1, max_size=30),
    cuts=st.sets(st.integers(1, 29)),
    stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    include=st.booleans(),
    least=st.integers(0, 8),
)
async def test_how_tokens_are_cut_into_events_changes_nothing_but_the_deltas(
    text: str, cuts: set[int], stops: list[str], include: bool, least: int
) -> None:
    params = {
        "max_tokens": 30,
        "min_tokens": least,
        "stop": stops,
        "include_stop": include,
    }

    async def answer(bounds: list[int]) -> tuple[str, tuple[int, ...], object, object]:
        engine = FakeEngine()
        ask = ClientRequest(prompts=((1,),), params=params if stops else params | {"stop": []})
        async with await served_by(engine, Letters()).open(ask) as stream:
            for start, end in itertools.pairwise(bounds):
                finish = FinishReason.LENGTH if end == len(text) else None
                engine.say(0, *letters(text[start:end]), finish=finish)
            deltas = [d async for d in stream]
        shown = "".join(d.text for d in deltas)
        ids = tuple(t for d in deltas for t in d.token_ids)
        return shown, ids, deltas[-1].finish, deltas[-1].usage

    bounds = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    assert await answer(bounds) == await answer(list(range(len(text) + 1)))
