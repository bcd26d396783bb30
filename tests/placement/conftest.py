"""Small routing of our own making: topics that prefer experts, in sequences of one topic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from moeserve.placement.routing import Routing, workload_of_tokens

MakeTopk = Callable[..., NDArray[np.int32]]


def make_topk(
    *, tokens: int, layers: int, experts: int, k: int, topics: int = 4, focus: float = 4.0,
    seed: int = 0,
) -> NDArray[np.int32]:  # fmt: skip
    """[tokens, layers, k]: each topic has its own preference over experts in every layer."""
    random = np.random.default_rng(seed)
    taste = random.normal(size=(topics, layers, experts)) * focus
    topic_T = np.arange(tokens) * topics // tokens
    score = taste[topic_T] + random.gumbel(size=(tokens, layers, experts))
    return np.argsort(-score, axis=2)[:, :, :k].astype(np.int32)


def planted_topk(
    *, tokens: int, layers: int, groups: int, size: int, k: int, seed: int = 0
) -> NDArray[np.int32]:
    """[tokens, layers, k] whose tokens always use experts of one hidden group, in every layer."""
    random = np.random.default_rng(seed)
    members = np.stack([random.permutation(groups * size) for _ in range(layers)])
    group_T = random.integers(groups, size=tokens)
    topk = np.empty((tokens, layers, k), np.int32)
    for t in range(tokens):
        for l in range(layers):
            inside = random.permutation(size)[:k]
            topk[t, l] = members[l, group_T[t] * size + inside]
    return topk


@pytest.fixture
def routing() -> Routing:
    topk = make_topk(tokens=240, layers=3, experts=16, k=3)
    lens = np.full(24, 10)
    return Routing((workload_of_tokens("toy", topk, lens, num_experts=16),), (1, 2, 3))


@pytest.fixture
def topk() -> MakeTopk:
    return make_topk


@pytest.fixture
def planted() -> MakeTopk:
    return planted_topk
