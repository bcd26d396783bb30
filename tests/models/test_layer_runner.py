"""A decoder does not care who runs its layers, as long as each is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeserve.kernels.ops import KvCache, Layer, Ops, Step
from moeserve.models.batch import KeptPass, Span, pack_spans
from moeserve.models.decoder import Decoder
from moeserve.models.layer_runner import GroupRows

LoadDecoder = Callable[..., Decoder]
BLOCK = 4


class OneLayerAtATime:
    """As if there was memory for one layer: it is brought in, all microbatches use it, it goes."""

    def __init__(self, ops: Ops, layers: Sequence[Layer]) -> None:
        self._ops = ops
        self._layers = tuple(layers)

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
        group: GroupRows | None = None,
    ) -> None:
        assert group is None, group
        for l, layer in enumerate(self._layers):
            stack = self._ops.stack_layers([layer])
            for m, (x_TH, step) in enumerate(zip(hidden, steps, strict=True)):
                if step is not None:
                    ids = None if routed is None else routed[m]
                    self._ops.forward_layers(x_TH, stack, step, caches[l : l + 1], ids)


def test_layers_that_are_brought_in_one_by_one_give_the_same_bits(
    tiny_decoder: LoadDecoder,
) -> None:
    spans = [Span(range(1, 10), 0, [0, 1, 2]), Span([7, 8], 0, [3])]
    for family in ("deepseek_v3", "gpt_oss"):
        whole = tiny_decoder(family)
        streamed = whole.over(OneLayerAtATime(whole.ops, whole.stack.layers))
        assert streamed.stack.layers == ()
        rows = []
        for decoder in (whole, streamed):
            steps = [pack_spans([span], BLOCK) for span in spans] + [pack_spans([], BLOCK)]
            rows.append(decoder.forward_micro(steps, decoder.new_cache(4, BLOCK)))
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
        assert [len(logits_RV) for logits_RV in rows[0]] == [1, 1, 0]


def test_a_step_that_comes_again_gives_the_bits_of_one_that_is_new(
    tiny_decoder: LoadDecoder,
) -> None:
    """Also in another cache, and where somebody looks at the routing in between."""
    decoder = tiny_decoder("deepseek_v3")
    first = pack_spans([Span([5], 0, [2, 1]), Span([6], 0, [0, 3])], BLOCK)
    again = replace(first, kept=KeptPass())
    for _ in range(2):
        caches = decoder.new_cache(4, BLOCK), decoder.new_cache(4, BLOCK)
        for position in range(6):
            spans = [Span([7 + position], position, [2, 1]), Span([3], position, [0, 3])]
            new = pack_spans(spans, BLOCK)
            for mine, theirs in (
                (again.token_ids_T, new.token_ids_T),
                (again.positions_T, new.positions_T),
                (again.slot_T, new.slot_T),
                (again.attention.context_S, new.attention.context_S),
            ):
                mine.copy_(theirs)
            observer = Unlooked() if position == 3 else None
            expected = decoder.forward(new, caches[0])
            assert torch.equal(decoder.forward(again, caches[1], observer), expected)


class Unlooked:
    """An observer that keeps nothing."""

    def record(self, layer: int, ids_TC: object) -> None: ...
