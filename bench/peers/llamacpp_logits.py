"""Worker in llama.cpp's venv: the logits of given tokens, all of them at once.

    python bench/peers/llamacpp_logits.py FILE.gguf OUT.npy THREADS < windows.json

reads a list of lists of token ids, each a text of its own, and writes their logits [tokens, vocab]
in fp32, one text after the other.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    file, out, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    windows = json.load(sys.stdin)
    longest = max(map(len, windows))
    model = llama_cpp.Llama(
        file, n_ctx=longest, n_batch=longest, n_ubatch=longest, n_threads=threads,
        n_threads_batch=threads, logits_all=True, verbose=False,
    )  # fmt: skip
    found = []
    for ids in windows:
        model.reset()
        model.eval(ids)
        found.append(np.array(model.scores[: len(ids)], np.float32))
    np.save(out, np.concatenate(found))


if __name__ == "__main__":
    main()
