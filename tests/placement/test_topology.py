"""Clusters as files: what the examples say, and that anything wrong is named."""

from __future__ import annotations

import json
import tempfile
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster
from moeserve.placement.step_time import ModelSizes, rates_of
from moeserve.placement.topology import MOST_TOPOLOGY_BYTES, load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "topologies"
SPEEDS = (1.0,) * 16 + (0.7,) * 16
SAID = {
    "h200": Cluster(64, 8, 9.0, (), 100_000_000_000),
    "cloudmatrix384": Cluster(768, 48, 137 / 135, (), 40_000_000_000),
    "mixed": Cluster(32, 4, 13.5, SPEEDS, 50_000_000_000),
}


@pytest.mark.parametrize("name", SAID)
def test_the_examples_say_what_solvers_need(name: str, tmp_path: Path) -> None:
    file = EXAMPLES / f"{name}.toml"
    cluster, expected = load(file).cluster(), SAID[name]
    assert cluster.node_ratio == pytest.approx(expected.node_ratio, rel=1e-12)
    for field in ("devices", "nodes", "speeds", "memory"):
        assert getattr(cluster, field) == getattr(expected, field)
    as_json = tmp_path / "same.json"
    as_json.write_text(json.dumps(tomllib.loads(file.read_text())))
    assert load(as_json) == load(file)


def test_every_example_is_known_here() -> None:
    assert {file.stem for file in EXAMPLES.iterdir()} == SAID.keys()


BASE: dict[str, Any] = tomllib.loads((EXAMPLES / "mixed.toml").read_text())


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), "other", 'must be "moeserve-topology"'),
        (("version",), 2, "reads version 1"),
        (("name",), "", "text of 1 to 200"),
        (("surprise",), 1, "unknown key 'surprise'"),
        (("links", "inside", "bandwidth"), 1, "links.inside: unknown key"),
        (("links", "inside", "bandwidth_bytes_per_s"), float("inf"), "a number from 1 to 1e+15"),
        (("links", "inside", "bandwidth_bytes_per_s"), float("nan"), "a number from 1"),
        (("links", "across", "latency_s"), -1, "links.across.latency_s=-1"),
        (("links", "inside"), 450e9, "must be a table, not 450000000000.0"),
        (("links",), {"inside": {"bandwidth_bytes_per_s": 1e9}}, "links: lacks across"),
        (("nodes",), [], "one group of nodes at least"),
        (("nodes",), {}, "a list of groups"),
        (("nodes", 0, "devices"), 4, "groups have 4 and 8 devices in a node"),
        (("nodes", 0, "devices"), True, "nodes[0].devices=True"),
        (("nodes", 1, "rails"), 2.5, "nodes[1].rails=2.5: must be a whole number"),
        (("nodes", 1, "speed"), 0, "nodes[1].speed=0"),
        (("nodes", 1, "memory_bytes"), "100 GB", "nodes[1].memory_bytes='100 GB'"),
        (("devices",), {}, "devices: lacks flops_per_s"),
        (("devices",), {"flops_per_s": 0}, "devices.flops_per_s=0: must be a number from 1"),
        (("nodes", 1, "count"), 60000, "devices in all, at most"),
        (("nodes", 1, "count"), 10**400, "an integer of more than 128 bits"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, path: tuple, value: Any, said: str) -> None:
    document = deepcopy(BASE)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps(document))
    with pytest.raises(PlacementError) as caught:
        load(file)
    assert said in caught.value.message
    assert str(file) in caught.value.message


def test_rates_follow_from_links_and_devices() -> None:
    """An expert's operations over a device's rate, beside a copy's bytes over a link's."""
    h200, mixed = (load(EXAMPLES / f"{name}.toml") for name in ("h200", "mixed"))
    assert rates_of(h200).expert == pytest.approx(88e6 / 500e12 * 450e9 / 10.9e3)
    assert rates_of(mixed).expert == pytest.approx(rates_of(h200).expert / 0.85)  # mean speed
    sizes = ModelSizes(expert_flops=2 * 88e6, copy_bytes=4 * 10.9e3)
    assert rates_of(h200, sizes).expert == pytest.approx(rates_of(h200).expert / 2)
    with pytest.raises(PlacementError, match="copy_bytes=0"):
        ModelSizes(copy_bytes=0)


def test_files_that_are_no_topology_are_refused(tmp_path: Path) -> None:
    for name, text, said in (
        ("a.toml", "nodes = [", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("b.json", "[" * 100_000, "is not JSON"),
        ("c.json", "[]", "must be a table"),
        ("d.toml", "#" * (MOST_TOPOLOGY_BYTES + 1), "bytes: split it"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(PlacementError, match=said):
            load(tmp_path / name)
    with pytest.raises(PlacementError, match="no regular file"):
        load(Path("/dev/zero"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_document_is_a_cluster_or_an_error(data: st.DataObject) -> None:
    document = deepcopy(BASE)
    tables = [document, *document["links"].values(), *document["nodes"]]
    table = data.draw(st.sampled_from(tables))
    table[data.draw(st.sampled_from(sorted(table)))] = data.draw(values)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cluster.json")
        file.write_text(json.dumps(document))
        said = str(file)
        try:
            load(file).cluster()
        except PlacementError as error:
            said = error.message
        assert str(file) in said
