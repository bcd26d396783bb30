"""Prompts in a real process of their own: tokens are the same bits, weights and KV are there once,
and whichever of the two processes is killed, the other one and the block table are right."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moeserve.config.options import EngineOptions, LoadOptions
from moeserve.core import Event, FinishReason, Logprobs, Request, RequestId, SamplingParams
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.engine.semi.process import PromptsProcess
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.select import choose_ops
from moeserve.models.packed.writer import pack_model

pytestmark = pytest.mark.long

WAIT_S = 120.0
SMALL = {"num_blocks": 96, "block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=1)
DRAWN = SamplingParams(temperature=0.9, max_tokens=9, seed=5, top_k=20, repetition_penalty=1.2)
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, logprobs=0)
PROMPTS = [[7 * i % 250 + j for j in range(3 + 9 * i)] for i in range(6)]
FEW: dict[str, object] = {"num_blocks": 20, "max_model_len": 64, "swap_memory": 1 << 20}
FEW |= {"prefix_cache": False, "ttft_target": 40, "tpot_target": 5}
NAMES = itertools.count()


@dataclass
class Client:
    """A sink, and what came."""

    name: RequestId
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            self.token_ids += event.token_ids
            self.logprobs += (*event.prompt_logprobs, *event.logprobs)
            if event.finish is not None:
                self.finish = event.finish
                self.ended.set()

    def wait(self) -> tuple[list[int], list[Logprobs]]:
        assert self.ended.wait(WAIT_S)
        return self.token_ids, self.logprobs


def submit(loaded: LoadedModel, prompt: Sequence[int], params: SamplingParams) -> Client:
    client = Client(RequestId(f"r{next(NAMES)}"))
    loaded.engine.submit(Request(client.name, tuple(prompt), params), client)
    return client


def ask_all(loaded: LoadedModel) -> list[tuple[list[int], list[Logprobs]]]:
    clients = [submit(loaded, prompt, params) for prompt in PROMPTS for params in (GREEDY, DRAWN)]
    return [client.wait() for client in clients]


def ask_long(loaded: LoadedModel) -> list[tuple[list[int], list[Logprobs]]]:
    """Answers that need more blocks than there may be."""
    clients = [submit(loaded, (i, 2, 3), LONG) for i in range(5)]
    return [client.wait() for client in clients]


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(scope="module")
def packed(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    pack_model(tiny_checkpoint("qwen3_moe"), out, choose_ops(), LoadOptions())
    return out


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[tuple[list[int], list[Logprobs]]]:
    """From one process."""
    loaded = build_engine(EngineOptions(model=str(packed), threads=1, **SMALL))
    answers = ask_all(loaded)
    assert loaded.close()
    return answers


def built(packed: Path, **settings: object) -> LoadedModel:
    options = {"model": str(packed), "threads": 1, "split": "semi", **SMALL, **settings}
    return build_engine(EngineOptions(**options))


def process_of(loaded: LoadedModel) -> PromptsProcess:
    assert loaded.split is not None
    return loaded.split.process


@pytest.fixture(scope="module")
def split(packed: Path) -> Iterator[LoadedModel]:
    loaded = built(packed)
    yield loaded
    pid = process_of(loaded).pid
    assert loaded.close()
    assert pid is None or not Path(f"/proc/{pid}").exists()


def assert_nothing_is_held(loaded: LoadedModel) -> None:
    until(lambda: loaded.engine.load().free_blocks == loaded.num_blocks, "blocks are still held")


def test_tokens_and_logprobs_are_those_of_one_process(
    split: LoadedModel, expected: list[tuple[list[int], list[Logprobs]]]
) -> None:
    assert ask_all(split) == expected
    assert ask_all(split) == expected, "with prefixes that are there"
    counts = process_of(split).counts
    assert counts.tokens >= sum(map(len, PROMPTS))
    assert (counts.lost, counts.failed) == (0, 0)
    # All that went between the two, and a token of KV is more than that.
    per_token = (counts.sent_bytes + counts.received_bytes) / counts.tokens
    assert per_token < split.own.decoder.kv_bytes_per_token
    assert_nothing_is_held(split)


def test_cancelled_prompts_leave_no_block_behind(
    split: LoadedModel, expected: list[tuple[list[int], list[Logprobs]]]
) -> None:
    for round_s in (0.0, 0.002, 0.01):
        clients = [submit(split, [i, *range(90)], DRAWN) for i in range(4)]
        time.sleep(round_s)
        for client in clients:
            split.engine.abort(client.name)
        for client in clients:
            client.wait()
    assert ask_all(split) == expected
    assert_nothing_is_held(split)


def test_weights_and_kv_are_in_memory_once(split: LoadedModel, packed: Path) -> None:
    ask_all(split)
    pids = os.getpid(), process_of(split).pid
    for what in (str(packed), "/memfd:moeserve-kv"):
        rss, pss = zip(*(mapped(pid, what) for pid in pids), strict=True)
        assert min(rss) > 0, f"{what} is not mapped by both"
        assert sum(pss) <= max(rss) * 1.05, f"{what}: {pss} of {rss}"


def mapped(pid: int | None, what: str) -> tuple[int, int]:
    """KiB of the maps whose file begins so: resident, and this process's share of it."""
    sums, inside = [0, 0], False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = what in line
        elif inside and line.startswith(("Rss:", "Pss:")):
            sums[line.startswith("Pss:")] += int(line.split()[1])
    return sums[0], sums[1]


