"""Several registries taken as one, so that none of them is needed: a member joins every one, and a
view holds whoever is in any.

Heartbeats and views treat each of its ``parts`` by itself, so one that is slow or away delays no
other. The calls here go to all at once, and succeed where one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence

from moeserve.errors import MoeserveError
from moeserve.pools.members import Report
from moeserve.pools.registry.base import EVERYTHING, Changes, Interest, Registry


class SeveralRegistries(Registry):
    """At least one."""

    def __init__(self, registries: Sequence[Registry]) -> None:
        assert registries
        self._parts = tuple(part for registry in registries for part in registry.parts())

    async def join(self, report: Report) -> None:
        await _any_of(part.join(report) for part in self._parts)

    async def renew(self, report: Report) -> None:
        await _any_of(part.renew(report) for part in self._parts)

    async def leave(self, member_id: str) -> None:
        await _any_of(part.leave(member_id) for part in self._parts)

    def watch(self, interest: Interest = EVERYTHING) -> AsyncGenerator[Changes, None]:
        """Of the first of them."""
        return self._parts[0].watch(interest)

    def parts(self) -> tuple[Registry, ...]:
        return self._parts

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in self._parts))


async def _any_of(calls: Iterable[Awaitable[None]]) -> None:
    """Waits for all; raises the first error where none succeeded."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    errors = [outcome for outcome in done if outcome is not None]
    for error in errors:
        if not isinstance(error, MoeserveError):
            raise error
    if len(errors) == len(done):
        raise errors[0]
