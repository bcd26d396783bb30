"""Clusters of many shapes answer as one process does, also when the cache pool has the prompts, and
hold no block afterwards: ranks, block sizes and formats of KV differ, registries too."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cluster_parts import (
    STORY,
    Part,
    Parts,
    ask_all,
    blocks_are_free,
    body,
    members,
    shown,
    started_etcd,
    until,
)

from moeserve.pools.registry.base import LEASE_S

pytestmark = pytest.mark.long

PROMPTS = 24


@dataclass(frozen=True)
class Setup:
    """Settings of each member, by name; ``shared`` are of all of them, and of the one process."""

    members: dict[str, dict[str, str]]
    shared: dict[str, str] = field(default_factory=dict)
    etcd: bool = False


SETUPS = {
    "prefill has two ranks, etcd knows the members": Setup(
        {"prefill-0": {"ep": "2"}, "decode-0": {}}, etcd=True
    ),
    "decode has two ranks, KV is int8, block sizes differ": Setup(
        {"prefill-0": {"block_size": "32"}, "decode-0": {"ep": "2", "block_size": "8"}},
        {"kv_dtype": "int8", "num_blocks": "768"},
    ),
}


def bodies() -> list[dict[str, Any]]:
    """Half of them of several pages of the cache."""
    return [body(i, prompt=f"{STORY}, {i % 7}. " * 6) if i % 2 else body(i) for i in range(PROMPTS)]


def answers_of_one(settings: dict[str, str]) -> list[list[Any]]:
    part = Part("alone", ["moeserve.cli", "serve"], **settings)
    try:
        return ask_all([part.url], bodies())
    finally:
        part.process.close()


@contextmanager
def raised(setup: Setup, registry: str) -> Iterator[Parts]:
    """With a cache member and two gateways."""
    parts = Parts(registry=registry)
    try:
        for name in ("g0", "g1"):
            parts.gateway(name)
        parts.peer("cache-0", "cache")
        for name, settings in setup.members.items():
            parts.peer(name, name.partition("-")[0], **setup.shared, **settings)
        parts.ready()
        for role in ("prefill", "decode"):
            count = sum(int(s.get("ep", "1")) for n, s in setup.members.items() if role in n)
            for name in ("g0", "g1"):
                members(parts[name], role, count)
        yield parts
    finally:
        parts.close()


@pytest.mark.parametrize("name", SETUPS)
def test_answers_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    """Also while an etcd that has the members is away, for longer than their leases."""
    setup = SETUPS[name]
    if setup.etcd and shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    expected = answers_of_one(setup.shared)
    with ExitStack() as held:
        registry, etcd = "embedded", None
        if setup.etcd:
            registry, etcd = held.enter_context(started_etcd(tmp_path))
        parts = held.enter_context(raised(setup, registry))
        gateways = [parts["g0"], parts["g1"]]
        urls = [gateway.url for gateway in gateways]
        asked = 0
        end = time.monotonic()
        if etcd is not None:
            etcd.send_signal(signal.SIGSTOP)
            end += 2 * LEASE_S
        while asked < 2 or time.monotonic() < end:
            assert ask_all(urls, bodies()) == expected
            asked += 1
        if etcd is not None:
            etcd.send_signal(signal.SIGCONT)
        sent = sum(shown(g, "cluster_sent_total") for g in gateways)
        assert sent == asked * PROMPTS
        assert sum(shown(g, "cluster_sent_with_sources_total") for g in gateways) == sent
        stored = 'members_stored_bytes{role="cache"}'
        until(lambda: shown(gateways[0], stored) > 0, "the cache has pages")
        blocks_are_free(gateways[0])
