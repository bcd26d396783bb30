"""Worker: the same experts as a loop of torch products. Arguments: kind and threads.

Kinds: ``bf16`` (``linear``), ``int_mm`` (int8 by ``_int_mm`` and eager rescaling), ``fbgemm``
(``quantized.linear_dynamic``).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from moeserve.bench.worker.repeat import repeat
from moeserve.process.answer import Channel


def main() -> None:
    kind, threads = sys.argv[1], int(sys.argv[2])
    channel = Channel()
    import torch
    from torch import Tensor
    from torch.nn import functional

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    Product = Callable[[Tensor], Tensor]
    held: list[tuple[Product, Product]] = []

    def bf16(weight_NK: Tensor) -> Product:
        w = weight_NK.bfloat16()
        return lambda x: functional.linear(x.bfloat16(), w)

    def int_mm(weight_NK: Tensor) -> Product:
        scale_N1 = weight_NK.abs().amax(-1, keepdim=True) / 127
        codes_NK = (weight_NK / scale_N1).round().to(torch.int8)

        def product(x_TK: Tensor) -> Tensor:
            x_T1 = x_TK.abs().amax(-1, keepdim=True) / 127
            codes_TK = (x_TK / x_T1).round().to(torch.int8)
            return torch._int_mm(codes_TK, codes_NK.t()).float() * x_T1 * scale_N1.t()

        return product

    def fbgemm(weight_NK: Tensor) -> Product:
        scale_N = weight_NK.abs().amax(-1) / 127
        zero_N = torch.zeros(len(scale_N), dtype=torch.int64)
        w = torch.quantize_per_channel(weight_NK, scale_N, zero_N, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(w, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    made = {"bf16": bf16, "int_mm": int_mm, "fbgemm": fbgemm}[kind]

    def prepare(experts: int, hidden: int, inner: int, per_token: int) -> dict[str, Any]:
        up = torch.randn(2 * inner, hidden) / hidden**0.5
        down = torch.randn(hidden, inner) / inner**0.5
        held.extend((made(up.clone()), made(down.clone())) for _ in range(experts))
        return {}

    def experts(x_TH: Tensor, ids_TC: Tensor) -> Tensor:
        out_TH = torch.zeros_like(x_TH)
        share = 1 / ids_TC.shape[1]
        for e in sorted({e for chosen in ids_TC.tolist() for e in chosen}):
            rows = (ids_TC == e).any(1).nonzero()[:, 0]
            gate, up = held[e][0](x_TH[rows]).float().chunk(2, -1)
            out_TH.index_add_(0, rows, held[e][1](functional.silu(gate) * up).float() * share)
        return out_TH

    def run(ids: list[list[int]], seconds: float, hidden: int) -> dict[str, Any]:
        ids_TC, x_TH = torch.tensor(ids), torch.randn(len(ids), hidden)
        with torch.inference_mode():
            return {"seconds": repeat(lambda: experts(x_TH, ids_TC), seconds)}

    channel.ready()
    channel.serve({"prepare": prepare, "run": run})


if __name__ == "__main__":
    main()
