"""Goodput of split pools against unified members, on published traces.

    python bench/pools/goodput.py --data FOLDER [--rounds 1] [--traces prefill decode]

Each setup has two members of one thread, bound to a core each: a prefill and a decode member, or
two unified ones. Requests are of the trace's lengths, scaled to what the demo model takes: of
Mooncake's conversations, long prompts and short answers (``prefill``); of Azure's, prompts of 64
tokens at most and long answers (``decode``). They come by a Poisson process, and ``moeserve bench
serve`` measures: goodput is the requests within ``--slo``, per second. FOLDER has
``mooncake/conversation_trace.jsonl.gz`` and ``azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz``.
Prints one JSON object: what ``bench serve`` says, by trace and setup, a list over rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import started

SETUPS = {"split": ("prefill", "decode"), "unified": ("unified", "unified")}
MEMBER = ("--threads", "1", "--num-blocks", "2048")
PATIENCE_S = 600


@dataclass(frozen=True, slots=True)
class Load:
    """A trace's file, how its lengths are scaled and cut, requests and requests per second."""

    file: str
    scale: float
    longest_prompt: int
    longest_answer: int
    count: int
    rate: float


LOADS = {
    "prefill": Load("mooncake/conversation_trace.jsonl.gz", 1 / 16, 900, 32, 40, 0.8),
    "decode": Load("azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz", 0.5, 64, 200, 60, 2.0),
}


def measure(setup: str, load: Load, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    count = options.requests or load.count
    with started(SETUPS[setup], model=options.model, cores=("0", "1"), options=MEMBER) as cluster:
        words = (
            *("--target", f"grpc://127.0.0.1:{cluster.grpc['gateway-0']}"),
            *("--trace", str(options.data / load.file), "--length-scale", str(load.scale)),
            *("--max-input-len", str(load.longest_prompt)),
            *("--max-output-len", str(load.longest_answer)),
            *("--request-rate", str(options.rate or load.rate), "--num-prompts", str(count)),
            *("--ignore-eos", "--seed", str(seed), "--num-warmups", "4", "--json"),
            *("--slo", *options.slo),
        )
        done = subprocess.run(
            [sys.executable, "-m", "moeserve.cli", "bench", "serve", *words],
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--traces", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--requests", type=int, help="of each run")
    parser.add_argument("--rate", type=float, help="requests per second")
    parser.add_argument("--slo", nargs="+", default=["ttft:2s", "tpot:50ms"])
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    rows: dict[str, dict[str, list[Any]]] = {
        trace: {setup: [] for setup in options.setups} for trace in options.traces
    }
    for round_ in range(options.rounds):
        for trace in options.traces:
            for setup in options.setups:
                found = measure(setup, LOADS[trace], options, round_)
                rows[trace][setup].append(found)
                print(trace, setup, json.dumps(found), file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
