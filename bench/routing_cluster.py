"""A cluster of prefill and decode members in simulated time, for comparing routing policies.

Prefill members compute one prompt after the other at a fixed rate; what of a prompt lies in their
cache, or in the cache pool if there is one, is not computed, but what comes from the pool travels.
Decode members make a token for each request with every step, which takes a base and so much for
each request; a request waits where its KV does not fit. Members report twice a second, and a
gateway routes by what was reported and by what it has sent itself, as the real one does.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from homes.traces import TracedRequest

from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms
from moeserve.pools.routing.base import RouteWanted, RoutingPolicy
from moeserve.pools.routing.loads import LoadTable
from moeserve.pools.routing.router import note

REPORT_S = 0.5
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second of prefill; seconds of a step; bytes of a token's KV, and per second of
    their way; tokens of KV that a member has room for."""

    prefill_rate: float = 8000.0
    step_base: float = 0.012
    step_per_request: float = 0.0004
    kv_bytes: int = 70_000
    link: float = 10e9
    kv_tokens: int = 400_000

    def step(self, batch: int) -> float:
        return self.step_base + self.step_per_request * batch


@dataclass(slots=True)
class Outcome:
    """Seconds; ``computed`` of the prompt's tokens were."""

    ttft: float = 0.0
    tpot: float = 0.0
    computed: int = 0


@dataclass(slots=True)
class Decoding:
    number: int
    left: float
    tokens: int
    began: float


