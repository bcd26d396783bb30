"""Worker in kt-kernel's venv: its CPU experts. Arguments: kind (int8, bf16) and threads."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from answer import Channel
from repeat import repeat

CLASSES = {"int8": "AMXInt8_MOE", "bf16": "AMXBF16_MOE"}
MOST_TOKENS = 512


def main() -> None:
    kind, threads = sys.argv[1], int(sys.argv[2])
    channel = Channel()
    import torch
    from kt_kernel import kt_kernel_ext

    torch.set_num_threads(1)
    pool = kt_kernel_ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = kt_kernel_ext.CPUInfer(pool)
    held: dict[str, Any] = {}

    def prepare(experts: int, hidden: int, inner: int, per_token: int) -> dict[str, Any]:
        def drawn(out: int, into: int) -> torch.Tensor:
            one = torch.randn(out, into) / into**0.5
            return one.bfloat16().repeat(experts, 1, 1)

        weights = {"gate": drawn(inner, hidden), "up": drawn(inner, hidden)}
        weights["down"] = drawn(hidden, inner)
        on_gpu = torch.zeros(experts, dtype=torch.bool)
        order = torch.arange(experts)
        config = kt_kernel_ext.moe.MOEConfig(experts, per_token, hidden, inner, on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, MOST_TOKENS
        config.save, config.load, config.path = False, False, tempfile.gettempdir()
        config.gate_proj = weights["gate"].data_ptr()
        config.up_proj = weights["up"].data_ptr()
        config.down_proj = weights["down"].data_ptr()
        moe = getattr(kt_kernel_ext.moe, CLASSES[kind])(config)
        cpu.submit(moe.load_weights_task(order.data_ptr()))
        cpu.sync()
        held.update(moe=moe, on_gpu=on_gpu)
        return {}

    def run(ids: list[list[int]], seconds: float, hidden: int) -> dict[str, Any]:
        tokens, chosen = len(ids), len(ids[0])
        count = torch.tensor([tokens], dtype=torch.int32)
        ids_TC = torch.tensor(ids, dtype=torch.int64)
        weights_TC = torch.full((tokens, chosen), 1 / chosen)
        x_TH = torch.randn(tokens, hidden).bfloat16()
        out_TH = torch.empty_like(x_TH)
        pointers = [t.data_ptr() for t in (ids_TC, weights_TC, x_TH, out_TH)]

        def once() -> None:
            task = held["moe"].forward_task(count.data_ptr(), chosen, *pointers, False)
            cpu.submit(task)
            cpu.sync()

        return {"seconds": repeat(once, seconds)}

    channel.ready()
    channel.serve({"prepare": prepare, "run": run})


if __name__ == "__main__":
    main()
