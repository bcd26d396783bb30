"""Checkpoints to measure with: any runtime loads them, and greedy tokens agree."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeserve.bench.generation import Case, prompts
from moeserve.config.options import LoadOptions
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.packed.writer import verify_packed
from moeserve.models.tokenizer import Tokenizer

pytestmark = pytest.mark.long

MAKE = Path(__file__).parents[2] / "bench" / "models" / "make.py"
SMALL = ["vocab_size=400", "hidden_size=64", "num_hidden_layers=2", "num_attention_heads=4"]
TINY = {
    "qwen3-moe-1.2b": [*SMALL, "num_key_value_heads=2", "head_dim=16", "num_experts=8"],
    "deepseek-v3-0.7b": [*SMALL, "num_key_value_heads=4", "q_lora_rank=32", "kv_lora_rank=32"],
}
TOKENS = 12


def make(
    home: Path, name: str, *changes: str, script: Path = MAKE
) -> subprocess.CompletedProcess[str]:
    settings = [word for change in changes for word in ("--set", change)]
    return subprocess.run(
        [sys.executable, str(script), name, "--dir", str(home), *settings],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    done = make(home, request.param, *TINY[request.param])
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def greedy(decoder: Decoder, prompt: tuple[int, ...]) -> list[int]:
    counters = Counters()
    config = SchedulerConfig(len(prompt) + TOKENS, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(8, 16, counters), counters)
    executor = ModelRunner(decoder, 8, 16)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    scheduler.add(Request(RequestId("r"), prompt, params))
    tokens = []
    while scheduler.has_work:
        tokens += [o.token_id for o in scheduler.apply(executor.run(scheduler.plan(0.0)))]
    return tokens


def test_transformers_generates_the_same_tokens(folder: Path, ops: Ops) -> None:
    import transformers

    (prompt,) = prompts(Case(1, 20, TOKENS), 400)
    ours = greedy(load_decoder(folder, ops=ops, options=LoadOptions(dtype="float32")), prompt)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            theirs.append(int(model(torch.tensor([theirs])).logits[0, -1].argmax()))
    assert ours == theirs[len(prompt) :]
    assert len(set(ours)) > 2


def test_every_id_is_a_text_and_a_text_comes_back(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    text = "the rate of thin tea, 12 €"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(400))


def test_the_same_settings_give_the_same_bytes_and_are_made_once(folder: Path) -> None:
    weights = folder / "model.safetensors"
    again = make(folder.parent / "again", folder.name, *TINY[folder.name])
    assert (Path(again.stdout.strip()) / weights.name).read_bytes() == weights.read_bytes()
    written = weights.stat().st_mtime_ns
    assert make(folder.parent, folder.name, *TINY[folder.name]).returncode == 0
    assert weights.stat().st_mtime_ns == written


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    done = make(tmp_path, "qwen3-moe-1.2b", "hidden=64")
    assert done.returncode == 1
    assert "--set hidden: no such key" in done.stderr


def test_random_codes_lean_to_no_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row sums up to as much as random numbers do: else all tokens would become alike."""
    monkeypatch.syspath_prepend(str(MAKE.parent))
    codes = importlib.import_module("make_packed").drawn_codes("w", 2, 256, 512)
    both = torch.stack([codes.packed & 15, codes.packed >> 4]).double()
    lean = both.mean() - codes.zero.double().mean()
    assert abs(float(lean)) < 0.05  # of codes 0 to 15
    assert set(codes.zero.unique().tolist()) == {7, 8}


def test_a_packed_folder_is_made_without_a_checkpoint(tmp_path: Path, ops: Ops) -> None:
    small, script = TINY["qwen3-moe-1.2b"], MAKE.with_name("make_packed.py")
    found = []
    for home in (tmp_path / "one", tmp_path / "other"):
        done = make(home, "qwen3-moe-1.2b", *small, "moe_intermediate_size=128", script=script)
        assert done.returncode == 0, done.stderr
        found.append(Path(done.stdout.strip()))
    one, other = (sorted(file.read_bytes() for file in folder.iterdir()) for folder in found)
    assert one == other
    assert verify_packed(found[0]) == 1 + 2 * (1 + 8)
    tokens = greedy(load_decoder(found[0], ops), prompts(Case(1, 20, TOKENS), 400)[0])
    assert len(set(tokens)) > 2
