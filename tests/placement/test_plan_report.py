"""The report of a plan: one page that needs nothing, says what is shown, and believes no file."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from moeserve.placement import cli
from moeserve.placement.heat_map import HeatMap, Scale, entries, figure, png
from moeserve.placement.tables import show

HOSTILE = "<script>document.title='owned'</script>"


@pytest.fixture
def trace(tmp_path: Path, topk) -> Path:
    path = tmp_path / "trace.npz"
    np.savez(path, topk_ids=topk(tokens=200, layers=2, experts=16, k=3), seq_lens=[10] * 20)
    return path


@pytest.fixture
def plan(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "plan.json"
    words = ("--devices", "4", "--nodes", "2", "--time-limit", "1", "--threads", "1")
    assert cli.main(["place", "solve", "--routing", str(trace), "--out", str(path), *words]) == 0
    capsys.readouterr()
    return path


def plotted(out: Path, plan: Path, *words: object) -> str:
    assert (
        cli.main(["place", "plot", "--plan", str(plan), "--out", str(out), *map(str, words)]) == 0
    )
    return (out if out.suffix else out / "report.html").read_text()


class Texts(HTMLParser):
    """What a page says, and the tags it is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.said.append(data.strip())


def table(page: str) -> list[list[str]]:
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", page)
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", line) for line in lines]


def test_a_page_has_everything_and_loads_nothing(tmp_path: Path, plan: Path, trace: Path) -> None:
    weigh = ("--dispatch-bytes", 64, "--combine-bytes", 128)
    page = plotted(tmp_path / "report", plan, "--routing", trace, *weigh)
    texts = Texts(page)
    assert "script" not in texts.tags
    assert len(texts.links) == 8  # three of loads, two of a layer, three of traffic
    assert all(link.startswith("data:image/png;base64,") for link in texts.links)
    heads, *rows = table(page)
    told = [
        "fullest device over the mean",
        "copies per token and layer",
        "of these across nodes",
        "bytes per token inside nodes",
        "bytes per token across nodes",
        "fullest over the mean, worst layer",
    ]
    assert set(told) < set(heads)
    assert [row[:2] for row in rows] == [
        [name, kind]
        for name in ("contiguous", "eplb", "this plan")
        for kind in ("fitted", "held out")
    ]
    document = json.loads(plan.read_text())["figures"]
    assert [rows[-1][heads.index(head)] for head in told[:2]] == [
        f"{document['held_out']['imbalance']['mean']:.3f}",
        f"{document['held_out']['copies_per_token_layer']:.3f}",
    ]
    assert "2 layers, 16 experts in 16 slots, 4 devices in 2 nodes; home-dedup, prefill" in page
    assert "trace.npz (200 tokens in 20 sequences)" in page


@pytest.mark.parametrize(
    "kind",
    [
        ("--dataflow", "migrate"),
        ("--dataflow", "replicated", "--phase", "decode"),
        ("--dataflow", "home-dedup", "--slots", "20"),
    ],
)
def test_any_plan_has_a_page(tmp_path: Path, trace: Path, kind: tuple[str, ...]) -> None:
    path = tmp_path / "plan.json"
    words = ("--devices", "4", "--time-limit", "1", "--threads", "1", "--bound-limit", "0", *kind)
    assert cli.main(["place", "solve", "--routing", str(trace), "--out", str(path), *words]) == 0
    page = plotted(tmp_path / "a.html", path, "--routing", trace, "--layer", 1)
    assert f"{kind[1]}, " in page
    assert len(Texts(page).links) == 7  # the last layer has none after it


def test_counts_and_plans_that_do_not_say_what_they_were_fitted_on(
    tmp_path: Path, plan: Path
) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(np.random.default_rng(1).integers(1, 99, (2, 16)).tolist()))
    page = plotted(tmp_path / "a.html", plan, "--routing", counts)
    assert {row[1] for row in table(page)[1:]} == {"held out"}
    assert "EPLB was made from the very routing" in page
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"figures": {}}))
    page = plotted(tmp_path / "b.html", plan, "--routing", counts)
    assert {row[1] for row in table(page)[1:]} == {"unknown"}
    assert "counts.json (counts)" in page
    assert len(Texts(page).links) == 3


