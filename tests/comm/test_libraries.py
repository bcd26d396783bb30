"""Dispatchers of libraries over their twins, whose ranks are threads.

DeepEP as a carrier of records gives the bits of one process. The others add floats: they are near,
and what each promises beyond that holds to the bit. What a set-up lacks is one line.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.build import Bounds
from moeserve.comm.dispatcher import Dispatcher, ShardedExperts
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.libraries import deepep_twin
from moeserve.comm.libraries import open as opening
from moeserve.comm.libraries.deepep_exchange import ROOM, DeepEpExchange
from moeserve.comm.libraries.deepep_twin import Buffer, ThreadGroup
from moeserve.comm.libraries.process_group import hccl_group, nccl_group
from moeserve.comm.libraries.promise import (
    DEEPEP,
    LOW_LATENCY,
    MOE_DISTRIBUTE,
    promise_of,
)
from moeserve.comm.table import table_of
from moeserve.config.options import LoadOptions
from moeserve.errors import ConfigError, InternalError, MoeserveError
from moeserve.kernels.ascend import calls
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.matrix import Matrix, part_of, stack, to_int8
from moeserve.kernels.ops import (
    Layer,
    MoeWeights,
    Ops,
    Part,
    Routed,
    RouterSpec,
    RouterWeights,
)
from moeserve.kernels.thread_meeting import ThreadMeeting
from moeserve.kernels.wire import Combine
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.spec import MoeSpec
from moeserve.observe.progress import Progress

HIDDEN, INNER, EXPERTS, CHOICES, MOST = 2048, 16, 6, 3, 8
FEW = settings(max_examples=8, deadline=None)
PROMPT = [17, 300, 5, 88, 199]
# What one bf16 rounding of each expert's row, of their sum and of the row itself may come to.
NEAR = 0.03


@pytest.fixture(autouse=True)
def _cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only on a machine with cards."""
    monkeypatch.setattr(opening, "deep_ep", deepep_twin.module)
    monkeypatch.setattr(opening, "npu_name", lambda device: "Ascend910_9392")
    monkeypatch.setenv("HCCL_BUFFSIZE", "4096")
    monkeypatch.setattr(opening, "hccl_group", lambda group: (group.store.name, None))
    monkeypatch.setattr(opening, "nccl_group", lambda group: ThreadGroup(group.store, group.rank))
    for name in (DEEPEP, LOW_LATENCY):
        monkeypatch.setitem(opening.LACKS, name, lambda setup: "")  # type: ignore[arg-type]


class ThreadedGroup(Group):
    """Whose notes go over a meeting of threads, which is its ``store``."""

    def all_gather(self, key: str, note: bytes, *args: Any, **kwargs: Any) -> list[bytes]:
        found: list[bytes] = self.store.meet(self.rank, note)  # type: ignore[attr-defined]
        return found


def on_ranks(world: int, work: Callable[[ThreadedGroup], Any]) -> list[Any]:
    """What ``work`` gives on every rank; the first error of any."""
    meeting = ThreadMeeting(world)
    found, errors = dict[int, Any](), list[BaseException]()

    def rank(r: int) -> None:
        try:
            found[r] = work(ThreadedGroup(r, world, meeting))  # type: ignore[arg-type]
        except MoeserveError as error:
            errors.append(error)
            meeting.give_up()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return [found[r] for r in range(world)]


@dataclass(frozen=True)
class Mixture:
    """Experts of one layer, and rows that were routed."""

    gate_up: Matrix
    down: Matrix
    combine: Combine

    @classmethod
    def draw(cls, kind: str, combine: Combine) -> Mixture:
        draw = torch.Generator().manual_seed(5)
        gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=draw) / HIDDEN**0.5
        down = torch.randn(EXPERTS, HIDDEN, INNER, generator=draw) / INNER**0.5
        if kind == "int8":
            return cls(to_int8(gate_up), to_int8(down), combine)
        return cls(gate_up.to(getattr(torch, kind)), down.to(getattr(torch, kind)), combine)

    def sharded(self, ops: Ops, layout: LayerLayout, rank: int) -> ShardedExperts:
        mine = layout.of_rank(rank)
        some = [stack([part_of(whole, e) for e in mine]) for whole in (self.gate_up, self.down)]
        part = ops.prepare(MoeWeights(ops.pack_experts(*some), None, self.combine))
        return ShardedExperts(part, layout, table_of(layout), ops.wire(part, CHOICES))

    def alone(self, ops: Ops, x_TH: Tensor, routed: Routed) -> Tensor:
        """In one process, added in order of choices or exactly."""
        experts = ops.pack_experts(self.gate_up, self.down)
        out_TH = x_TH.clone()
        ops.moe(out_TH, ops.prepare(MoeWeights(experts, None, self.combine)), routed)
        return out_TH


