"""Whole models over the table of NPUs, on the twin of their operators.

In fp32 every family gives the reference's greedy tokens, token for token; in bf16 and int8 its
logits are near. A batch, chunks and ranks change no bit: what is not the operators' own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from moeserve.comm.build import host_layers, parallel_over
from moeserve.comm.dispatcher import FlatDispatcher
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.collective import CollectiveExchange
from moeserve.comm.exchange.media import HostMedium
from moeserve.comm.exchange.open import open_host_exchanges
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout
from moeserve.config.options import LoadOptions
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.npu_fallbacks import npu_fallbacks
from moeserve.models.spec import MoeSpec
from moeserve.observe.progress import Progress

Tiny = Callable[[str], Path]
FAMILIES = [
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_plain",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "mixtral_llama3",
    "olmoe",
    "olmoe_linear",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_yarn",
]
PROMPT = [17, 300, 5, 88, 88, 251, 199, 3, 42, 120, 7]
NEW_TOKENS = 6


class Served:
    """A decoder with a cache of its own; blocks are not in order."""

    def __init__(self, decoder: Decoder, block_size: int = 16) -> None:
        self.decoder, self.size = decoder, block_size
        self.cache = decoder.new_cache(8, block_size)
        self.blocks = [[5, 1, 6, 0], [2, 7, 4, 3]]

    def run(self, *parts: tuple[int, Sequence[int], int]) -> list[Tensor]:
        """Logits of every token of (sequence, tokens, start)."""
        spans = [Span(ids, start, self.blocks[s], len(ids)) for s, ids, start in parts]
        logits = self.decoder.forward(pack_spans(spans, self.size), self.cache)
        return list(logits.split([len(ids) for _, ids, _ in parts]))


def greedy(decoder: Decoder, block_size: int = 16) -> list[int]:
    served, ids = Served(decoder, block_size), list(PROMPT)
    fresh: Sequence[int] = PROMPT
    for _ in range(NEW_TOKENS):
        (logits,) = served.run((0, fresh, len(ids) - len(fresh)))
        fresh = [int(logits[-1].argmax())]
        ids += fresh
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_reference_s(
    npu: AscendOps, tiny_checkpoint: Tiny, family: str
) -> None:
    folder, own = tiny_checkpoint(family), AscendOps(npu.device)
    decoder = load_decoder(folder, own)
    assert greedy(decoder) == greedy(load_decoder(folder, ReferenceOps()))
    assert own.fallbacks == npu_fallbacks(decoder.spec, torch.float32, 16)


# By the greatest logit: products of bf16 are rounded once more, and so is what fused attention
# gives, which int8 codes follow.
NEAR = {"bfloat16": 0.06, "int8": 0.06}
WIDE = [("qwen3_moe_wide", 128), ("deepseek_v3_wide", 16)]


def options(kind: str) -> LoadOptions:
    if kind == "int8":
        return LoadOptions(quantization="int8", kv_dtype="bfloat16")
    return LoadOptions(dtype="bfloat16")


@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize(("family", "block_size"), WIDE)
def test_logits_are_near_and_neither_batch_nor_chunks_change_a_bit(
    npu: AscendOps, tiny_checkpoint: Tiny, kind: str, family: str, block_size: int
) -> None:
    """With attention by the fused operator, whose limits these shapes keep."""
    folder, own = tiny_checkpoint(family), AscendOps(npu.device)
    decoder = load_decoder(folder, own, options(kind))
    (alone,) = Served(decoder, block_size).run((0, PROMPT, 0))
    assert own.fallbacks == {}
    assert npu_fallbacks(decoder.spec, torch.bfloat16, block_size) == {}
    theirs = load_decoder(folder, ReferenceOps(), options(kind))
    (wanted,) = Served(theirs, block_size).run((0, PROMPT, 0))
    assert (alone - wanted).abs().max() <= NEAR[kind] * wanted.abs().max()
    served = Served(decoder, block_size)
    first = served.run((1, PROMPT[3:], 0), (0, PROMPT[:4], 0))[1]
    second = served.run((0, PROMPT[4:10], 4), (1, [9], len(PROMPT) - 3))[0]
    (third,) = served.run((0, PROMPT[10:], 10))
    assert torch.equal(torch.cat((first, second, third)), alone)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_int8_products_are_the_reference_s(
    npu: AscendOps, tiny_checkpoint: Tiny, family: str
) -> None:
    """What is left are last bits of norms and activations, which move a code by one at most."""
    logits = []
    for ops in (npu, ReferenceOps()):
        decoder = load_decoder(tiny_checkpoint(family), ops, LoadOptions(quantization="int8"))
        logits += Served(decoder).run((0, PROMPT, 0))
    assert (logits[0] - logits[1]).abs().max() <= 0.02 * logits[1].abs().max()


def served_by_steps(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sampled and greedy answers in turn, in steps that a scheduler plans: chunks of 4 tokens, and
    decodes that come again with the same tensors."""
    counters, tokens = Counters(), [list[int]() for _ in prompts]
    config = SchedulerConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=4)
    scheduler = Scheduler(config, BlockPool(24, 16, counters), counters)
    runner = ModelRunner(decoder, 24, 16)
    for n, prompt in enumerate(prompts):
        params = SamplingParams(temperature=n % 2, max_tokens=6, ignore_eos=True, seed=n)
        scheduler.add(Request(RequestId(str(n)), tuple(prompt), params))
    while scheduler.has_work:
        for out in scheduler.apply(runner.run(scheduler.plan(0.0))):
            tokens[int(out.request_id)].append(out.token_id)
    return tokens


