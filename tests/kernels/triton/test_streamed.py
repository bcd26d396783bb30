"""Experts that are streamed to a device in name give the bits of all of them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions, RankModelOptions
from moeserve.engine import device_memory, rank_model
from moeserve.engine.rank_model import load_rank_model
from moeserve.errors import ConfigError
from moeserve.kernels.device import Card
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.triton.double import DEVICE, Crossings, device_double
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.packed.cli import packing_ops
from moeserve.models.packed.writer import pack_model
from moeserve.offload.device_load import DeviceStreaming
from moeserve.offload.device_mover import DeviceMover
from moeserve.offload.runner import StreamedLayerRunner

Load = Callable[[str], Path]
BLOCK = 8
STEPS = ([17, 300, 5], [251])


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    with device_double() as seen:
        yield seen


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Load, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """For Triton's kernels, of which there need be none."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, quantization: Any = "auto") -> Path:
        key = family, quantization
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "-".join(key)
            options = LoadOptions(quantization=quantization)
            pack_model(tiny_checkpoint(family), made[key], packing_ops("cuda"), options)
        return made[key]

    return make


def logits_of(decoder: Decoder) -> Tensor:
    cache, done, rows = decoder.new_cache(2, BLOCK), 0, []
    for ids in STEPS:
        step = pack_spans([Span(ids, done, [1, 0], len(ids))], BLOCK)
        rows.append(decoder.forward(step, cache).cpu())
        done += len(ids)
    return torch.cat(rows)


def streaming_of(folder: Path, table: Ops, **options: Any) -> DeviceStreaming:
    settings = RankModelOptions(model=str(folder), device="cuda", **options)
    return DeviceStreaming.open(folder, table, settings, 0, 0)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_streamed_experts_give_the_bits_of_those_that_are_all_there(
    crossings: Crossings, packed: Callable[..., Path]
) -> None:
    """Slots for fewer experts than a layer needs, on device and host; attention is the host's."""
    from moeserve.kernels.triton.host_attention import HostAttentionOps

    folder, table = packed("qwen3_moe", "int8"), HostAttentionOps(DEVICE, ReferenceOps())
    expected = logits_of(load_decoder(folder, table))
    opened = streaming_of(folder, table, weights_prediction="on")
    few = replace(opened.records, most_in_layer=2)
    budget = opened.fixed.total + few.least
    before, copied = crossings.nbytes, crossings.to_device
    streaming = replace(opened, records=few, budget=budget)
    decoder = streaming.load(0, 3 * few.nbytes)
    runner = decoder.runner
    assert isinstance(runner, StreamedLayerRunner)
    mover = runner.stream.mover
    assert isinstance(mover, DeviceMover)
    assert torch.equal(logits_of(decoder), expected)
    counts = runner.stream.counts
    assert runner.stream.arena.slots == 4 and mover.host.arena.slots == 3
    assert counts.evictions > 0 and counts.waves > counts.layers and counts.ahead_used > 0
    assert mover.copied.host_evictions > 0
    assert mover.copied.copied_bytes == mover.copied.copies * few.nbytes
    assert crossings.to_device - copied > mover.copied.copies > len(STEPS)
    assert before + streaming.fixed.total < crossings.nbytes
    runner.close()


def test_a_device_that_is_too_small_for_all_gets_what_it_has_room_for(
    crossings: Crossings, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, slots and KV lie within ``--device-memory``; with less than the least it is refused,
    and with enough for all there is nothing to stream."""
    from moeserve.kernels.triton.ops import TritonOps

    folder = packed("qwen2_moe", "int8")
    monkeypatch.setattr(device_memory, "free_memory", lambda _: Card("a card", 1 << 34, 1 << 34))
    monkeypatch.setattr(rank_model, "choose_table", lambda *_, **__: TritonOps(DEVICE))
    asked: dict[str, Any] = {"model": str(folder), "device": "cuda", "num_blocks": 4}
    asked |= {"block_size": BLOCK, "max_num_batched_tokens": 8, "max_num_seqs": 2}
    needs = device_memory.needs_of(TritonOps(DEVICE), RankModelOptions(**asked), (1, 1))
    empty = crossings.nbytes
    opened = streaming_of(folder, TritonOps(DEVICE))
    shapes = crossings.nbytes - empty  # tensors without data are the double's, too
    assert opened.records.least < opened.records.count * opened.records.nbytes
    least = opened.fixed.total + opened.records.least + needs.workspace + 4 * needs.block
    with pytest.raises(ConfigError, match=r"device_memory=.*: the least for this model .* is"):
        load_rank_model(RankModelOptions(**asked, device_memory=least - 1))
    with pytest.raises(ConfigError, match="leave it out"):
        load_rank_model(RankModelOptions(**asked, device_memory=least, weights_window=2))
    with pytest.raises(ConfigError, match=r"the process itself takes \d+ bytes"):
        load_rank_model(RankModelOptions(**asked, memory=1 << 20))
    before = crossings.nbytes
    with closing(load_rank_model(RankModelOptions(**asked, device_memory=least))) as own:
        assert own.streamed is not None and own.size.num_blocks == 4
        assert own.streamed.stream.arena.slots == opened.records.least // opened.records.nbytes
        taken = crossings.nbytes - before - shapes
        assert least - needs.workspace <= taken <= least
        assert list(own.counted) == ["expert_stream", "weight_reads", "expert_copies"]
    with closing(load_rank_model(RankModelOptions(**asked))) as own:
        assert own.streamed is None


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("qwen3_moe", "int4"), ("gpt_oss", "auto"), ("deepseek_v3", "int8")],
)
def test_packed_weights_on_a_device_are_those_of_the_checkpoint(
    crossings: Crossings, packed: Callable[..., Path], family: str, quantization: Any
) -> None:
    """Every expert's record, and the rows of a product."""
    from moeserve.kernels.triton.ops import TritonOps

    theirs = load_decoder(packed(family, quantization), ReferenceOps())
    ours = load_decoder(packed(family, quantization), TritonOps(DEVICE))
    assert crossings.to_device > 0
    for a, b in zip(ours.stack.layers, theirs.stack.layers, strict=True):
        if not isinstance(b.mlp, tuple) or not isinstance(a.mlp, tuple):
            continue
        own, other = a.mlp[1].weights.experts, b.mlp[1].weights.experts
        layout = theirs.ops.record_layout(other)
        for e in range(other.num_experts):
            near = torch.empty(layout.nbytes, dtype=torch.uint8)
            far = torch.empty(layout.nbytes, dtype=torch.uint8, device=DEVICE)
            theirs.ops.write_record(other, e, near)
            ours.ops.write_record(own, e, far)
            assert torch.equal(far.cpu(), near), (family, e)
    x = torch.randn(1, theirs.spec.hidden)
    found = ours.ops.linear(x.to(DEVICE), ours.head.weights.head).cpu()
    near = theirs.ops.linear(x, theirs.head.weights.head)
    assert torch.allclose(found, near, rtol=1e-4, atol=1e-4)
