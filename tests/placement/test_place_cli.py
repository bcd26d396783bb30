"""``moeserve place`` from outside: figures as JSON, exit codes, nothing written on bad input."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.placement import cli
from moeserve.placement.cluster import Dataflow, Phase
from moeserve.placement.solvers.portfolio import Solver

FIGURES = {
    "imbalance", "copies_per_token_layer", "cross_node_copies_per_token_layer", "objective",
    "bound", "gap", "seconds",
}  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path, topk) -> Path:
    path = tmp_path / "trace.npz"
    ids = topk(tokens=200, layers=2, experts=16, k=3)
    np.savez(path, topk_ids=ids.astype(np.uint8), seq_lens=np.full(20, 10))
    return path


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "counts.json"
    load = np.random.default_rng(3).integers(1, 1000, (3, 16))
    path.write_text(json.dumps({"logical_count": load.tolist()}))
    return path


def place(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    status = cli.main(["place", *map(str, words), "--json"])
    out = capsys.readouterr().out.strip().splitlines()
    return status, json.loads(out[-1]) if out else {}


SMALL = ("--time-limit", "1", "--threads", "1")


@pytest.mark.parametrize("flow", cli.DATAFLOWS)
def test_solve_and_evaluate_print_the_same_figures(capsys, tmp_path, trace, flow: str) -> None:
    plan = tmp_path / "plan.json"
    status, solved = place(
        capsys, "solve", "--routing", trace, "--devices", 4, "--nodes", 2, "--dataflow", flow,
        "--out", plan, *SMALL,
    )  # fmt: skip
    assert status == 0
    assert solved.keys() >= FIGURES | {"held_out"}
    assert solved["gap"] is None or solved["gap"] >= 0
    status, evaluated = place(capsys, "evaluate", "--plan", plan, "--routing", trace)
    assert status == 0
    assert evaluated.keys() >= FIGURES
    for key in FIGURES - {"seconds"}:
        assert evaluated[key] == solved[key]


def test_counts_are_enough_for_balance(capsys, tmp_path, counts) -> None:
    plan = tmp_path / "plan.json"
    status, solved = place(
        capsys, "solve", "--routing", counts, "--devices", 4, "--slots", 20, "--out", plan, *SMALL
    )
    assert status == 0
    assert solved["copies_per_token_layer"] is None
    assert 1 <= solved["bound"] <= solved["objective"] == solved["imbalance"]["mean"]


def test_bytes_are_split_by_link_class(capsys, tmp_path, trace) -> None:
    _, solved = place(
        capsys, "solve", "--routing", trace, "--devices", 4, "--nodes", 2, "--dispatch-bytes", 64,
        "--combine-bytes", 128, "--out", tmp_path / "p.json", *SMALL,
    )  # fmt: skip
    across = solved["cross_node_copies_per_token_layer"] * 96 * 2
    assert solved["bytes_per_token"]["across_nodes"] == pytest.approx(across)


def test_compare_puts_the_solvers_side_by_side(capsys, trace) -> None:
    status, compared = place(
        capsys, "compare", "--routing", trace, "--devices", 4, "--solvers", "contiguous", "eplb",
        "auto", *SMALL,
    )  # fmt: skip
    assert status == 0
    assert list(compared["solvers"]) == ["contiguous", "eplb", "auto"]
    assert compared["evaluated_on"] == "held out"


def test_a_recording_can_be_solved(capsys, tmp_path, trace) -> None:
    ours = tmp_path / "ours.safetensors"
    status, recorded = place(capsys, "record", "--routing", trace, "--out", ours)
    assert (status, recorded["tokens"], recorded["experts"]) == (0, 200, 16)
    plan = tmp_path / "p.json"
    words = ("solve", "--routing", ours, "--devices", 2, "--out", plan, *SMALL)
    assert place(capsys, *words)[0] == 0


def test_export_and_back(capsys, tmp_path, trace) -> None:
    plan, other, back = (tmp_path / n for n in ("p.json", "o.json", "b.json"))
    place(capsys, "solve", "--routing", trace, "--devices", 4, "--out", plan, *SMALL)
    words = ("--format", "ascend", "--out")
    assert place(capsys, "export", "--plan", plan, *words, other)[0] == 0
    known = ("--experts", 16, "--devices", 4)
    assert place(capsys, "export", "--import", "--plan", other, *known, *words, back)[0] == 0
    rows = [json.loads(p.read_text())["expert_of_slot"] for p in (plan, back)]
    assert rows[0] == rows[1]


def verbs() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    top = argparse.ArgumentParser(prog="moeserve")
    cli.add_parser(top.add_subparsers())
    for name in ("place", "verb"):
        (chosen,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
        top = chosen.choices["place"] if name == "place" else top
    yield from chosen.choices.items()


def test_every_option_has_a_help_line_and_every_verb_an_example(capsys) -> None:
    for name, parser in verbs():
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings}"
        said = re.sub(r"\s+", " ", parser.format_help())
        assert f"example: {cli.EXAMPLES[name]}" in said
        words = shlex.split(cli.EXAMPLES[name])
        assert words[:3] == ["moeserve", "place", name]
        parser.parse_args(words[3:])


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert cli.main(["place", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def rows(lines: list[str]) -> list[tuple[str, str]]:
    """Plan, and what it is judged on, of each row of a table."""
    first = next(i for i, line in enumerate(lines) if "judged on" in line)
    last = next(i for i, line in enumerate(lines) if line.startswith("balance, worst:"))
    at = lines[first].index("judged on")
    return [(line[:at].strip(), line[at : at + 9].strip()) for line in lines[first + 1 : last]]


def test_what_solve_prints_fits_and_says_what_was_fitted(capsys, tmp_path, trace, counts) -> None:
    plan = tmp_path / "plan.json"
    words = ("--routing", trace, "--devices", 4, "--nodes", 2, "--out", plan, *SMALL)
    lines = printed(capsys, "solve", *words)
    assert lines[0] == "2 layers, 16 experts in 16 slots, 4 devices in 2 nodes; home-dedup, prefill"
    kinds = ("fitted", "held out")
    plain = [(name, kind) for name in ("contiguous", "eplb") for kind in kinds]
    ours = [("this plan", kind) for kind in ("both", *kinds)]
    assert rows(lines) == plain + ours
    said = " ".join(line.strip() for line in lines)
    assert "gap: no plan within the same limits is better by more" in said
    assert "of at most 1 s (--time-limit); wrote" in said
    assert "".join(lines).replace(" ", "").endswith(plan.name)  # wherever its line was broken
    lines = printed(capsys, "evaluate", "--plan", plan, "--routing", trace, "--bound-limit", 0)
    assert rows(lines) == ours
    lines = printed(capsys, "solve", "--routing", counts, "--devices", 4, "--out", plan, *SMALL)
    assert rows(lines) == [(name, "fitted") for name in ("contiguous", "eplb", "this plan")]


def test_routing_that_a_plan_never_saw_is_held_out(capsys, tmp_path, trace, topk) -> None:
    plan, other = tmp_path / "plan.json", tmp_path / "other.npz"
    place(capsys, "solve", "--routing", trace, "--devices", 4, "--out", plan, *SMALL)
    np.savez(other, topk_ids=topk(tokens=50, layers=2, experts=15, k=3, seed=9))
    renamed = trace.rename(tmp_path / "renamed.npz")
    judged = {
        files: place(capsys, "evaluate", "--plan", plan, "--routing", *files)[1]
        for files in ((renamed,), (other,), (renamed, other))
    }
    assert [j["judged_on"] for j in judged.values()] == ["both", "held_out", "both"]
    document = json.loads(plan.read_text())
    for figures in ({}, {"fitted_on": 3}, {"fitted_on": {"held_out": "x", "workloads": [1]}}):
        plan.write_text(json.dumps(document | {"figures": figures}))
        _, old = place(capsys, "evaluate", "--plan", plan, "--routing", renamed)
        assert old["judged_on"] == "unknown"


def test_evaluate_names_the_experts_of_both(capsys, tmp_path, trace, topk) -> None:
    plan, larger = tmp_path / "plan.json", tmp_path / "larger.npz"
    place(capsys, "solve", "--routing", trace, "--devices", 4, "--out", plan, *SMALL)
    np.savez(larger, topk_ids=topk(tokens=99, layers=2, experts=24, k=3))
    status, said = place(capsys, "evaluate", "--plan", plan, "--routing", larger)
    assert status == cli.BAD_INPUT
    assert "has 2 layers of 24 experts, the plan 2 of 16" in said["error"]
    fewer = tmp_path / "fewer.npz"
    np.savez(fewer, topk_ids=topk(tokens=99, layers=2, experts=12, k=3))
    status, figures = place(capsys, "evaluate", "--plan", plan, "--routing", fewer)
    assert (status, figures["plan"]["experts"]) == (0, 16)


def test_compare_lists_the_solvers_that_need_tokens(capsys, counts) -> None:
    words = ("--routing", counts, "--devices", 4, "--solvers", "contiguous", "moetuner", *SMALL)
    lines = printed(capsys, "compare", *words)
    assert rows(lines) == [("contiguous", "fitted")]
    why = "moetuner could not run: this solver needs per-token routing, not counts"
    assert why in " ".join(lines)


TOPOLOGY = """
format = "moeserve-topology"
version = 1
name = "two of two"
links = {inside = {bandwidth_bytes_per_s = 9e9}, across = {bandwidth_bytes_per_s = 1e9}}
nodes = [{count = 1, devices = 2}, {count = 1, devices = 2, rails = 1, speed = 0.5}]
"""


def test_a_topology_stands_for_the_flags(capsys, tmp_path, trace) -> None:
    plan, cluster = tmp_path / "plan.json", tmp_path / "cluster.toml"
    cluster.write_text(TOPOLOGY)
    words = ("solve", "--routing", trace, "--out", plan, "--solver", "eplb", *SMALL)
    status, solved = place(capsys, *words, "--topology", cluster)
    assert status == 0
    flags = ("--devices", 4, "--nodes", 2, "--node-ratio", 13.5, "--speeds", 1, 1, 0.5, 0.5)
    _, same = place(capsys, *words, *flags)
    for key in FIGURES - {"seconds", "gap", "bound"}:
        assert solved[key] == same[key]
    ways = (("--topology", cluster), ("--node-ratio", 13.5, "--speeds", 1, 1, 0.5, 0.5))
    judged = [place(capsys, "evaluate", "--plan", plan, "--routing", trace, *w)[1] for w in ways]
    assert judged[0]["objective"] == judged[1]["objective"] == same["objective"]
    # 88 MFLOP at three quarters (the mean speed) of 500 TFLOP/s, 10.9 kB at 9 GB/s.
    assert solved["rates"]["expert"] == pytest.approx(88e6 / 375e12 * 9e9 / 10.9e3)
    assert same["rates"]["expert"] == 0.7
    sizes = ("--expert-flops", 375e12, "--dispatch-bytes", 6e9, "--combine-bytes", 12e9)
    words_of_size = [str(int(word)) if isinstance(word, float) else word for word in sizes]
    evaluated = place(
        capsys, "evaluate", "--plan", plan, "--routing", trace, *ways[0], *words_of_size
    )[1]
    assert evaluated["rates"] == {"expert": 1.0, "copy": 1.0}
    status, said = place(capsys, *words, "--topology", cluster, "--nodes", 2)
    assert (status, "--nodes beside --topology" in said["error"]) == (cli.BAD_INPUT, True)
    place(capsys, *words, "--devices", 2)
    status, said = place(capsys, "evaluate", "--plan", plan, "--routing", trace, *ways[0])
    assert (status, "4 devices in 2 nodes, the plan 2 in 1" in said["error"]) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", "5"), "slots do not divide over 5 devices"),
        (("--devices", "4", "--slots", "12"), "cannot hold 16 experts"),
        (("--devices", "4", "--nodes", "3"), "do not divide over 3 nodes"),
        (("--devices", "4", "--memory", "100", "--expert-bytes", "50"), "memory: 4 slots"),
        (("--devices", "4", "--memory", "100"), "needs --expert-bytes"),
        (("--devices", "4", "--speeds", "1", "2"), "2 device speeds for 4 devices"),
        (("--devices", "4", "--max-imbalance", "0.5"), "at least 1"),
        (("--devices", "4", "--apart", "1,99"), "two different experts below 16"),
        (("--devices", "4", "--apart", "1,2", "--together", "1,2"), "also together"),
        (("--devices", "4", "--apart", "one,2"), "expected two experts"),
        (("--devices", "4", "--experts", "8"), "unknown expert"),
        (("--devices", "4", "--solver", "dp"), "too many placements"),
        (("--devices", "4", "--held-out", "1"), "below 1"),
        (("--devices", "4", "--time-limit", "0"), "must be positive"),
        (("--devices", "4", "--previous", "nowhere.json"), "cannot read nowhere.json"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    capsys, tmp_path, trace, words: tuple[str, ...], said: str
) -> None:
    plan = tmp_path / "plan.json"
    status, printed = place(capsys, "solve", "--routing", trace, "--out", plan, *words)
    assert status == cli.BAD_INPUT
    assert said in printed["error"]
    assert not plan.exists()


def test_the_parser_knows_every_choice_there_is() -> None:
    assert tuple(Dataflow) == cli.DATAFLOWS
    assert tuple(Phase) == cli.PHASES
    assert set(cli.SOLVERS) == set(Solver)


def test_place_imports_no_torch_and_help_no_numpy() -> None:
    solved = "import sys; import moeserve.placement.commands; assert 'torch' not in sys.modules"
    helped = (
        "import sys; from moeserve.placement import cli\n"
        "try: cli.main(['place', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'torch', 'pulp', 'rich'} & sys.modules.keys()"
    )
    for code in (solved, helped):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