def test_an_engine_s_steps_give_the_tokens_of_each_request_alone(
    npu: AscendOps, tiny_checkpoint: Tiny
) -> None:
    decoder = load_decoder(tiny_checkpoint("deepseek_v3_wide"), npu, LoadOptions(dtype="bfloat16"))
    prompts = [PROMPT, PROMPT[::-1], PROMPT[2:7]]
    together = served_by_steps(decoder, prompts)
    assert [len(tokens) for tokens in together] == [6, 6, 6]
    assert together[0] == served_by_steps(decoder, prompts[:1])[0]
    # The same seed and place, so that it draws the same numbers.
    assert together[:2] == served_by_steps(decoder, prompts[:2])


def keeping_to_devices(store: Store, rank: int, device: torch.device) -> Exchange:
    """Of one of two ranks, with gloo in HCCL's place."""
    group, lanes = Group(rank, 2, store), Lanes((1 << 20, 1 << 20), 60.0)
    on_host = open_host_exchanges(group, Topology((0, 0)), lanes, key="ranks")
    return CollectiveExchange(group, lanes, *on_host, HostMedium.open(group, "ranks", device))


# Experts in int4 run on the host, so that records do not stay on devices.
WAYS = [("none", False), ("int8", False), ("int4", False), ("none", True), ("int8", True)]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize(("quantization", "on_devices"), WAYS)
def test_two_ranks_give_the_bits_of_one(
    npu: AscendOps,
    tiny_checkpoint: Tiny,
    new_post: Callable[[], Callable[[str, int, int], Exchange]],
    family: str,
    quantization: str,
    on_devices: bool,
) -> None:
    folder, post, store = tiny_checkpoint(family), new_post(), HashStore()
    how = LoadOptions.model_validate({"quantization": quantization})
    whole = load_decoder(folder, npu, how)
    layouts = {
        n: LayerLayout(
            np.arange(m.router.num_experts, dtype=np.int32)[::-1].copy(), m.router.num_experts, 2
        )
        for n, layer in enumerate(whole.spec.layers)
        if isinstance(m := layer.mlp, MoeSpec)
    }
    prompts = [PROMPT, PROMPT[5:]]
    found: dict[int, Tensor] = {}

    def rank(r: int) -> None:
        mine = {n: layout.of_rank(r) for n, layout in layouts.items()}
        decoder = load_decoder(folder, npu, how, experts=mine)
        assert on_devices <= (not host_layers(npu, decoder.stack.layers))
        if on_devices:
            exchange = keeping_to_devices(store, r, npu.device)
        else:
            exchange = post("all", r, 2)
        moves = FlatDispatcher(npu, exchange, Topology((0, 0)), Progress())
        over = parallel_over(npu, decoder.stack.layers, layouts, moves, Progress(), wide=on_devices)
        (found[r],) = Served(decoder.over(over)).run((0, prompts[r], 0))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for r, prompt in enumerate(prompts):
        (alone,) = Served(whole).run((0, prompt, 0))
        assert torch.equal(found[r], alone)


def test_kv_leaves_and_enters_as_the_reference_has_it(
    npu: AscendOps, tiny_checkpoint: Tiny
) -> None:
    """Passes are counted, and bytes of a fused cache are a cache's of the same numbers."""
    folder = tiny_checkpoint("deepseek_v3_wide")
    caches: dict[str, list[Tensor]] = {}
    tables: tuple[Ops, ...] = (npu, ReferenceOps())
    for ops in tables:
        served = Served(load_decoder(folder, ops, LoadOptions(dtype="bfloat16")))
        served.run((0, PROMPT, 0))
        assert [ops.kv_passes(cache) for cache in served.cache.layers] == [1, 1, 1]
        blocks = torch.tensor([5])
        caches[ops.name] = [ops.export_kv(cache, blocks) for cache in served.cache.layers]
    for mine, theirs in zip(caches["ascend"], caches["reference"], strict=True):
        assert mine.shape == theirs.shape
        a, b = (x.view(torch.bfloat16).float() for x in (mine, theirs))
        assert (a - b).abs().max() <= 0.06 * b.abs().max()
