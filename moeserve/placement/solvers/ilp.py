"""The integer programs, through PuLP: HiGHS where it is installed, else PuLP's own CBC.

Each model is built and solved in a process of its own, which is ended, with CBC's own process,
when it overshoots its limit. PuLP calls a time-limit stop "Optimal": only ``sol_status`` is
believed, and without an incumbent there is no answer rather than a wrong one. Constraints carry
names.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import DeadlineError, PlacementError, UnavailableError
from moeserve.process.answer import Channel
from moeserve.process.ask import ask_once

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

# A solver may overshoot its limit by 5 s before it is ended, and take 20 s to be imported.
SPARE_S = 25.0


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """``device_E`` of one program; ``proven`` when the solver showed that nothing is better."""

    device_E: I32
    value: float
    proven: bool


def have_highs() -> bool:
    return importlib.util.find_spec("highspy") is not None


def cluster_layer(
    load_E: F64, devices: int, *, limit: float, objective: str = "abs"
) -> Solution | None:
    """MoETuner's first program for one layer: equal groups of least load deviation.

    ``objective`` "abs" is the paper's sum over groups of |load - mean|; "max" the largest load,
    which can be proven. None: no incumbent within ``limit`` seconds.
    """
    if objective not in ("abs", "max"):
        raise PlacementError(f"objective={objective!r}: expected 'abs' or 'max'")
    return _within(limit, "cluster", [load_E], [devices, objective])


def polish_layer(gain_ED: F64, load_E: F64, cap_D: F64, *, limit: float) -> Solution | None:
    """One layer as a generalised assignment: the most gain with equal groups under load caps."""
    return _within(limit, "polish", [gain_ED, load_E, cap_D], [])


def best_chain(pairs_LEE: F64, load_LE: F64, devices: int, *, limit: float) -> Solution | None:
    """All layers at once (tiny instances): the most pair mass kept on one device.

    ``device_E`` is [L * E], layer after layer.
    """
    return _within(limit, "chain", [pairs_LEE, load_LE], [devices])


def label_layers(flow_LGG: F64, cost_DD: F64, *, limit: float) -> Solution | None:
    """MoETuner's second program: [L * G] device of each group, least sum of worst links."""
    return _within(limit, "labels", [flow_LGG, cost_DD], [])


def cover_items(item_CM: I32, cost_C: F64, *, limit: float) -> Solution | None:
    """The cheapest columns that hold each item once: ``device_E`` numbers them as they come.

    Costs are whole numbers; a proof is to the last one.
    """
    return _within(limit, "cover", [item_CM.astype(np.float64), cost_C], [])


def _within(limit: float, program: str, arrays: list[F64], options: list[Any]) -> Solution | None:
    """The worker's answer; None when it had none, or had to be ended."""
    task = {
        "do": program,
        "limit": limit,
        "arrays": [array.tolist() for array in arrays],
        "options": options,
    }
    command = [sys.executable, "-m", __name__]
    try:
        answer = ask_once("the integer-program solver", command, task, timeout_s=limit + SPARE_S)
    except DeadlineError:
        return None
    except UnavailableError as failed:
        raise PlacementError(failed.message) from failed
    if answer["device_E"] is None:
        return None
    device_E = np.array(answer["device_E"], np.int32)
    return Solution(device_E, float(answer["value"]), bool(answer["proven"]))


def main() -> None:
    """The worker: one program as JSON, and its answer."""
    Channel().serve({name: partial(_run, program) for name, program in _PROGRAMS.items()})


def _run(
    program: Callable[..., Solution | None], limit: float, arrays: list[Any], options: list[Any]
) -> dict[str, Any]:
    found = program(*[np.array(a, np.float64) for a in arrays], limit, *options)
    if found is None:
        return {"device_E": None}
    return {"device_E": found.device_E.tolist(), "value": found.value, "proven": found.proven}


