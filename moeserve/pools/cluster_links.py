"""What a gateway needs of the rest of a cluster: who is there, a route for each request, and links.

Links are made when they are first used, and closed when their member has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from moeserve.core import FinishReason, Request, RequestId
from moeserve.engine.ranks.rank_links import RankListener
from moeserve.engine.sequence import History
from moeserve.pools.members import Member, Report


class MemberLink(Protocol):
    """One member, such as ``RemoteLink``. The listener is never called from within ``submit`` and
    ``end``."""

    def submit(self, request: Request, history: History) -> None: ...

    def end(self, request_id: RequestId, reason: FinishReason) -> None: ...

    async def close(self) -> None:
        """Ends what is there: the listener hears of every request."""
        ...


class MembersSeen(Protocol):
    """Who is in the cluster, as far as this gateway knows (``registry.view``)."""

    def members(self) -> tuple[Report, ...]: ...


class MembersNews(Protocol):
    """What has changed: new members and new loads, and ids of those that have left."""

    @property
    def put(self) -> tuple[Report, ...]: ...

    @property
    def gone(self) -> tuple[str, ...]: ...


class PickedRoute(Protocol):
    """Who decodes a request, who prefills it if that is another, and who could instead."""

    @property
    def decode(self) -> Member: ...

    @property
    def prefill(self) -> Member | None: ...

    @property
    def alternates(self) -> tuple[Member, ...]: ...


class Router(Protocol):
    """Picks a route for ``request``, which has made ``made`` tokens, over members that are not in
    ``exclude``. None where there is none now."""

    def __call__(
        self, request: Request, made: int, exclude: frozenset[str], now: float, /
    ) -> PickedRoute | None: ...


class MemberLinks:
    """On the event loop's thread."""

    def __init__(self, connect: Callable[[Member, RankListener], MemberLink]) -> None:
        self._connect = connect
        self._links: dict[str, MemberLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def to(self, member: Member, listener: RankListener) -> MemberLink:
        link = self._links.get(member.id)
        if link is None:
            link = self._links[member.id] = self._connect(member, listener)
        return link

    def drop(self, member_ids: Iterable[str]) -> None:
        """Those members have left; what they still say is heard until their links are closed."""
        for member_id in member_ids:
            link = self._links.pop(member_id, None)
            if link is not None:
                task = asyncio.get_running_loop().create_task(link.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.drop(list(self._links))
        if self._closing:
            await asyncio.wait(self._closing)
