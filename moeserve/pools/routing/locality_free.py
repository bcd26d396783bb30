"""The least predicted finish, wherever KV lies: the default.

Requests go by load alone, for the KV of a prefix can be had from the cache pool or another member
about as fast from everywhere (CloudMatrix-Infer, arXiv 2506.12708: scheduling without KV locality).
"""

from __future__ import annotations

from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.choosing import Windows
from moeserve.pools.routing.least_finish import least_finish, look
from moeserve.pools.routing.loads import LoadTable
from moeserve.pools.routing.predict import ASSUMED, Assumed


class LocalityFree(RoutingPolicy):
    """``start`` differs between gateways."""

    def __init__(self, assumed: Assumed = ASSUMED, start: int = 0) -> None:
        self._assumed = assumed
        self._windows = Windows(start)

    def choose(self, wanted: RouteWanted, table: LoadTable, now: float) -> Route | None:
        rows = look(self._windows, wanted, table, now)
        return least_finish(wanted, rows, table, self._assumed, {})

    def note(self, wanted: RouteWanted, route: Route) -> None:
        """Nothing is remembered but by the table."""
