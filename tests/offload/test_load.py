"""A packed folder served within a budget of memory."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.comm.build import parallel_over
from moeserve.comm.dispatcher import FlatDispatcher
from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import LayerLayout
from moeserve.config.options import EngineOptions, LoadOptions, RankModelOptions
from moeserve.core import Event, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.engine.rank_model import load_rank_model, num_experts
from moeserve.engine.request_state import EachEvent
from moeserve.errors import ConfigError, DataLossError
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, StepBatch, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.packed.writer import pack_model
from moeserve.observe.progress import Progress
from moeserve.offload.budget import MIB
from moeserve.offload.interpreter import require_interpreter
from moeserve.offload.load import Streaming
from moeserve.offload.runner import StreamedLayerRunner

Serve = Callable[[Decoder], list[Any]]
Tiny = Callable[[str], Path]
ENOUGH = 4 << 30


@pytest.fixture(scope="module")
def packed_folder(
    tiny_checkpoint: Tiny, ops: Ops, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A family's tiny checkpoint, packed with these options; made on first use."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, quantization: str = "auto") -> Path:
        key = family, quantization
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "-".join(key)
            options = LoadOptions(quantization=quantization)  # type: ignore[arg-type]
            pack_model(tiny_checkpoint(family), made[key], ops, options)
        return made[key]

    return make


def streamed(folder: Path, ops: Ops, **options: Any) -> tuple[Decoder, StreamedLayerRunner]:
    """With no more memory than is needed."""
    settings = RankModelOptions(model=str(folder), memory=ENOUGH, **options)
    streaming = Streaming.open(folder, ops, settings)
    least = streaming.fixed.total + streaming.records.least
    decoder = replace(streaming, budget=least).load(kv=0)
    assert isinstance(decoder.runner, StreamedLayerRunner)
    return decoder, decoder.runner


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("deepseek_v3", "auto"),
        ("qwen2_moe", "int8"),
        ("qwen3_moe", "int4"),
        ("gpt_oss", "auto"),
        ("glm4_moe", "int8"),
        ("mixtral", "int4"),
        ("olmoe", "auto"),
    ],
)
def test_the_least_memory_gives_the_bits_of_all_of_it(
    packed_folder: Callable[..., Path], ops: Ops, serve: Serve, family: str, quantization: str
) -> None:
    """Slots for the experts of two layers, with and without prediction, and a window of layers."""
    folder = packed_folder(family, quantization)
    expected = serve(load_decoder(folder, ops))
    for options in (
        {"weights_prediction": "on"},
        {"weights_prediction": "off", "weights_window": 2, "check_weights": True},
    ):
        decoder, runner = streamed(folder, ops, **options)
        assert serve(decoder) == expected, options
        assert runner.stream.arena.slots == min(
            2 * max(runner.stream.residency.experts_L), sum(runner.stream.residency.experts_L)
        )
        assert (runner.window is None) == ("weights_window" not in options)
        runner.close()


def test_below_the_least_the_error_names_it_and_its_parts(
    packed_folder: Callable[..., Path], ops: Ops
) -> None:
    folder = packed_folder("mixtral")
    options = RankModelOptions(model=str(folder), memory=200 << 20, kv_memory=64 << 20)
    streaming = Streaming.open(folder, ops, options)
    with pytest.raises(
        ConfigError,
        match=r"memory=200.0MiB: the least for .* is \d+.0MiB \(process .*KV 64.0MiB, experts of",
    ):
        load_rank_model(options)
    with pytest.raises(ConfigError, match="the least for this model"):
        replace(streaming, budget=streaming.fixed.total + MIB).load(kv=MIB)


def test_what_is_not_packed_is_refused_with_what_to_do(tiny_checkpoint: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"moeserve quantize --model .* --packed"):
        load_rank_model(RankModelOptions(model=str(tiny_checkpoint("mixtral")), memory=ENOUGH))


def test_a_damaged_trunk_is_found_as_it_is_loaded(
    packed_folder: Callable[..., Path], ops: Ops, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed_folder("mixtral"), tmp_path / "damaged")
    settings = RankModelOptions(model=str(folder), memory=ENOUGH)
    region = Streaming.open(folder, ops, settings).packed.trunk(1)
    with (folder / region.file).open("r+b") as out:
        out.seek(region.start + 100)
        out.write(b"\xff\x00\xff\x00")
    with pytest.raises(DataLossError, match="digest"):
        streamed(folder, ops)
    held = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert not [file for file in held if file.startswith(str(folder))]


@pytest.mark.parametrize(
    ("family", "combine", "prediction"),
    [
        ("deepseek_v3", "ordered", "auto"),
        ("mixtral", "exact", "on"),
        ("mixtral", "ordered", "off"),
        ("olmoe", "exact", "off"),
    ],
)
def test_ranks_that_each_read_their_share_give_the_bits_of_one_process(
    packed_folder: Callable[..., Path],
    ops: Ops,
    new_post: Callable[[], Callable[[str, int, int], Exchange]],
    family: str,
    combine: Any,
    prediction: Any,
) -> None:
    """Two of them; two experts lie on both, and some rank has no rows or no choices. Each has as
    little memory as it may: less than its share, but for the family of which two layers route."""
    folder, post, topology = packed_folder(family), new_post(), Topology((0, 0))
    whole = load_decoder(folder, ops, LoadOptions(combine=combine))
    num = num_experts(whole.spec)
    expert_S = np.array([*range(num - 1, -1, -1), num - 1, num - 2], np.int32)
    layouts = {l: LayerLayout(expert_S, num, 2) for l in whole.spec.moe_layers}
    prompts = [[[7, 8, 9, 1, 2, 3, 4, 5], [3]], [[5, 6], []]]  # by step and rank
    prompts += [[[29 * n % 251], [83 * n % 251]] for n in range(1, 15)]

    def steps(rank: int) -> list[StepBatch]:
        blocks, made, done = [0, 1, 2], list[StepBatch](), 0
        for of_step in prompts:
            ids = of_step[rank]
            made.append(pack_spans([Span(ids, done, blocks)] if ids else [], 8))
            done += len(ids)
        return made

    def alone(rank: int) -> list[list[list[float]]]:
        cache = whole.new_cache(3, 8)
        return [whole.forward(s, cache).tolist() for s in steps(rank) if len(s.token_ids_T)]

    def work(rank: int) -> list[list[list[float]]]:
        own = {l: layout.of_rank(rank) for l, layout in layouts.items()}
        wanted = {"combine": combine, "weights_prediction": prediction}
        settings = RankModelOptions(model=str(folder), memory=ENOUGH, **wanted)
        streaming = Streaming.open(folder, ops, settings, own)
        fixed, records = streaming.fixed, streaming.records
        decoder = replace(streaming, budget=fixed.total + records.least).load(kv=0)
        runner = decoder.runner
        assert isinstance(runner, StreamedLayerRunner)
        moves = FlatDispatcher(ops, post("all", rank, 2), topology, Progress())
        layers = decoder.stack.layers
        over = parallel_over(ops, layers, layouts, moves, Progress(), runner.of_rank())
        decoder, cache = decoder.over(over), decoder.new_cache(3, 8)
        rows = [decoder.forward(step, cache).tolist() for step in steps(rank)]
        held = runner.stream.arena.slots * records.nbytes
        assert held == records.least
        assert (runner.stream.counts.evictions > 0) == (family != "deepseek_v3")
        assert runner.stream.counts.misses > 0
        runner.close()
        return [row for row in rows if row]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(work, range(2)))
    assert found == [alone(0), alone(1)]


def ask(loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int | str]]:
    """Greedy answers to all at once; one that failed ends with that."""
    answers: list[list[int | str]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]

    def sink(n: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            answers[n].extend(event.token_ids)
            if event.finish is FinishReason.ERROR:
                answers[n].append("error")
            if event.finish is not None:
                ended[n].set()

        return take

    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for n, prompt in enumerate(prompts):
        request = Request(RequestId(f"r{n}"), tuple(prompt), params, domain="here")
        loaded.engine.submit(request, EachEvent(sink(n)))
    assert all(event.wait(60) for event in ended)
    return answers


def test_an_engine_within_a_budget_answers_as_one_without_also_under_preemption(
    packed_folder: Callable[..., Path],
) -> None:
    """KV for fewer sequences than there are, so that some are preempted."""
    folder = packed_folder("deepseek_v3")
    common: dict[str, Any] = {"model": str(folder), "num_blocks": 6, "block_size": 8}
    prompts = [[i, i + 1, i + 2, i + 3] for i in range(1, 6)]
    found = []
    for options in ({}, {"memory": ENOUGH, "weights_window": 2, "weights_prediction": "on"}):
        loaded = build_engine(EngineOptions(**common, **options))
        try:
            found.append(ask(loaded, prompts))
            assert loaded.engine.counters.preemptions > 0
        finally:
            assert loaded.close()
    assert found[0] == found[1]


def test_an_engine_guesses_by_the_module_within_a_budget(tmp_path: Path, ops: Ops) -> None:
    folder = tmp_path / "demo"
    pack_model(resolve_model("demo"), folder, ops, LoadOptions())
    common: dict[str, Any] = {"model": str(folder), "num_blocks": 32, "speculation": "mtp"}
    found = []
    for options in ({"speculation": "off"}, {"memory": ENOUGH}):
        loaded = build_engine(EngineOptions(**common | options))
        try:
            found.append(ask(loaded, [[i, 7, 8, 9] for i in range(3)]))
            assert loaded.own.decoder.mtp is not None
        finally:
            assert loaded.close()
    assert found[0] == found[1]


def test_a_request_that_needs_a_file_that_changed_ends_with_an_error_and_no_token(
    packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(packed_folder("mixtral"), tmp_path / "changed")
    loaded = build_engine(EngineOptions(model=str(folder), memory=ENOUGH, num_blocks=8))
    try:
        for file in folder.glob("*.bin"):
            os.utime(file, (1, 1))
        assert ask(loaded, [[1, 2, 3], [4]]) == [["error"], ["error"]]
    finally:
        assert loaded.close()


def test_a_limit_below_the_interpreter_is_refused(tmp_path: Path) -> None:
    """Before anything large is imported: the kernel would end the process."""
    files = {
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 8000000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/memory.max": f"{300 << 20}\n",
        "sys/fs/cgroup/memory.current": "0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    require_interpreter(1 << 30, tmp_path)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{100 << 20}\n")
    require_interpreter(None, tmp_path)
    with pytest.raises(ConfigError, match=r"100\.0MiB are left .* takes 208\.0MiB"):
        require_interpreter(1 << 30, tmp_path)
