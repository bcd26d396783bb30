"""What strangers send to a server of four ranks, all kinds one after the other: each is refused,
and nobody else notices. ``tests/tools/attack.py`` sends it and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ATTACK = Path(__file__).parents[1] / "tools" / "attack.py"
PATIENCE_S = 400
MB = 1 << 20
# Of four ranks and their workers: heaps that have grown once, and the texts' workers, which stay
# for a minute.
MOST_GROWTH = 600 * MB
MOST_MORE_DESCRIPTORS = 40
REFUSED = {
    "4 MB of text": {"400", "413"},
    "15 MB of lists": {"400", "413"},
    "2,000,000 ids": {"400", "413"},
    "600 KB of chat": {"400"},
    "a regex of regexes": {"200", "400"},  # followed, where it takes no more than grammars may
    "a trickled body": {"left"},
    "another site": {"403", "421"},
}

pytestmark = [pytest.mark.long, pytest.mark.timeout(450)]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, ATTACK, "--ep", "4", "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_each_attack_is_refused_and_others_are_served_right(
    report: dict[str, Any], subtests: pytest.Subtests
) -> None:
    assert {a["name"] for a in report["attacks"]} == {*REFUSED, "idle sockets", "2,000 calls"}
    for attack in report["attacks"]:
        with subtests.test(attack["name"]):
            assert attack["wrong"] == []
            assert attack["right"] >= 1
            assert attack["health"] >= 3
            if attack["name"] in REFUSED:
                assert set(attack["answered"]) <= REFUSED[attack["name"]]


def test_beside_idle_sockets_both_doors_answer(report: dict[str, Any]) -> None:
    (idle,) = (a for a in report["attacks"] if a["name"] == "idle sockets")
    assert idle["answered"]["200"] == idle["answered"]["grpc demo"] == 1


def test_calls_beyond_what_is_taken_are_refused_with_a_detail(report: dict[str, Any]) -> None:
    (calls,) = (a for a in report["attacks"] if a["name"] == "2,000 calls")
    assert calls["answered"].pop("bare", 0) == 0
    assert set(calls["answered"]) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert sum(calls["answered"].values()) == 2000
    assert calls["answered"]["OK"] >= 1
    assert calls["answered"]["RESOURCE_EXHAUSTED"] >= 1


def test_memory_and_descriptors_are_given_back(report: dict[str, Any]) -> None:
    assert report["rss"][1] - report["rss"][0] < MOST_GROWTH
    assert report["descriptors"][1] - report["descriptors"][0] <= MOST_MORE_DESCRIPTORS


def test_it_ends_as_it_is_told_and_leaves_nothing(report: dict[str, Any]) -> None:
    assert (report["status"], report["left"]) == (0, [])
    assert "Traceback" not in report["log"]
