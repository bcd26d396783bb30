"""The search loops of ``placement/search.cc`` in Python: the same decisions, slowly.

The oracle for the native half and the fallback where it is not built. Shapes as in the package's
docstring; arguments are those of ``search``, checked there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.solvers.annealing import LayerGrouping

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

_WORD = (1 << 64) - 1
PLACE = 720720


class Random:
    """splitmix64."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _WORD

    def draw(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _WORD
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        return z ^ (z >> 31)


def _uses(slot_TK: I32, slots: int) -> NDArray[np.bool_]:
    uses_ST = np.zeros((slots, len(slot_TK)), np.bool_)
    token, k = np.nonzero(slot_TK >= 0)
    uses_ST[slot_TK[token, k], token] = True
    return uses_ST


class _Annealer:
    """An arrangement of one layer; cost and excess are summed anew after every swap."""

    def __init__(self, problem: LayerGrouping, device_S: I32) -> None:
        slots, devices = len(device_S), len(problem.node_D)
        self.uses_ST = _uses(problem.slot_TK, slots)
        self.device_S, self.node_D = device_S, problem.node_D
        self.weight_DT = problem.weight_DT.astype(np.int64)
        self.weight_NT = problem.weight_NT.astype(np.int64) * (len(problem.weight_NT) > 1)
        self.load_SW, self.cap_DW = problem.load_SW, problem.cap_DW
        self.bond_SS = _or_zeros(problem.bond_SS, (slots, slots))
        self.price_SD = _or_zeros(problem.price_SD, (slots, devices))

    def cost(self) -> int:
        tokens = self.weight_DT.shape[1]
        device_DT = np.zeros((len(self.node_D), tokens), np.bool_)
        for s, d in enumerate(self.device_S):
            device_DT[d] |= self.uses_ST[s]
        node_NT = np.zeros(self.weight_NT.shape, np.bool_)
        for d, n in enumerate(self.node_D):
            node_NT[n] |= device_DT[d]
        same_SS = np.tril(self.device_S[:, None] == self.device_S[None, :], -1)
        price = self.price_SD[np.arange(len(self.device_S)), self.device_S].sum()
        return int(
            (self.weight_DT * device_DT).sum() + (self.weight_NT * node_NT).sum()
            + price + (self.bond_SS * same_SS).sum()
        )  # fmt: skip

    def excess(self) -> int:
        load_DW = np.zeros_like(self.cap_DW)
        np.add.at(load_DW, self.device_S, self.load_SW)
        return int(np.maximum(0, load_DW - self.cap_DW).sum())

    def swap(self, i: int, j: int) -> None:
        self.device_S[i], self.device_S[j] = self.device_S[j], self.device_S[i]


def _or_zeros(price: I64, shape: tuple[int, int]) -> I64:
    """``price``, or zeros where it is empty."""
    return price if len(price) else np.zeros(shape, np.int64)


def group(
    problem: LayerGrouping, device_S: I32, draw: I32, *, steps: int, heat: int, seed: int
) -> tuple[int, int]:
    """(cost, excess) of the best arrangement met, which ``device_S`` receives."""
    state = _Annealer(problem, device_S)
    cost, excess = state.cost(), state.excess()
    best, kept_S = (excess, cost), device_S.copy()
    random = Random(seed)
    for step in range(steps):
        i = random.draw() % len(device_S)
        j = random.draw() % len(device_S)
        sample = int(draw[random.draw() & 1023])
        if device_S[i] == device_S[j]:
            continue
        left = steps - step
        # A cost this much higher is still accepted: exponential, and cooling with the square.
        accepted = (heat * left // steps * left // steps * sample) >> 10
        state.swap(i, j)
        new_cost, new_excess = state.cost(), state.excess()
        if new_cost - cost + problem.penalty * (new_excess - excess) > accepted:
            state.swap(i, j)
            continue
        cost, excess = new_cost, new_excess
        if (excess, cost) < best:
            best, kept_S = (excess, cost), device_S.copy()
    device_S[:] = kept_S
    return best[1], best[0]


def saved_bound(slot_TK: I32, slots: int, partners: int) -> int:
    uses_ST = _uses(slot_TK, slots)
    total = 0
    for s in range(slots):
        mate_XT = uses_ST[:, uses_ST[s]]
        open_X = np.ones(slots, np.bool_)
        open_X[s] = False
        mates_T = np.ones(mate_XT.shape[1], np.int64)
        saved, bounds = 0, []
        for _ in range(min(partners, slots - 1) + 1):
            step_T = PLACE // mates_T - PLACE // (mates_T + 1)
            gain_X = (mate_XT @ step_T) * open_X
            bounds.append(saved + int(np.sort(gain_X)[::-1][:partners].sum()))
            pick = int(np.argmax(gain_X))
            saved += int(gain_X[pick])
            open_X[pick] = False
            mates_T += mate_XT[pick]
        total += min(bounds)
    return total


class _Packing:
    def __init__(self, load_EW: F64, speed_D: F64, slots: int) -> None:
        self.load: list[list[float]] = load_EW.tolist()
        self.speed: list[float] = speed_D.tolist()
        self.E, self.D, self.m = len(self.load), len(self.speed), slots // len(self.speed)
        self.W = load_EW.shape[1]
        self.count = [1] * self.E
        self.rows: list[list[int]] = []
        self.heat: list[list[float]] = []

    def share(self, e: int) -> list[float]:
        return [x / self.count[e] for x in self.load[e]]

    def size(self, e: int) -> float:
        return max(self.share(e))

    def peak(self, d: int) -> float:
        return max(x / self.speed[d] for x in self.heat[d])

    def hottest(self) -> int:
        return max(range(self.D), key=lambda d: (self.peak(d), -d))

    def sum_loads(self) -> None:
        self.heat = [[0.0] * self.W for _ in range(self.D)]
        for heat, row in zip(self.heat, self.rows, strict=True):
            for e in row:
                for w, x in enumerate(self.share(e)):
                    heat[w] += x

    def replicate(self) -> None:
        for extra in range(self.D * self.m - self.E, 0, -1):
            able = [e for e in range(self.E) if self.count[e] < self.D]
            heavy = max(able, key=lambda e: (self.size(e), -e)) if able else extra % self.E
            self.count[heavy] += 1

    def pack(self) -> None:
        self.rows = [[] for _ in range(self.D)]
        self.heat = [[0.0] * self.W for _ in range(self.D)]
        for e in sorted(range(self.E), key=lambda e: -self.size(e)):
            share = self.share(e)
            for _ in range(self.count[e]):
                free = [d for d in range(self.D) if len(self.rows[d]) < self.m]
                place = min(free, key=lambda d: (e in self.rows[d], self._with(d, share), d))
                self.rows[place].append(e)
                for w, x in enumerate(share):
                    self.heat[place][w] += x

    def _with(self, d: int, share: list[float]) -> float:
        return max((h + x) / self.speed[d] for h, x in zip(self.heat[d], share, strict=True))

    def _after(self, a: int, b: int, x: int, y: int) -> float:
        top = 0.0
        for w in range(self.W):
            gain = self.load[y][w] / self.count[y] - self.load[x][w] / self.count[x]
            top = max(top, (self.heat[a][w] + gain) / self.speed[a])
            top = max(top, (self.heat[b][w] - gain) / self.speed[b])
        return top

    def refine(self) -> float:
        for _ in range(64 * self.D):
            hot = self.hottest()
            top = self.peak(hot)
            best, found = top * (1 - 1e-12), None
            for i, x in enumerate(self.rows[hot]):
                for d, row in enumerate(self.rows):
                    for j, y in enumerate(row):
                        if d == hot or x == y or (self.count[x] > 1 and x in row):
                            continue
                        if self.count[y] > 1 and y in self.rows[hot]:
                            continue
                        p = self._after(hot, d, x, y)
                        if p < best:
                            best, found = p, (i, d, j)
            if found is None:
                return top
            i, d, j = found
            self.rows[hot][i], self.rows[d][j] = self.rows[d][j], self.rows[hot][i]
            self.sum_loads()
        return self.peak(self.hottest())

    def recount(self, top: float, rounds: int) -> float:
        for _ in range(rounds):
            kept_count, kept_rows = self.count, self.rows
            takers = list(self.rows[self.hottest()])
            best, found = top * (1 - 1e-12), None
            for taker in takers:
                if kept_count[taker] >= self.D:
                    continue
                for giver in range(self.E):
                    if giver == taker or kept_count[giver] < 2:
                        continue
                    self.count = kept_count.copy()
                    self.count[taker] += 1
                    self.count[giver] -= 1
                    if self.size(giver) >= best:
                        continue
                    self.pack()
                    p = self.refine() if self.m > 2 else self.peak(self.hottest())
                    if p < best:
                        best, found = p, (self.count, self.rows)
            self.count, self.rows = found or (kept_count, kept_rows)
            self.sum_loads()
            if found is None:
                break
            top = self.refine()
        return top


def balance(load_EW: F64, speed_D: F64, recounts: int, expert_S: I32) -> float:
    packing = _Packing(load_EW, speed_D, len(expert_S))
    packing.replicate()
    packing.pack()
    top = packing.recount(packing.refine(), recounts)
    expert_S[:] = [e for row in packing.rows for e in row]
    return top


def assign(cost_RC: F64, column_R: I32) -> None:
    """Shortest augmenting paths; one row at a time, column 0 standing for "not yet placed"."""
    size = len(cost_RC)
    u, v = np.zeros(size + 1), np.zeros(size + 1)
    row, way = np.zeros(size + 1, np.int64), np.zeros(size + 1, np.int64)
    for r in range(1, size + 1):
        row[0] = r
        column = 0
        slack = np.full(size + 1, math.inf)
        done = np.zeros(size + 1, np.bool_)
        while True:
            done[column] = True
            i = row[column]
            reduced = np.concatenate(([math.inf], cost_RC[i - 1] - u[i] - v[1:]))
            nearer = ~done & (reduced < slack)
            slack[nearer], way[nearer] = reduced[nearer], column
            following = int(np.argmin(np.where(done, math.inf, slack)))
            step = slack[following]
            u[row[done]] += step
            v[done] -= step
            slack[~done] -= step
            column = following
            if row[column] == 0:
                break
        while column:
            row[column] = row[way[column]]
            column = int(way[column])
    column_R[row[1:] - 1] = np.arange(size)