@pytest.mark.parametrize(
    "wrong", [3, [], {"gap": "x"}, {"points": [{"copies": HOSTILE}, 1]}, "text"]
)
def test_what_a_plan_says_of_itself_is_not_believed(
    tmp_path: Path, plan: Path, trace: Path, wrong: Any
) -> None:
    document = json.loads(plan.read_text())
    figures = {"frontier": wrong, "fitted": wrong, "fitted_on": wrong}
    plan.write_text(json.dumps(document | {"figures": figures}))
    hostile = trace.rename(tmp_path / f"{HOSTILE.replace('/', '')}.npz")
    page = plotted(tmp_path / "a.html", plan, "--routing", hostile)
    assert "script" not in Texts(page).tags
    assert 'frontier"' not in page


def test_a_frontier_is_drawn(tmp_path: Path, plan: Path, trace: Path) -> None:
    document = json.loads(plan.read_text())
    points = [
        {"name": HOSTILE, "copies": 3.5, "imbalance": 1.4},
        {"name": "even", "copies": 4.5, "imbalance": 1.1},
    ]
    document["figures"]["fitted"] = {"gap": 0.123, "bound_is": "columns"}
    document["figures"] |= {"frontier": {"points": points}, "chosen": "even"}
    plan.write_text(json.dumps(document))
    page = plotted(tmp_path / "a.html", plan, "--routing", trace)
    assert "better by more than 12.3% on what it was fitted on (certified)" in page
    assert page.count("<circle") == 2
    assert page.count('circle class="ours"') == 1
    assert "script" not in Texts(page).tags


def test_a_frontier_is_printed(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(plan.read_text())["figures"]
    point = {"imbalance": 1.2, "copies": 3.5, "step": 7.25, "admissible": True}
    points = [{**point, "name": "eplb"}, {**point, "name": "other", "admissible": False}]
    frontier = {"points": points, "judged_on": ["a", "b"]}
    show("solve", figures | {"out": "p.json", "frontier": frontier, "chosen": "eplb"})
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "eplb 1.200 3.500 7.250 picked" in said
    assert "other 1.200 3.500 7.250 too uneven" in said


def test_an_unknown_layer_is_named(tmp_path: Path, plan: Path, trace: Path, capsys) -> None:
    words = ("--plan", plan, "--routing", trace, "--layer", 2, "--out", tmp_path / "a.html")
    assert cli.main(["place", "plot", *map(str, words)]) == cli.BAD_INPUT
    assert "layer 2: the plan has 2" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


@settings(max_examples=50, deadline=None)
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)),
                  elements=st.floats(0, 8)),
    st.sampled_from(Scale),
)  # fmt: skip
def test_a_picture_says_how_far_from_even_each_cell_is(matrix: np.ndarray, scale: Scale) -> None:
    shown = HeatMap("t", matrix, scale, "a", "b")
    with Image.open(io.BytesIO(png(entries(shown), scale))) as image:
        assert image.size == matrix.shape[::-1]
        pixels = np.asarray(image.convert("RGBA")).astype(int)
    if scale is Scale.LOAD:
        far = np.minimum(1, np.abs(np.log2(np.maximum(matrix, 1e-9))))
        warm = pixels[..., 0] > pixels[..., 2]
        assert (warm == (matrix > 1))[far > 0.02].all()
    else:
        far = matrix / max(matrix.max(), 1e-300)
    assert np.abs(pixels[..., 3] / 254 - far).max() <= 1 / 127
    assert f'viewBox="0 0 {matrix.shape[1]} {matrix.shape[0]}"' in figure(shown)


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_it_fits_a_desk_and_a_phone_in_both_schemes(
    tmp_path: Path, plan: Path, trace: Path, browser: Any
) -> None:
    plotted(tmp_path / "a.html", plan, "--routing", trace)
    grounds = set()
    for width, scheme in ((1000, "light"), (360, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
        complaints: list[str] = []
        page.on("console", lambda said, to=complaints: to.append(said.text))
        page.goto((tmp_path / "a.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("figure svg").count() == 8
        boxes = [page.locator("figure svg").nth(i).bounding_box() for i in range(8)]
        assert all(box["width"] > 150 and box["height"] > 100 for box in boxes)
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert complaints == []
    assert len(grounds) == 2
