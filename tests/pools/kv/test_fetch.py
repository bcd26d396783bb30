"""KV goes from one rank to another over a real socket, and the tokens are those of one rank."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import torch
from toy_house import alone
from toy_peer import QUICK, SHARED, WAIT_S, ended, peer, request, until

from moeserve.core import CacheScope, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.sequence import KvSource
from moeserve.errors import ExhaustedError, InvalidRequestError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.receiver_call import ReceiverCall


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((4, 4), torch.bfloat16),
        ((4, 8), torch.bfloat16),
        ((8, 4), torch.bfloat16),
        ((4, 6), torch.int8),
        ((6, 4), torch.int8),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", [False, True], ids=["grpc", "memory"])
async def test_tokens_are_those_of_one_rank(
    sizes: tuple[int, int], dtype: torch.dtype, memory: bool
) -> None:
    ask = [request(f"r{n}", n) for n in (1, 3, 4, 5, 16, 31, 61)]
    want = [alone(r, dtype=dtype) for r in ask]
    name, limits = ("memory", SHARED) if memory else ("grpc", QUICK)
    limits = replace(limits, first_s=10.0, progress_s=10.0, stalled_s=10.0, whole_s=20.0)
    async with (
        peer(block_size=sizes[0], dtype=dtype, limits=limits) as a,
        peer(block_size=sizes[1], dtype=dtype, blocks=200, limits=limits) as b,
    ):
        sinks = [b.ask(r, a.source) for r in ask]
        await ended(*sinks)
        for sink, expected in zip(sinks, want, strict=True):
            assert sink.tokens == expected.tokens
            assert sink.last.finish is FinishReason.LENGTH
        await a.vacant()
        await b.vacant()
        prompts = sum(len(r.prompt_ids) for r in ask)
        assert b.counters.fetched == prompts
        assert b.counters.recomputed == 0
        assert b.counters.sources_lost == {}
        assert b.house.computed == 5 * len(ask), "all but the first token, one position each"
        assert set(b.counters.bytes) == set(a.counters.sent_bytes) == {name}


@pytest.mark.parametrize("memory", [False, True], ids=["grpc", "memory"])
async def test_room_for_one_frame_is_enough(memory: bool) -> None:
    """Nobody who has made a frame waits for room for the next before that is sent."""
    tight = replace(SHARED, slots=int(memory), frames=1)
    ask = [request(f"r{n}", n) for n in (31, 61)]
    want = [alone(r) for r in ask]
    async with peer(limits=tight) as a, peer(limits=tight) as b:
        sinks = [b.ask(r, a.source) for r in ask]
        await ended(*sinks)
        assert [sink.tokens for sink in sinks] == [one.tokens for one in want]
        await a.vacant()
        await b.vacant()
        assert b.counters.sources_lost == {}
        assert b.counters.recomputed == 0
        assert set(b.counters.bytes) == {"memory" if memory else "grpc"}


async def test_what_is_cached_on_either_side_is_not_sent() -> None:
    async with peer() as a, peer(block_size=8) as b:
        first = b.ask(request("first", 40), a.source)
        await ended(first)
        sent = a.counters.sent_runs
        longer = request("first", 40)
        longer = Request(RequestId("longer"), (*longer.prompt_ids, 5, 6, 7), longer.params)
        second = b.ask(longer, a.source)
        await ended(second)
        assert second.tokens == alone(longer).tokens
        assert a.counters.sent_runs - sent == 3, "one run of three positions for each layer"
        await a.vacant()
        await b.vacant()


async def test_log_probabilities_come_once_and_in_order() -> None:
    for params in ({"logprobs": 0}, {"prompt_logprobs": 0}, {"logprobs": 0, "prompt_logprobs": 0}):
        ask = request("scored", 30, **params)
        want = alone(ask)
        async with peer() as a, peer() as b:
            sink = b.ask(ask, a.source)
            await ended(sink)
            assert sink.tokens == want.tokens
            assert sink.scores == want.scores
            assert [e.logprobs for e in sink.events if e.token_ids] == [
                e.logprobs for e in want.events if e.token_ids
            ]
            assert b.counters.fetched == 30


async def test_one_token_needs_no_kv() -> None:
    async with peer() as a, peer() as b:
        sink = b.ask(request(max_tokens=1), a.source)
        await ended(sink)
        assert sink.tokens == alone(request(max_tokens=1)).tokens
        assert sink.last.finish is FinishReason.LENGTH
        assert b.house.histories == []
        await a.vacant()
        await b.vacant()


async def test_an_answer_goes_on_where_it_was() -> None:
    ask = request("resumed", 21, max_tokens=9)
    want = alone(ask).tokens
    async with peer() as a, peer() as b:
        sink = b.ask(ask, a.source, output_ids=tuple(want[:4]))
        await ended(sink)
        assert want[:4] + sink.tokens == want
        assert b.counters.fetched == 25


async def test_a_source_that_is_not_there_is_passed_over() -> None:
    ask = request()
    want = alone(ask).tokens
    async with peer() as a, peer("other model") as stranger, peer() as b:
        gone = KvSource("127.0.0.1:1")
        for sources in (
            (gone, a.source),
            (stranger.source, a.source),
            (KvSource("no address"), a.source),
            (gone, stranger.source),
        ):
            sink = b.ask(ask, *sources)
            await ended(sink)
            assert sink.tokens == want
            await b.vacant()
        assert b.counters.sources_lost == {"unreachable": 2, "refused": 2, "wrong": 1}
        assert b.counters.recomputed > 0
        await a.vacant()
        await stranger.vacant()


async def test_a_source_that_refuses_or_fails_is_passed_over() -> None:
    ask = request()
    want = alone(ask).tokens
    async with peer() as a, peer() as b:
        a.house.refusal = ExhaustedError("64 requests are waiting")
        sink = b.ask(ask, a.source)
        await ended(sink)
        assert sink.tokens == want
        assert b.counters.sources_lost == {"refused": 1}
        a.house.refusal = None
        a.house.go.clear()
        sink = b.ask(request("b"), a.source)
        await until(lambda: bool(a.house.waiting))
        for name in list(a.house.waiting):
            a.house.abort(name, FinishReason.ERROR)
        await ended(sink)
        assert sink.tokens == alone(request("b")).tokens
        await a.vacant()
        await b.vacant()


async def test_a_source_that_makes_nothing_is_given_up() -> None:
    async with peer() as a, peer() as b:
        a.house.go.clear()
        began = time.monotonic()
        sink = b.ask(request(), a.source)
        await ended(sink)
        assert time.monotonic() - began < 8
        assert sink.tokens == alone(request()).tokens
        assert b.counters.sources_lost == {"late": 1}
        a.house.go.set()
        await a.vacant()
        await b.vacant()


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.ABORT])
async def test_what_is_aborted_leaves_nothing_on_either_side(reason: FinishReason) -> None:
    async with peer(step_s=0.02, chunk=4) as a, peer() as b:
        for steps in (0, 1, 3, 6):
            before = a.house.steps
            ask = request(f"x{steps}", 60)
            sink = b.ask(ask, a.source)
            with pytest.raises(InvalidRequestError, match="in use"):
                b.ask(ask, a.source)
            await until(lambda before=before, steps=steps: a.house.steps >= before + steps)
            b.arrivals.abort(ask.id, reason)
            await ended(sink)
            assert sink.last.finish is reason
            await a.vacant()
            await b.vacant()
        assert b.counters.sources_lost == {}


async def test_a_deadline_ends_what_has_not_arrived() -> None:
    async with peer() as a, peer() as b:
        a.house.go.clear()
        ask = Request(
            RequestId("late"), (1, 2, 3), SamplingParams(), deadline=time.monotonic() + 0.3
        )
        sink = b.ask(ask, a.source)
        await ended(sink)
        assert sink.last.finish is FinishReason.DEADLINE
        a.house.go.set()
        await a.vacant()
        await b.vacant()


async def test_who_finds_no_room_waits_in_turn() -> None:
    async with peer(blocks=300) as a, peer(blocks=24, step_s=0.01) as b:
        asked = [request(f"r{i}", 60, max_tokens=8) for i in range(6)]
        sinks = [b.ask(r, a.source) for r in asked]
        await ended(*sinks)
        for sink, r in zip(sinks, asked, strict=True):
            assert sink.tokens == alone(r).tokens
        assert b.counters.fetched == 6 * 60
        await a.vacant()
        await b.vacant()


async def test_salts_do_not_mix() -> None:
    ask = request()
    salted = Request(ask.id, ask.prompt_ids, ask.params, scope=CacheScope("tenant"))
    async with peer() as a, peer() as b:
        for one in (ask, salted):
            sink = b.ask(one, a.source)
            await ended(sink)
            assert sink.tokens == alone(ask).tokens
        assert b.counters.fetched == 60


async def test_a_running_request_moves() -> None:
    for params in ({}, {"logprobs": 0}):
        ask = request("moves", 30, max_tokens=40, **params)
        want = alone(ask)
        async with peer(step_s=0.01) as a, peer(block_size=6) as b:
            stays = a.ask(ask)
            await until(lambda stays=stays: len(stays.tokens) >= 5)
            known = tuple(stays.tokens)
            running = KvSource(a.source.address, running="moves")
            moved = b.ask(ask, running, output_ids=known, moved=True)
            await ended(stays, moved)
            assert stays.returned
            assert len(stays.tokens) < 40
            assert [*known, *moved.tokens] == want.tokens
            assert stays.tokens == want.tokens[: len(stays.tokens)]
            assert a.counters.handed == 1
            assert b.counters.sources_lost == {}
            assert b.counters.fetched >= 30 + len(known) - 1
            assert b.house.computed <= 40 - len(known) + (1 if params else 0)
            await a.vacant()
            await b.vacant()


@pytest.mark.parametrize("stale", [0, 5, 60])
async def test_what_a_running_request_makes_meanwhile_leaves_before_it_stops(stale: int) -> None:
    """Whoever fetches knows of few of its tokens."""
    ask = request("moves", 30, max_tokens=200, ignore_eos=True)
    want = alone(ask, blocks=256)
    async with peer(step_s=0.01, blocks=256) as a, peer(block_size=6, blocks=256) as b:
        stays = a.ask(ask)
        await until(lambda: len(stays.tokens) >= stale + 5)
        known = tuple(stays.tokens[:5])
        running = KvSource(a.source.address, running="moves")
        moved = b.ask(ask, running, output_ids=known, moved=True)
        await ended(stays, moved)
        assert stays.returned
        assert [*known, *moved.tokens] == want.tokens
        assert a.counters.handed == 1
        assert bool(a.counters.rounds) or stale < a.house.block_size
        assert a.counters.last_positions < stale or stale < 2 * a.house.block_size
        assert b.counters.sources_lost == {}
        assert b.counters.fetched >= 30 + 5 + stale - 1
        await a.vacant()
        await b.vacant()


async def test_the_engine_has_a_request_before_its_source_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who aborts it meanwhile reaches the engine."""
    said, send = asyncio.Event(), ReceiverCall._send

    async def late(call: ReceiverCall, message: pb.ToSource) -> None:
        if message.WhichOneof("what") == "done":
            said.set()
            await asyncio.sleep(WAIT_S)
        await send(call, message)

    monkeypatch.setattr(ReceiverCall, "_send", late)
    limits = replace(QUICK, first_s=10.0, progress_s=10.0, whole_s=20.0)
    async with peer(limits=limits) as a, peer(limits=limits, step_s=0.02, blocks=200) as b:
        sink = b.ask(request(max_tokens=500), a.source)
        await asyncio.wait_for(said.wait(), WAIT_S)
        await until(lambda: len(sink.tokens) > 2)
        b.arrivals.abort(RequestId("a"))
        await ended(sink)
        assert sink.last.finish is FinishReason.ABORT
        await a.vacant()
        await b.vacant()


async def test_a_running_request_that_is_not_there_is_computed() -> None:
    async with peer() as a, peer() as b:
        sink = b.ask(request(), KvSource(a.source.address, running="nobody"))
        await ended(sink)
        assert sink.tokens == alone(request()).tokens
        assert b.counters.sources_lost == {"refused": 1}
