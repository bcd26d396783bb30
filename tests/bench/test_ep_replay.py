"""bench/ep.py --replay: what is recorded is what ranks do, by every plan alike."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeserve.errors import ConfigError, PlacementError
from moeserve.placement.cluster import Dataflow
from moeserve.placement.cost import traffic
from moeserve.placement.layer_use import split_uses
from moeserve.placement.plan import Plan
from moeserve.testbed.network import refusal

BENCH = Path(__file__).resolve().parents[2] / "bench"
EXPERTS, LAYERS, TOP_K, WINDOW, WAIT_S = 8, 3, 2, 8, 60.0
Import = Callable[[str], ModuleType]
I32 = NDArray[np.int32]


@pytest.fixture(scope="module")
def bench() -> Iterator[Import]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield lambda name: importlib.import_module(f"expert_parallel.{name}")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sequences; experts 2 i and 2 i + 1 like to be chosen together."""
    draw = np.random.default_rng(3)
    first = draw.integers(EXPERTS, size=(10 * WINDOW, LAYERS))
    other = np.where(draw.random(first.shape) < 0.7, first ^ 1, (first + 3) % EXPERTS)
    file = tmp_path_factory.mktemp("trace") / "recorded.npz"
    np.savez(file, topk_ids=np.stack((first, other), axis=2), seq_lens=np.full(10, WINDOW))
    return file


def plan_of(expert_LS: Any, nodes: int = 1) -> Plan:
    rows = np.asarray(expert_LS, np.int32)
    return Plan(rows, EXPERTS, 2, nodes, tuple(range(len(rows))))