def _solve(problem: Any, limit: float, gap: float | None = None) -> bool | None:
    """Whether the incumbent is proven, to a relative ``gap``; None without one."""
    import pulp  # slow to import

    if have_highs():
        solver = pulp.HiGHS(msg=False, timeLimit=limit, threads=1, gapRel=gap)
    else:
        solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=limit, threads=1, gapRel=gap)
    problem.solve(solver)
    if problem.sol_status == pulp.LpSolutionOptimal:
        return True
    return False if problem.sol_status == pulp.LpSolutionIntegerFeasible else None


def _choices(pulp: Any, problem: Any, experts: int, devices: int, tag: str = "") -> Any:
    x = pulp.LpVariable.dicts(f"x{tag}", (range(experts), range(devices)), cat="Binary")
    for e in range(experts):
        problem += pulp.lpSum(x[e].values()) == 1, f"expert{tag}_{e}_lies_once"
    for d in range(devices):
        size = experts // devices
        problem += pulp.lpSum(x[e][d] for e in range(experts)) == size, f"group{tag}_{d}_is_full"
    return x


def _chosen(x: Any, experts: int, devices: int) -> list[int]:
    return [max(range(devices), key=lambda d: x[e][d].value()) for e in range(experts)]


def _cluster_layer(load_E: F64, limit: float, devices: int, objective: str) -> Solution | None:
    import pulp

    share_E = load_E / load_E.sum() * devices
    problem = pulp.LpProblem("cluster", pulp.LpMinimize)
    x = _choices(pulp, problem, len(share_E), devices)
    off = [pulp.LpVariable(f"off_{d}", 0) for d in range(devices)]
    peak = pulp.LpVariable("peak", 0)
    problem += peak if objective == "max" else pulp.lpSum(off)
    for d in range(devices):
        load = pulp.lpSum(float(share_E[e]) * x[e][d] for e in range(len(share_E)))
        problem += load - 1 <= off[d], f"over_{d}"
        problem += 1 - load <= off[d], f"under_{d}"
        problem += load <= peak, f"peak_{d}"
    proven = _solve(problem, limit)
    if proven is None:
        return None
    device_E = np.array(_chosen(x, len(share_E), devices), np.int32)
    load_D = np.bincount(device_E, share_E, devices)
    value = load_D.max() if objective == "max" else np.abs(load_D - 1).sum()
    return Solution(device_E, float(value), proven)


def _polish_layer(gain_ED: F64, load_E: F64, cap_D: F64, limit: float) -> Solution | None:
    import pulp

    experts, devices = gain_ED.shape
    problem = pulp.LpProblem("polish", pulp.LpMaximize)
    x = _choices(pulp, problem, experts, devices)
    problem += pulp.lpSum(
        float(gain_ED[e, d]) * x[e][d] for e in range(experts) for d in range(devices)
    )
    for d in range(devices):
        load = pulp.lpSum(float(load_E[e]) * x[e][d] for e in range(experts))
        problem += load <= float(cap_D[d]), f"cap_{d}"
    proven = _solve(problem, limit)
    if proven is None:
        return None
    device_E = np.array(_chosen(x, experts, devices), np.int32)
    return Solution(device_E, float(gain_ED[np.arange(experts), device_E].sum()), proven)


def _best_chain(pairs_LEE: F64, load_LE: F64, limit: float, devices: int) -> Solution | None:
    import pulp

    layers, experts = load_LE.shape
    size = experts // devices
    problem = pulp.LpProblem("chain", pulp.LpMaximize)
    x = [_choices(pulp, problem, experts, devices, f"_{l}_") for l in range(layers)]
    terms = []
    both = range(experts)
    for l in range(layers - 1):
        z = pulp.LpVariable.dicts(f"z_{l}", (both, both, range(devices)), 0, 1)
        for e in both:
            for d in range(devices):
                # Without these sums the relaxation is worthless; with them, about b-matching.
                ahead = pulp.lpSum(z[e][f][d] for f in both)
                behind = pulp.lpSum(z[f][e][d] for f in both)
                problem += ahead == size * x[l][e][d], f"links_out_{l}_{e}_{d}"
                problem += behind == size * x[l + 1][e][d], f"links_in_{l}_{e}_{d}"
            terms += [float(pairs_LEE[l, e, f]) * z[e][f][d] for f in both for d in range(devices)]
    problem += pulp.lpSum(terms)
    proven = _solve(problem, limit)
    if proven is None:
        return None
    device_LE = np.array([_chosen(x[l], experts, devices) for l in range(layers)], np.int32)
    same_LEE = device_LE[:-1, :, None] == device_LE[1:, None, :]
    value = float((pairs_LEE * same_LEE).sum() / max(1, layers - 1))
    return Solution(device_LE.ravel(), value, proven)


