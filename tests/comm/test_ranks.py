"""Law 1 over real ranks: 2, 4 and 8 processes, over torch, TCP, MPI and shared memory.

Eight processes are started once, by mpirun; smaller groups are parts of them (``law_ranks``).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeserve.comm.launch.note_store import host_store
from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
MOST = 8
SHARED_CORES = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")


def law() -> ModuleType:
    spec = importlib.util.spec_from_file_location("law_ranks", HERE / "law_ranks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["law_ranks"] = module
    spec.loader.exec_module(module)
    return module


def cases_of(models: list[str]) -> Iterator[tuple[str, str, int, int, int, int, int]]:
    """(model, backend, world, ranks per node, microbatches, slots for replicas, seed). Every family
    over every backend and number of ranks, but two families over torch, whose rounds take
    milliseconds; then nodes of several ranks. The numbers of microbatches alternate."""
    count = seed = 0
    for world in (2, 4, 8):
        for model in models:
            seed += 1
            for backend in ("tcp", "mpi", "shm", "torch"):
                if backend != "torch" or model in models[:2]:
                    count += 1
                    yield model, backend, world, world, 1 + count % 3, seed % 3, seed
    for world, size in ((4, 2), (8, 4), (8, 2)):
        seed += 1
        for backend in ("auto", "mpi"):
            yield ["demo", "qwen2_moe"][seed % 2], backend, world, size, 2, 1, seed


@pytest.mark.timeout(220)
def test_every_backend_and_number_of_ranks_gives_the_bits_of_one_process(
    tiny_checkpoint: Callable[[str], Path], ops: Ops, mpirun: str | None, tmp_path: Path
) -> None:
    assert mpirun is not None, "no mpirun: install the dev extra"
    ranks = law()
    models = {
        "demo": (str(resolve_model("demo")), "int8"),
        "deepseek_v3": (str(tiny_checkpoint("deepseek_v3")), "int8"),
        "qwen2_moe": (str(tiny_checkpoint("qwen2_moe")), "int8"),
        "gpt_oss": (str(tiny_checkpoint("gpt_oss")), "none"),
    }
    drawn = [
        ranks.Case(f"{i}-{model}-{backend}-{world}", *models[model], backend, world, *rest)
        for i, (model, backend, world, *rest) in enumerate(cases_of(list(models)))
    ]
    written = tmp_path / "cases.json"
    written.write_text(json.dumps([asdict(case) for case in drawn]))
    store, port = host_store("127.0.0.1")
    done = subprocess.run(
        [
            mpirun,
            *SHARED_CORES,
            "-n",
            str(MOST),
            sys.executable,
            HERE / "law_ranks.py",
            str(port),
            written,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    del store
    assert done.returncode == 0, done.stderr[-4000:]
    whole: dict[str, Decoder] = {}
    expected: dict[int, list[Tensor]] = {}
    for case in drawn:
        key = case.model + case.quantization
        if key not in whole:
            whole[key] = load_decoder(
                case.model, ops=ops, options=LoadOptions(quantization=case.quantization)
            )
        prompts, home = ranks.prompts_of(case, whole[key].spec.vocab)
        if case.seed not in expected:
            expected[case.seed] = ranks.greedy(whole[key], prompts, 1, 0)
        found = {
            int(name): row
            for rank in range(case.world)
            for name, row in load_file(tmp_path / f"{case.name}.{rank}.safetensors").items()
        }
        assert sorted(found) == list(range(len(prompts))), case
        for i, row in enumerate(expected[case.seed]):
            assert torch.equal(found[i], row), (case, f"prompt {i} of rank {home[i]}")
