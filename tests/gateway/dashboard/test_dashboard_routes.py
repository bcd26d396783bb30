"""The dashboard of a real server, over real sockets."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moeserve.gateway.dashboard.routes import FILES
from moeserve.pools.members import Role

FOLDER = Path(__file__).resolve().parents[3] / "moeserve/gateway/dashboard"
KEY = {"authorization": "Bearer sesame-sesame"}


def snapshots(client: httpx.Client, count: int, **request: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with client.stream("GET", "/dashboard/events", **request) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if len(found) == count:
                    break
    return found


def test_a_server_shows_itself(house: Any) -> None:
    (shown,) = snapshots(house.http, 1)
    (member,) = shown["members"]
    assert (shown["model"], shown["state"]) == ("tiny", "ready")
    assert member["role"] == Role.UNIFIED
    assert member["address"] == house.url.removeprefix("http://")
    assert member["total_blocks"] == 512
    assert shown["flows"] == [] and shown["experts"] is None
    assert shown["counts"]["steps"] >= 0


def test_what_clients_do_is_counted(house: Any) -> None:
    (before,) = snapshots(house.http, 1)
    house.tokens([1, 2, 3], 5)

    def counted() -> tuple[int, int]:
        (found,) = snapshots(house.http, 1)
        return found["attainment"]["requests"], found["counts"]["generated_tokens"]

    requests, tokens = before["attainment"]["requests"], before["counts"]["generated_tokens"]
    house.eventually(lambda: counted() == (requests + 1, tokens + 5), "one more ended")
    (after,) = snapshots(house.http, 1)
    assert after["attainment"]["good"] <= after["attainment"]["requests"]


def test_a_viewer_that_leaves_is_forgotten(house: Any) -> None:
    snapshots(house.http, 1)
    feed = house.server.dashboard.feed
    house.eventually(lambda: feed.viewers == 0, "nobody watches")
    made = feed.made
    snapshots(house.http, 1)
    assert feed.made > made


def test_a_viewer_that_reads_nothing_holds_up_nobody(house: Any) -> None:
    host, port = house.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as dead:
        dead.sendall(f"GET /dashboard/events HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n".encode())
        assert len(snapshots(house.http, 2)) == 2
    house.eventually(lambda: house.server.dashboard.feed.viewers == 0, "nobody watches")


@pytest.mark.parametrize("path", FILES)
def test_the_page_may_load_nothing_but_its_own_files(house: Any, path: str) -> None:
    answer = house.http.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    addresses = re.findall(r"""(?:src|href)="([^"]+)"|https?://[^\s"'`]+""", answer.text)
    assert set(addresses) <= {"/dashboard/page.css", "/dashboard/page.js", "data:,", ""}


def test_the_script_never_makes_markup_of_text() -> None:
    script = (FOLDER / "page.js").read_text()
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert name not in script


def test_pages_of_others_may_not_read_it(house: Any) -> None:
    strange = {"origin": "https://evil.example"}
    assert house.http.get("/dashboard/events", headers=strange).status_code == 403
    assert house.http.get("/dashboard", headers={"host": "evil.example"}).status_code == 403


def test_experts_are_counted_where_that_is_asked_for(
    house: Any, tiny: Path, open_house: Callable[..., Any]
) -> None:
    prompt, made = [7, 8, 9, 10], 6
    with open_house(tiny, num_blocks=64, count_experts=True) as counting:
        found, same = (one.tokens(prompt, made, temperature=0) for one in (counting, house))
        assert found == same
        (shown,) = snapshots(counting.http, 1)
    heat = shown["experts"]
    # Two of the three layers have 16 experts, of which each token uses four; the last token is
    # not computed.
    assert (len(heat["layers"]), heat["experts"]) == (2, 16)
    assert heat["choices"] == 2 * 4 * (len(prompt) + made - 1)


@pytest.fixture(scope="module")
def locked(tiny: Path, open_house: Callable[..., Any]) -> Iterator[Any]:
    with open_house(tiny, num_blocks=64, api_key="sesame-sesame") as house:
        yield house


def test_without_a_key_there_is_a_page_that_says_nothing(locked: Any) -> None:
    assert locked.http.get("/dashboard").status_code == 200
    refused = locked.http.get("/dashboard/events")
    assert refused.status_code == 401
    assert "members" not in refused.text
    assert len(snapshots(locked.http, 1, headers=KEY)) == 1


def test_a_server_that_stops_ends_its_viewers(tiny: Path, open_house: Callable[..., Any]) -> None:
    ended: list[bool] = []
    with open_house(tiny, num_blocks=64, grpc_port=None) as house:
        watching = threading.Event()

        def watch() -> None:
            with httpx.stream("GET", f"{house.url}/dashboard/events", timeout=60) as answer:
                for _ in answer.iter_lines():
                    watching.set()
            ended.append(True)

        viewer = threading.Thread(target=watch)
        viewer.start()
        assert watching.wait(60)
    viewer.join(60)
    assert ended == [True]
