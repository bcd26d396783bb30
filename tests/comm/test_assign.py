"""Copies of tokens: each choice goes to one slot of its expert, once per rank, by the rule."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.comm.assign import assign
from moeserve.comm.device_table import DeviceAssignmentTable
from moeserve.comm.layout import LayerLayout
from moeserve.comm.table import NumpyAssignmentTable, table_of
from moeserve.kernels.wire import Copies, Wire
from moeserve.placement.split import slack_of, slots_of, split_batch, split_batches


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, LayerLayout]:
    world = draw(st.integers(1, 5))
    experts = draw(st.integers(2, 9))
    slots = -(-experts // world) * world + world * draw(st.integers(0, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    extra = random.integers(experts, size=slots - experts)
    expert_S = random.permutation(np.concatenate((np.arange(experts), extra))).astype(np.int32)
    if draw(st.booleans()):  # ranks that differ: empty slots behind the filled ones
        empty_RS = np.full((world, draw(st.integers(1, 3))), -1, np.int32)
        expert_S = np.concatenate((expert_S.reshape(world, -1), empty_RS), axis=1)
        expert_S[draw(st.integers(0, world - 1)), -1] = draw(st.integers(-1, experts - 1))
        expert_S = np.take_along_axis(expert_S, (expert_S < 0).argsort(1, kind="stable"), 1).ravel()
    tokens, k = draw(st.integers(0, 40)), draw(st.integers(1, min(4, experts)))
    ids_TC = np.stack([random.permutation(experts)[:k] for _ in range(tokens)] or [np.zeros(k)])
    return ids_TC[:tokens].astype(np.int32), LayerLayout(expert_S, experts, world)


@settings(deadline=None)
@given(batches())
def test_every_choice_travels_once_to_a_slot_of_its_expert(
    batch: tuple[np.ndarray, LayerLayout],
) -> None:
    ids_TC, layout = batch
    for rank in range(layout.world):
        copies = assign(torch.from_numpy(ids_TC), layout, rank)
        starts = copies.start_R1.tolist()
        assert starts[0] == 0
        assert starts[-1] == len(copies.token_N) == len(copies.slot_NC)
        seen = np.zeros(ids_TC.shape, int)
        for r in range(layout.world):
            there = slice(starts[r], starts[r + 1])
            tokens, slots = copies.token_N[there].numpy(), copies.slot_NC[there].numpy()
            assert (np.diff(tokens) > 0).all()
            assert (slots >= 0).any(axis=1).all()
            for token, slot_C in zip(tokens, slots, strict=True):
                for c in np.flatnonzero(slot_C >= 0):
                    assert layout.of_rank(r)[slot_C[c]] == ids_TC[token, c]
                    seen[token, c] += 1
        assert (seen == 1).all()


@settings(deadline=None)
@given(batches(), st.booleans())
def test_many_batches_at_once_split_as_each_by_itself(
    batch: tuple[np.ndarray, LayerLayout], gaps: bool
) -> None:
    ids_TC, layout = batch
    ids_BTC = np.stack([ids_TC, ids_TC[::-1]])
    if gaps:
        ids_BTC[:, ::2, 0] = -1
    homes = np.array([0, layout.world - 1], np.int32)
    expert_BS = np.stack([layout.expert_S, layout.expert_S[::-1]])
    together = split_batches(
        ids_BTC, expert_BS, layout.num_experts, ranks=layout.world, home_B=homes
    )
    for b, home in enumerate(homes):
        slots = slots_of(expert_BS[b], layout.num_experts)
        alone = split_batch(ids_BTC[b], slots, ranks=layout.world, home=int(home))
        assert (together[b] == alone).all()


def test_a_replica_where_the_token_goes_anyway_is_preferred() -> None:
    layout = LayerLayout(np.array([1, 2, 0, 3, 0, 4], np.int32), 5, 3)
    copies = assign(torch.tensor([[4, 0]], dtype=torch.int32), layout, 0)
    assert copies.start_R1.tolist() == [0, 0, 0, 1]
    assert copies.slot_NC.tolist() == [[1, 0]]


def test_home_costs_nothing_and_counts_as_visited() -> None:
    layout = LayerLayout(np.array([0, 1, 0, 2], np.int32), 3, 2)
    assert assign(torch.tensor([[0]], dtype=torch.int32), layout, 1).start_R1.tolist() == [0, 0, 1]
    assert assign(torch.tensor([[0]], dtype=torch.int32), layout, 0).start_R1.tolist() == [0, 1, 1]


def test_past_the_slack_the_least_loaded_replica_is_taken() -> None:
    layout = LayerLayout(np.array([0, 1, 0, 2], np.int32), 3, 2)
    tokens = 40
    ids = torch.zeros(tokens, 1, dtype=torch.int32)
    copies = assign(ids, layout, 0)
    at_home, away = np.diff(copies.start_R1.numpy())
    assert at_home + away == tokens
    assert 0 < at_home - away <= slack_of(tokens, 2) + 1


def same(one: Copies, other: Copies) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one.start_R1, other.start_R1),
            (one.token_N, other.token_N),
            (one.slot_NC, other.slot_NC),
        )
    )


@settings(deadline=None)
@given(batches(), st.booleans())
def test_the_native_table_assigns_as_the_rule_says(
    batch: tuple[np.ndarray, LayerLayout], gaps: bool
) -> None:
    ids_TC, layout = batch
    if gaps:
        ids_TC[::2, 0] = -1
    table = table_of(layout)
    for rank in range(layout.world):
        assigned = table.assign(torch.from_numpy(ids_TC), rank)
        assert same(assigned.copies, assign(torch.from_numpy(ids_TC), layout, rank))
        assert assigned.count_R == np.diff(assigned.copies.start_R1.numpy()).tolist()


@settings(deadline=None)
@given(batches(), st.booleans())
def test_a_device_s_table_assigns_as_the_host_s(
    batch: tuple[np.ndarray, LayerLayout], gaps: bool
) -> None:
    """With and without replicas; the host is asked for one tensor."""
    ids_TC, layout = batch
    if gaps:
        ids_TC[::2, 0] = -1
    table = DeviceAssignmentTable(layout, torch.device("cpu"))
    for rank in range(layout.world):
        asked: list[Tensor] = []

        def fetch(numbers: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(numbers)
            return numbers

        assigned = table.assign(torch.from_numpy(ids_TC), rank, fetch=fetch)
        assert same(assigned.copies, assign(torch.from_numpy(ids_TC), layout, rank))
        assert assigned.count_R == np.diff(assigned.copies.start_R1.numpy()).tolist()
        assert len(asked) == 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
def test_copies_of_nodes_spread_inside_are_copies_of_ranks(
    seed: int, nodes: int, size: int, tokens: int
) -> None:
    random = np.random.default_rng(seed)
    world, experts, k = nodes * size, 6, 3
    slots = -(-experts // world) * world + world
    extra = random.integers(experts, size=slots - experts)
    expert_S = random.permutation(np.concatenate((np.arange(experts), extra))).astype(np.int32)
    layout = LayerLayout(expert_S, experts, world)
    table, slow = table_of(layout), NumpyAssignmentTable(layout)
    on_device = DeviceAssignmentTable(layout, torch.device("cpu"), size)
    ids = torch.from_numpy(
        np.array([random.permutation(experts)[:k] for _ in range(tokens)], np.int32).reshape(-1, k)
    )
    home = int(random.integers(world))
    wire = Wire(torch.int8, 8, k)
    flat = table.assign(ids, home).copies
    outer = table.assign(ids, home, ranks_per_unit=size)
    assert same(outer.copies, slow.assign(ids, home, ranks_per_unit=size).copies)
    starts = outer.copies.start_R1.tolist()
    found: list[list[tuple[int, list[int]]]] = []
    for node in range(nodes):
        there = slice(starts[node], starts[node + 1])
        records = torch.zeros(starts[node + 1] - starts[node], wire.row_bytes, dtype=torch.uint8)
        slot_NC = outer.copies.slot_NC[there].contiguous()
        slots_at = wire.row_bytes - (2 * k + 2) // 4 * 4
        records[:, slots_at : slots_at + 2 * k] = slot_NC.view(torch.uint8)
        inside = table.relay([records.flatten()], wire, size).copies
        assert same(inside, slow.relay([records.flatten()], wire, size).copies)
        assert same(inside, on_device.relay([records.flatten()], wire, size).copies)
        token_N = outer.copies.token_N[there][inside.token_N.long()].tolist()
        ends = inside.start_R1.tolist()
        found += [
            list(zip(token_N[a:b], inside.slot_NC[a:b].tolist(), strict=True))
            for a, b in itertools.pairwise(ends)
        ]
    ends = flat.start_R1.tolist()
    assert found == [
        list(zip(flat.token_N[a:b].tolist(), flat.slot_NC[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(ends)
    ]
