"""What an accelerator's memory has room for, by numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.config.options import LoadOptions, RankModelOptions
from moeserve.engine import device_memory
from moeserve.engine.device_memory import (
    DeviceNeeds,
    host_keeps_kv,
    least_weights,
    load_on_device,
    needs_of,
    plan_device,
    with_exchange,
    workspace_of,
)
from moeserve.engine.device_streaming import stream_to_device
from moeserve.errors import ConfigError
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.device import Card
from moeserve.kernels.ops import Linear
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.packed.checkpoint import open_checkpoint
from moeserve.models.packed.writer import pack_model
from moeserve.models.survey import survey

SIZES = st.integers(0, 1 << 40)


@given(st.tuples(SIZES, SIZES, SIZES, SIZES, SIZES))
def test_a_plan_shares_out_what_is_free_or_names_every_number(sizes: tuple[int, ...]) -> None:
    free, weights, workspace, graphs, block = sizes
    card = Card("a card", free + 7, free)
    if free - weights - workspace - graphs >= block:
        plan = plan_device(card, weights, workspace, graphs, block)
        assert plan.kv + plan.weights + plan.workspace + plan.graphs == free
        assert plan.kv >= block
        return
    with pytest.raises(ConfigError) as refused:
        plan_device(card, weights, workspace, graphs, block)
    assert all(str(size) in refused.value.message for size in (*sizes, free + 7))
    assert "lower max_num_batched_tokens" in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_workspace_grows_with_a_step_and_holds_what_it_must(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    spec = survey(tiny_checkpoint(family)).spec
    one, two = workspace_of(spec, 100, 4), workspace_of(spec, 200, 4)
    logits = 8 * 4 * spec.vocab
    assert two - logits == 2 * (one - logits)
    routed = max(
        m.router.top_k * m.intermediate
        for layer in spec.layers
        if hasattr(m := layer.mlp, "router")
    )
    assert one > 100 * 4 * (4 * routed + 3 * spec.hidden)  # int32 gate and up, and their floats


def test_weights_are_never_thought_greater_than_they_become() -> None:
    assert least_weights(1000, LoadOptions(), 1) == 1000
    assert least_weights(1000, LoadOptions(quantization="int8"), 1) == 250
    assert least_weights(1000, LoadOptions(dtype="bfloat16"), 2) == 250


Tiny = Callable[[str], Path]


def test_what_is_packed_becomes_no_smaller_where_its_rounding_is_named(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, host = tmp_path / "packed", ReferenceOps()
    rounded = LoadOptions(quantization="int8")
    pack_model(tiny_checkpoint("qwen3_moe"), folder, choose_ops(), rounded)
    monkeypatch.setattr(device_memory, "free_memory", lambda _: Card("a card", 1 << 40, 1 << 34))
    for named in ({}, {"quantization": "int8"}):
        options = RankModelOptions(model=str(folder), device="cuda", **named)
        assert needs_of(host, options, (1, 1)).weights == survey(folder).weight_bytes


class FullOps(ReferenceOps):
    """Of a device on which there is no room for a matrix."""

    def pack_linear(self, *args: Any) -> Linear:
        raise RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB")


def load(
    folder: Path, ops: ReferenceOps, monkeypatch: pytest.MonkeyPatch, *free: int, **given: Any
) -> tuple[Decoder, int]:
    """On a card that has so many bytes free before and after weights are loaded."""
    left = iter(free)
    monkeypatch.setattr(device_memory, "free_memory", lambda _: Card("a card", 1 << 40, next(left)))
    options = RankModelOptions(model=str(folder), **given)
    return load_on_device(open_checkpoint(folder), ops, options, None, None, (1, 1))


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.raises(ConfigError, match=r"a card has 1000 of .* leave 0 for KV, whose least is"):
        load(folder, FullOps(), monkeypatch, 1000)


def test_memory_is_divided_for_packed_models_on_one_cuda_device_alone(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch, npu: AscendOps
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    options = RankModelOptions(model=str(folder), device="cuda", memory=1 << 30)
    monkeypatch.setattr(device_memory, "free_memory", lambda _: Card("a card", 1 << 40, 1 << 34))
    with pytest.raises(ConfigError, match=r"moeserve quantize --model .* --packed"):
        stream_to_device(ReferenceOps(), options, (1, 1))
    with pytest.raises(ConfigError, match="leave out --memory, or give --device cpu"):
        stream_to_device(ReferenceOps(), options, (2, 2))
    guessing = options.model_copy(update={"speculation": "mtp"})
    with pytest.raises(ConfigError, match="left aside where experts are streamed to a device"):
        stream_to_device(ReferenceOps(), guessing, (1, 1))
    everything = options.model_copy(update={"memory": None})
    assert stream_to_device(ReferenceOps(), everything, (1, 1)) is None


def test_a_draft_models_kv_is_some_of_what_has_to_fit() -> None:
    needs = DeviceNeeds(Card("a card", 1 << 40, 1100), 1100, 500, 200, 80, 16 * 5)
    options = RankModelOptions(model="any", num_blocks=4, block_size=16)  # 320 bytes
    assert needs.fits(options)
    assert not needs.fits(options, beside=1)  # 64 more, where none is left
    assert needs.fits(options.model_copy(update={"attention_device": "cpu"}), beside=1)


def test_a_device_that_is_full_while_weights_are_loaded_is_one_line(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="and the weights need more: quantize") as refused:
        load(tiny_checkpoint("qwen3_moe"), FullOps(), monkeypatch, 1 << 34)
    assert "\n" not in refused.value.message


def test_kv_gets_what_weights_workspace_and_graphs_leave(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, free = tiny_checkpoint("qwen3_moe"), 1 << 30
    decoder, room = load(folder, ReferenceOps(), monkeypatch, free, free - 5000)
    workspace = workspace_of(decoder.spec, 512, 64)
    assert room == free - 5000 - workspace


def test_a_share_of_the_device_is_kept(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others come and go meanwhile; what it is too little for is refused by it."""
    folder, free = tiny_checkpoint("qwen3_moe"), 1 << 30
    share = {"device": "auto", "device_memory": 1 << 24}
    decoder, room = load(folder, ReferenceOps(), monkeypatch, free, free - 5000, **share)
    assert room == (1 << 24) - 5000 - workspace_of(decoder.spec, 512, 64)
    _, all_of_it = load(folder, ReferenceOps(), monkeypatch, 1 << 23, (1 << 23) - 5000, **share)
    assert all_of_it == room - (1 << 23)
    with pytest.raises(ConfigError, match="a card, within device_memory=999, has 999 of "):
        load(folder, ReferenceOps(), monkeypatch, free, device="auto", device_memory=999)


