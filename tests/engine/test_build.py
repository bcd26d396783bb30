"""From a folder to a running engine, on a tiny real checkpoint."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moeserve.config.options import RankModelOptions
from moeserve.config.sources import load_config
from moeserve.core import Event, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.build import LoadedModel, build_engine, load_tokenizer
from moeserve.engine.kv_size import size_kv
from moeserve.engine.request_state import EachEvent
from moeserve.errors import CheckpointError, ConfigError

MakeCheckpoint = Callable[[str], Path]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@contextmanager
def built(path: Path, **options: object) -> Iterator[LoadedModel]:
    progress = options.pop("progress", None)
    config = load_config({"model": str(path), "num_blocks": 64, **options}, {})
    loaded = build_engine(config, progress=progress)  # type: ignore[arg-type]
    try:
        yield loaded
    finally:
        assert loaded.close()


def ask(loaded: LoadedModel, prompt: list[int], params: SamplingParams = GREEDY) -> list[Event]:
    events: list[Event] = []
    ended = threading.Event()

    def sink(event: Event) -> None:
        events.append(event)
        if event.finish is not None:
            ended.set()

    loaded.engine.submit(
        Request(RequestId("r"), tuple(prompt), params, domain="here"), EachEvent(sink)
    )
    assert ended.wait(60)
    return events


def test_a_folder_becomes_an_engine_that_streams(tiny_checkpoint: MakeCheckpoint) -> None:
    read: list[tuple[int, int]] = []
    path = tiny_checkpoint("qwen3_moe")
    with built(path, progress=lambda done, total: read.append((done, total))) as loaded:
        assert loaded.tokenizer is not None
        prompt = loaded.tokenizer.encode("the thing")
        events = ask(loaded, prompt)
    ids = [t for e in events for t in e.token_ids]
    assert len(ids) == 6
    assert events[-1].finish is FinishReason.LENGTH
    assert read[-1][0] == read[-1][1] > 0
    assert (loaded.name, loaded.max_model_len) == (path.name, 512)
    assert loaded.config.eos_ids == {256}


def test_without_a_tokenizer_token_ids_are_served(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "model")
    (path / "tokenizer.json").unlink()
    with built(path) as loaded:
        assert loaded.tokenizer is None
        assert "tokenizer.json" in loaded.no_tokenizer
        events = ask(loaded, [1, 2, 3])
    assert sum(len(e.token_ids) for e in events) == 6


def test_routing_is_recorded_while_serving(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    with built(tiny_checkpoint("deepseek_v3"), record_routing=trace) as loaded:
        ask(loaded, [1, 2, 3, 4, 5])
        layers = len(loaded.spec.moe_layers)
    found = load_file(trace)
    assert found["topk_ids"].shape == (5 + 5, layers, 4)
    assert all(len(set(ids)) == 4 for ids in found["topk_ids"].reshape(-1, 4).tolist())
    assert found["topk_ids"].max() < 16
    assert found["prompt_lens"].tolist() == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"max_model_len": 513}, "made for 512 positions"),
        ({"max_model_len": 512, "num_blocks": 31}, "holds 496 tokens"),
        ({"num_blocks": None, "kv_memory": 10}, "holds 0 tokens"),
        ({"num_blocks": 10**30}, "bytes of memory available: lower num_blocks"),
        ({"num_blocks": None, "kv_memory": 2**60}, "bytes of memory available: lower num_blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny_checkpoint: MakeCheckpoint, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), built(tiny_checkpoint("qwen3_moe"), **options):
        pass


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="no such folder"), built(Path("nowhere")):
        pass


def sized(available: int = 10**12, **options: float | None) -> tuple[int, int]:
    chosen = RankModelOptions.model_validate({"block_size": 16, "max_num_seqs": 4, **options})
    size = size_kv(100, 8192, chosen, available)
    return size.num_blocks, size.max_model_len


def test_kv_memory_defaults_to_every_sequence_at_a_usual_length() -> None:
    assert sized() == (4 * 2048 // 16, 8192)
    assert sized(max_num_seqs=1) == (8192 // 16, 8192)
    assert sized(max_model_len=32) == (4 * 2, 32)


def test_kv_memory_leaves_half_of_what_is_available(caplog: pytest.LogCaptureFixture) -> None:
    assert sized(available=2 * 100 * 16 * 10) == (10, 160)
    assert "max_model_len is 160 instead of the checkpoint's 8192" in caplog.text
    assert sized(available=8 * 100 * 16 * 10, host_share=0.25) == (10, 160)
    assert sized(available=10**6, host_share=0.25, num_blocks=9) == (9, 144), "as it was given"


def test_kv_memory_can_be_given() -> None:
    assert sized(kv_memory=100 * 16 * 7 + 99) == (7, 112)
    assert sized(num_blocks=9) == (9, 144)


@given(st.integers(2, 4096), st.integers(0, 10**8), st.integers(1, 64))
def test_what_is_sized_holds_the_longest_sequence_or_is_refused(
    longest: int, available: int, max_num_seqs: int
) -> None:
    affordable = available // 2 // (100 * 16) * 16
    options = {
        "max_model_len": longest,
        "available": available,
        "max_num_seqs": max_num_seqs,
    }
    if affordable < longest:
        with pytest.raises(ConfigError, match="KV memory holds"):
            sized(**options)
        return
    num_blocks, max_len = sized(**options)
    assert max_len == longest <= num_blocks * 16 <= affordable


def test_a_tokenizer_that_is_a_program_is_told_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text("IQ== 0\n")
    tokenizer, said = load_tokenizer(tmp_path)
    assert tokenizer is None
    assert "tokenizer.json" in said
    assert "TikTokenConverter" in said
