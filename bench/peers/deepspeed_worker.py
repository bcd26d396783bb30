"""One rank of ``deepspeed.moe.layer.MoE`` over gloo, for ``bench/dispatch.py --deepspeed``.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python deepspeed_worker.py SECONDS 1,8,32

Runs in an environment of its own (``DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install
--no-build-isolation deepspeed``), so it imports nothing of ours. The same layer: 32 experts,
top-4, hidden 1024, intermediate 512, SwiGLU, bf16, no token dropped. Rank 0 prints a JSON object a
figure.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

HIDDEN, TOP_K, EXPERTS, INNER = 1024, 4, 32, 512
FEWEST, MOST = 5, 500


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.down = torch.nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down(torch.nn.functional.silu(gate) * up)
        return out


def main() -> None:
    import deepspeed
    from deepspeed.moe.layer import MoE

    seconds, tokens = float(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    moe = MoE(HIDDEN, Expert(), EXPERTS, ep_size=world, k=TOP_K, drop_tokens=False)
    moe.set_deepspeed_parallelism()
    moe = moe.bfloat16().eval()
    for count in tokens:
        x_BTH = torch.randn(1, count, HIDDEN, dtype=torch.bfloat16)
        with torch.no_grad():
            begun = time.perf_counter()
            for _ in range(FEWEST):
                moe(x_BTH)
            wanted = torch.tensor(seconds * FEWEST / (time.perf_counter() - begun))
            dist.broadcast(wanted, 0)
            taken = []
            for _ in range(min(MOST, max(FEWEST, int(wanted)))):
                begun = time.perf_counter()
                moe(x_BTH)
                taken.append((time.perf_counter() - begun) * 1e6)
        if rank == 0:
            row = {
                "ranks": world, "tokens": count, "by": "deepspeed", "kind": "bf16", "bytes": 0,
                "median_us": statistics.median(taken), "best_us": min(taken), "calls": len(taken),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