def test_killed_in_the_middle_of_a_prompt_it_comes_again_once_the_model_is_the_same(
    split: LoadedModel,
    expected: list[tuple[list[int], list[Logprobs]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, before = process_of(split), process_of(split).counts.started
    until(lambda: process.ready, "not ready")
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    clients = [submit(split, prompt, p) for prompt in PROMPTS for p in (GREEDY, DRAWN)]
    until(lambda: not process.ready, "no prompt is with it")
    assert split.engine.load().free_blocks < split.num_blocks

    checked = threading.Event()

    def changed() -> None:
        checked.set()
        raise CheckpointError("it was replaced")

    with monkeypatch.context() as patch:
        patch.setattr(process, "_check", changed)
        os.kill(pid, signal.SIGKILL)
        assert [client.wait() for client in clients] == expected
        assert process.counts.lost == 1
        assert_nothing_is_held(split)
        assert checked.wait(WAIT_S), "no other process came"
        assert process.counts.started > before
        steps = process.counts.steps
        assert ask_all(split) == expected, "in the first process"
        assert process.counts.steps == steps
    until(lambda: process.ready, "no other process came")
    assert ask_all(split) == expected
    assert process.counts.steps > steps


@pytest.mark.parametrize("speculation", ["ngram", "draft"])
def test_few_blocks_swaps_and_drafts_change_nothing(
    packed: Path,
    split: LoadedModel,
    expected: list[tuple[list[int], list[Logprobs]]],
    speculation: str,
) -> None:
    """A draft model, here the model itself, has KV of its own, which the other process has not."""
    enough = ask_long(split)
    drafts = {"draft_model": str(packed)} if speculation == "draft" else {}
    loaded = built(packed, speculation=speculation, **FEW, **drafts)
    try:
        assert ask_long(loaded) == enough
        assert ask_all(loaded) == expected
        assert loaded.engine.counters.preemptions > 0
        assert_nothing_is_held(loaded)
    finally:
        assert loaded.close()


FIRST = """
import os, sys, time
from moeserve.config.options import EngineOptions
from moeserve.engine.build import build_engine
loaded = build_engine(EngineOptions(model=sys.argv[1], threads=1, split="semi", num_blocks=8))
print(loaded.split.process.pid, flush=True)
time.sleep(600)
"""


def test_where_the_first_is_killed_the_second_ends(packed: Path) -> None:
    command = [sys.executable, "-c", FIRST, str(packed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        try:
            second = int(first.stdout.readline())
            assert Path(f"/proc/{second}").exists()
            os.kill(second, signal.SIGSTOP)
            os.kill(second, signal.SIGCONT)
        finally:
            first.kill()
        until(lambda: has_ended(second), "the second process goes on")


def has_ended(pid: int) -> bool:
    """Also where nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "1GiB"}, "split=semi with memory="),
        ({"device": "cuda"}, "split=semi with device=cuda"),
        ({"objective": "throughput"}, "split=semi with objective=throughput"),
        ({"prefill_mode": "layer"}, "split=semi with prefill_mode=layer"),
        ({"speculation": "auto"}, "ngram and draft work"),
        ({"count_experts": True}, "split=semi with count_experts=True"),
    ],
)
def test_what_only_one_process_can_do_is_refused(
    packed: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        built(packed, **settings)


def test_a_model_that_is_not_packed_is_refused_with_the_way_to_pack_it(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    with pytest.raises(ConfigError, match="moeserve quantize --packed --model"):
        built(tiny_checkpoint("qwen3_moe"))
