"""The model's own guesses with experts read from disk: the same guesses, the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions, RankModelOptions
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.packed.writer import pack_model
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes
from moeserve.offload.load import Streaming
from moeserve.offload.runner import StreamedLayerRunner

ENOUGH = 4 << 30


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, ops: Ops) -> Path:
    out = tmp_path_factory.mktemp("demo") / "packed"
    pack_model(resolve_model("demo"), out, ops, LoadOptions())
    return out


def guesses(decoder: Decoder) -> list[Tensor]:
    """Of a prompt and of three tokens behind it."""
    cache = decoder.new_cache(3, 8, mtp=True)
    found, done = [], 0
    for ids in ([5, 6, 7, 8, 9, 10, 11], [12], [13], [14]):
        step = pack_spans([Span(ids, done, [0, 1, 2], len(ids))], 8)
        hidden_TH = decoder.final_norm(decoder.trunk(step, cache))
        found.append(decoder.mtp_forward(hidden_TH, step, cache))
        done += len(ids)
    return found


def test_guesses_from_the_least_memory_are_those_of_all_of_it(demo: Path, ops: Ops) -> None:
    """The module's experts share the slots of the layers', and what else it takes is counted."""
    common: dict[str, Any] = {"model": str(demo), "memory": ENOUGH, "weights_prediction": "on"}
    without, streaming, beside = (
        Streaming.open(demo, ops, RankModelOptions(**common, **more))
        for more in (
            {"speculation": "off"},
            {"speculation": "mtp"},
            {"speculation": "auto", "draft_model": "another"},  # which guesses instead
        )
    )
    assert without.fixed.drafts == beside.fixed.drafts == 0 < streaming.fixed.drafts
    assert streaming.records.count == without.records.count + 32
    fixed, records = streaming.fixed, streaming.records
    decoder = replace(streaming, budget=fixed.total + records.least).load(kv=0)
    runner = decoder.runner
    assert isinstance(runner, StreamedLayerRunner)
    assert runner.stream.arena.slots == 64
    expected = guesses(load_decoder(demo, ops))
    for _ in range(2):
        assert all(map(torch.equal, guesses(decoder), expected))
    assert runner.stream.counts.evictions > 64
    assert runner.stream.residency.experts_L[-1] == 32
    runner.close()
    left_out = without.load(kv=0)
    assert left_out.mtp is None
    assert isinstance(left_out.runner, StreamedLayerRunner)
    left_out.runner.close()


def test_doctor_counts_the_module_where_it_guesses(demo: Path, ops: Ops) -> None:
    """As serve does: with a budget all but its experts, and nothing where it is left aside."""
    sizes, found = stored_sizes(demo), []
    for speculation in ("off", "mtp"):
        options = RankModelOptions(model=str(demo), memory=ENOUGH, speculation=speculation)
        fixed = Streaming.open(demo, ops, options).fixed
        found.append((demand_of(sizes, options, ops).other_bytes, fixed.drafts))
    (without, nothing), (held, drafts) = found
    assert held - without == drafts > nothing == 0
    whole = demand_of(sizes, LoadOptions(), ops).other_bytes
    assert whole - without == sizes.drafts + sizes.draft_experts


def test_a_rank_of_several_has_the_whole_module(demo: Path, ops: Ops) -> None:
    """Beside half of each layer's experts, in slots for as many as two of it."""
    options = RankModelOptions(model=str(demo), memory=ENOUGH, speculation="mtp")
    own = {l: range(0, 32, 2) for l in range(1, 8)}
    streaming = Streaming.open(demo, ops, options, own)
    fixed, records = streaming.fixed, streaming.records
    assert (records.count, records.most_in_layer) == (7 * 16 + 32, 32)
    decoder = replace(streaming, budget=fixed.total + records.least).load(kv=0)
    step = pack_spans([Span([5, 6, 7, 8, 9], 0, [0], 5)], 8)
    normed = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    both = decoder, load_decoder(demo, ops)
    found = [d.mtp_forward(normed, step, d.new_mtp_cache(1, 8)) for d in both]
    assert torch.equal(*found)
    assert isinstance(decoder.runner, StreamedLayerRunner)
    decoder.runner.close()
