"""From outside: a process within its budget, under a limit of the kernel where there is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.models.packed.writer import pack_model

pytestmark = pytest.mark.long

LAYERS, EXPERTS, HIDDEN, INNER = 8, 32, 256, 512
CGROUP = Path("/sys/fs/cgroup/memory")
SOAK = Path(__file__).parents[2] / "bench" / "constrained" / "soak.py"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ops: Ops) -> Path:
    """Random weights of which 200 MiB are experts, packed; no tokenizer."""
    source = tmp_path_factory.mktemp("limit") / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    draw = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=draw) * shape[-1] ** -0.5
        return drawn.bfloat16()

    tensors = {
        "model.embed_tokens.weight": noise(512, HIDDEN),
        "lm_head.weight": noise(512, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    for l in range(LAYERS):
        at = f"model.layers.{l}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for part, rows in (("q", 256), ("k", 128), ("v", 128), ("o", 256)):
            tensors[f"{at}.self_attn.{part}_proj.weight"] = noise(rows, HIDDEN)
        for part in ("q", "k"):
            tensors[f"{at}.self_attn.{part}_norm.weight"] = torch.ones(64).bfloat16()
        tensors[f"{at}.mlp.gate.weight"] = noise(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for part in ("gate", "up"):
                tensors[f"{at}.mlp.experts.{e}.{part}_proj.weight"] = noise(INNER, HIDDEN)
            tensors[f"{at}.mlp.experts.{e}.down_proj.weight"] = noise(HIDDEN, INNER)
    save_file(tensors, source / "model.safetensors")
    packed = source.parent / "packed"
    pack_model(source, packed, ops, LoadOptions())
    return packed


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Callable[[int], Path | None]]:
    """A control group with a limit on memory, or None where this system gives none."""
    made: list[Path] = []

    def make(nbytes: int) -> Path | None:
        group = CGROUP / f"moeserve-test-{os.getpid()}"
        try:
            group.mkdir()
            made.append(group)
            (group / "memory.limit_in_bytes").write_text(str(nbytes))
        except OSError:
            return None
        return group

    yield make
    for group in made:
        with suppress(OSError):
            group.rmdir()


# Runs ``generate`` and says how much memory that took.
SCRIPT = """
import sys
from pathlib import Path
from moeserve.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print("PEAK", int(status["VmHWM"].split()[0]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def generate(
    folder: Path, *flags: str, group: Path | None = None
) -> subprocess.CompletedProcess[str]:
    prompt = ",".join(str(7 * i % 512) for i in range(1, 60))
    wanted = ["--prompt-ids", prompt, "--max-tokens", "16", "--temperature", "0", "--ignore-eos"]
    bounds = ["--max-num-batched-tokens", "32", "--max-num-seqs", "4", "--kv-memory", "4MiB"]

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = ["generate", "--model", str(folder), "--json", *wanted, *bounds, *flags]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *command],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=enter,
    )


def test_a_process_stays_within_its_budget_and_says_the_same(
    folder: Path, limited: Callable[[int], Path | None]
) -> None:
    """As little as the error below the least names, for experts of which a quarter fits."""
    free = generate(folder)
    assert free.returncode == 0, free.stderr
    refused = generate(folder, "--memory", "64MiB")
    assert refused.returncode != 0
    named = re.search(r"the least for this model and these settings is (\d+)\.0MiB", refused.stderr)
    assert named is not None, refused.stderr
    budget = (int(named[1]) + 8) << 20
    group = limited(budget)
    kept = generate(folder, "--memory", str(budget), group=group)
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout)["token_ids"] == json.loads(free.stdout)["token_ids"]
    peak = re.search(r"PEAK (\d+)", kept.stderr)
    assert peak is not None, kept.stderr
    assert int(peak[1]) <= budget
    if group is not None:
        assert int((group / "memory.max_usage_in_bytes").read_text()) <= budget
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()


def test_a_limit_below_the_interpreter_is_refused_before_it_kills(
    folder: Path, limited: Callable[[int], Path | None]
) -> None:
    group = limited(100 << 20)
    if group is None:
        pytest.skip("no limit can be set here")
    refused = generate(folder, "--memory", "100MiB", group=group)
    assert refused.returncode == 2
    assert "takes 208.0MiB before any weights" in refused.stderr
    assert "oom_kill 0" in (group / "memory.oom_control").read_text()


def soak(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SOAK), str(folder), "--kv-memory", "4MiB", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_a_soak_finds_every_token_right_and_nothing_grown(folder: Path, tmp_path: Path) -> None:
    """Some hundred MiB are the process's, so that less than half of the experts fit."""
    kept = tmp_path / "soak.json"
    done = soak(folder, "--memory", "480MiB", "--minutes", "0.05", "--json", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(kept.read_text())["soak"]
    assert found["faults"] == []
    assert found["turns"] > 0
    assert found["counts"]["expert_stream_evictions"] > 0
