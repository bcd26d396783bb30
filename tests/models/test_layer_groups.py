"""Rows that run in one group of layers a step have the bits of rows that run in all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.models.batch import GroupPass, Span, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache

LoadDecoder = Callable[..., Decoder]
BLOCK = 4
PROMPT = [*range(20, 31)]
BLOCKS = [3, 1, 0]  # of the prompt
OTHERS = [Span([5, 6, 7], 0, [2]), Span([9], 0, [4, 5])]


@dataclass
class Seen:
    """Choices by layer, in the order of the rows that are said to be shown."""

    layers: dict[int, list[NDArray[Any]]] = field(default_factory=dict)

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        self.layers.setdefault(layer, []).append(ids_TC.copy())

    def rows(self, layer: int) -> list[list[int]]:
        return sorted(np.concatenate(self.layers[layer]).tolist())


def whole(decoder: Decoder, cache: ModelKvCache, beside: Sequence[Span], seen: Seen) -> Tensor:
    decoder.forward(pack_spans(beside, BLOCK), cache, seen)
    return decoder.forward(pack_spans([Span(PROMPT, 0, BLOCKS)], BLOCK), cache, seen)


def in_groups(
    decoder: Decoder,
    cache: ModelKvCache,
    borders: Sequence[int],
    beside: Sequence[Span],
    seen: Seen,
) -> Tensor:
    """The prompt in so many steps; the others run in the first of them, and in a later one again.
    Gives the logits behind the prompt."""
    layers, states, routed = len(decoder.spec.layers), None, {}
    for start, stop in pairwise(borders):
        spans, last = beside if start == 0 else (), stop == layers
        step = pack_spans([*spans, Span(PROMPT, 0, BLOCKS, int(last))], BLOCK)
        group = GroupPass(start, stop, last, len(PROMPT), states, routed)
        none = [pack_spans([], BLOCK)]
        logits = decoder.forward_micro([replace(step, group=group), *none], cache, seen)[0]
        states, routed = group.states_PH, group.routed
    assert states is None
    return logits[-1:]


@pytest.mark.parametrize("beside", [OTHERS, []], ids=["beside others", "alone"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_prompt_in_groups_of_layers_has_the_bits_of_one_in_all(
    tiny_decoder: LoadDecoder, family: str, beside: list[Span]
) -> None:
    decoder = tiny_decoder(family)
    layers = len(decoder.spec.layers)
    assert layers > 1
    once, expected = decoder.new_cache(6, BLOCK), Seen()
    logits = whole(decoder, once, beside, expected)
    for borders in ({0, 1, layers}, {0, layers - 1, layers}, {*range(layers + 1)}, {0, layers}):
        cache, seen = decoder.new_cache(6, BLOCK), Seen()
        found = in_groups(decoder, cache, sorted(borders), beside, seen)
        assert torch.equal(found, logits)
        after = Span([8], len(PROMPT), [*BLOCKS, 5])
        following = [decoder.forward(pack_spans([after], BLOCK), c) for c in (once, cache)]
        assert torch.equal(*following)
        for layer in decoder.spec.moe_layers:
            assert seen.rows(layer) == expected.rows(layer)
