"""What members that move KV read of one another: any bytes are understood, or refused by an error
of ours."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import CacheScope, Request, RequestId, SamplingParams
from moeserve.engine.ranks.messages import write_submission
from moeserve.engine.sequence import NEW, HeldKv
from moeserve.errors import DataLossError, InvalidRequestError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import import_by_blocks
from moeserve.kernels.ops import KvRuns
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import RunDigests
from moeserve.pools.kv.frames import Side, seal, unseal
from moeserve.pools.kv.importer import KvImporter
from moeserve.pools.kv.memory import open_memory
from moeserve.pools.kv.messages import Reader, SourceReader
from moeserve.pools.kv.runs import Stretch

EXAMPLES = 150
LAYOUTS = tuple(KvBlockLayout(torch.int8, 4, 2, 3, 2, latent=False) for _ in range(2))


class NoHouse:
    """Nothing that fuzzing makes has the right digest, so nothing is imported."""

    layouts = LAYOUTS
    block_size = 4

    def import_kv(self, layer: int, blocks: Any, data_NX: Any) -> None:
        raise AssertionError("something was imported")

    def export_kv(self, layer: int, blocks: Any, out_NX: Any) -> None:
        raise AssertionError("something was read")

    def import_runs(self, blocks: Any, runs: KvRuns, digests_RD: Any, data_X: Any) -> Any:
        return import_by_blocks(self, blocks, runs, digests_RD, data_X)


def first() -> bytes:
    wanted = pb.Wanted(compute_id="m", geometry=b"g", have=3, running="r")
    request = Request(RequestId("a"), (1, 2, 3), SamplingParams(), scope=CacheScope("s"))
    write_submission(wanted.submission, request, NEW, 0.0)
    return seal(Side.RECEIVER, 0, pb.ToSource(wanted=wanted).SerializeToString())


@given(st.data())
def test_a_frame_with_changed_bytes_is_refused(spoiled: Any, data: st.DataObject) -> None:
    frame = first()
    changed = spoiled(frame, data)
    with contextlib.suppress(DataLossError):
        Reader().read(changed)
        assert changed == frame


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(0, 2**32 - 1))
def test_heads_of_any_bytes(head: bytes, tail: bytes, number: int) -> None:
    assert unseal(Side.SOURCE, number, seal(Side.SOURCE, number, head, tail)) == (head, tail)
    for side, reader in ((Side.RECEIVER, Reader()), (Side.SOURCE, SourceReader())):
        with contextlib.suppress(InvalidRequestError):
            reader.read(seal(side, 0, head, tail))


numbers = st.integers(-3, 12) | st.integers(0, 2**63)


@given(numbers, numbers, numbers, numbers, st.binary(max_size=64), st.binary(max_size=400))
def test_runs_of_any_place_and_size(
    layer: int, start: int, stop: int, run_size: int, digests: bytes, data: bytes
) -> None:
    tokens = RunDigests("m", LAYOUTS, CacheScope(), range(10))
    counters = KvCounters()
    importer = KvImporter(NoHouse(), HeldKv((0, 1, 2), 0), 10, tokens, counters)  # type: ignore[arg-type]
    with contextlib.suppress(InvalidRequestError, DataLossError):
        wrong = importer.take_stretch(Stretch(layer, start, stop), digests, run_size, data, "grpc")
        assert len(wrong) == counters.bad_digests > 0
    assert importer.computed == 0


@given(numbers, numbers, st.binary(max_size=40), numbers, numbers)
def test_memory_of_any_description(
    pid: int, fd: int, cookie: bytes, slots: int, slot_bytes: int
) -> None:
    offered = pb.Memory(
        pid=pid % 2**32,
        fd=fd % 2**32,
        cookie=cookie,
        slots=slots % 2**32,
        slot_bytes=slot_bytes % 2**64,
    )
    assert open_memory(offered, 64, 1.0) is None
