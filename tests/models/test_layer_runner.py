"""A decoder does not care who runs its layers, as long as each is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeserve.kernels.ops import KvCache, Layer, Ops, Step
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder

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
    ) -> None:
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