def routed_rows(seed: int, rows: int) -> tuple[Tensor, Routed]:
    draw = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(rows, HIDDEN, generator=draw)
    order = torch.rand(rows, EXPERTS, generator=draw).argsort(1)[:, :CHOICES].int()
    weights = torch.rand(rows, CHOICES, generator=draw)
    return x_TH, Routed(torch.randn(rows, HIDDEN, generator=draw), order.contiguous(), weights)


def rows_of(routed: Routed, which: slice) -> Routed:
    return Routed(routed.normed_TH[which], routed.ids_TC[which], routed.weights_TC[which])


def opened(name: str, ops: Ops, sharded: ShardedExperts, group: Group) -> Dispatcher:
    nodes = Topology((0,) * group.world)
    setup = opening.LibrarySetup(ops, [sharded], group, nodes, Bounds(MOST, 2), Progress())
    return opening.OPEN[name](setup)


def mixed(
    name: str,
    ops: Ops,
    mixture: Mixture,
    layout: LayerLayout,
    rows_R: Sequence[tuple[Tensor, Routed]],
) -> list[Tensor]:
    """What every rank has of its rows after one layer."""

    def work(group: Group) -> Tensor:
        sharded = mixture.sharded(ops, layout, group.rank)
        dispatcher = opened(name, ops, sharded, group)
        x_TH, routed = rows_R[group.rank]
        # Two microbatches that take turns, as the pipeline's do; the second may be empty.
        halves = [slice(0, (len(x_TH) + 1) // 2), slice((len(x_TH) + 1) // 2, None)]
        out_TH = x_TH.clone()
        walks = deque(
            dispatcher.moe(lane, sharded, out_TH[half], rows_of(routed, half))
            for lane, half in enumerate(halves)
        )
        while walks:
            walk = walks.popleft()
            if next(walk, 1) is None:
                walks.append(walk)
        others = group.world - 1
        assert dispatcher.stats.tokens == len(x_TH)
        assert dispatcher.stats.copies <= len(x_TH) * max(CHOICES, others)
        dispatcher.close()
        return out_TH

    return on_ranks(layout.world, work)


def laid(slots: Sequence[int], world: int = 2) -> LayerLayout:
    return LayerLayout(np.array(slots, np.int32), EXPERTS, world)


IN_ORDER, SHUFFLED = laid(range(EXPERTS)), laid([5, 0, 3, 1, 4, 2])
# Two slots of expert 1 and of 2; one of each rank's is empty.
REPLICAS = laid([0, 1, 2, 5, -1, 1, 2, 3, 4, -1])
sizes = st.tuples(st.integers(0, MOST), st.integers(0, MOST))
layouts = st.sampled_from([IN_ORDER, SHUFFLED, REPLICAS])


@pytest.mark.parametrize("kind", ["int8", "float32"])
@FEW
@given(rows=sizes, layout=layouts, seed=st.integers(0, 999))
def test_records_over_deepep_give_the_bits_of_one_process(
    ops: Ops, kind: str, rows: tuple[int, int], layout: LayerLayout, seed: int
) -> None:
    mixture = Mixture.draw(kind, Combine.EXACT)
    given_R = [routed_rows(seed + r, n) for r, n in enumerate(rows)]
    found = mixed(DEEPEP, ops, mixture, layout, given_R)
    for out_TH, (x_TH, routed) in zip(found, given_R, strict=True):
        assert torch.equal(out_TH, mixture.alone(ops, x_TH, routed))


@pytest.fixture
def tables(ops: Ops, npu: AscendOps) -> dict[str, Ops]:
    return {DEEPEP: ops, LOW_LATENCY: ops, MOE_DISTRIBUTE: npu}


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", [DEEPEP, LOW_LATENCY, MOE_DISTRIBUTE])
def test_what_a_library_adds_is_near_and_keeps_its_promise(
    tables: dict[str, Ops], name: str, kind: str
) -> None:
    ops, mixture = tables[name], Mixture.draw(kind, Combine.FAST)
    promise = promise_of(name, Combine.FAST)
    given_R = [routed_rows(1, MOST), routed_rows(2, 3)]
    found = {
        layout: mixed(name, ops, mixture, layout, given_R)
        for layout in (IN_ORDER, SHUFFLED, REPLICAS)
    }
    for out_R in found.values():
        for out_TH, (x_TH, routed) in zip(out_R, given_R, strict=True):
            wanted = mixture.alone(ops, x_TH, routed)
            assert (out_TH - wanted).abs().max() <= NEAR * (wanted - x_TH).abs().max()
    if promise.placement:
        for out_R in found.values():
            assert all(map(torch.equal, out_R, found[IN_ORDER]))
    # The first rows alone, and in another number; on the other rank nothing at all.
    layout = REPLICAS if promise.batch else SHUFFLED
    x_TH, routed = given_R[0]
    few = rows_of(routed, slice(2))
    alone = mixed(name, ops, mixture, layout, [(x_TH[:2], few), routed_rows(3, 0)])
    assert torch.equal(alone[0], found[layout][0][:2])
    assert not promise.whole


def test_four_ranks_give_the_bits_of_two_where_that_is_promised(tables: dict[str, Ops]) -> None:
    four = laid([*range(EXPERTS), 0, 1], 4)
    for name in (LOW_LATENCY, MOE_DISTRIBUTE):
        mixture = Mixture.draw("int8", Combine.FAST)
        given_R = [routed_rows(r, r) for r in range(4)]
        found = mixed(name, tables[name], mixture, four, given_R)
        two = mixed(name, tables[name], mixture, IN_ORDER, given_R[2:])
        assert all(map(torch.equal, found[2:], two))


@FEW
@given(st.lists(st.lists(st.integers(0, 3 * ROOM), min_size=3, max_size=3), min_size=1, max_size=3))
def test_segments_of_any_length_arrive_whole_over_deepep(rounds: list[list[int]]) -> None:
    def work(group: Group) -> None:
        buffer = Buffer(ThreadGroup(group.store, group.rank), 1 << 40)  # type: ignore[arg-type]
        lanes = Lanes((3 * ROOM,))
        exchange = DeepEpExchange(group, lanes, buffer, torch.device("cpu"))
        for number, sizes in enumerate(rounds):
            mine = [size + group.rank for size in sizes if size + group.rank <= 3 * ROOM]
            mine += [0] * (3 - len(mine))
            for r, area in enumerate(exchange.areas(0, mine)):
                area[: mine[r]] = (number + 10 * group.rank + r) % 251
            exchange.send(0, mine)
            for r, segment in enumerate(exchange.receive(0)):
                theirs = [size + r for size in sizes if size + r <= 3 * ROOM] + [0] * 3
                wanted = torch.full((theirs[group.rank],), (number + 10 * r + group.rank) % 251)
                assert torch.equal(segment, wanted.to(torch.uint8))
        assert exchange.traffic.rounds == len(rounds)

    on_ranks(3, work)


def answered(decoder: Decoder, told: Sequence[int] = (), new: int = 3) -> list[Tensor]:
    """Logits after the prompt, and after each token of a greedy answer, or of the one told."""
    cache, seen, fresh = decoder.new_cache(4, 16), 0, list(PROMPT)
    logits = []
    for n in range(new):
        span = Span(fresh, seen, [2, 1, 3, 0], len(fresh))
        logits.append(decoder.forward(pack_spans([span], 16), cache)[-1])
        seen += len(fresh)
        fresh = [told[n] if told else int(logits[-1].argmax())]
    return logits


@pytest.mark.parametrize(
    ("name", "combine"),
    [(DEEPEP, "exact"), (DEEPEP, "fast"), (LOW_LATENCY, "fast"), (MOE_DISTRIBUTE, "fast")],
)
def test_greedy_tokens_of_two_ranks(
    tables: dict[str, Ops],
    tiny_checkpoint: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    name: str,
    combine: str,
) -> None:
    folder, ops = tiny_checkpoint("qwen2_moe_2048"), tables[name]
    how = LoadOptions.model_validate({"quantization": "int8", "combine": combine})
    whole = load_decoder(folder, ops, how)
    wanted = answered(whole)
    tokens = [int(row.argmax()) for row in wanted]
    layouts = {
        n: LayerLayout(np.arange(m.router.num_experts, dtype=np.int32)[::-1].copy(), 8, 2)
        for n, layer in enumerate(whole.spec.layers)
        if isinstance(m := layer.mlp, MoeSpec)
    }
    caplog.set_level(logging.INFO, "moeserve.comm")

    def work(group: Group) -> list[Tensor]:
        mine = {n: layout.of_rank(group.rank) for n, layout in layouts.items()}
        decoder = load_decoder(folder, ops, how, experts=mine)
        nodes, bounds = Topology((0, 0)), Bounds(len(PROMPT), 1)
        layers, progress = decoder.stack.layers, Progress()
        over = opening.open_with_library(
            name, ops, layers, layouts, group, nodes, bounds=bounds, progress=progress
        )
        return answered(decoder.over(over), tokens)

    for found in on_ranks(2, work):
        for mine, theirs in zip(found, wanted, strict=True):
            bound = 0.0 if combine == "exact" else NEAR * float(theirs.abs().max())
            assert (mine - theirs).abs().max() <= bound
            first, second = theirs.topk(2).values.tolist()
            assert mine.argmax() == theirs.argmax() or first - second <= 2 * bound
    assert f"dispatcher {name}: {promise_of(name, Combine(combine))}" in caplog.messages


def setup_of(
    ops: Ops,
    kind: str,
    combine: Combine,
    tokens: int = MOST,
    wire: dict[str, Any] | None = None,
) -> Any:
    """Of rank 0 of two."""
    sharded = Mixture.draw(kind, combine).sharded(ops, IN_ORDER, 0)
    sharded.wire = replace(sharded.wire, **(wire or {}))
    group = ThreadedGroup(0, 2, ThreadMeeting(2))  # type: ignore[arg-type]
    nodes, bounds = Topology((0, 0)), Bounds(tokens, 1)
    return opening.LibrarySetup(ops, [sharded], group, nodes, bounds, Progress())


@dataclass(frozen=True)
class OnACard:
    """As much of a table on a card as is asked before one is used."""

    name: str = "triton"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing of what is asked is replaced."""
    monkeypatch.undo()
    return monkeypatch


def no_symbol(name: str) -> ModuleType:
    raise ImportError(f"undefined symbol\nwhile {name} was loaded")


def test_what_deepep_lacks_is_one_line_with_the_remedy(ops: Ops, plain: pytest.MonkeyPatch) -> None:
    fast = setup_of(ops, "int8", Combine.FAST)
    assert "computes on cpu" in opening.LACKS[DEEPEP](fast)
    fast = replace(fast, ops=OnACard())
    assert "deep_ep is not installed: build it" in opening.LACKS[DEEPEP](fast)
    plain.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    sys.modules["deep_ep"].__spec__ = ModuleSpec("deep_ep", None)
    assert "has no Buffer: install one" in opening.LACKS[LOW_LATENCY](fast)
    with plain.context() as broken:
        broken.setattr("importlib.import_module", no_symbol)
        told = opening.LACKS[DEEPEP](fast)
    assert told.startswith("deep_ep cannot be loaded: undefined symbol: build it for torch 2")
    plain.setattr(sys.modules["deep_ep"], "Buffer", Buffer, raising=False)
    assert opening.LACKS[DEEPEP](fast) == opening.LACKS[LOW_LATENCY](fast) == ""
    three = replace(fast, group=ThreadedGroup(0, 3, ThreadMeeting(3)))  # type: ignore[arg-type]
    assert "no settings for 3 ranks: run 2, 4, 8" in opening.LACKS[DEEPEP](three)
    narrow = replace(setup_of(ops, "int8", Combine.FAST, wire={"hidden": 100}), ops=OnACard())
    assert "100 features are no whole 16 bytes" in opening.LACKS[DEEPEP](narrow)
    assert "100 features: kernels of low latency take" in opening.LACKS[LOW_LATENCY](narrow)
    floats = replace(setup_of(ops, "float32", Combine.FAST), ops=OnACard())
    assert "give --dtype bfloat16 or --quantization int8" in opening.LACKS[DEEPEP](floats)
    exact = replace(setup_of(ops, "float32", Combine.EXACT), ops=OnACard())
    assert opening.LACKS[DEEPEP](exact) == ""


def test_a_buffer_that_deepep_cannot_open_is_one_line(
    ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("NVSHMEM: no IBGDA\nTraceback ...")

    monkeypatch.setattr(Buffer, "__init__", broken)
    setup = setup_of(ops, "int8", Combine.FAST)
    with pytest.raises(ConfigError, match="cannot open its buffer: NVSHMEM: no IBGDA: check") as e:
        opening.OPEN[LOW_LATENCY](setup)
    assert "\n" not in e.value.message


def test_what_the_operators_of_npus_lack_is_one_line_with_the_remedy(
    ops: Ops, npu: AscendOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks, fast = opening.LACKS[MOE_DISTRIBUTE], Combine.FAST
    fine = setup_of(npu, "int8", fast)
    assert lacks(fine) == ""
    assert "computes on cpu" in lacks(replace(fine, ops=ops))
    floats = setup_of(npu, "float32", fast)
    assert "give --dtype bfloat16 or --quantization int8" in lacks(floats)
    wide = setup_of(npu, "int8", fast, wire={"hidden": 512})
    assert lacks(wide) == "512 features: Atlas A3 takes 1024 to 8192"
    many = setup_of(npu, "int8", fast, tokens=2048)
    assert "--max-num-batched-tokens 512" in lacks(many)
    monkeypatch.setenv("HCCL_BUFFSIZE", "0")
    assert "HCCL_BUFFSIZE=0: 8 tokens of 2048 features on each of 2 ranks need" in lacks(fine)
    monkeypatch.setattr(opening, "npu_name", lambda device: "Ascend910B3")
    assert lacks(fine) == "2 ranks: Atlas A2 takes 16, 32, 64, 128, 256"
    monkeypatch.setattr(opening, "npu_name", lambda device: "Ascend310P3")
    assert "neither Atlas A2 nor A3" in lacks(fine)
    monkeypatch.setattr(calls, "has", lambda name: name in calls.USED)
    assert "has no npu_moe_distribute_dispatch_v2: install torch_npu 2.13" in lacks(fine)


def test_all_ranks_refuse_and_name_the_one_that_lacks_something(
    ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(opening.LACKS, DEEPEP, lambda setup: "a card" if setup.group.rank else "")

    def work(group: Group) -> str:
        sharded = Mixture.draw("int8", Combine.EXACT).sharded(ops, IN_ORDER, group.rank)
        layers = [cast("Layer", SimpleNamespace(mlp=(router_of(ops), sharded.part)))]
        more = {"bounds": Bounds(MOST, 1), "progress": Progress()}
        with pytest.raises(ConfigError) as refused:
            opening.open_with_library(
                DEEPEP, ops, layers, {0: IN_ORDER}, group, Topology((0, 0)), **more
            )
        return refused.value.message

    line = "dispatcher=deepep: rank 1: a card, or leave out --dispatcher"
    assert on_ranks(2, work) == [line, line]


def test_a_meeting_that_fails_names_who_came_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not who came to those before."""
    monkeypatch.setattr("moeserve.kernels.thread_meeting.MEETING_S", 0.1)

    def work(group: Group) -> str:
        assert group.all_gather("first", b"") == [b"", b""]
        if group.rank:
            return ""
        with pytest.raises(InternalError) as failed:
            group.all_gather("second", b"")
        return failed.value.message

    assert on_ranks(2, work) == ["of 2 ranks only [0] called", ""]


def router_of(ops: Ops) -> Part[RouterWeights]:
    router = ops.pack_linear(torch.zeros(EXPERTS, HIDDEN))
    return ops.prepare(
        RouterWeights(torch.ones(HIDDEN), 1e-6, router, RouterSpec(EXPERTS, CHOICES))
    )


@pytest.mark.parametrize(
    ("name", "combine"),
    [(LOW_LATENCY, Combine.EXACT), (MOE_DISTRIBUTE, Combine.EXACT), (DEEPEP, Combine.ORDERED)],
)
def test_what_cannot_be_combined_is_refused_before_anything_is_opened(
    name: str, combine: Combine
) -> None:
    with pytest.raises(ConfigError, match=rf"dispatcher={name} does not .* give --combine (e|f)"):
        promise_of(name, combine)


@pytest.mark.parametrize(("make", "name"), [(nccl_group, "NCCL"), (hccl_group, "HCCL")])
def test_a_torch_without_the_library_is_one_line(
    make: Callable[[Group], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING"):
        monkeypatch.setenv(f"TORCH_{name}_{variable}", "0")
    with pytest.raises(ConfigError, match=f"no group of {name} can be made: .*; {name}_DEBUG") as e:
        make(Group(0, 1, HashStore()))
    assert "\n" not in e.value.message
