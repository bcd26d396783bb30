"""Start-up of a model folder beside its packed copy: time to the first token, peak memory.

Each start is a process of its own that loads the model and answers one prompt with one token.
``cold`` means that the folder's pages were dropped from the system's memory first (POSIX_FADV_
DONTNEED, which needs no privilege). Figures of one run hold against each other only. With
``--gguf`` llama.cpp maps that file and does the same.

    python bench/load.py --model FOLDER [--scheme auto|int8|int4] [--packed COPY]
        [--gguf FILE [--home PEERS]] [--rounds N] [--json] [--keep FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from moeserve.bench.workers import Worker

HERE = Path(__file__).resolve().parent
HOME = Path.home() / ".cache" / "moeserve-bench" / "peers"
THREADS, LATE_S, PROMPT = 2, 300.0, 64
START = """
import json, resource, sys, time
begun = time.perf_counter()
from moeserve.config.options import LoadOptions
from moeserve.engine.rank_model import choose_table
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder
imported = time.perf_counter()
ops = choose_table("cpu", None)
decoder = load_decoder(sys.argv[1], ops, LoadOptions(quantization=sys.argv[2]))
loaded = time.perf_counter()
step = pack_spans([Span(list(range(1, 65)), 0, [0, 1, 2, 3], 64)], 16)
decoder.forward(step, decoder.new_cache(4, 16))
first = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
kib = {name: int(status[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssFile")}
print(json.dumps({
    "import_s": imported - begun, "load_s": loaded - imported, "first_token_s": first - loaded,
    "load_to_first_token_s": first - imported, "peak_rss_mb": kib["VmHWM"] / 1024,
    "own_mb": kib["RssAnon"] / 1024, "file_mb": kib["RssFile"] / 1024,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder that is not packed")
    parser.add_argument("--scheme", choices=("auto", "int8", "int4"), default="auto")
    parser.add_argument("--packed", type=Path, help="a copy made before, of the same scheme")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the same model")
    parser.add_argument("--home", type=Path, default=HOME, help=f"of the peers' venvs [{HOME}]")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="for the raw figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        packed = args.packed or pack(args.model, Path(scratch) / "packed", args.scheme)
        starts: dict[str, tuple[Path, Callable[[], dict[str, float]]]] = {
            "unpacked": (args.model, lambda: start(args.model, args.scheme)),
            "packed": (packed, lambda: start(packed, args.scheme)),
        }
        if args.gguf is not None:
            log = Path(scratch) / "llamacpp.log"
            name = f"llama.cpp {args.gguf.stem.upper()}"
            starts[name] = (args.gguf, lambda: start_llamacpp(args.gguf, args.home, log))
        rows = measure(starts, args.rounds)
    raw = json.dumps(
        {"model": Path(args.model).name, "scheme": args.scheme, "rows": rows}, indent=1
    )
    if args.keep is not None:
        args.keep.write_text(raw + "\n")
    if args.json:
        print(raw)
        return
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))


def pack(model: Path, out: Path, scheme: str) -> Path:
    words = ["--model", str(model), "--out", str(out), "--scheme", scheme]
    command = [sys.executable, "-m", "moeserve", "quantize", "--packed", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def measure(
    starts: dict[str, tuple[Path, Callable[[], dict[str, float]]]], rounds: int
) -> list[dict[str, object]]:
    """Medians over interleaved rounds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for state in ("cold", "warm"):
            for name, (path, begin) in starts.items():
                (drop if state == "cold" else read)(path)
                found.setdefault((name, state), []).append(begin())
    return [
        {"folder": name, "state": state}
        | {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for (name, state), runs in found.items()
    ]


def start(folder: Path, scheme: str) -> dict[str, float]:
    command = [sys.executable, "-c", START, str(folder), scheme]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def start_llamacpp(file: Path, home: Path, log: Path) -> dict[str, float]:
    script = HERE / "peers" / "llamacpp_worker.py"
    command = [str(home / "llamacpp/bin/python"), str(script), str(file), str(THREADS), "128", "1"]
    with Worker("llama.cpp", command, cpus=THREADS, log=log, deadline=LATE_S) as worker:
        load_s = worker.ready_message["load_s"]
        prompt = list(range(1, PROMPT + 1))
        first_s = worker.request("prefill", deadline=LATE_S, prompts=[prompt])["seconds"]
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        kib = {name: int(status[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssFile")}
        return {
            "import_s": worker.ready_s - load_s,
            "load_s": load_s,
            "first_token_s": first_s,
            "load_to_first_token_s": load_s + first_s,
            "peak_rss_mb": kib["VmHWM"] / 1024,
            "own_mb": kib["RssAnon"] / 1024,
            "file_mb": kib["RssFile"] / 1024,
        }


def drop(path: Path) -> None:
    for file in weights(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    for file in weights(path):
        with file.open("rb") as opened:
            while opened.read(16 << 20):
                pass


def weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin")]


if __name__ == "__main__":
    main()
