"""DeepEP's adapters give a device what is its own: a device in name, over DeepEP's twin, one rank.
The experts are the reference's, behind a table that takes tensors of the device alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.dispatcher import ShardedExperts
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.libraries.deepep import BufferRank, DeepEpDispatcher, DeepEpLowLatencyDispatcher
from moeserve.comm.libraries.deepep_exchange import ROOM, DeepEpExchange
from moeserve.comm.libraries.deepep_twin import Buffer, ThreadGroup
from moeserve.comm.table import table_of
from moeserve.kernels.matrix import to_int8
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.thread_meeting import ThreadMeeting
from moeserve.kernels.triton.double import DEVICE, OnDevice, device_double
from moeserve.kernels.wire import Combine
from moeserve.observe.progress import Progress

HIDDEN, EXPERTS, MOST = 2048, 4, 4
REFERENCE = ReferenceOps()
ALONE = BufferRank(0, 1, Topology((0,)))


def there(*tensors: Tensor) -> list[Tensor]:
    assert all(isinstance(t, OnDevice) for t in tensors)
    return [t.cpu() for t in tensors]


class Far:
    """What the adapters ask of a table."""

    device = DEVICE

    def quantize_per_token(self, x_TK: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(DEVICE) for t in REFERENCE.quantize_per_token(*there(x_TK)))

    def moe_ffn(self, x_TH: Tensor, experts: Any, ids_TC: Tensor, weights_TC: Tensor) -> Tensor:
        x, ids, weights = there(x_TH, ids_TC, weights_TC)
        return REFERENCE.moe_ffn(x, experts, ids, weights).to(DEVICE)

    def shared(self, part: Part[MoeWeights], routed: Routed) -> None: ...


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with device_double():
        yield


def normal(far: Ops) -> DeepEpDispatcher:
    return DeepEpDispatcher(far, Buffer(group(), 1 << 40), ALONE, Progress())


def low_latency(far: Ops) -> DeepEpLowLatencyDispatcher:
    buffer = Buffer(group(), 0, 1 << 40, low_latency_mode=True, num_qps_per_rank=EXPERTS)
    return DeepEpLowLatencyDispatcher(far, buffer, ALONE, Progress(), MOST)


def group() -> ThreadGroup:
    return ThreadGroup(ThreadMeeting(1), 0)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("make", [normal, low_latency])
def test_rows_stay_on_the_device(make: Callable[[Ops], Any], kind: str) -> None:
    draw = torch.Generator().manual_seed(3)
    gate_up, down = (
        to_int8(weight) if kind == "int8" else weight.bfloat16()
        for weight in (
            torch.randn(EXPERTS, 32, HIDDEN, generator=draw) / 45,
            torch.randn(EXPERTS, HIDDEN, 16, generator=draw) / 4,
        )
    )
    weights = MoeWeights(REFERENCE.pack_experts(gate_up, down), None, Combine.FAST)
    part = REFERENCE.prepare(weights)
    layout = LayerLayout(np.arange(EXPERTS, dtype=np.int32), EXPERTS, 1)
    sharded = ShardedExperts(part, layout, table_of(layout), REFERENCE.wire(part, 2))
    rows = [torch.randn(3, HIDDEN, generator=draw) for _ in range(2)]
    ids, weighed = torch.tensor([[0, 3], [2, 1], [3, 2]], dtype=torch.int32), torch.rand(3, 2)
    wanted = rows[0].clone()
    REFERENCE.moe(wanted, part, Routed(rows[1], ids, weighed))
    x_TH = rows[0].to(DEVICE)
    routed = Routed(*(t.to(DEVICE) for t in (rows[1], ids, weighed)))
    dispatcher = make(cast("Ops", Far()))
    for _ in dispatcher.moe(0, sharded, x_TH, routed):
        pass
    (found,) = there(x_TH)
    assert (found - wanted).abs().max() <= 0.03 * (wanted - rows[0]).abs().max()
    assert dispatcher.stats.copies == dispatcher.stats.dispatch_bytes == 0


@pytest.mark.parametrize("staged", [True, False])
def test_segments_lie_where_the_table_writes_them(staged: bool) -> None:
    whole = Group(0, 1, cast("Any", None))
    buffer = Buffer(group(), 1 << 40)
    exchange = DeepEpExchange(whole, Lanes((2 * ROOM,)), buffer, DEVICE, staged=staged)
    (area,) = exchange.areas(0, [ROOM + 5])
    assert isinstance(area, OnDevice) != staged
    area[: ROOM + 5] = 9
    exchange.send(0, [ROOM + 5])
    (segment,) = exchange.receive(0)
    assert isinstance(segment, OnDevice) != staged
    assert segment.cpu().tolist() == [9] * (ROOM + 5)
