"""Start-up of a model folder beside its packed copy: time to the first token, peak memory.

Each start is a process of its own that loads the model and answers one prompt with one token.
``cold`` means that the folder's pages were dropped from the system's memory first (POSIX_FADV_
DONTNEED, which needs no privilege). Figures of one run hold against each other only.

    python bench/load.py --model FOLDER [--scheme auto|int8|int4] [--packed COPY] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

START = """
import json, resource, sys, time
begun = time.perf_counter()
from moeserve.config.options import LoadOptions
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder
imported = time.perf_counter()
decoder = load_decoder(sys.argv[1], choose_ops(), LoadOptions(quantization=sys.argv[2]))
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
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        packed = args.packed or pack(args.model, Path(scratch) / "packed", args.scheme)
        rows = measure({"unpacked": args.model, "packed": packed}, args.scheme, args.rounds)
    if args.json:
        print(json.dumps({"model": str(args.model), "scheme": args.scheme, "rows": rows}, indent=1))
        return
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))


def pack(model: Path, out: Path, scheme: str) -> Path:
    words = ["--model", str(model), "--out", str(out), "--scheme", scheme]
    command = [sys.executable, "-m", "moeserve", "quantize", "--packed", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def measure(folders: dict[str, Path], scheme: str, rounds: int) -> list[dict[str, object]]:
    """Medians over interleaved rounds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for state in ("cold", "warm"):
            for name, folder in folders.items():
                (drop if state == "cold" else read)(folder)
                found.setdefault((name, state), []).append(start(folder, scheme))
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


def drop(folder: Path) -> None:
    for file in weights(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    for file in weights(folder):
        with file.open("rb") as opened:
            while opened.read(16 << 20):
                pass


def weights(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]


if __name__ == "__main__":
    main()
