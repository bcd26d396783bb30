"""The routing trace holds every computed token once, in order, under its domain."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from io import RawIOBase
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.null import NullExecutor
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.homes import Candidates
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import ConfigError
from moeserve.observe.routing import RoutingRecorder

LAYERS, TOP_K, EXPERTS, BLOCK = (1, 2, 5), 2, 16, 4


def chosen(token: int, position: int, layer: int) -> list[int]:
    """The routing of a model that needs no weights."""
    return [(token + position * 3 + layer) % EXPERTS, (token * 5 + layer) % EXPERTS]


def recorder(path: Path, max_tokens: int = 10_000, experts: int = EXPERTS) -> RoutingRecorder:
    return RoutingRecorder(
        path,
        model="toy",
        moe_layers=LAYERS,
        num_experts=experts,
        top_k=TOP_K,
        max_tokens=max_tokens,
    )


def record_step(recorder: RoutingRecorder, plan: StepPlan) -> None:
    recorder.begin(plan)
    for layer in LAYERS:
        rows = [
            chosen(token, position, layer)
            for c in plan.chunks
            for position, token in enumerate(c.token_ids, c.start)
        ]
        recorder.record(layer, np.array(rows, np.int32).reshape(-1, TOP_K))
    recorder.end()


def serve(
    recorder: RoutingRecorder, waves: Sequence[Sequence[Request]], num_blocks: int, chunk: int
) -> tuple[dict[RequestId, list[int]], Counters]:
    """Each wave is added when the one before has ended; gives all tokens of every request."""
    counters = Counters()
    config = SchedulerConfig(64, max_num_seqs=4, max_num_batched_tokens=max(4, chunk))
    scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK, counters), counters)
    executor = NullExecutor(num_blocks, BLOCK, 100)
    tokens: dict[RequestId, list[int]] = {}
    for wave in waves:
        for r in wave:
            scheduler.add(r)
            tokens[r.id] = list(r.prompt_ids)
        while scheduler.has_work:
            plan = scheduler.plan(0.0)
            record_step(recorder, plan)
            for out in scheduler.apply(executor.run(plan)):
                tokens[out.request_id].append(out.token_id)
    return tokens, counters


def request(name: str, prompt: Sequence[int], max_tokens: int = 6, domain: str = "") -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(RequestId(name), tuple(prompt), params, domain=domain)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        found: dict[str, str] = file.metadata()
    return found


def by_sequence(trace: dict[str, NDArray[np.generic]], name: str) -> list[NDArray[np.generic]]:
    return np.split(trace[name], np.cumsum(trace["seq_lens"])[:-1].tolist())


def test_a_trace_of_two_domains(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    recorded = recorder(path)
    requests = [
        request("a", [1, 2, 3, 4, 5], 3, "code"),
        request("b", [9, 8], 2, "prose"),
        request("c", [7], 1, "code"),
    ]
    tokens, _ = serve(recorded, [requests], num_blocks=16, chunk=8)
    assert not path.exists()
    recorded.close()
    trace = load_file(path)
    assert trace["topk_ids"].dtype == np.uint8
    assert trace["topk_ids"].shape == (7 + 3 + 1, len(LAYERS), TOP_K)
    assert trace["seq_lens"].tolist() == [7, 3, 1]
    assert trace["prompt_lens"].tolist() == [5, 2, 1]
    assert trace["cached_lens"].tolist() == [0, 0, 0]
    assert trace["domain_ids"].tolist() == [0, 1, 0]
    found = metadata(path)
    assert json.loads(found["domains"]) == ["code", "prose"]
    assert json.loads(found["moe_layers"]) == list(LAYERS)
    assert (found["model"], found["num_experts"]) == ("toy", str(EXPERTS))
    assert [p.name for p in tmp_path.iterdir()] == ["trace.safetensors"]
    assert tokens[RequestId("c")][0] == 7


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 20), st.integers(1, 8)),
        min_size=1,
        max_size=8,
    ),
    num_blocks=st.integers(8, 14),
    chunk=st.integers(4, 20),
    first_wave=st.integers(0, 8),
)
def test_every_computed_token_is_recorded_once(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[tuple[int, int, int]],
    num_blocks: int,
    chunk: int,
    first_wave: int,
) -> None:
    path = tmp_path_factory.mktemp("routing") / "trace.safetensors"
    recorded = recorder(path)
    requests = [
        request(f"r{i}", [start] * length, made) for i, (start, length, made) in enumerate(prompts)
    ]
    tokens, counters = serve(
        recorded, [requests[:first_wave], requests[first_wave:]], num_blocks, chunk
    )
    recorded.close()
    trace = load_file(path)
    parts = zip(
        requests,
        by_sequence(trace, "positions"),
        by_sequence(trace, "topk_ids"),
        trace["cached_lens"].tolist(),
        strict=True,
    )
    for r, positions, ids, cached in parts:
        history = tokens[r.id][:-1]  # the last token was never computed
        assert sorted(set(positions.tolist())) == positions.tolist()
        assert positions[-1] == len(history) - 1
        assert len(positions) + cached == len(history)
        assert ids.tolist() == [
            [chosen(history[p], p, layer) for layer in LAYERS] for p in positions.tolist()
        ]
    assert recorded.recorded_tokens == len(trace["positions"])
    assert recorded.recorded_tokens <= counters.computed_tokens


def test_tokens_from_the_prefix_cache_are_left_out_and_counted(tmp_path: Path) -> None:
    recorded = recorder(tmp_path / "t")
    waves = [[request("a", range(10), 1)], [request("b", range(10), 1)]]
    serve(recorded, waves, num_blocks=16, chunk=64)
    recorded.close()
    trace = load_file(tmp_path / "t")
    assert trace["seq_lens"].tolist() == [10, 2]
    assert trace["cached_lens"].tolist() == [0, 8]
    assert trace["positions"].tolist() == [*range(10), 8, 9]


def test_what_a_preemption_computes_again_is_recorded_once(tmp_path: Path) -> None:
    recorded = recorder(tmp_path / "t")
    requests = [request(f"r{i}", [i] * 8, 12) for i in range(2)]
    _, counters = serve(recorded, [requests], num_blocks=6, chunk=64)
    recorded.close()
    assert counters.recomputed_tokens > 0
    assert load_file(tmp_path / "t")["seq_lens"].tolist() == [19, 19]


class FirstRank:
    """Fills rank 0 before rank 1."""

    def pick(self, request: Request, candidates: Candidates) -> int:
        return int(candidates.rank_C[0])


def test_a_token_that_another_rank_computes_again_is_in_one_file(tmp_path: Path) -> None:
    """A request is preempted on rank 0 and goes on, from its beginning, on rank 1."""
    counters = Counters()
    pools = [BlockPool(6, BLOCK, counters) for _ in range(2)]
    config = SchedulerConfig(64, max_num_seqs=4, max_num_batched_tokens=64)
    fleet = Fleet(config, pools, counters, FirstRank())
    files = [tmp_path / f"rank{rank}" for rank in range(2)]
    recorders = [recorder(file) for file in files]
    executors = [NullExecutor(6, BLOCK, 100) for _ in range(2)]
    for i in range(2):
        fleet.add(request(f"r{i}", [i] * 8, 12))
    while fleet.has_work:
        plan = fleet.plan(0.0)
        sampled = []
        for rank, (recorded, executor) in enumerate(zip(recorders, executors, strict=True)):
            own = replace(plan, chunks=tuple(c for c in plan.chunks if c.rank == rank))
            record_step(recorded, own)
            sampled += executor.run(own).sampled
        fleet.apply(StepResult(tuple(sampled)))
    for recorded in recorders:
        recorded.close()
    assert counters.recomputed_tokens > 0
    first, second = (load_file(file) for file in files)
    assert first["seq_lens"][0] == 19
    moved_at = int(first["seq_lens"][1])
    assert (second["seq_lens"].tolist(), second["cached_lens"].tolist()) == (
        [19 - moved_at],
        [moved_at],
    )
    assert second["positions"].tolist() == [*range(moved_at, 19)]


def test_draft_tokens_are_left_out(tmp_path: Path) -> None:
    recorded = recorder(tmp_path / "t")
    asked = request("a", [1, 2, 3])
    chunk = Chunk(asked, (3, 40, 41), 2, (BlockId(0), BlockId(1)), 3, reached=2)
    record_step(recorded, StepPlan((chunk,)))
    recorded.close()
    assert load_file(tmp_path / "t")["positions"].tolist() == [2]


def test_an_id_used_again_is_another_sequence(tmp_path: Path) -> None:
    recorded = recorder(tmp_path / "t")
    serve(recorded, [[request("a", [1, 2], 1)], [request("a", [3, 4, 5], 1)]], 16, 64)
    recorded.close()
    assert load_file(tmp_path / "t")["seq_lens"].tolist() == [2, 3]


def test_a_step_that_failed_is_not_recorded(tmp_path: Path) -> None:
    counters = Counters()
    scheduler = Scheduler(SchedulerConfig(64), BlockPool(8, BLOCK, counters), counters)
    recorded = recorder(tmp_path / "t")
    scheduler.add(request("a", [1, 2, 3]))
    recorded.begin(scheduler.plan(0.0))
    scheduler.abort(RequestId("a"), FinishReason.ERROR)
    serve(recorded, [[request("b", [1], 1)]], 8, 64)
    recorded.close()
    assert load_file(tmp_path / "t")["seq_lens"].tolist() == [0, 1]


def test_a_full_trace_says_so_and_counts_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = recorder(tmp_path / "t", max_tokens=7)
    serve(recorded, [[request("a", range(5), 1)], [request("b", range(50, 55), 1)]], 16, 64)
    recorded.close()
    assert load_file(tmp_path / "t")["seq_lens"].tolist() == [5, 2]
    assert metadata(tmp_path / "t")["dropped_tokens"] == "3"
    assert caplog.text.count("is full with 7 tokens") == 1


def test_more_than_256_experts_take_two_bytes(tmp_path: Path) -> None:
    recorded = recorder(tmp_path / "t", experts=384)
    serve(recorded, [[request("a", [1])]], 8, 64)
    recorded.close()
    assert load_file(tmp_path / "t")["topk_ids"].dtype == np.int16


def test_an_empty_trace_is_a_file_too(tmp_path: Path) -> None:
    recorder(tmp_path / "t").close()
    assert load_file(tmp_path / "t")["topk_ids"].shape == (0, len(LAYERS), TOP_K)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"record_routing=.*missing/t.*No such file"):
        recorder(tmp_path / "missing" / "t")


def test_a_folder_is_no_place_for_a_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        recorder(tmp_path)


class FullDisk:
    """Takes ``room`` bytes, then no more."""

    def __init__(self, file: RawIOBase, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: memoryview) -> int | None:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(data[: self._room])
        self._room -= written or 0
        return written

    def close(self) -> None:
        self._file.close()


def test_a_full_disk_ends_the_trace_and_not_the_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = recorder(tmp_path / "t")
    one_row = 4 + 4 + len(LAYERS) * TOP_K
    recorded._spool = FullDisk(recorded._spool, 5 * one_row + 3)  # type: ignore[assignment]
    waves = [[request("a", range(5), 1)], [request("b", range(50, 55), 3)], [request("c", [1], 1)]]
    tokens, _ = serve(recorded, waves, 16, 64)
    recorded.close()
    assert [len(tokens[RequestId(name)]) for name in "abc"] == [6, 8, 2]
    trace = load_file(tmp_path / "t")
    assert trace["topk_ids"].tolist() == [[chosen(p, p, x) for x in LAYERS] for p in range(5)]
    assert trace["seq_lens"].tolist() == [5, 0]
    assert metadata(tmp_path / "t")["dropped_tokens"] == "8"
    assert caplog.text.count("recording ends here (No space left on device)") == 1


def test_a_trace_that_cannot_be_completed_keeps_its_rows_and_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = recorder(tmp_path / "t")
    serve(recorded, [[request("a", range(5), 1)]], 16, 64)
    (tmp_path / "t").mkdir()
    recorded.close()
    assert f"its rows are left in {tmp_path / 't.spool'}" in caplog.text
    assert (tmp_path / "t.spool").stat().st_size == 5 * (4 + 4 + len(LAYERS) * TOP_K)


def test_what_comes_after_a_full_trace_takes_no_memory(tmp_path: Path) -> None:
    recorded = recorder(tmp_path / "t", max_tokens=3)
    serve(recorded, [[request(f"r{i}", range(5), 1)] for i in range(9)], 16, 64)
    recorded.close()
    assert load_file(tmp_path / "t")["seq_lens"].tolist() == [3]