class PageCache:
    """The pages that were used last, of so many tokens."""

    def __init__(self, tokens: int, page_tokens: int) -> None:
        self._most = tokens // page_tokens
        self._pages: OrderedDict[bytes, None] = OrderedDict()

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first pages are here."""
        for i, key in enumerate(keys):
            if key not in self._pages:
                return i
        return len(keys)

    def put(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # the first pages of a prompt are the last to go
            self._pages[key] = None
            self._pages.move_to_end(key)
        while len(self._pages) > self._most:
            self._pages.popitem(last=False)


class PrefillMember:
    """One prompt after the other. ``jobs`` are (when it is done, tokens)."""

    def __init__(self, name: str, speeds: Speeds, page_tokens: int) -> None:
        terms = ServedTerms(block_size=BLOCK, kv_bytes_per_token=speeds.kv_bytes)
        self.member = Member(name, name, Role.PREFILL, "127.0.0.1:80", terms=terms)
        self.cache = PageCache(speeds.kv_tokens, page_tokens)
        self._speeds = speeds
        self._free_at = 0.0
        self._jobs: deque[tuple[float, int]] = deque()

    def take(self, tokens: int, extra_s: float, now: float) -> float:
        """When it is done."""
        self._free_at = max(now, self._free_at) + tokens / self._speeds.prefill_rate + extra_s
        self._jobs.append((self._free_at, tokens))
        return self._free_at

    def load(self, sequence: int, now: float) -> MemberLoad:
        while self._jobs and self._jobs[0][0] <= now:
            self._jobs.popleft()
        waiting = 0
        if self._jobs:
            end, tokens = self._jobs[0]
            first = min(tokens, int((end - now) * self._speeds.prefill_rate))
            waiting = first + sum(t for _, t in self._jobs) - tokens
        return MemberLoad(
            sequence,
            waiting=len(self._jobs),
            waiting_tokens=waiting,
            prefill_rate=self._speeds.prefill_rate,
        )


class DecodeMember:
    """All at once; who does not fit waits."""

    def __init__(self, name: str, speeds: Speeds) -> None:
        terms = ServedTerms(block_size=BLOCK, kv_bytes_per_token=speeds.kv_bytes)
        self.member = Member(name, name, Role.DECODE, "127.0.0.1:80", terms=terms)
        self.running: list[Decoding] = []
        self.waiting: deque[Decoding] = deque()
        self._speeds = speeds
        self._used = 0
        self._at = 0.0
        self._coming = 0

    def expect(self) -> None:
        """A request is here whose KV comes later."""
        self._coming += 1

    def take(self, request: Decoding) -> None:
        """After ``advance``."""
        self._coming -= 1
        self.waiting.append(request)
        self._admit()

    def advance(self, now: float) -> list[Decoding]:
        """Who has ended by now."""
        made = (now - self._at) / self._speeds.step(len(self.running))
        self._at = now
        ended = []
        for request in self.running:
            request.left -= made
            if request.left <= 1e-6:
                ended.append(request)
                self._used -= request.tokens
        if ended:
            self.running = [r for r in self.running if r.left > 1e-6]
            self._admit()
        return ended

    def next_end(self) -> float | None:
        if not self.running:
            return None
        left = min(r.left for r in self.running)
        return self._at + max(0.0, left) * self._speeds.step(len(self.running))

    def load(self, sequence: int) -> MemberLoad:
        return MemberLoad(
            sequence,
            running=len(self.running),
            waiting=len(self.waiting) + self._coming,
            free_blocks=(self._speeds.kv_tokens - self._used) // BLOCK,
            total_blocks=self._speeds.kv_tokens // BLOCK,
            step_s=self._speeds.step(len(self.running)),
        )

    def _admit(self) -> None:
        room = self._speeds.kv_tokens
        while self.waiting and self._used + self.waiting[0].tokens <= room:
            request = self.waiting.popleft()
            self._used += request.tokens
            self.running.append(request)


class SimulatedCluster:
    """``pool`` is the cache pool, if there is one."""

    def __init__(
        self,
        policy: RoutingPolicy,
        speeds: Speeds,
        prefill: Sequence[PrefillMember],
        decode: Sequence[DecodeMember],
        page_tokens: int,
        pool: PageCache | None = None,
    ) -> None:
        self._policy = policy
        self._speeds = speeds
        self._prefill = {m.member.id: m for m in prefill}
        self._decode = {m.member.id: m for m in decode}
        self._page_tokens = page_tokens
        self._pool = pool
        self._table = LoadTable()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ties = count()
        self._looks = dict.fromkeys(self._decode, 0)  # of which the newest counts
        self._sequence = 0

    def run(self, requests: Sequence[tuple[float, TracedRequest]]) -> list[Outcome]:
        """Requests with their arrivals, until all have ended."""
        self._requests = [traced for _, traced in requests]
        self._outcomes = [Outcome() for _ in requests]
        self._left = len(requests)
        self._report(0.0)
        for number, (arrival, _) in enumerate(requests):
            self._at(arrival, partial(self._arrive, number))
        while self._left:
            now, _, call = heapq.heappop(self._events)
            call(now)
        return self._outcomes

    def _at(self, when: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._ties), call))

    def _report(self, now: float) -> None:
        self._sequence += 1
        loads = [Report(m.member, m.load(self._sequence, now)) for m in self._prefill.values()]
        loads += [Report(m.member, m.load(self._sequence)) for m in self._decode.values()]
        self._table.update(loads, now)
        self._at(now + REPORT_S, self._report)

    def _arrive(self, number: int, now: float) -> None:
        traced = self._requests[number]
        wanted = self._wanted(traced)
        route = self._policy.choose(wanted, self._table, now)
        assert route is not None and route.prefill is not None
        self._policy.note(wanted, route)
        note(self._table, wanted, route, now)
        prefill = self._prefill[route.prefill.id]
        computed, extra_s = self._hits(prefill, wanted)
        done = prefill.take(computed, extra_s, now)
        self._outcomes[number].ttft, self._outcomes[number].computed = done - now, computed
        request = Decoding(number, traced.answer, traced.prompt + traced.answer, done)
        way_s = traced.prompt * self._speeds.kv_bytes / self._speeds.link
        self._decode[route.decode.id].expect()
        self._at(done + way_s, partial(self._begin, route.decode.id, request))

    def _begin(self, member_id: str, request: Decoding, now: float) -> None:
        self._advance(member_id, now)
        self._decode[member_id].take(request)
        self._look_later(member_id)

    def _advance(self, member_id: str, now: float) -> None:
        for request in self._decode[member_id].advance(now):
            outcome, answer = self._outcomes[request.number], self._requests[request.number].answer
            outcome.tpot = (now - request.began) / max(1, answer - 1)
            self._left -= 1

    def _look_later(self, member_id: str) -> None:
        """When the next request ends there, if nothing comes before."""
        when = self._decode[member_id].next_end()
        if when is not None:
            self._looks[member_id] += 1
            self._at(when, partial(self._look, member_id, self._looks[member_id]))

    def _look(self, member_id: str, number: int, now: float) -> None:
        if number == self._looks[member_id]:
            self._advance(member_id, now)
            self._look_later(member_id)

    def _wanted(self, traced: TracedRequest) -> RouteWanted:
        pages = traced.blocks[: traced.prompt // self._page_tokens]
        keys = tuple(block.to_bytes(8, "little") for block in pages)
        return RouteWanted(traced.prompt, traced.answer, traced.answer, keys, self._page_tokens)

    def _hits(self, member: PrefillMember, wanted: RouteWanted) -> tuple[int, float]:
        """Tokens that have to be computed, and seconds in which others come from the pool."""
        here = member.cache.prefix(wanted.keys)
        found = max(here, self._pool.prefix(wanted.keys)) if self._pool is not None else here
        member.cache.put(wanted.keys)
        if self._pool is not None:
            self._pool.put(wanted.keys)
        came = (found - here) * self._page_tokens * self._speeds.kv_bytes / self._speeds.link
        return max(1, wanted.prompt_tokens - found * self._page_tokens), came
