"""Experts that requests prefer: the closed form beside the policy that keeps them."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.offload.model.demand import ExpertsDemand, MatrixDemand
from moeserve.offload.model.locality import (
    LONG,
    WINDOW,
    RoutingHabits,
    beta_binomial,
    kept_experts,
)
from moeserve.offload.model.residency import WeightsInMemory
from moeserve.offload.residency import EMPTY, HALF_LIFE, Residency

EXPERTS, TOP_K, LAYERS = 32, 4, 8
DEMAND = ExpertsDemand(MatrixDemand(1 << 20, 1 << 20, "int8"), EXPERTS, TOP_K)


@given(st.integers(0, 60), st.floats(0.05, 20.0), st.floats(0.05, 20.0))
def test_successes_are_distributed(trials: int, a: float, b: float) -> None:
    found = beta_binomial(trials, a, b)
    assert sum(found) == pytest.approx(1.0)
    assert sum(i * p for i, p in enumerate(found)) == pytest.approx(trials * a / (a + b))


@given(
    st.integers(1, 64),
    st.sampled_from([4, 8, 16]),
    st.floats(0.0, 1.0),
    st.integers(1, 300),
    st.integers(0, 2 * WINDOW),
    st.floats(0.0, 1.0),
)
def test_hits_lie_between_chance_and_all(
    experts: int, top_k: int, repeat: float, requests: int, made: int, kept: float
) -> None:
    """They grow with what is kept; and are by chance where nothing is preferred, or nothing is
    known of these requests yet."""
    p = min(1.0, top_k / experts)
    found = kept_experts(p, repeat, requests, made)
    used = 1 - (1 - p) ** requests
    hits = found.hits(kept)
    assert kept * used - 1e-9 <= hits <= min(kept, used) + 1e-9
    assert hits <= found.hits(min(1.0, kept + 0.1)) + 1e-9
    assert found.hits(1.0) == pytest.approx(used)
    if repeat <= p or not made:
        assert hits == pytest.approx(kept * used, abs=1e-6)


@pytest.mark.parametrize("requests", [1, 8])
def test_a_request_that_always_chooses_alike_finds_what_it_used(requests: int) -> None:
    """Which no density has: all of what one request uses is there once it was used."""
    always = kept_experts(0.125, 1.0, requests, LONG)
    used = 1 - (1 - 0.125) ** requests
    assert always.hits(used) == pytest.approx(used, rel=1e-3)


class Drawn:
    """Requests whose tokens choose by weights of their own; new ones come all at once."""

    def __init__(self, requests: int, spread: float) -> None:
        self._draw = np.random.default_rng(7)
        self._requests, self._spread = requests, spread
        self.renew()

    def renew(self) -> None:
        shape = (self._requests, LAYERS, EXPERTS)
        self._weight_BLE = self._spread * self._draw.standard_normal(shape)

    def chosen(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """[B, L, K], distinct: the largest of weights with Gumbel noise."""
        noisy = self._weight_BLE + self._draw.gumbel(size=self._weight_BLE.shape)
        return np.argpartition(-noisy, TOP_K, axis=-1)[:, :, :TOP_K]


@pytest.mark.parametrize("steps", [8, 24])
@pytest.mark.parametrize(("requests", "share"), [(1, 0.3), (4, 0.3), (4, 0.6), (12, 0.6)])
def test_what_the_policy_misses_is_what_is_predicted(
    requests: int, share: float, steps: int
) -> None:
    """In the first steps of requests and in the last ones; one layer's experts are held at a time,
    so that what is read takes half the room that is predicted."""
    slots = int(share * EXPERTS * LAYERS)
    policy, drawn = Residency([EXPERTS] * LAYERS, slots), Drawn(requests, 1.6)
    missed_S: list[list[int]] = [[] for _ in range(steps)]
    alike = []
    for _ in range(9):
        drawn.renew()
        before = None
        for step in range(steps):
            chosen_BLK = drawn.chosen()
            if before is not None:
                same = chosen_BLK[..., :, None] == before[..., None, :]
                alike.append(float(same.any(-1).mean()))
            before = chosen_BLK
            policy.begin_step()
            missed = 0
            for layer in range(LAYERS):
                needed = np.unique(chosen_BLK[:, layer])
                policy.use(layer, needed)
                there = policy.slot_LE[layer, needed] != EMPTY
                held = policy.slot_LE[layer, needed[there]].copy()
                policy.hold(held)
                placed = policy.place(layer, needed[~there].tolist(), layer)
                policy.release(held)
                policy.release(placed)
                missed += int((~there).sum())
            missed_S[step].append(missed)
    weights = WeightsInMemory(share, routed=LAYERS * 2, repeat=fmean(alike))
    for part in (range(2, 6), range(steps - 6, steps)):
        measured = fmean(fmean(missed_S[s][2:]) / LAYERS for s in part)
        predicted = fmean(weights.missing_experts(DEMAND, requests, s) for s in part)
        assert predicted == pytest.approx(measured, rel=0.12, abs=0.1)
    chance = WeightsInMemory(share, routed=LAYERS * 2).missing_experts(DEMAND, requests)
    assert predicted < chance


def test_reading_ahead_goes_on_while_half_of_it_is_used() -> None:
    tokens, made = 4, 16
    unsure, sure = (
        WeightsInMemory(0.6, None, foreseen, 1.0, 20).expert_reads(DEMAND, tokens, made)
        for foreseen in (0.3, 0.8)
    )
    assert unsure.missing == sure.missing > 0
    assert unsure.foreseen == unsure.in_vain == 0
    assert sure.foreseen == 0.8
    assert sure.in_vain < 0.25 * sure.missing


def test_a_step_that_needs_nearly_all_reads_what_is_absent() -> None:
    reads = WeightsInMemory(0.5, None, 0.0, 1.0, 20).expert_reads(DEMAND, 16, 0)
    assert reads.foreseen == 1.0
    assert reads.missing + reads.in_vain == pytest.approx(16)


def test_a_model_of_one_layer_foresees_nothing() -> None:
    assert WeightsInMemory.of(0.5, 1, RoutingHabits(0.4, 0.8)).foreseen == 0.0
    assert WeightsInMemory.of(0.5, 20, RoutingHabits(0.4, 0.8)).foreseen == pytest.approx(0.76)
    with pytest.raises(ConfigError, match="shares lie within"):
        RoutingHabits(repeat=1.5)


def test_what_counts_weighs_as_much_as_the_policy_remembers() -> None:
    """All steps there were, each by what is left of it."""
    remembered = sum(0.5 ** (step / HALF_LIFE) for step in range(1000))
    assert int(remembered) == WINDOW
