"""How fast a packed model is served from disk, against how many of its experts fit in memory.

    python bench/offload.py FOLDER [--shares 0.125 0.5 1] [--batch 1] [--tokens 32] [--prompt 64]
        [--prediction off on] [--window N] [--threads N]

FOLDER is one that `moeserve quantize --packed` wrote. Every row is a model loaded anew with slots
for that share of its experts (at least those of two layers), in one process: ``batch`` prompts of
random tokens, then ``tokens`` greedy tokens of each. Prints a JSON array. ``bytes_per_token`` are
weights read from disk while decoding, ``hit_rate`` the share of experts that were there when their
layer wanted them, ``waited_share`` the part of decoding that waited for the disk.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from moeserve.config.options import RankModelOptions
from moeserve.engine.rank_model import choose_table
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache
from moeserve.offload.load import Streaming
from moeserve.offload.runner import StreamedLayerRunner

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Row:
    """``slots`` of ``experts``; rates are tokens per second."""

    share: float
    slots: int
    experts: int
    prediction: str
    window: int | None
    batch: int
    prefill_rate: float
    decode_rate: float
    bytes_per_token: float
    hit_rate: float
    wasted_bytes: int
    waited_share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.5, 1.0])
    parser.add_argument("--prediction", nargs="+", default=["off", "on"])
    parser.add_argument("--window", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    ops = choose_table("cpu", args.threads)
    print(json.dumps([asdict(row) for row in rows(args, ops)], indent=2))


def rows(args: argparse.Namespace, ops: Ops) -> Iterator[Row]:
    for share in args.shares:
        for prediction in args.prediction:
            options = RankModelOptions(
                model=str(args.folder),
                memory=1 << 50,
                weights_prediction=prediction,
                weights_window=args.window,
            )
            yield measure(args, share, prediction, *with_share(options, ops, share))


def with_share(options: RankModelOptions, ops: Ops, share: float) -> tuple[Decoder, int]:
    """The packed model with slots for that share of its experts, at least those of two layers; and
    how many experts there are."""
    streaming = Streaming.open(Path(options.model), ops, options)
    records = streaming.records
    slots = max(int(share * records.count) * records.nbytes, records.least)
    return replace(streaming, budget=streaming.fixed.total + slots).load(kv=0), records.count


def measure(
    args: argparse.Namespace, share: float, prediction: str, decoder: Decoder, experts: int
) -> Row:
    runner = decoder.runner
    assert isinstance(runner, StreamedLayerRunner)
    per_sequence = -(-(args.prompt + args.tokens) // BLOCK)
    cache = decoder.new_cache(args.batch * per_sequence, BLOCK)
    blocks = [list(range(n * per_sequence, (n + 1) * per_sequence)) for n in range(args.batch)]
    draw = torch.Generator().manual_seed(11)
    begun, last = time.perf_counter(), list[int]()
    for row in blocks:
        ids = torch.randint(decoder.spec.vocab, (args.prompt,), generator=draw).tolist()
        last += next_tokens(decoder, cache, [Span(ids, 0, row)])
    prefilled = time.perf_counter()
    before, read = replace(runner.stream.counts), runner.stream.mover.counts()
    for position in range(args.prompt, args.prompt + args.tokens):
        spans = [Span([token], position, row) for token, row in zip(last, blocks, strict=True)]
        last = next_tokens(decoder, cache, spans)
    took = time.perf_counter() - prefilled
    after, now = runner.stream.counts, runner.stream.mover.counts()
    runner.close()
    made, hits = args.batch * args.tokens, after.hits - before.hits
    return Row(
        share=share,
        slots=runner.stream.arena.slots,
        experts=experts,
        prediction=prediction,
        window=args.window,
        batch=args.batch,
        prefill_rate=round(args.batch * args.prompt / (prefilled - begun), 2),
        decode_rate=round(made / took, 2),
        bytes_per_token=round((now.bytes - read.bytes) / made),
        hit_rate=round(hits / (hits + after.misses - before.misses), 4),
        wasted_bytes=after.wasted_bytes - before.wasted_bytes,
        waited_share=round((now.waited_ns - read.waited_ns) / 1e9 / took, 4),
    )


def next_tokens(decoder: Decoder, cache: ModelKvCache, spans: list[Span]) -> list[int]:
    logits_RV = decoder.forward(pack_spans(spans, BLOCK), cache)
    return [int(token) for token in logits_RV.argmax(-1)]


if __name__ == "__main__":
    main()
