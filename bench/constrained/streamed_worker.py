"""Worker in our own environment: an engine within a memory budget, as ``serve --memory`` makes it.

Argument: the engine's options as one JSON object. Requests: ``prefill`` and ``decode`` as other
peers' workers have them, ``answer`` for tokens, ``state`` for what the process takes and has
counted.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from answer import Channel

LATE_S = 1800.0


class Answers:
    """What has come of some requests; seconds since it was made."""

    def __init__(self, count: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.first_s = [0.0] * count
        self.error = ""
        self._ended = [threading.Event() for _ in range(count)]
        self._begun = time.perf_counter()

    def take(self, n: int, event: Any) -> None:
        """An engine's event of request ``n``; called by the engine's thread."""
        if event.token_ids and not self.tokens[n]:
            self.first_s[n] = time.perf_counter() - self._begun
        self.tokens[n].extend(event.token_ids)
        self.error = event.error or self.error
        if event.finish is not None:
            self._ended[n].set()

    def wait(self) -> float:
        """Until all have ended, with every token that they could have."""
        for event in self._ended:
            if not event.wait(LATE_S):
                sys.exit(f"an answer is late after {LATE_S:g} s")
        if self.error:
            sys.exit(self.error)
        return time.perf_counter() - self._begun


class Serving:
    """An engine, and what is asked of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        from moeserve.config.options import EngineOptions
        from moeserve.engine.build import build_engine

        begun = time.perf_counter()
        self.loaded = build_engine(EngineOptions(**options))
        self.load_s = time.perf_counter() - begun
        self._asked = 0

    def ask(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> tuple[Answers, float]:
        """Greedy answers of so many tokens each, and the seconds that all took."""
        from moeserve.core import Request, RequestId, SamplingParams
        from moeserve.engine.request_state import EachEvent

        answers = Answers(len(prompts))
        for n, (prompt, most) in enumerate(zip(prompts, tokens, strict=True)):
            params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
            self._asked += 1
            request = Request(RequestId(f"r{self._asked}"), tuple(prompt), params)
            sink = EachEvent(lambda event, n=n: answers.take(n, event))  # type: ignore[misc]
            self.loaded.engine.submit(request, sink)
        return answers, answers.wait()

    def prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        return {
            "seconds": self.ask(prompts, [1] * len(prompts))[1],
            "tokens": sum(map(len, prompts)),
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """From when each has its first token on; counts are of all steps."""
        before = self.counted()
        answers, took = self.ask(prompts, [tokens + 1] * len(prompts))
        after = self.counted()
        return {
            "seconds": took - max(answers.first_s),
            "tokens": tokens * len(prompts),
            "total_s": took,
            "counts": {key: after[key] - before[key] for key in after},
        }

    def answer(self, prompts: list[list[int]], tokens: list[int]) -> dict[str, Any]:
        return {"answers": self.ask(prompts, tokens)[0].tokens}

    def counted(self) -> dict[str, int]:
        counted = self.loaded.own.counted.items()
        return {
            f"{name}_{key}": int(value)
            for name, counts in counted
            for key, value in asdict(counts()).items()  # type: ignore[call-overload]
        }

    def state(self) -> dict[str, Any]:
        """Bytes, descriptors, threads and counts."""
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        kib = {name: int(status[name].split()[0]) for name in ("VmRSS", "VmHWM", "VmSwap")}
        return {
            "rss": kib["VmRSS"] << 10,
            "peak_rss": kib["VmHWM"] << 10,
            "swap": kib["VmSwap"] << 10,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "counts": self.counted(),
        }


def main() -> None:
    channel = Channel()
    serving = Serving(json.loads(sys.argv[1]))
    loaded = serving.loaded
    kv_tokens = loaded.num_blocks * loaded.block_size
    channel.ready(load_s=serving.load_s, vocab=loaded.spec.vocab, kv_tokens=kv_tokens)
    handlers = ("prefill", "decode", "answer", "state")
    channel.serve({name: getattr(serving, name) for name in handlers})
    if not loaded.close():
        sys.exit("the engine did not stop")


if __name__ == "__main__":
    main()
