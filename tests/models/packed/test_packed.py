"""A packed copy computes what the folder it was made from computes, to the bit, mapped or read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, ConfigError, PlacementError
from moeserve.kernels.ops import Ops, Part
from moeserve.kernels.records import PAGE
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.expert_source import expert_bytes, open_experts
from moeserve.models.fingerprint import fingerprint
from moeserve.models.layer_runner import LocalLayerRunner
from moeserve.models.library import resolve_model
from moeserve.models.packed.checkpoint import PackedCheckpoint
from moeserve.models.packed.layout import Region, read_packed_header, write_header
from moeserve.models.packed.model import PackedModel
from moeserve.models.packed.writer import pack_model, verify_packed
from moeserve.models.survey import survey

Tiny = Callable[[str], Path]
FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
]
BOTH = [LoadOptions(), LoadOptions(quantization="int4", dtype="bfloat16")]
STEP = pack_spans([Span([1, 2, 3, 250, 17], 0, [0], 5)], 8)


def logits(decoder: Decoder) -> Tensor:
    return decoder.forward(STEP, decoder.new_cache(1, 8)).clone()


def drafts(decoder: Decoder) -> Tensor:
    cache = decoder.new_cache(1, 8, mtp=True)
    hidden_TH = decoder.final_norm(decoder.trunk(STEP, cache))
    return decoder.mtp_forward(hidden_TH, STEP, cache)


def read(folder: Path, region: Region) -> Tensor:
    """A region, read into memory of its own."""
    whole = torch.full((region.nbytes + PAGE,), 7, dtype=torch.uint8)
    skip = -whole.data_ptr() % PAGE
    memory = whole[skip : skip + region.nbytes]
    with (folder / region.file).open("rb") as opened:
        assert os.preadv(opened.fileno(), [memory.numpy().data], region.start) == region.nbytes
    return memory


@pytest.mark.parametrize("options", BOTH, ids=["as stored", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_to_the_bit(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops, family: str, options: LoadOptions
) -> None:
    source, out = tiny_checkpoint(family), tmp_path / "out"
    done = pack_model(source, out, ops, options)
    plain, packed = load_decoder(source, ops, options), load_decoder(out, ops)
    assert torch.equal(logits(packed), logits(plain))
    assert (packed.dtype, packed.kv_dtype) == (plain.dtype, plain.kv_dtype)
    assert (packed.unread, packed.spec) == (plain.unread, plain.spec)
    assert verify_packed(out) == done.layers + done.records + 1


def test_multi_token_prediction_comes_along(tmp_path: Path) -> None:
    ops, source, out = choose_ops(), resolve_model("demo"), tmp_path / "out"
    done = pack_model(source, out, ops, LoadOptions())
    plain, packed = load_decoder(source, ops), load_decoder(out, ops)
    assert plain.mtp is not None
    assert torch.equal(logits(packed), logits(plain))
    assert torch.equal(drafts(packed), drafts(plain))
    assert verify_packed(out) == done.layers + done.records + 2
    header = read_packed_header(out)
    write_header(out, replace(header, mtp=None))
    with pytest.raises(CheckpointError, match="multi-token prediction was not packed"):
        load_decoder(out, ops)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_layers_run_from_memory_that_was_read_into(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops, family: str
) -> None:
    """Two layers' worth of memory, and slots in another order than the experts."""
    out = tmp_path / "out"
    pack_model(tiny_checkpoint(family), out, ops, LoadOptions(quantization="int8"))
    mapped, model = load_decoder(out, ops), PackedModel.open(out, ops)
    layers = []
    for number, spec in enumerate(model.spec.layers):
        trunk = read(out, model.trunk(number))
        if model.checkpoint.header.layers[number].experts is None:
            layers.append(model.layer_over(number, trunk))
            continue
        layout, num = model.record_layout(number), spec.mlp.router.num_experts
        slots = torch.cat([read(out, model.expert(number, e)) for e in reversed(range(num))])
        arena = torch.empty(slots.numel() + PAGE, dtype=torch.uint8)
        arena = arena[-arena.data_ptr() % PAGE :][: slots.numel()].copy_(slots)
        assert slots.numel() == num * layout.nbytes
        order = list(reversed(range(num)))
        experts = model.experts_over(number, arena, num, order)
        layers.append(model.layer_over(number, trunk, experts))
    stack = ops.stack_layers(layers)
    streamed = mapped.over(LocalLayerRunner(ops, stack))
    assert torch.equal(logits(streamed), logits(mapped))
    model.require_unchanged()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_rank_maps_its_own_experts(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops, family: str
) -> None:
    source, out = tiny_checkpoint(family), tmp_path / "out"
    pack_model(source, out, ops, LoadOptions())
    whole = load_decoder(source, ops)
    layer = whole.spec.moe_layers[-1]
    own = [3, 0, 0, 2]
    checkpoint = PackedCheckpoint.open(out)
    nbytes = expert_bytes(checkpoint, whole.spec.moe_layers, 4)
    some = load_decoder(out, ops, experts={layer: own})
    again = open_experts(out, ops)
    x_TH, ones_T1 = torch.randn(3, whole.spec.hidden), torch.ones(3, 1)
    all_ = _experts(whole, layer)
    for found in (_experts(some, layer), again.read(layer, own)):
        assert found.num_experts == len(own)
        for slot, expert in enumerate(own):
            here, there = (torch.full((3, 1), e, dtype=torch.int32) for e in (slot, expert))
            expected = ops.moe_ffn(x_TH, all_, there, ones_T1)
            assert torch.equal(ops.moe_ffn(x_TH, found, here, ones_T1), expected)
    assert again.bytes_read == 3 * nbytes
    with pytest.raises(PlacementError, match="experts"):
        again.read(layer, [4000])


