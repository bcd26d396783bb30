"""Worker in our own environment: scheduler, executor, model. Arguments: folder, threads."""

from __future__ import annotations

import sys
import time
from typing import Any

from answer import Channel


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    channel = Channel()
    from moeserve.bench.cli import load
    from moeserve.bench.generation import Case, bounds, run_prompts
    from moeserve.bench.roofline import Roofline

    begun = time.perf_counter()
    decoder = load(folder, "auto", threads)
    loaded = time.perf_counter() - begun

    def prefill(prompts: list[list[int]]) -> dict[str, Any]:
        timing = run_prompts(decoder, [tuple(p) for p in prompts], 1)
        return {"seconds": timing.prefill_s, "tokens": timing.prompted}

    def decode(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        timing = run_prompts(decoder, [tuple(p) for p in prompts], tokens + 1)
        return {"seconds": timing.decode_s, "tokens": timing.decoded}

    def roofline(case: list[int], limit: dict[str, float]) -> dict[str, Any]:
        least = bounds(decoder, Case(*case), Roofline(**limit))
        return {"prefill": least.prefill_rate, "decode": least.decode_rate if case[2] > 1 else 0.0}

    channel.ready(load_s=loaded)
    channel.serve({"prefill": prefill, "decode": decode, "roofline": roofline})


if __name__ == "__main__":
    main()