def test_kv_that_attention_leaves_to_the_host_is_counted_there(
    tiny_checkpoint: Tiny, npu: AscendOps
) -> None:
    decoder = load_decoder(tiny_checkpoint("qwen3_moe_wide"), npu, LoadOptions(kv_dtype="bfloat16"))
    assert host_keeps_kv(decoder, 16)
    assert not host_keeps_kv(decoder, 128)


def test_tokens_that_stay_on_devices_have_room_beside_kv(
    tiny_checkpoint: Tiny, npu: AscendOps
) -> None:
    """None where there is one rank, or where the experts of a layer run on the host."""
    folder, card = tiny_checkpoint("qwen3_moe"), Card("a card", 1 << 34, 1 << 34)
    options = RankModelOptions(model=str(folder), max_num_batched_tokens=128)
    before = plan_device(card, 5000, 1000, 0, 1)

    def kept(quantization: str, world: int) -> int:
        how = LoadOptions.model_validate({"quantization": quantization})
        decoder = load_decoder(folder, npu, how)
        return before.kv - with_exchange(before, card, decoder, options, world).kv

    assert kept("none", 1) == kept("int4", 4) == 0
    row = load_decoder(folder, npu).spec.hidden * 4
    for quantization, limbs in (("none", 2), ("int8", 1)):
        two, four = kept(quantization, 2), kept(quantization, 4)
        assert 2 * 4 * 128 * row * limbs < two < four  # sums there and back, of two ranks
    decoder = load_decoder(folder, npu)
    with pytest.raises(ConfigError, match="lower max_num_batched_tokens"):
        with_exchange(plan_device(card, 1 << 33, (1 << 33) - 9, 0, 1), card, decoder, options, 2)
