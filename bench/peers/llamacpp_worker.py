"""Worker in llama.cpp's venv: greedy generation through its C interface, batched.

Arguments: GGUF file, threads. No sampler but argmax, no text: nothing that Python could slow down.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from answer import Channel

CONTEXT, MOST_STREAMS, STEP = 8192, 32, 512


def main() -> None:
    file, threads = sys.argv[1], int(sys.argv[2])
    channel = Channel()
    import llama_cpp as ll
    import numpy as np

    begun = time.perf_counter()
    ll.llama_backend_init()
    model_params = ll.llama_model_default_params()
    model_params.use_mmap, model_params.n_gpu_layers = True, 0
    model = ll.llama_model_load_from_file(file.encode(), model_params)
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = CONTEXT, MOST_STREAMS, True
    params.n_batch = params.n_ubatch = STEP
    params.n_threads = params.n_threads_batch = threads
    context = ll.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"{file}: llama.cpp did not load it")
    loaded = time.perf_counter() - begun
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(STEP, 0, 1)

    def step(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, stream, whether its logits are wanted) to the likeliest next ones."""
        batch.n_tokens = len(tokens)
        wanted = []
        for i, (token, position, stream, logits) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
            batch.logits[i] = logits
            if logits:
                wanted.append(i)
        if ll.llama_decode(context, batch) != 0:
            sys.exit("llama_decode failed")
        ll.llama_synchronize(context)
        rows = (ll.llama_get_logits_ith(context, i) for i in wanted)
        return [int(np.ctypeslib.as_array(row, (vocab,)).argmax()) for row in rows]

    def prompt_all(prompts: list[list[int]]) -> list[int]:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        flat = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        parts = [flat[at : at + STEP] for at in range(0, len(flat), STEP)]
        return [token for part in parts for token in step(part)]

    def prefill(prompts: list[list[int]]) -> dict[str, Any]:
        begin = time.perf_counter()
        prompt_all(prompts)
        return {"seconds": time.perf_counter() - begin, "tokens": sum(map(len, prompts))}

    def decode(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        last = prompt_all(prompts)
        begin = time.perf_counter()
        for made in range(tokens):
            last = step([(token, len(prompts[s]) + made, s, True) for s, token in enumerate(last)])
        return {"seconds": time.perf_counter() - begin, "tokens": tokens * len(prompts)}

    channel.ready(load_s=loaded)
    channel.serve({"prefill": prefill, "decode": decode})


if __name__ == "__main__":
    main()
