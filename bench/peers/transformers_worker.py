"""Worker in transformers' venv: bf16, grouped_mm experts, greedy. Arguments: folder, threads, and
perhaps bytes of weights in memory and a folder on disk for the others (accelerate reads them as
their module's turn comes)."""

from __future__ import annotations

import sys
import time
from typing import Any

from answer import Channel


def main() -> None:
    folder, threads, offload = sys.argv[1], int(sys.argv[2]), dict[str, Any]()
    if len(sys.argv) > 3:
        most = {"cpu": int(sys.argv[3])}
        offload = {"device_map": "auto", "max_memory": most, "offload_folder": sys.argv[4]}
    channel = Channel()
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="grouped_mm", **offload
    ).eval()
    loaded = time.perf_counter() - begun

    def prompt_all(prompts: list[list[int]]) -> Any:
        return model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def prefill(prompts: list[list[int]]) -> dict[str, Any]:
        begin = time.perf_counter()
        prompt_all(prompts).logits.argmax(-1)
        return {"seconds": time.perf_counter() - begin, "tokens": sum(map(len, prompts))}

    @torch.inference_mode()
    def decode(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        said = prompt_all(prompts)
        begin = time.perf_counter()
        for _ in range(tokens):
            last = said.logits[:, -1:].argmax(-1)
            said = model(last, past_key_values=said.past_key_values, use_cache=True)
        said.logits.argmax(-1)
        return {"seconds": time.perf_counter() - begin, "tokens": tokens * len(prompts)}

    channel.ready(load_s=loaded)
    channel.serve({"prefill": prefill, "decode": decode})


if __name__ == "__main__":
    main()
