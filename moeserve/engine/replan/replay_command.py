"""``moeserve place replay``: would re-planning by itself have paid on this traffic?

Beside the planner's other verbs, but the policy is the runtime's, so it is added from here. Exit
codes are theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeserve.errors import MoeserveError, PlacementError
from moeserve.placement.cli import BAD_INPUT, INTERRUPTED, add_parser

if TYPE_CHECKING:
    from moeserve.engine.replan.benefit import ReplanPolicy
    from moeserve.engine.replan.candidates import Solve
    from moeserve.engine.replan.replay import Replay, ReplaySettings, TrafficPhase

POLICY_NAMES = {"horizon": "horizon_s", "interval": "min_interval_s", "gain": "min_gain"}


def add_place(subparsers: Any) -> None:
    """The planner's verbs and this one."""
    verbs = add_parser(subparsers)
    parser = verbs.add_parser(
        "replay",
        help="a shift of traffic through the runtime's re-planning: regret, bytes, pauses",
        description="Replay domains one after the other, and their mixture last, through the "
        "runtime's re-planning policy, beside doing nothing and the best in hindsight.",
        epilog="example: moeserve place replay --routing chat.npz code.npz --devices 8 "
        "--expert-bytes 17000000 --policy horizon=600 gain=0.03 --plot shift.svg",
    )
    option = parser.add_argument
    option("--routing", nargs="+", required=True, metavar="FILE", help="traces, in this order")
    option("--experts", type=int, help="experts per layer, where files do not say")
    option("--devices", type=int, required=True, help="ranks, each on a device")
    option("--nodes", type=int, default=1, help="nodes that the devices lie in (default 1)")
    option("--expert-bytes", type=int, required=True, help="bytes of one expert")
    option("--copy-bytes", type=int, default=21800,
           help="bytes of a token's copy, out and back (default 21800)")  # fmt: skip
    option("--link-rate", type=float, default=31e9, help="bytes/s of a device's link (31e9)")
    option("--skew", type=float, default=0.0,
           help="share of the links' time that the fullest one decides: 0 where they share a "
           "switch or the CPU (default), 1 where each is its own")  # fmt: skip
    option("--max-imbalance", type=float,
           help="max/mean load that the solver may cause (default: any, since steps are priced by "
           "copies alone)")  # fmt: skip
    option("--token-seconds", type=float, default=1e-5,
           help="seconds a token takes beside its copies, all devices busy (1e-5)")  # fmt: skip
    option("--read-rate", type=float, default=5e9,
           help="bytes/s that all ranks read experts at, together (5e9)")  # fmt: skip
    option("--pause", type=float, default=0.002, help="seconds a layer's switch takes (0.002)")
    option("--tokens-per-s", type=float, default=20_000.0, help="of all ranks (20000)")
    option("--tokens-per-step", type=float, default=512.0, help="of all ranks (512)")
    option("--minutes", type=int, default=30, help="that each domain lasts (30)")
    option("--swaps", type=int, default=60, help="tried per slot by the solver (60)")
    option("--policy", nargs="+", default=(), metavar="NAME=VALUE",
           help="horizon=SECONDS, interval=SECONDS, gain=SHARE: other than the "
           "runtime's 600, 120, 0.03")  # fmt: skip
    option("--plot", metavar="FILE.svg", help="seconds of steps over time, drawn")
    option("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        result = replayed(arguments)
    except MoeserveError as error:
        if arguments.json:
            print(json.dumps({"error": error.message}))
        print(f"moeserve place replay: {error.message}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(result))
        return 0
    for key in ("regret_s", "shift_cost_s", "regret_share", "moving_s", "bytes_read"):
        value = result[key]
        print(f"{key}: {'-' if value is None else f'{value:.6g}'}")
    print(f"policy: {result['policy']}")
    for change in result["changes"]:
        print(
            f"after {change['at_s']:g} s: a plan that saves {change['gain_s']:.3g} s within the "
            f"horizon for {change['cost_s']:.3g} s of moving {change['bytes_read']} bytes"
        )
    if not result["changes"]:
        print("no change of plan would have paid")
    return 0


def replayed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON has it; the plot is written on the way."""
    from dataclasses import asdict

    from moeserve.engine.replan.replay import replay
    from moeserve.engine.replan.replay_plot import svg
    from moeserve.placement.plan import write_whole

    phases, first, settings, solve = _asked(arguments)
    policy = read_policy(arguments.policy)
    found = replay(phases, first, settings, solve, policy)
    if arguments.plot:
        write_whole(Path(arguments.plot), svg(found, settings.every_s))
    return report(found, settings) | {"policy": asdict(policy)}


def report(found: Replay, settings: ReplaySettings) -> dict[str, Any]:
    """``regret_share`` is of the shift's cost, None where the shift costs nothing."""
    from dataclasses import asdict

    changes = [{"at_s": (c.interval + 1) * settings.every_s} | asdict(c) for c in found.changes]
    share = found.regret_s / found.shift_cost_s if found.shift_cost_s > 1e-9 else None
    return {
        "regret_s": found.regret_s,
        "shift_cost_s": found.shift_cost_s,
        "regret_share": share,
        "moving_s": found.moving_s,
        "bytes_read": found.bytes_read,
        "changes": changes,
        "hindsight_changes": found.hindsight_changes,
        "hindsight_moving_s": found.hindsight_moving_s,
        "settings": asdict(settings),
        "phases": list(found.phase_I),
        "policy_s": found.policy_I.tolist(),
        "nothing_s": found.nothing_I.tolist(),
        "hindsight_s": found.hindsight_I.tolist(),
    }


def read_policy(words: list[str] | tuple[str, ...]) -> ReplanPolicy:
    """PlacementError names the word that cannot be read."""
    from dataclasses import replace
    from math import isfinite

    from moeserve.engine.replan.benefit import ReplanPolicy

    policy = ReplanPolicy()
    for word in words:
        name, _, value = word.partition("=")
        try:
            number = float(value)
        except ValueError as cause:
            raise PlacementError(f"--policy {word!r}: expected NAME=NUMBER") from cause
        if name not in POLICY_NAMES or not isfinite(number) or number < 0:
            raise PlacementError(
                f"--policy {word!r}: names are {', '.join(POLICY_NAMES)}, numbers at least 0"
            )
        policy = replace(policy, **{POLICY_NAMES[name]: number})
    return policy


def _asked(
    arguments: argparse.Namespace,
) -> tuple[list[TrafficPhase], Any, ReplaySettings, Solve]:
    import numpy as np

    from moeserve.engine.replan.benefit import MoveCost, StepCostModel
    from moeserve.engine.replan.replay import ReplaySettings, phase_of
    from moeserve.engine.replan.routing_counts import most_sampled
    from moeserve.placement.cluster import Cluster
    from moeserve.placement.formats import routing_files
    from moeserve.placement.plan import Plan
    from moeserve.placement.problem import Problem
    from moeserve.placement.routing import Routing, workload_of_tokens
    from moeserve.placement.solvers.portfolio import Budget, Solver
    from moeserve.placement.solvers.portfolio import solve as find

    for name in ("link_rate", "read_rate", "tokens_per_s", "tokens_per_step", "minutes"):
        if not getattr(arguments, name) > 0:
            raise PlacementError(f"--{name.replace('_', '-')} must be positive")
    if not 0 <= arguments.skew <= 1:
        raise PlacementError(f"--skew {arguments.skew}: must be between 0 and 1")
    routing = routing_files.read_all(arguments.routing, num_experts=arguments.experts)
    problem = Problem(
        Cluster(arguments.devices, arguments.nodes), routing.num_experts,
        max_imbalance=(
            arguments.devices if arguments.max_imbalance is None else arguments.max_imbalance
        ),
    )  # fmt: skip
    budget = Budget(seconds=None, threads=1, swaps=arguments.swaps)

    def solve(plan: Plan | None, topk_TLK: Any) -> Plan:
        del plan
        work = workload_of_tokens("sampled", topk_TLK, None, num_experts=routing.num_experts)
        return find(problem, Routing((work,), routing.moe_layers), Solver.AUTO, budget)

    phases = [phase_of(Path(w.name).stem, w.tokens, arguments.minutes) for w in routing.workloads]
    if len(phases) > 1:
        mixed = np.random.default_rng(1).permutation(routing.tokens_TLK)
        phases.append(phase_of("all mixed", mixed, arguments.minutes))
    link_s = arguments.copy_bytes / arguments.link_rate
    skew = arguments.skew
    step = StepCostModel(
        0.0, arguments.token_seconds, (1 - skew) * link_s / arguments.devices, skew * link_s
    )
    settings = ReplaySettings(
        step, MoveCost(arguments.read_rate, arguments.pause), arguments.expert_bytes,
        arguments.tokens_per_s, arguments.tokens_per_step,
        sampled=arguments.devices * most_sampled(routing.num_layers, routing.tokens_TLK.shape[2]),
    )  # fmt: skip
    return phases, solve(None, phases[0].counted_TLK), settings, solve
