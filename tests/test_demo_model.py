"""The shipped model: what it is, that it can do what its card says, and how it was trained."""

from __future__ import annotations

import functools
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moeserve.config.options import ServeConfig
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.swap_memory import HostSwapMemory
from moeserve.engine.swapping import Swapping
from moeserve.gateway.offline import generate
from moeserve.kernels.select import choose_ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import load_decoder
from moeserve.models.families import read_spec
from moeserve.models.library import resolve_model
from moeserve.models.spec import MlaSpec, MoeSpec
from moeserve.models.tokenizer import Tokenizer

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[1] / "examples"
TRACE = EXAMPLES / "demo_model" / "routing_by_domain.safetensors"
MAX_WEIGHT_BYTES = 32_000_000


def test_the_demo_model_is_a_small_deepseek_v3() -> None:
    folder = resolve_model("demo")
    assert (folder / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    spec, _ = read_spec(Checkpoint.open(folder))
    assert spec.architecture == "DeepseekV3ForCausalLM"
    moe = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
    assert len(moe) >= 7
    assert all(isinstance(layer.attention, MlaSpec) for layer in spec.layers)
    assert all(m.router.num_experts >= 32 and m.router.top_k == 4 for m in moe)
    assert all(m.router.scoring == "sigmoid" and m.router.num_groups > 1 for m in moe)
    assert all(m.selection_bias and m.shared for m in moe)
    assert spec.mtp is not None


def answer(prompt: str, **params: object) -> str:
    config = ServeConfig.model_validate({"model": "demo", "num_blocks": 64})
    return generate(config, prompt, {"temperature": 0.0, **params}).text


def test_a_story_goes_on_in_words_of_its_vocabulary() -> None:
    """Readable: known words, punctuation, no loop from the start."""
    text = answer("Once upon a time, there was a little girl named Lily.", max_tokens=120)
    words = [w.strip(".,!?\"'").lower() for w in text.split()]
    common = set("the a and to was she he it her his they with said in of day not very so".split())
    assert len(words) >= 50
    assert sum(w in common for w in words) >= len(words) / 4
    assert len(set(words)) >= len(words) / 4


def test_sums_are_far_above_chance() -> None:
    """Sums that the test draws itself; guessing is right once in a hundred."""
    draw = random.Random(12)
    right = 0
    for _ in range(20):
        a, b = draw.randrange(10, 100), draw.randrange(10, 100)
        right += answer(f"{a} + {b} =", max_tokens=6, stop="\n").strip() == str(a + b)
    assert right >= 6


def test_the_recorded_trace_shows_specialisation() -> None:
    """The domain of a token tells something about its experts, in every layer."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo_model/specialisation.py", "--routing", TRACE, "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    bits = json.loads(done.stdout)["bits_by_layer"]
    assert len(bits) == 7
    assert min(bits.values()) > 0.1


def test_the_demo_serves_answers_and_stops() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    story, *sums = json.loads(done.stdout.splitlines()[-1])["answers"]
    assert story["tokens"] > 20
    assert all(a["tokens"] > 1 and a["ttft_s"] > 0 and a["tpot_s"] > 0 for a in [story, *sums])
    assert any(a["right"] for a in sums)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The training script, with a model and steps that are small enough for a test."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo_model"))
    module = importlib.import_module("train")
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    monkeypatch.setattr(module, "Config", functools.partial(module.Config, **small))
    monkeypatch.setattr(module, "TOKENS_PER_STEP", 256)
    monkeypatch.setattr(module, "WINDOW", 32)
    monkeypatch.setattr(module, "LONG_WINDOW", 64)
    yield module
    for name in ("train", "model", "data"):
        sys.modules.pop(name, None)


def test_training_resumes_where_it_was_stopped(train: ModuleType, tmp_path: Path) -> None:
    """Two steps, a stop, two steps: the same weights and biases as four in one go."""
    data = tmp_path / "data"
    data.mkdir()
    draw = np.random.default_rng(0)
    for domain in [*train.MIXTURE, train.GENERATED]:
        np.save(data / f"{domain}.train.npy", draw.integers(0, 4096, 400).astype(np.uint16))
        np.save(data / f"{domain}.held.npy", draw.integers(0, 4096, 80).astype(np.uint16))

    def run(folder: Path, *parts: int) -> dict[str, torch.Tensor]:
        for part in parts:
            steps = ["--steps", "3", "--finish", "1", "--stop-after", str(part)]
            train.main(["--data", str(data), "--out", str(folder), "--threads", "1", *steps])
        from safetensors.torch import load_file

        return load_file(folder / "checkpoint.safetensors")

    whole, parts = run(tmp_path / "whole", 4), run(tmp_path / "parts", 2, 2)
    assert whole.keys() == parts.keys()
    assert any(name.startswith("adam.") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(s)["step"] for s in steps] == [0, 1, 2, 3]


def told(num_blocks: int, swap_memory: int) -> tuple[dict[str, list[int]], Counters]:
    """What it tells six clients at once, and how."""
    path, counters, tokens = resolve_model("demo"), Counters(), dict[str, list[int]]()
    decoder = load_decoder(path, choose_ops())
    runner = ModelRunner(decoder, num_blocks, 16)
    memory = HostSwapMemory(watch_kv(runner, decoder.ops), swap_memory)
    config, pool = SchedulerConfig(256, 6), BlockPool(num_blocks, 16, counters)
    swapping = Swapping(memory, SwapOrCompute())
    scheduler = Scheduler(config, pool, counters, swapping=swapping)
    for name in ("girl", "boy", "dog", "cat", "bird", "fish"):
        prompt = tuple(Tokenizer.load(path).encode(f"Once upon a time, there was a {name} named"))
        params = SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True, seed=len(name))
        scheduler.add(Request(RequestId(name), prompt, params))
        tokens[name] = []
    for outcome in drive(scheduler, runner):
        outcome.raise_failure()
        for out in outcome.outs:
            tokens[out.request_id].append(out.token_id)
    return tokens, counters


def test_swapping_changes_no_token() -> None:
    roomy, _ = told(64, 1 << 22)
    tokens, counters = told(12, 1 << 22)
    assert tokens == roomy
    assert counters.swaps == counters.preemptions > 0
    assert counters.recomputed_tokens == 0
