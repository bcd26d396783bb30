"""Worker in llama.cpp's venv: greedy generation through its C interface, batched.

Arguments: GGUF file, threads, and perhaps how many tokens of context all streams have together and
how many streams there are, and ``mapped``: weights then stay as the file has them, which otherwise
are copied in another order where its kernels have one. No sampler but argmax, no text: nothing that
Python could slow down.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from answer import Channel

CONTEXT, MOST_STREAMS, STEP = 8192, 32, 512


class Generator:
    """A loaded model with one context of so many sequences; ``ll`` is llama_cpp."""

    def __init__(
        self, ll: Any, file: str, threads: int, context: int, streams: int, *, mapped: bool
    ) -> None:
        import numpy as np

        self.ll, self.np = ll, np
        ll.llama_backend_init()
        model_params = ll.llama_model_default_params()
        model_params.use_mmap, model_params.n_gpu_layers = True, 0
        model_params.use_extra_bufts = not mapped
        model = ll.llama_model_load_from_file(file.encode(), model_params)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = context, streams, True
        params.n_batch = params.n_ubatch = STEP
        params.n_threads = params.n_threads_batch = threads
        self.context = ll.llama_init_from_model(model, params)
        if not self.context:
            sys.exit(f"{file}: llama.cpp did not load it")
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
        self.batch = ll.llama_batch_init(STEP, 0, 1)

    def step(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, stream, whether its logits are wanted) to the likeliest next ones."""
        ll, batch = self.ll, self.batch
        batch.n_tokens = len(tokens)
        wanted = []
        for i, (token, position, stream, logits) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
            batch.logits[i] = logits
            if logits:
                wanted.append(i)
        if ll.llama_decode(self.context, batch) != 0:
            sys.exit("llama_decode failed")
        ll.llama_synchronize(self.context)
        rows = (ll.llama_get_logits_ith(self.context, i) for i in wanted)
        return [int(self.np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in rows]

    def prompt_all(self, prompts: list[list[int]]) -> list[int]:
        self.ll.llama_memory_clear(self.ll.llama_get_memory(self.context), True)
        flat = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        parts = [flat[at : at + STEP] for at in range(0, len(flat), STEP)]
        return [token for part in parts for token in self.step(part)]

    def prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        begin = time.perf_counter()
        self.prompt_all(prompts)
        return {"seconds": time.perf_counter() - begin, "tokens": sum(map(len, prompts))}

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        last = self.prompt_all(prompts)
        begin = time.perf_counter()
        for made in range(tokens):
            rows = [(token, len(prompts[s]) + made, s, True) for s, token in enumerate(last)]
            last = self.step(rows)
        return {"seconds": time.perf_counter() - begin, "tokens": tokens * len(prompts)}


def main() -> None:
    words = sys.argv[1:]
    mapped = words[-1] == "mapped"
    file, threads, *sizes = words[0], *map(int, words[1 : len(words) - mapped])
    context, streams = sizes or (CONTEXT, MOST_STREAMS)
    channel = Channel()
    import llama_cpp

    begun = time.perf_counter()
    generator = Generator(llama_cpp, file, threads, context, streams, mapped=mapped)
    channel.ready(load_s=time.perf_counter() - begun)
    channel.serve({"prefill": generator.prefill, "decode": generator.decode})


if __name__ == "__main__":
    main()
