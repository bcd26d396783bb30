"""A shift of traffic through the re-planning policy: it follows where that pays, and only there."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.cli import main
from moeserve.engine.replan.benefit import MoveCost, ReplanPolicy, StepCostModel
from moeserve.engine.replan.replay import ReplaySettings, cheapest_path, phase_of, replay
from moeserve.engine.replan.replay_command import report
from moeserve.engine.replan.replay_plot import svg
from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.solvers.portfolio import Budget, Solver, solve

EXPERTS, DEVICES = 16, 4
CHEAP = ReplaySettings(
    StepCostModel(0.0, 1e-6, 1e-5, 0.0), MoveCost(1e9, 1e-4), 1_000_000, 5_000.0, 256.0
)


def domain(seed: int, tokens: int = 512) -> np.ndarray:
    """[T, 2, 2]: tokens use experts of one of four groups, hidden and different by seed."""
    random = np.random.default_rng(seed)
    members = np.stack([random.permutation(EXPERTS).reshape(DEVICES, -1) for _ in range(2)])
    group_T = random.integers(DEVICES, size=tokens)
    inside = np.argsort(random.random((tokens, 2, EXPERTS // DEVICES)), axis=2)[:, :, :2]
    return np.stack([members[l][group_T[:, None], inside[:, l]] for l in range(2)], axis=1).astype(
        np.int32
    )


def fitted(plan: Plan | None, topk_TLK: np.ndarray) -> Plan:
    del plan
    work = workload_of_tokens("counted", topk_TLK, None, num_experts=EXPERTS)
    problem = Problem(Cluster(DEVICES), EXPERTS, max_imbalance=1.2)
    budget = Budget(seconds=None, threads=1, swaps=60)
    return solve(problem, Routing((work,), (0, 1)), Solver.AUTO, budget)


PHASES = [phase_of(f"domain {seed}", domain(seed), 30) for seed in (1, 2, 3)]
FIRST = fitted(None, PHASES[0].counted_TLK)


def test_the_policy_follows_a_shift_that_pays_with_little_regret() -> None:
    found = replay(PHASES, FIRST, CHEAP, fitted)
    assert [c.interval for c in found.changes] == [30, 60]
    assert found.bytes_read == sum(c.bytes_read for c in found.changes) > 0
    assert found.shift_cost_s > 0
    assert found.regret_s <= 0.1 * found.shift_cost_s


def test_nothing_is_moved_where_moving_does_not_pay() -> None:
    dear = replace(CHEAP, moving=MoveCost(1e4, 1.0))
    found = replay(PHASES, FIRST, dear, fitted)
    assert found.changes == ()
    assert (found.policy_I == found.nothing_I).all()
    assert found.hindsight_changes == 0
    assert found.regret_s == found.shift_cost_s == 0


def test_no_shift_needs_no_change() -> None:
    found = replay(PHASES[:1], FIRST, CHEAP, fitted)
    assert found.changes == ()
    assert found.regret_s <= 1e-9 + 0.02 * float(found.policy_I.sum())


def test_a_longer_interval_between_changes_is_kept() -> None:
    policy = ReplanPolicy(min_interval_s=3000.0)
    found = replay(PHASES, FIRST, CHEAP, fitted, policy)
    at_s = [(c.interval + 1) * CHEAP.every_s for c in found.changes]
    assert all(b - a >= 3000.0 for a, b in itertools.pairwise(at_s))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_the_path_in_hindsight_equals_brute_force(seed: int, intervals: int, plans: int) -> None:
    random = np.random.default_rng(seed)
    cost, move = random.random((intervals, plans)), random.random((plans, plans))
    np.fill_diagonal(move, 0.0)

    def total(path: tuple[int, ...]) -> float:
        moves = sum(move[a, b] for a, b in itertools.pairwise((0, *path)))
        return float(moves + sum(cost[i, p] for i, p in enumerate(path)))

    path, moving = cheapest_path(cost, move)
    best = min(total(p) for p in itertools.product(range(plans), repeat=intervals))
    assert total(tuple(path.tolist())) == pytest.approx(best)
    assert moving == pytest.approx(sum(move[a, b] for a, b in itertools.pairwise((0, *path))))


def test_a_replay_is_reported_and_drawn() -> None:
    found = replay(PHASES[:2], FIRST, CHEAP, fitted)
    told = json.loads(json.dumps(report(found, CHEAP)))
    assert len(told["policy_s"]) == 60
    assert told["changes"][0]["at_s"] == 31 * 60.0
    drawn = svg(found, CHEAP.every_s)
    assert drawn.startswith("<svg")
    assert drawn.count("<circle") == len(found.changes)
    assert "domain 2" in drawn


def test_the_command_replays_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for seed in (1, 2):
        file = tmp_path / f"domain{seed}.npz"
        np.savez(file, topk_ids=domain(seed), seq_lens=np.full(8, 64))
        files.append(str(file))
    words = ["place", "replay", "--routing", *files, "--devices", "4", "--expert-bytes", "1000",
             "--minutes", "5", "--policy", "gain=0.01", "--json"]  # fmt: skip
    plot = tmp_path / "shift.svg"
    assert main([*words, "--plot", str(plot)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policy"]["min_gain"] == 0.01
    assert told["phases"][-1] == "all mixed"
    assert plot.read_text().startswith("<svg")
    assert main([*words[:-3], "--policy", "patience=3"]) == 1
    assert "patience" in capsys.readouterr().err


def test_phases_that_are_too_short_are_refused() -> None:
    with pytest.raises(PlacementError, match="phase short"):
        phase_of("short", domain(1, tokens=16), 3)
    with pytest.raises(PlacementError, match="name of its own"):
        replay([PHASES[0], PHASES[0]], FIRST, CHEAP, fitted)
