"""Requests to routes, for a gateway: makes of a request what a policy wants to know, and notes in
the table what was chosen, so that the next request sees it.

``on_change`` is for ``ClusterView.subscribe``. On one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moeserve.core import CacheScope, Request
from moeserve.engine.blocks import child_key, root_key
from moeserve.pools.members import Report
from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.loads import LoadTable, Sent

PAGE_TOKENS = 64
# How long answers are thought to be before any has ended.
_ANSWER_TOKENS = 256.0


class MembersChanged(Protocol):
    """``registry.view.ViewChange``."""

    @property
    def put(self) -> tuple[Report, ...]: ...

    @property
    def gone(self) -> tuple[str, ...]: ...


@dataclass(slots=True)
class RouterCounts:
    """Routes that were chosen, of these with another member for prefill; and how often there was
    none."""

    chosen: int = 0
    split: int = 0
    none: int = 0


class RequestRouter:
    """``compute_id`` is of the model that requests are for. ``use_keys`` where the policy wants the
    keys of prompts, which cost a hash of each. Answers are expected to be as long as they lately
    were (``on_answer``), for few requests use what they may."""

    def __init__(
        self,
        policy: RoutingPolicy,
        compute_id: str,
        *,
        use_keys: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = LoadTable()
        self.counts = RouterCounts()
        self._policy = policy
        self._compute_id = compute_id
        self._use_keys = use_keys
        self._clock = clock
        self._answer_tokens = _ANSWER_TOKENS

    def on_change(self, change: MembersChanged) -> None:
        self.table.remove(change.gone)
        self.table.update(change.put, self._clock())

    def on_answer(self, tokens: int) -> None:
        """A request has ended well with so many."""
        self._answer_tokens += (tokens - self._answer_tokens) / 64

    def __call__(
        self, request: Request, made: int, exclude: frozenset[str], now: float
    ) -> Route | None:
        """``made`` tokens have come already. ``now`` is by ``clock``."""
        wanted = RouteWanted(
            prompt_tokens=len(request.prompt_ids) + made,
            output_tokens=max(1, min(request.params.max_tokens, round(self._answer_tokens)) - made),
            max_tokens=request.params.max_tokens,
            keys=page_keys(request.prompt_ids, request.scope) if self._use_keys else (),
            page_tokens=PAGE_TOKENS,
            priority=-request.priority,
            domain=request.domain,
            compute_id=self._compute_id,
            exclude=exclude,
        )
        route = self._policy.choose(wanted, self.table, now)
        if route is None:
            self.counts.none += 1
            return None
        self.counts.chosen += 1
        self.counts.split += route.prefill is not None
        self._policy.note(wanted, route)
        note(self.table, wanted, route, now)
        return route


def note(table: LoadTable, wanted: RouteWanted, route: Route, now: float) -> None:
    """What the route brings to its members."""
    urgent = int(wanted.priority > 0)
    kept = wanted.prompt_tokens + wanted.output_tokens
    if route.prefill is None:
        table.note(route.decode.id, Sent(wanted.prompt_tokens, kept, 1, urgent), now)
        return
    table.note(route.decode.id, Sent(0, kept, 1, urgent), now)
    table.note(route.prefill.id, Sent(wanted.prompt_tokens, wanted.prompt_tokens), now)


def page_keys(
    token_ids: tuple[int, ...], scope: CacheScope, page_tokens: int = PAGE_TOKENS
) -> tuple[bytes, ...]:
    """Of the full pages, from the first on."""
    key, keys = root_key(scope), []
    for start in range(0, len(token_ids) - page_tokens + 1, page_tokens):
        key = child_key(key, token_ids[start : start + page_tokens])
        keys.append(bytes(key))
    return tuple(keys)
