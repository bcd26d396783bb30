"""What a request wants of a route, what a route is, and what a policy does.

A policy is a pure function of the table, but for a cursor that spreads its choices: it reads no
clock, and waits for nothing. It never chooses a member that drains, is excluded, or computes with
another model, nor one that does not do what it is chosen for.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

from moeserve.errors import InvalidRequestError
from moeserve.pools.members import Member
from moeserve.pools.routing.loads import LoadTable


@dataclass(frozen=True, slots=True)
class RouteWanted:
    """``prompt_tokens`` are to be computed, with those that the request has made elsewhere;
    ``output_tokens`` are expected to come, and ``max_tokens`` may. ``keys`` are of the pages of the
    prompt, from the first on, each a digest of all tokens up to its end (``engine.blocks``), and a
    page is ``page_tokens`` long. ``priority`` above 0 is urgent (a request's own is below 0 then).
    ``compute_id`` is of ``members.ServedTerms``. InvalidRequestError for counts that mean nothing.
    """

    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    keys: tuple[bytes, ...] = ()
    page_tokens: int = 64
    priority: int = 0
    domain: str = ""
    compute_id: str = ""
    exclude: Set[str] = frozenset()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 0 or self.page_tokens < 1:
            raise InvalidRequestError(
                f"a route for {self.prompt_tokens} + {self.output_tokens} tokens in pages of "
                f"{self.page_tokens}: expected no negative counts, and pages of a token or more"
            )


@dataclass(frozen=True, slots=True)
class Route:
    """``decode`` has the request. ``prefill`` computes its prompt, None where ``decode`` does so;
    ``alternates`` could instead, best first. None of them is ``decode``."""

    decode: Member
    prefill: Member | None = None
    alternates: tuple[Member, ...] = ()


class RoutingPolicy(Protocol):
    def choose(self, wanted: RouteWanted, table: LoadTable, now: float) -> Route | None:
        """None where no member can decode it. ``now`` is by the clock of the table's updates."""
        ...

    def note(self, wanted: RouteWanted, route: Route) -> None:
        """The request goes there: for policies that remember."""
        ...
