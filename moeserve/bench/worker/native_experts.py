"""Worker: our ``moe_ffn``, with random weights. Arguments: kind (int8, int4, bf16) and threads."""

from __future__ import annotations

import sys
from typing import Any

from moeserve.bench.worker.repeat import repeat
from moeserve.process.answer import Channel


def main() -> None:
    kind, threads = sys.argv[1], int(sys.argv[2])
    channel = Channel()
    import torch
    from torch import Tensor

    from moeserve.kernels.matrix import Matrix, to_int4, to_int8
    from moeserve.kernels.ops import Experts
    from moeserve.kernels.select import choose_ops

    torch.set_num_threads(1)
    ops = choose_ops(threads=threads)
    held: dict[str, Experts] = {}

    def drawn(num: int, out: int, into: int) -> Matrix:
        one: Tensor = torch.randn(out, into) / into**0.5
        # Every expert has memory of its own; that they say the same costs no time to draw.
        if kind == "bf16":
            return one.bfloat16().repeat(num, 1, 1)
        several = one.repeat(num, 1, 1)
        return to_int8(several) if kind == "int8" else to_int4(several)

    def prepare(experts: int, hidden: int, inner: int, per_token: int) -> dict[str, Any]:
        gate_up, down = drawn(experts, 2 * inner, hidden), drawn(experts, hidden, inner)
        held["experts"] = ops.pack_experts(gate_up, down)
        return {"name": ops.name}

    def run(ids: list[list[int]], seconds: float, hidden: int) -> dict[str, Any]:
        ids_TC = torch.tensor(ids, dtype=torch.int32)
        x_TH = torch.randn(len(ids), hidden)
        weights_TC = torch.full(ids_TC.shape, 1 / ids_TC.shape[1])
        return {
            "seconds": repeat(
                lambda: ops.moe_ffn(x_TH, held["experts"], ids_TC, weights_TC), seconds
            )
        }

    channel.ready()
    channel.serve({"prepare": prepare, "run": run})


if __name__ == "__main__":
    main()