def together(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What each rank makes; one that fails is not waited for."""
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        found[rank] = work(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return [found[rank] for rank in range(world)]


@pytest.fixture(scope="module")
def replayed(
    bench: Import, trace: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Callable[[int, str], list[dict[str, Any]]]]]:
    """A replay over two ranks of one host, and what they make of a step by a plan."""
    source = bench("recorded").parse_source(f"{trace}:hidden=64:intermediate=32", 0, 0)
    recording = bench("recorded").record(source, 4, WINDOW)
    ids_RSWLK = np.stack([recording.ids_CWLK[r::2] for r in range(2)])
    turned = np.roll(np.arange(EXPERTS), 3)
    plans = {
        "contiguous": plan_of([range(EXPERTS)] * LAYERS),
        "another": plan_of([turned, turned[::-1], turned]),
        "replicas": plan_of([[*turned[:5], *turned[3:], 0, turned[0]]] * LAYERS),
    }
    case = bench("replay_case")
    load = bench("schemes").LoadCase("decode", 2)
    replay = case.Replay(
        recording, case.BedShape(1, 2), plans, ids_RSWLK, load,
        bench("schemes").Repetitions(WINDOW, WINDOW // 2, 2, 1),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    bench("scaled_model").write_model(recording, folder)
    np.save(folder / "routing.npy", ids_RSWLK)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    setup = replay.settings(folder, folder / "routing.npy", 1, "auto")
    threads = torch.get_num_threads()
    ranks = together(
        2,
        lambda rank: bench("rank").set_up(
            setup,
            {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        ),
    )  # fmt: skip

    def step(number: int, plan: str, prefill: bool = False) -> list[dict[str, Any]]:
        spans = replay.spans(number)
        if prefill:
            spans = [[(s, 0, WINDOW) for s in range(2)]] * 2
        return together(
            2,
            lambda rank: ranks[rank].run(
                spans=spans[rank], microbatches=1 + number, plan=plan, copies="rank", wire="own",
                digest=True,
            ),
        )  # fmt: skip

    for plan in plans:
        step(0, plan, prefill=True)
    yield replay, step
    for rank in ranks:
        rank.exchanges.close()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", [0, 1], ids=["one microbatch", "two"])
def test_ranks_choose_what_was_recorded_and_plans_change_no_logits(
    replayed: tuple[Any, Any], number: int
) -> None:
    replay, step = replayed
    ids_TLK, _ = replay.tokens(number)
    recorded = [np.bincount(ids_TLK[:, l].ravel(), minlength=EXPERTS) for l in range(LAYERS)]
    digests = set()
    for plan in [*replay.plans, "contiguous"]:
        taken = step(number, plan)
        chosen_RLE = np.array([one["chosen_LE"] for one in taken])
        assert chosen_RLE.sum(axis=0).tolist() == np.array(recorded).tolist()
        digests.add(tuple(one["digest"] for one in taken))
        if number == 0:
            expected = replay.predicted(plan, number)
            assert sum(one["copies"] for one in taken) == expected.inter + expected.intra
    assert len(digests) == 1


def test_half_of_a_trace_is_replayed_and_the_other_fits(bench: Import, trace: Path) -> None:
    recorded = bench("recorded")
    source = recorded.parse_source(str(trace), 64, 32)
    recording = recorded.record(source, 5, WINDOW)
    whole = np.load(trace)["topk_ids"].reshape(10, WINDOW, LAYERS, TOP_K)
    assert recording.ids_CWLK.tolist() == whole[1::2].tolist()
    assert recording.fitted.tokens_TLK.tolist() == whole[0::2].reshape(-1, LAYERS, TOP_K).tolist()
    with pytest.raises(PlacementError, match="6 are needed"):
        recorded.record(source, 6, WINDOW)


def test_tokens_drawn_of_counts_choose_experts_as_often_as_counted(
    bench: Import, tmp_path: Path
) -> None:
    recorded = bench("recorded")
    counts_LE = np.array([[400, 100, 100, 100, 100, 80, 70, 50], [1000, 1, 1, 1, 1, 1, 1, 1]])
    np.savez(tmp_path / "counts.npz", expert_counts=counts_LE)
    with pytest.raises(ConfigError, match=":k=N"):
        recorded.record(recorded.parse_source(f"{tmp_path}/*.npz", 64, 32), 4, WINDOW)
    source = recorded.parse_source(f"{tmp_path}/*.npz:k=2", 64, 32)
    ids = recorded.record(source, 500, WINDOW).ids_CWLK.reshape(-1, 2, 2)
    assert (ids == recorded.record(source, 500, WINDOW).ids_CWLK.reshape(-1, 2, 2)).all()
    assert (ids[:, :, 0] != ids[:, :, 1]).all()
    drawn_E = np.bincount(ids[:, 0].ravel(), minlength=EXPERTS) / len(ids)
    assert drawn_E == pytest.approx(counts_LE[0] / 1000 * 2, abs=0.03)
    # An expert with more than a token's share of the choices is in every token, once.
    assert (ids[:, 1] == 0).sum() == len(ids)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Plan, I32, I32, int]:
    nodes = draw(st.sampled_from([1, 2, 4]))
    extra = draw(st.sampled_from([0, 1]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [
        random.permutation(np.concatenate((np.arange(EXPERTS), random.choice(8, 4 * extra, False))))
        for _ in range(2)
    ]
    plan = Plan(np.array(rows, np.int32), EXPERTS, 4, nodes, (0, 1))
    ids = np.stack([random.choice(EXPERTS, (3), replace=False) for _ in range(40)])
    ids_TLK = ids.reshape(20, 2, 3).astype(np.int32)
    return plan, ids_TLK, random.integers(4, size=20).astype(np.int32), draw(st.integers(1, 20))


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_the_predicted_step_is_the_cost_models_link_by_link(
    bench: Import, step: tuple[Plan, I32, I32, int]
) -> None:
    """Between nodes they are the cost model's copies; all of them, copy by copy."""
    plan, ids_TLK, home_T, batch = step
    found = bench("predicted").predict(plan, ids_TLK, home_T, batch)
    known = traffic(plan, ids_TLK, dataflow=Dataflow.HOME_DEDUP, home_T=home_T, batch=batch)
    assert found.inter == pytest.approx(known.cross_L.sum() / 2 * len(ids_TLK))
    intra, sent_LN = 0, np.zeros((2, plan.num_nodes), np.int64)
    size = 4 // plan.num_nodes
    for l, use in enumerate(split_uses(plan, ids_TLK, home_T, batch)):
        for home, used_D in zip(home_T.tolist(), use.used_TD, strict=True):
            ranks = set(np.flatnonzero(used_D).tolist())
            for node in {r // size for r in ranks}:
                landing = node * size + home % size
                sent_LN[l, home // size] += node != home // size
                intra += len({r for r in ranks if r // size == node} - {landing})
    assert found.intra == intra
    assert found.inter_LNN.sum(axis=2).tolist() == sent_LN.tolist()
    assert (found.busiest_L >= sent_LN.max(axis=1)).all()


def test_settings_of_a_replay_are_checked(bench: Import, trace: Path) -> None:
    parse: Callable[[str, int, int], Any] = bench("recorded").parse_source
    wrong: Sequence[tuple[str, str]] = [
        (f"{trace}:k=x", "none of k=N"),
        (f"{trace}:layers=2", "none of k=N"),
        (f"{trace.parent}/absent*.npz", "no such file"),
    ]
    for text, said in wrong:
        with pytest.raises(ConfigError, match=said):
            parse(text, 64, 32)


@pytest.mark.long
def test_rows_are_what_was_counted_beside_what_was_predicted(trace: Path, tmp_path: Path) -> None:
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    words = (
        f"--replay {trace}:hidden=64:intermediate=32 --beds 2x1,2x2 --rates unlimited,100mbit "
        "--tokens 2 --length 4 --steps 1 --rounds 1 --solve-s 0.2"
    ).split()
    file = tmp_path / "replay.json"
    done = subprocess.run(
        [sys.executable, str(BENCH / "ep.py"), *words, "--json", str(file)],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    raw = json.loads(file.read_text())
    rows = raw["rows"]
    assert {(row["bed"], row["rate"]) for row in rows} == {
        (bed, rate) for bed in ("2x1", "2x2") for rate in ("unlimited", "100mbit")
    }
    assert len({row["plan"] for row in rows}) == len(rows) / 4 == 6
    for row in rows:
        # A segment has a head, which is much beside so few rows.
        assert row["predicted_inter_bytes"] <= row["inter_bytes"] < row["link_bytes"], row
        assert (row["intra_copies"] > 0) == (row["bed"] == "2x2"), row
        assert row["held_out"], row
        if row["plan"] == "contiguous":
            assert row["bytes_saved"] == row["time_saved"] == 0
