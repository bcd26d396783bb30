"""Requests from published traces: when they arrive, how long they are, which beginnings they share.

A trace's prompts are known by length and, in two of them, by hashes of blocks: equal hashes stand
for equal tokens from the beginning on. So every token of a block is given the block's hash as its
id; what follows the last block has an id of its own.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from moeserve.core import Request, RequestId, SamplingParams


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """``arrival`` in seconds from the trace's beginning; ``blocks`` are hashes."""

    arrival: float
    prompt: int
    answer: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """``block_size`` is the one of the hashes. Blocks of KV for each request that may run at once,
    and tokens of a step, are what a rank is given to serve it. It is replayed ``repeat`` times in a
    row, each with hashes of its own."""

    name: str
    file: str
    read: Callable[[Path], Iterator[TracedRequest]]
    block_size: int
    blocks_per_seq: int
    step_tokens: int
    prefixes: bool
    repeat: int = 1

    def requests(self, folder: Path, most: int) -> list[TracedRequest]:
        """The first ``most``, by arrival."""
        found = sorted(self.read(folder / self.file), key=lambda r: r.arrival)
        mean_gap = found[-1].arrival / len(found)
        length = found[-1].arrival + mean_gap
        hashes = 1 + max((max(r.blocks, default=0) for r in found), default=0)
        repeated = (
            TracedRequest(
                r.arrival + i * length, r.prompt, r.answer, tuple(b + i * hashes for b in r.blocks)
            )
            for i in range(self.repeat)
            for r in found
        )
        return list(islice(repeated, most))

    def request(self, number: int, traced: TracedRequest, arrival: float) -> Request:
        """As a door would have it, arriving then. ``number`` names it."""
        own = -1 - number
        prompt: list[int] = []
        for block in traced.blocks[: traced.prompt // self.block_size]:
            prompt += [block] * self.block_size
        prompt += [own] * (traced.prompt - len(prompt))
        params = SamplingParams(max_tokens=traced.answer, ignore_eos=True)
        return Request(RequestId(str(number)), tuple(prompt), params, arrival=arrival)


def read_azure(file: Path) -> Iterator[TracedRequest]:
    with gzip.open(file, "rt", newline="") as lines:
        first = None
        for row in csv.DictReader(lines):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or at
            prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            yield TracedRequest((at - first).total_seconds(), max(1, prompt), max(1, answer))


def read_mooncake(file: Path) -> Iterator[TracedRequest]:
    with gzip.open(file, "rt") as lines:
        for row in map(json.loads, lines):
            prompt, answer = max(1, row["input_length"]), max(1, row["output_length"])
            yield TracedRequest(row["timestamp"] / 1e3, prompt, answer, tuple(row["hash_ids"]))


def read_llmservingsim(file: Path) -> Iterator[TracedRequest]:
    with gzip.open(file, "rt") as lines:
        for row in map(json.loads, lines):
            at, hashes = row["arrival_time_ns"] / 1e9, tuple(row["hash_ids_blk16"])
            yield TracedRequest(at, max(1, row["input_toks"]), max(1, row["output_toks"]), hashes)


AZURE = Trace(
    "azure",
    "azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz",
    read_azure,
    block_size=16,
    blocks_per_seq=128,
    step_tokens=1024,
    prefixes=False,
)
MOONCAKE = Trace(
    "mooncake",
    "mooncake/conversation_trace.jsonl.gz",
    read_mooncake,
    block_size=512,
    blocks_per_seq=16,
    step_tokens=4096,
    prefixes=True,
)
LLMSERVINGSIM = Trace(
    "llmservingsim",
    "llmservingsim/sharegpt_qwen3_300_sps10.lengths_blockhash.jsonl.gz",
    read_llmservingsim,
    block_size=16,
    blocks_per_seq=128,
    step_tokens=1024,
    prefixes=True,
    repeat=20,
)
TRACES = {trace.name: trace for trace in (AZURE, MOONCAKE, LLMSERVINGSIM)}