def _experts(decoder: Decoder, layer: int):  # type: ignore[no-untyped-def]
    mlp = decoder.stack.layers[layer].mlp
    assert not isinstance(mlp, Part)
    return mlp[1].weights.experts


def test_several_files_hold_what_one_holds(tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops) -> None:
    source = tiny_checkpoint("qwen3_moe")
    pack_model(source, tmp_path / "one", ops, LoadOptions())
    pack_model(source, tmp_path / "many", ops, LoadOptions(), file_bytes=1)
    one, many = (PackedCheckpoint.open(tmp_path / name) for name in ("one", "many"))
    assert len(one.header.files) == 1
    assert len(many.header.files) == 1 + len(many.header.layers)
    assert [r.digest for _, r in one.header.regions()] == [
        r.digest for _, r in many.header.regions()
    ]
    assert torch.equal(
        logits(load_decoder(tmp_path / "many", ops)), logits(load_decoder(tmp_path / "one", ops))
    )


def test_it_says_it_is_the_model_it_was_made_from(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops
) -> None:
    source, out = tiny_checkpoint("deepseek_v3"), tmp_path / "out"
    pack_model(source, out, ops, LoadOptions())
    assert fingerprint(out) == fingerprint(source)
    assert survey(out).spec == survey(source).spec
    assert survey(out).kv_bytes_per_token == survey(source).kv_bytes_per_token


@pytest.mark.parametrize(
    "asked",
    [
        LoadOptions(quantization="int4"),
        LoadOptions(quantization="none"),
        LoadOptions(dtype="float32"),
        LoadOptions(quantize_attention=False),
    ],
)
def test_options_that_it_was_not_packed_with_are_refused(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops, asked: LoadOptions
) -> None:
    out = tmp_path / "out"
    made = LoadOptions(quantization="int8", dtype="bfloat16")
    pack_model(tiny_checkpoint("mixtral"), out, ops, made)
    load_decoder(out, ops, made)
    with pytest.raises(CheckpointError, match="packed with"):
        load_decoder(out, ops, asked)


def test_what_exists_or_is_packed_is_not_packed(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops
) -> None:
    out = tmp_path / "out"
    pack_model(tiny_checkpoint("mixtral"), out, ops, LoadOptions())
    with pytest.raises(ConfigError, match="exists"):
        pack_model(tiny_checkpoint("mixtral"), out, ops, LoadOptions())
    with pytest.raises(ConfigError, match="packed already"):
        pack_model(out, tmp_path / "again", ops, LoadOptions())


def test_a_copy_that_fails_leaves_nothing(
    tiny_checkpoint: Tiny, tmp_path: Path, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, nbytes: int) -> tuple[str, int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeserve.models.packed.writer.RegionFiles.make_room", full)
    with pytest.raises(CheckpointError, match=r"No space left .*nothing was kept"):
        pack_model(tiny_checkpoint("mixtral"), tmp_path / "out", ops, LoadOptions())
    assert list(tmp_path.iterdir()) == []
