"""What a rank counts of routing: each token of each step that ended, once; nothing made up."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from moeserve.core import Chunk, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.replan.routing_counts import (
    PER_STEP,
    SAMPLE_BYTES,
    RoutingCounts,
    chain_observers,
    read_routing,
)
from moeserve.errors import PlacementError

LAYERS, EXPERTS, K = (1, 3), 8, 2


def step(counts: Any, tokens: int, seed: int, fails: bool = False) -> np.ndarray:
    """The choices [L, T, K] of a step of one request."""
    ids_LTK = np.random.default_rng(seed).integers(0, EXPERTS, (len(LAYERS), tokens, K))
    request = Request(RequestId("r"), (1,), SamplingParams())
    counts.begin(StepPlan((Chunk(request, (0,) * tokens, 0, (), 1),) if tokens else ()))
    for l, layer in enumerate(LAYERS):
        counts.record(layer, ids_LTK[l].astype(np.int32))
    if not fails:
        counts.end()
    return ids_LTK


def taken(counts: RoutingCounts) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(json.dumps(counts.take()))
    return found


def test_every_token_is_counted_and_some_are_sampled() -> None:
    counts = RoutingCounts(LAYERS, EXPERTS, K)
    seen = [step(counts, tokens, tokens) for tokens in (3, 0, 50)]
    found = taken(counts)
    assert found["tokens"] == 53
    all_LTK = np.concatenate(seen, axis=1)
    assert found["load"] == [
        np.bincount(ids.ravel(), minlength=EXPERTS).tolist() for ids in all_LTK
    ]
    routing = read_routing(found, len(LAYERS), EXPERTS, K)
    assert routing.tokens == 53
    assert routing.topk_TLK.shape == (3 + PER_STEP, len(LAYERS), K)
    assert routing.topk_TLK[:3].tolist() == seen[0].swapaxes(0, 1).tolist()


def test_what_was_taken_is_gone_and_a_step_that_fails_is_not_counted() -> None:
    counts = RoutingCounts(LAYERS, EXPERTS, K)
    step(counts, 5, 0)
    taken(counts)
    step(counts, 5, 1, fails=True)
    assert taken(counts) == {"tokens": 0, "load": [[0] * EXPERTS] * 2, "sample": ""}
    step(counts, 4, 2)
    assert taken(counts)["tokens"] == 4


def test_the_sample_is_of_the_newest_tokens_and_bounded() -> None:
    """Steps of one token, whose only choice is told by their number; the other stays open."""
    layers, most = tuple(range(512)), SAMPLE_BYTES // (2 * 512 * K)
    counts = RoutingCounts(layers, EXPERTS, K)
    request = Request(RequestId("r"), (1,), SamplingParams())
    for number in range(most + 5):
        counts.begin(StepPlan((Chunk(request, (0,), 0, (), 1),)))
        for layer in layers:
            counts.record(layer, np.array([[number % EXPERTS]], np.int32))
        counts.end()
    found = counts.take()
    assert len(base64.b64decode(found["sample"])) == most * 2 * 512 * K == 96 << 10
    topk_TLK = read_routing(found, len(layers), EXPERTS, K).topk_TLK
    assert topk_TLK[:, 0, 0].tolist() == [n % EXPERTS for n in range(5, most + 5)]
    assert (topk_TLK[:, :, 1] == -1).all()


def test_a_token_larger_than_the_bound_is_still_a_sample() -> None:
    layers = tuple(range(SAMPLE_BYTES // 2))
    counts = RoutingCounts(layers, 1, K)
    request = Request(RequestId("r"), (1,), SamplingParams())
    for _ in range(2):
        counts.begin(StepPlan((Chunk(request, (0,), 0, (), 1),)))
        counts.end()
    assert len(base64.b64decode(counts.take()["sample"])) == 2 * K * len(layers)


def test_observers_see_a_step_in_turn() -> None:
    one, other = (RoutingCounts(LAYERS, EXPERTS, K) for _ in range(2))
    assert chain_observers(None, None) is None
    assert chain_observers(one, None) is one
    assert chain_observers(None, other) is other
    both = chain_observers(one, other)
    step(both, 5, 0)
    assert taken(one) == taken(other)
    assert one is not other


def test_taking_beside_steps_loses_and_doubles_nothing() -> None:
    counts, found, over = RoutingCounts(LAYERS, EXPERTS, K), list[Mapping[str, Any]](), []

    def take() -> None:
        while not over:
            found.append(counts.take())

    thread = threading.Thread(target=take)
    thread.start()
    for number in range(300):
        step(counts, number % 7, number)
    over.append(True)
    thread.join(20)
    found.append(counts.take())
    tokens = sum(number % 7 for number in range(300))
    assert sum(part["tokens"] for part in found) == tokens
    for part in found:
        assert np.array(part["load"]).sum(axis=1).tolist() == [K * part["tokens"]] * len(LAYERS)


def coded(numbers: list[int]) -> str:
    return base64.b64encode(np.array(numbers, np.int16).tobytes()).decode()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": -1}, "tokens: '-1'"),
        ({"tokens": "many"}, "tokens: 'many'"),
        ({"sample": None}, "no text of"),
        ({"sample": "A" * 200_000}, "no text of"),
        ({"sample": "?"}, "cannot be read"),
        ({"sample": coded([1, 2, 3])}, "cannot be read"),
        ({"sample": coded([0, 1, 2, EXPERTS])}, "names experts 0 to 8, the model has 8"),
        ({"sample": coded([-2, 1, 2, 3])}, "names experts -2 to 3"),
    ],
)
def test_counts_that_no_rank_would_send_are_refused(changed: dict[str, Any], said: str) -> None:
    honest = RoutingCounts(LAYERS, EXPERTS, K).take()
    assert len(read_routing(honest, len(LAYERS), EXPERTS, K).topk_TLK) == 0
    with pytest.raises(PlacementError, match=said):
        read_routing({**honest, **changed}, len(LAYERS), EXPERTS, K)
