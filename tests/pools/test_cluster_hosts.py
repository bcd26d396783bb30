"""A cluster on four hosts, whose links are cut and made slow: every answer is that of one process,
and nobody holds a block afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from cluster_parts import (
    STORY,
    Part,
    Parts,
    ask,
    ask_all,
    blocks_are_free,
    body,
    members,
    shown,
    until,
)

from moeserve.testbed.links import parse_rate
from moeserve.testbed.network import Bed, refusal

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

SECRET = "known to all hosts of this cluster"
# Its host, and with it the door of the gateway.
GATEWAY, PREFILL, DECODE, OTHER = range(4)


@dataclass
class Hosts:
    """A cluster on a bed; its gateway is asked from its own host."""

    bed: Bed
    parts: Parts

    @property
    def gateway(self) -> Part:
        return self.parts["g0"]

    def ask(self, bodies: list[dict[str, Any]]) -> list[list[Any]]:
        def one(fields: dict[str, Any]) -> list[Any]:
            with self.bed.inside(GATEWAY):
                return ask(self.gateway.url, fields)

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, bodies))

    def members(self, role: str, count: int) -> None:
        with self.bed.inside(GATEWAY):
            members(self.gateway, role, count)

    def shown(self, metric: str) -> float:
        with self.bed.inside(GATEWAY):
            return shown(self.gateway, metric)

    def blocks_are_free(self) -> None:
        with self.bed.inside(GATEWAY):
            blocks_are_free(self.gateway)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    parts = Parts()
    with Bed(4) as bed, contextlib.ExitStack() as held:
        held.callback(parts.close)

        def on(host: int) -> tuple[Any, dict[str, str]]:
            listen = {"listen": f"{bed.address(host)}:0", "cluster_secret": SECRET}
            return partial(bed.start, host), listen

        begin, settings = on(GATEWAY)
        parts.gateway("g0", settings.pop("listen"), begin, **settings)
        for host, role in ((PREFILL, "prefill"), (DECODE, "decode"), (OTHER, "decode")):
            begin, settings = on(host)
            # Where it listens, and by which of its names it is reached.
            settings |= {"listen": "0.0.0.0:0", "advertise": bed.name(host)}
            parts.peer(f"{role}-{host}", role, begin, **settings)
        begin, settings = on(OTHER)
        parts.peer("cache-0", "cache", begin, **settings)
        parts.ready()
        found = Hosts(bed, parts)
        found.members("prefill", 1)
        found.members("decode", 2)
        yield found


@pytest.fixture(scope="module")
def alone() -> Iterator[Part]:
    """One process by itself: what is right."""
    part = Part("alone", ["moeserve.cli", "serve"])
    yield part
    part.process.close()


def prompts(first: int, **fields: Any) -> list[dict[str, Any]]:
    """Half of them of several pages of the cache."""
    long = {"prompt": f"{STORY}, {first}. " * 6}
    return [body(i, **(long if i % 2 else {}), **fields) for i in range(first, first + 20)]


def test_answers_are_those_of_one_process(alone: Part, hosts: Hosts) -> None:
    assert hosts.ask(prompts(0)) == ask_all([alone.url], prompts(0))
    sent = hosts.shown("cluster_sent_with_sources_total")
    assert sent == 20
    received = hosts.bed.count(DECODE).received_bytes, hosts.bed.count(OTHER).received_bytes
    assert min(received) > 100_000, "KV did not cross the links"
    hosts.blocks_are_free()


def test_a_slow_link_makes_answers_late_and_not_wrong(alone: Part, hosts: Hosts) -> None:
    right = ask_all([alone.url], prompts(100))
    try:
        hosts.bed.set_rate(parse_rate("4mbit"), PREFILL)
        assert hosts.ask(prompts(100)) == right
    finally:
        hosts.bed.set_rate(None, PREFILL)
    hosts.blocks_are_free()


@pytest.mark.parametrize(
    ("host", "role", "there"), [(DECODE, "decode", 2), (PREFILL, "prefill", 1)]
)
def test_a_member_that_is_cut_off_is_not_waited_for(
    alone: Part, hosts: Hosts, host: int, role: str, there: int
) -> None:
    """Its requests go on elsewhere; once it is back it is a member again, and holds nothing."""
    asked = prompts(200 + 100 * host, max_tokens=120, ignore_eos=True)
    right = ask_all([alone.url], asked)
    lost = hosts.shown("cluster_lost_total")
    for _ in range(5):  # all it had may have ended before it was cut off
        cut_while_answering(hosts, asked, host, role, there, right)
        hosts.members(role, there)
        if role == "prefill" or hosts.shown("cluster_lost_total") > lost:
            break
    else:
        pytest.fail("it was never cut off with a request")
    hosts.blocks_are_free()
    assert hosts.ask(asked) == right


def cut_while_answering(
    hosts: Hosts, asked: list[dict[str, Any]], host: int, role: str, there: int, right: list[Any]
) -> None:
    sent = hosts.shown("cluster_sent_total")
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(hosts.ask, asked)
        try:
            until(lambda: hosts.shown("cluster_sent_total") >= sent + 6, "they are under way")
            hosts.bed.cut(host)
            hosts.members(role, there - 1)
            assert answers.result() == right
        finally:
            hosts.bed.mend(host)
