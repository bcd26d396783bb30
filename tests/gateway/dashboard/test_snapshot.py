"""What a snapshot says, and what it keeps to itself."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from moeserve.gateway.dashboard.history import Attainment
from moeserve.gateway.dashboard.snapshot import (
    HEAT_UNIT,
    MOST_FLOWS,
    MOST_MEMBERS,
    ExpertLoads,
    Flow,
    Snapshot,
    heat_of,
    with_rates,
)
from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms


def snapshot(**fields: Any) -> Snapshot:
    empty: dict[str, Any] = {
        "time": 1.0,
        "uptime_s": 2.0,
        "model": "tiny",
        "state": "ready",
        "streams": 0,
        "members": (),
        "flows": (),
        "attainment": Attainment(60, 1.0, 0.1),
        "points": (),
    }
    return Snapshot(**(empty | fields))


def report(number: int, role: Role = Role.DECODE) -> Report:
    terms = ServedTerms("tiny", folder="/secret/place")
    member = Member(f"m{number}", "here", role, "h:1", server_name="internal", terms=terms)
    return Report(member, MemberLoad(running=number, free_blocks=3, total_blocks=8))


def test_a_member_is_shown_without_what_only_peers_need() -> None:
    text = snapshot(members=(report(4),)).to_json()
    (member,) = json.loads(text)["members"]
    assert member["role"] == "decode"
    assert (member["running"], member["free_blocks"], member["total_blocks"]) == (4, 3, 8)
    assert "secret" not in text and "internal" not in text


def test_what_is_sent_is_bounded() -> None:
    many = snapshot(
        members=tuple(map(report, range(MOST_MEMBERS + 5))),
        flows=tuple(Flow(f"{n}", "x", n, n) for n in range(MOST_FLOWS + 5)),
    )
    shown = json.loads(many.to_json())
    assert len(shown["members"]) == MOST_MEMBERS
    assert len(shown["flows"]) == MOST_FLOWS
    assert shown["member_count"] == MOST_MEMBERS + 5
    assert shown["flow_count"] == MOST_FLOWS + 5


def test_a_number_that_json_has_not_is_left_out() -> None:
    odd = snapshot(counts={"steps": 3, "paused_s": float("nan"), "read": float("inf")})
    assert json.loads(odd.to_json())["counts"] == {"steps": 3}


def test_rates_are_of_what_moved_since_the_snapshot_before() -> None:
    before = [Flow("a", "b", 1000, 10), Flow("a", "c", 500, 5)]
    now = [Flow("a", "b", 3000, 30), Flow("a", "c", 100, 1), Flow("d", "b", 700, 7)]
    assert [f.bytes_per_s for f in with_rates(before, now, 2.0)] == [1000.0, 50.0, 0.0]
    assert [f.bytes_per_s for f in with_rates(before, now, 0.0)] == [0.0, 0.0, 0.0]


def test_heat_is_the_load_over_the_mean_of_its_layer() -> None:
    loads_LE = np.array([[4, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.int64)
    heat = heat_of(ExpertLoads((1, 2, 5), loads_LE))
    cells = np.frombuffer(base64.b64decode(heat["cells"]), np.uint8).reshape(3, 4)
    assert (cells * HEAT_UNIT).tolist() == [[4, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert heat["balance"] == [4.0, 1.0, 1.0]
    assert (heat["layers"], heat["experts"], heat["choices"]) == ([1, 2, 5], 4, 8)


def test_a_load_beyond_the_scale_stays_in_its_byte() -> None:
    loads_LE = np.zeros((1, 256), np.int64)
    loads_LE[0, 7] = 1_000_000
    heat = heat_of(ExpertLoads((0,), loads_LE))
    assert max(base64.b64decode(heat["cells"])) == 255
    assert heat["balance"] == [256.0]
