"""The page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeserve.pools.members import Role

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
PHONE = {"viewport": {"width": 360, "height": 740}}


def test_a_cluster_is_shown_and_said_in_words(stage: Any, new_window: Callable[..., Any]) -> None:
    window = new_window()
    window.watch(stage.url)
    assert "6 members" in window.text("summary")
    assert "2 prefill, 2 decode, 2 cache" in window.text("map-says")
    assert "Of the 2 requests" in window.text("slo-says")
    assert "1 met both" in window.text("slo-says")
    assert "3 MoE layers" in window.text("heat-says")
    pools = window.text("pools")
    for said in ("prefill-0", "10.0.0.1:7000", "draining", "900 MiB of 2.0 GiB", "1,235 tok/s"):
        assert said in pools
    assert window.page.locator("#map rect").count() == 6
    assert window.page.locator("#map path.flow").count() == 4
    window.until("document.querySelectorAll('#map path.moving').length === 4")
    assert window.complaints == []
    assert all(url.startswith((stage.url, "data:")) for url in window.asked), window.asked


def test_hostile_names_stay_names(stage: Any, new_window: Callable[..., Any]) -> None:
    stage.cluster.names = dict.fromkeys(Role, HOSTILE)
    window = new_window()
    window.watch(stage.url)
    assert HOSTILE in window.text("pools")
    assert window.page.locator("main script, main img").count() == 0
    assert window.page.title() == "moeserve dashboard"
    assert window.complaints == []


def test_it_comes_back_by_itself_after_the_server_was_away(
    stage: Any, new_window: Callable[..., Any]
) -> None:
    window = new_window()
    window.watch(stage.url)
    stage.close()
    window.until("document.getElementById('link').textContent.includes('trying again')")
    stage.cluster.names[Role.DECODE] = "renewed"
    stage.open()
    window.until("document.getElementById('link').textContent === 'live'")
    assert "renewed-1" in window.text("pools")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_a_phone(stage: Any, new_window: Callable[..., Any], scheme: str) -> None:
    window = new_window(color_scheme=scheme, **PHONE)
    window.watch(stage.url)
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = window.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, ground[4:-1].split(","))) > 128) == (scheme == "light")


def test_every_picture_has_words_and_every_table_heads(
    stage: Any, new_window: Callable[..., Any]
) -> None:
    window = new_window()
    window.watch(stage.url)
    unnamed = """[...document.querySelectorAll('[role=img]')].filter((picture) => {
        const words = document.getElementById(picture.getAttribute('aria-labelledby'));
        return !words || !words.textContent.trim();
    }).length"""
    assert window.page.evaluate(unnamed) == 0
    assert window.page.evaluate("document.querySelectorAll('table:not(:has(th))').length") == 0
    assert window.page.evaluate("document.documentElement.lang") == "en"
    headed = "[...document.querySelectorAll('section')].every((s) => s.querySelector('h2'))"
    assert window.page.evaluate(headed)


def test_without_counted_experts_it_says_how_to_count(
    stage: Any, new_window: Callable[..., Any]
) -> None:
    stage.cluster.heat = None
    window = new_window()
    window.watch(stage.url)
    assert "--count-experts" in window.text("heat-says")
    assert not window.page.locator("#heat").is_visible()


def test_numbers_move_while_a_stream_runs(house: Any, new_window: Callable[..., Any]) -> None:
    window = new_window()
    window.watch(house.url)
    assert window.text("tile-running") == "0"
    threads = [threading.Thread(target=house.tokens, args=([1, n], 480)) for n in range(32)]
    for thread in threads:
        thread.start()
    window.until("document.getElementById('tile-running').textContent !== '0'")
    for thread in threads:
        thread.join()
    window.until("document.getElementById('tile-running').textContent === '0'")
    window.until("document.getElementById('slo-says').textContent.includes('requests')")
    made = "document.getElementById('rate-says').textContent.match(/at most ([0-9.,]+)/)"
    window.until(f"({made} ?? ['', '0'])[1] !== '1.0'")
    assert window.complaints == []


def test_a_key_is_asked_for_and_kept(
    tiny: Path, open_house: Callable[..., Any], new_window: Callable[..., Any]
) -> None:
    with open_house(tiny, num_blocks=64, grpc_port=None, api_key="sesame-sesame") as house:
        window = new_window()
        window.page.goto(f"{house.url}/dashboard")
        window.page.locator("#key").fill("wrong-key")
        window.page.locator("#ask button").click()
        window.page.locator("#key").fill("sesame-sesame")
        window.page.locator("#ask button").click()
        window.until("document.getElementById('link').textContent === 'live'")
        window.page.reload()
        window.until("document.getElementById('link').textContent === 'live'")
        assert not window.page.locator("#ask").is_visible()
