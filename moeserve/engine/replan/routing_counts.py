"""What a rank counts of its own tokens' routing while it serves: loads, and a sample of tokens.

Loads count every token. The sample takes a few tokens of each step, evenly, and keeps the newest;
which experts go together can only be seen in whole tokens. Letters: L layers, E experts, T tokens,
N sampled tokens, K choices.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import StepPlan
from moeserve.engine.model_runner import StepObserver
from moeserve.engine.replan.messages import read_count
from moeserve.errors import PlacementError

SAMPLE_BYTES = 96 << 10
PER_STEP = 8


def most_sampled(layers: int, top_k: int) -> int:
    """Tokens of a rank's sample: one at least."""
    return max(1, SAMPLE_BYTES // (2 * layers * top_k))


class RoutingCounts:
    """A step observer, whose steps are counted when they end: one that fails is not.

    ``take``, from any thread, gives what came since the last ``take``, as JSON has it.
    """

    def __init__(self, moe_layers: Sequence[int], num_experts: int, top_k: int) -> None:
        self._column = {layer: l for l, layer in enumerate(moe_layers)}
        self._shape = len(moe_layers), top_k
        self._most = most_sampled(len(moe_layers), top_k)
        # Of the step that runs:
        self._step_LE = np.zeros((len(moe_layers), num_experts), np.int64)
        self._rows_NLK = np.empty((0, *self._shape), np.int16)
        self._picked_N = np.empty(0, np.int64)
        self._step_tokens = 0
        # Of the steps that ended:
        self._lock = threading.Lock()
        self._load_LE = np.zeros_like(self._step_LE)
        self._kept: list[NDArray[np.int16]] = []
        self._tokens = 0

    def begin(self, plan: StepPlan) -> None:
        count = plan.num_tokens
        self._picked_N = np.unique(np.linspace(0, count - 1, min(count, PER_STEP)).astype(int))
        self._rows_NLK = np.full((len(self._picked_N), *self._shape), -1, np.int16)
        self._step_LE[:] = 0
        self._step_tokens = count

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        l = self._column[layer]
        self._step_LE[l] += np.bincount(ids_TC.ravel(), minlength=self._step_LE.shape[1])
        self._rows_NLK[:, l, : ids_TC.shape[1]] = ids_TC[self._picked_N]

    def end(self) -> None:
        with self._lock:
            self._load_LE += self._step_LE
            self._tokens += self._step_tokens
            if len(self._rows_NLK):
                self._kept.append(self._rows_NLK)
                while len(self._kept) > 1 and sum(map(len, self._kept)) > self._most:
                    del self._kept[0]

    def take(self) -> Mapping[str, Any]:
        with self._lock:
            kept, self._kept = self._kept, []
            load_LE, self._load_LE = self._load_LE, np.zeros_like(self._load_LE)
            tokens, self._tokens = self._tokens, 0
        sample_NLK = np.concatenate([np.empty((0, *self._shape), np.int16), *kept])
        return {
            "tokens": tokens,
            "load": load_LE.tolist(),
            "sample": base64.b64encode(sample_NLK[-self._most :].tobytes()).decode("ascii"),
        }


@dataclass(frozen=True, slots=True, eq=False)
class RankRouting:
    """What ``take`` gave, read: tokens computed, and the choices of a sample of them; -1 where a
    layer has fewer."""

    tokens: int
    topk_TLK: NDArray[np.int32]


def read_routing(
    counts: Mapping[str, Any], layers: int, num_experts: int, top_k: int
) -> RankRouting:
    """What a peer says it counted; PlacementError where it cannot be that."""
    tokens, sample = read_count(counts, "tokens"), counts.get("sample")
    if not isinstance(sample, str) or len(sample) > 2 * SAMPLE_BYTES:
        raise PlacementError(f"routing counts: the sample is no text of {2 * SAMPLE_BYTES} letters")
    try:
        flat = np.frombuffer(base64.b64decode(sample, validate=True), np.int16)
        topk_TLK = flat.reshape(-1, layers, top_k).astype(np.int32)
    except (binascii.Error, ValueError) as error:
        raise PlacementError(f"routing counts: the sample cannot be read: {error}") from error
    if topk_TLK.size and not -1 <= topk_TLK.min() <= topk_TLK.max() < num_experts:
        raise PlacementError(
            f"routing counts: the sample names experts {topk_TLK.min()} to {topk_TLK.max()}, "
            f"the model has {num_experts}"
        )
    return RankRouting(tokens, topk_TLK)


def chain_observers(first: StepObserver | None, second: StepObserver | None) -> StepObserver | None:
    """Those that are there as one, in this order; None if neither is."""
    return (first and second and ChainedObservers(first, second)) or first or second


class ChainedObservers:
    """Two step observers as one."""

    def __init__(self, first: StepObserver, second: StepObserver) -> None:
        self._pair = first, second

    def begin(self, plan: StepPlan) -> None:
        for one in self._pair:
            one.begin(plan)

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        for one in self._pair:
            one.record(layer, ids_TC)

    def end(self) -> None:
        for one in self._pair:
            one.end()
