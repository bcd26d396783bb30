"""Steps that are captured and replayed give the bits of steps run by themselves.

In the place of CUDA graphs a recorder takes what a device does, on a device in name: whatever the
host decided in a capture it cannot decide again, and a capture that crosses to the host fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeserve.config.options import LoadOptions
from moeserve.errors import InternalError
from moeserve.kernels.ops import ATTENTION_SEGMENT, Ops
from moeserve.kernels.triton.double import DEVICE, Crossings, OnDevice, device_double
from moeserve.models.batch import Span, StepBatch, pack_spans
from moeserve.models.decoder import Decoder, load_decoder

Load = Callable[[str], Path]
BLOCK = 8


@dataclass
class Recorded(TorchDispatchMode):
    """What ran within it, in order, to be run again on the same memory."""

    calls: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))

        def again() -> None:
            found = func(*args, **(kwargs or {}))
            for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and not same_memory(old, new):
                    old.copy_(new)

        if func.name() != "aten::empty.memory_format":
            self.calls.append(again)
        return out


def same_memory(one: Tensor, other: Tensor) -> bool:
    held = [t.held if isinstance(t, OnDevice) else t for t in (one, other)]
    return held[0].untyped_storage().data_ptr() == held[1].untyped_storage().data_ptr()


class Recorder:
    """A ``Capture``."""

    def __init__(self, seen: Crossings) -> None:
        self.seen = seen

    def __call__(self, run: Callable[[], Tensor], /) -> tuple[Tensor, Callable[[], None]]:
        from triton.runtime.interpreter import GridExecutor

        run()  # as on a device, where this compiles kernels
        launched, recorded = GridExecutor.__call__, Recorded()

        def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
            def again() -> None:
                launched(executor, *args, **kwargs)

            recorded.calls.append(again)
            again()

        before = str(self.seen)
        with pytest.MonkeyPatch.context() as patch, recorded:
            patch.setattr(GridExecutor, "__call__", noted)
            out = run()
        assert str(self.seen) == before, "a capture crosses between device and host"

        def replay() -> None:
            for call in recorded.calls:
                call()

        return out, replay


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    with device_double() as seen:
        yield seen


def tables(seen: Crossings) -> tuple[Ops, Any]:
    """One that runs each step by itself, and one that replays."""
    from moeserve.kernels.triton.ops import TritonOps

    return TritonOps(DEVICE), TritonOps(DEVICE, Recorder(seen))


def prompts(decoder: Decoder, cache: Any) -> None:
    """Six sequences of one to six tokens, each in a block of its own."""
    spans = [Span([7 * s + i for i in range(s + 1)], 0, [s], 1) for s in range(6)]
    decoder.forward(pack_spans(spans, BLOCK), cache)


def decode(which: Sequence[int], start: int) -> StepBatch:
    """The next token of these sequences, ``start`` beyond their prompts."""
    spans = [Span([100 + s], s + 1 + start, [s, 6 + s], 1) for s in which]
    return pack_spans(spans, BLOCK)


# Sequences of steps that follow one another: rows beyond them, others in their place, fewer, more.
Steps = Sequence[tuple[Sequence[int], int]]
STEPS: Steps = (((4, 0, 2), 0), ((5, 1, 3), 0), ((0, 2), 1), ((2, 0, 4, 1), 2))


def equal_by_steps(folder: Path, seen: Crossings, how: LoadOptions, steps: Steps) -> None:
    alone, replayed = tables(seen)
    decoders = [load_decoder(folder, table, how) for table in (alone, replayed)]
    caches = [decoder.new_cache(12, BLOCK) for decoder in decoders]
    for decoder, cache in zip(decoders, caches, strict=True):
        if len(steps) > 2:
            prompts(decoder, cache)
    for which, start in steps:
        step = decode(which, start)
        ours, theirs = (
            d.forward(step, cache).cpu() for d, cache in zip(decoders, caches, strict=True)
        )
        assert torch.equal(ours, theirs), (which, start)
    graphs = replayed.graphs
    assert graphs.replays == len(steps)
    assert {bucket.rows for bucket in graphs.buckets} == {2, 4} - (
        {2} if len(steps) == 2 else set()
    )
    passes = [d.ops.kv_passes(c.layers[-1]) for d, c in zip(decoders, caches, strict=True)]
    assert passes == [len(steps) + (len(steps) > 2)] * 2
    for cache, other in zip(caches[0].layers, caches[1].layers, strict=True):
        blocks = torch.arange(12)
        assert torch.equal(alone.export_kv(cache, blocks), replayed.export_kv(other, blocks))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_replayed_steps_are_those_run_by_themselves_to_the_bit(
    crossings: Crossings, tiny_checkpoint: Load
) -> None:
    equal_by_steps(tiny_checkpoint("mixtral"), crossings, LoadOptions(), STEPS[:2])


@pytest.mark.rare
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_replayed_steps_of_every_kind_of_layer(
    family: str, crossings: Crossings, tiny_checkpoint: Load
) -> None:
    int8 = LoadOptions(quantization="int8", kv_dtype="int8", quantize_attention=True)
    equal_by_steps(tiny_checkpoint(family), crossings, int8, STEPS)


def test_a_step_that_does_not_fit_its_caches_is_not_replayed(
    crossings: Crossings, tiny_checkpoint: Load
) -> None:
    _, table = tables(crossings)
    decoder = load_decoder(tiny_checkpoint("mixtral"), table)
    cache = decoder.new_cache(4, BLOCK)
    with pytest.raises(InternalError, match="do not fit"):
        decoder.forward(pack_spans([Span([3], 0, [9], 1)], BLOCK), cache)


@given(st.integers(1, 256), st.integers(1, 1 << 20))
def test_a_bucket_has_room_and_is_not_twice_too_large(rows: int, positions: int) -> None:
    from moeserve.kernels.triton.graphs import Bucket

    bucket = Bucket.of(rows, positions)
    assert bucket is not None
    assert rows <= bucket.rows <= max(1, 2 * (rows - 1))
    reach = bucket.segments * ATTENTION_SEGMENT
    assert positions <= reach < 2 * (positions + ATTENTION_SEGMENT)
    assert Bucket.of(257, positions) is None
