"""Who is compared: how each peer's worker and server start, and what it needs to be here.

Peers live in venvs of their own under ``home``, made by ``install.py``; models under
``home.parent / "models"``, made by ``bench/models``. Nothing here is ever imported into them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SLOTS = 16  # of llama-server: streams at once
HOME = Path.home() / ".cache" / "moeserve-bench" / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """``needs`` are files without which it is absent, and ``remedy`` makes them.

    ``server`` takes a port; it may be empty. ``precision`` names the roofline of its weights.
    """

    name: str
    precision: str
    worker: tuple[str, ...]
    server: tuple[str, ...] = ()
    health: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    needs: tuple[Path, ...] = ()
    server_needs: tuple[Path, ...] = ()
    remedy: str = ""
    start_s: float = 180.0
    default: bool = True

    def absent(self, *, serving: bool = False) -> str:
        """Why it cannot be measured here; empty if it can."""
        if serving and not self.server:
            return "absent: it has no server"
        files = self.needs + (self.server_needs if serving else ())
        missing = [str(file) for file in files if not file.exists()]
        return f"absent: no {missing[0]}; {self.remedy}" if missing else ""


def roster(home: Path, model: Path, threads: int, longest: int) -> list[Peer]:
    """Ours first. Servers are asked for sequences of ``longest`` tokens at most."""
    ours = [moeserve(model, threads, longest, weights) for weights in ("int8", "int4", "bf16")]
    llama = [llamacpp(home, model, threads, longest, kind) for kind in ("q8_0", "q4_k_m", "bf16")]
    others = [vllm(home, model, threads, longest, mode) for mode in ("compiled", "eager")]
    return [*ours, *llama, *others, transformers(home, model, threads)]


def moeserve(model: Path, threads: int, longest: int, weights: str) -> Peer:
    """Int8 and int4 from a checkpoint that is so already, as the peers have theirs."""
    folder = model if weights == "bf16" else model / weights
    return Peer(
        name=f"moeserve {weights}",
        precision=weights,
        worker=(
            sys.executable, str(HERE / "moeserve_worker.py"), str(folder), str(threads),
        ),
        server=(
            sys.executable, "-m", "moeserve.cli", "serve", "--model", str(folder),
            "--http-port", "{port}", "--grpc-port", "none", "--threads", str(threads),
            "--max-model-len", str(longest),
        ),
        health="/ready",
        needs=(folder / "config.json",),
        remedy="python bench/models/make.py"
        if weights == "bf16"
        else f"moeserve quantize --quantize-head --scheme {weights} --model {model} --out {folder}",
    )  # fmt: skip


def llamacpp(home: Path, model: Path, threads: int, longest: int, kind: str) -> Peer:
    python, server = home / "llamacpp/bin/python", home / "llamacpp/server/llama-server"
    file = model / "gguf" / f"{kind}.gguf"
    count = str(threads)
    return Peer(
        name=f"llama.cpp {kind.upper() if kind != 'bf16' else kind}",
        precision={"q8_0": "int8", "q4_k_m": "int4", "bf16": "bf16"}[kind],
        worker=(str(python), str(HERE / "llamacpp_worker.py"), str(file), count),
        server=(
            str(server), "--model", str(file), "--port", "{port}", "--host", "127.0.0.1",
            "--threads", count, "--threads-batch", count, "--parallel", str(SLOTS),
            "--ctx-size", str(SLOTS * longest), "--no-webui",
        ),
        needs=(python, file),
        server_needs=(server,),
        remedy="python bench/peers/install.py llamacpp, then bench/models/to_gguf.py",
    )  # fmt: skip


def vllm(home: Path, model: Path, threads: int, longest: int, mode: str) -> Peer:
    venv = home / "vllm"
    eager = ("--enforce-eager",) if mode == "eager" else ()
    preload = [p for p in (venv / "lib/libiomp5.so", tcmalloc()) if p is not None and p.exists()]
    return Peer(
        name=f"vLLM bf16 {mode}",
        precision="bf16",
        worker=(
            str(venv / "bin/python"), str(HERE / "vllm_worker.py"), str(model), str(threads), mode,
        ),
        server=(
            # The command `vllm` asks for the version of a package "vllm", which this build is not.
            str(venv / "bin/python"), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--port", "{port}",
            "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", str(longest),
            "--max-num-seqs", "32", "--no-enable-prefix-caching", *eager,
        ),
        env={
            "LD_PRELOAD": ":".join(map(str, preload)),
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        },
        needs=(venv / "bin/vllm", model / "config.json"),
        remedy="python bench/peers/install.py vllm",
        start_s=300.0,
        default=mode == "compiled",
    )  # fmt: skip


def transformers(home: Path, model: Path, threads: int) -> Peer:
    python = home / "transformers/bin/python"
    return Peer(
        name="transformers bf16",
        precision="bf16",
        worker=(str(python), str(HERE / "transformers_worker.py"), str(model), str(threads)),
        env={"HF_HUB_OFFLINE": "1"},
        needs=(python, model / "config.json"),
        remedy="python bench/peers/install.py transformers",
    )


def tcmalloc() -> Path | None:
    found = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return found[0] if found else None