def _label_layers(flow_LGG: F64, cost_DD: F64, limit: float) -> Solution | None:
    import pulp

    pairs, groups = flow_LGG.shape[:2]
    everyone = range(groups)
    problem = pulp.LpProblem("labels", pulp.LpMinimize)
    y = [_choices(pulp, problem, groups, groups, f"_{l}_") for l in range(pairs + 1)]
    worst = [pulp.LpVariable(f"worst_{l}", 0) for l in range(pairs)]
    problem += pulp.lpSum(worst)
    for l in range(pairs):
        links = (everyone, everyone, everyone, everyone)
        z = pulp.LpVariable.dicts(f"z_{l}", links, 0, 1)
        for a in everyone:
            for b in everyone:
                for g in everyone:
                    row = pulp.lpSum(z[a][b][g][h] for h in everyone)
                    column = pulp.lpSum(z[a][b][h][g] for h in everyone)
                    problem += row == y[l][a][g], f"from_{l}_{a}_{b}_{g}"
                    problem += column == y[l + 1][b][g], f"to_{l}_{a}_{b}_{g}"
        for g in everyone:
            for h in everyone:
                time_on_link = pulp.lpSum(
                    float(flow_LGG[l, a, b] * cost_DD[g, h]) * z[a][b][g][h]
                    for a in everyone
                    for b in everyone
                )
                problem += time_on_link <= worst[l], f"link_{l}_{g}_{h}"
    proven = _solve(problem, limit)
    if proven is None:
        return None
    device_LG = np.array([_chosen(y[l], groups, groups) for l in range(pairs + 1)], np.int32)
    value = sum(
        float((flow_LGG[l] * cost_DD[device_LG[l]][:, device_LG[l + 1]]).max())
        for l in range(pairs)
    )
    return Solution(device_LG.ravel(), value, proven)


def _cover_items(item_CM: F64, cost_C: F64, limit: float) -> Solution | None:
    import pulp

    columns = [[int(e) for e in items] for items in item_CM]
    experts = max(e for items in columns for e in items) + 1
    problem = pulp.LpProblem("cover", pulp.LpMinimize)
    x = pulp.LpVariable.dicts("x", range(len(columns)), cat="Binary")
    problem += pulp.lpSum(float(cost) * x[c] for c, cost in enumerate(cost_C))
    holding: list[list[int]] = [[] for _ in range(experts)]
    for c, items in enumerate(columns):
        for e in items:
            holding[e].append(c)
    for e in range(experts):
        problem += pulp.lpSum(x[c] for c in holding[e]) == 1, f"expert_{e}_lies_once"
    proven = _solve(problem, limit, gap=0.0)
    if proven is None:
        return None
    device_E, chosen = np.zeros(experts, np.int32), [c for c in x if x[c].value() > 0.5]
    for d, c in enumerate(chosen):
        device_E[columns[c]] = d
    return Solution(device_E, float(cost_C[chosen].sum()), proven)


_PROGRAMS: dict[str, Callable[..., Solution | None]] = {
    "cluster": _cluster_layer,
    "polish": _polish_layer,
    "chain": _best_chain,
    "labels": _label_layers,
    "cover": _cover_items,
}

if __name__ == "__main__":
    main()
