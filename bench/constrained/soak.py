"""A packed model served for long within a memory budget: nothing grows, and every token is right.

    python bench/constrained/soak.py PACKED --memory SIZE [--minutes 20] [--kv-memory SIZE]
        [--threads N] [--json FILE]

First an engine without a budget answers every prompt once. Then one with ``--memory``, under a
limit of the kernel of just that (where there are control groups of version 1), answers some of them
at once, again and again: batches of 1 to 8, of answers that end early or late, so that steps are
never the same; each must begin as the answer from before. The exit status is 1 where a token
differed, the peak was above the budget, the process was swapped or killed, or descriptors or
threads grew after the first minute. ``--json`` keeps what was seen at every turn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cap import MemoryCap

from moeserve.bench.workers import Worker
from moeserve.config.kinds import parse_bytes
from moeserve.errors import MoeserveError
from moeserve.models.packed.layout import read_packed_header

HERE = Path(__file__).resolve().parent
PROMPTS, LONGEST, ANSWER, MOST_AT_ONCE = 24, 160, 48, 8
LATE_S = 900.0
# Of the run, what does not count yet where growth is looked for.
SETTLED = 0.2


@dataclass(frozen=True, slots=True)
class Turn:
    """Of the process when a batch had been answered; bytes. ``charged`` are of the group."""

    seconds: float
    tokens: int
    rss: int
    charged: dict[str, int]
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Soak:
    """``faults`` is empty where all went well. ``peak`` is the group's, and the process's where
    there is no group."""

    budget: int
    file_bytes: int
    minutes: float
    capped: bool
    turns: int
    tokens: int
    tokens_per_s: float
    peak: int
    peak_rss: int
    reclaims: int
    swap: int
    rss_settled: int
    rss_last: int
    descriptors: tuple[int, int]
    counts: dict[str, int]
    faults: tuple[str, ...]


def draw_prompts(vocab: int) -> list[list[int]]:
    draw = random.Random(7)
    return [
        [draw.randrange(1, vocab) for _ in range(draw.randrange(4, LONGEST))]
        for _ in range(PROMPTS)
    ]


def start(
    stack: ExitStack, args: argparse.Namespace, memory: int | None, cap: MemoryCap | None
) -> Worker:
    options: dict[str, Any] = {
        "model": str(args.folder),
        "memory": memory,
        "kv_memory": args.kv_memory,
        "threads": args.threads,
        "max_num_seqs": MOST_AT_ONCE,
        "max_num_batched_tokens": 128,
        "prefix_cache": False,
    }
    words = (sys.executable, str(HERE / "streamed_worker.py"), json.dumps(options))
    log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "worker.log"
    command = words if cap is None else cap.command(words)
    return stack.enter_context(
        Worker("the engine", command, cpus=args.threads, log=log, deadline=LATE_S)
    )


def reference(args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the answers of a model that is all in memory."""
    with ExitStack() as stack:
        worker = start(stack, args, None, None)
        prompts = draw_prompts(worker.ready_message["vocab"])
        asked = {"prompts": prompts, "tokens": [ANSWER] * PROMPTS}
        return prompts, worker.request("answer", deadline=LATE_S, **asked)["answers"]


def turns(
    worker: Worker,
    cap: MemoryCap | None,
    known: Sequence[tuple[list[int], list[int]]],
    seconds: float,
    faults: list[str],
) -> Iterator[Turn]:
    """Until the time is over or a token differed."""
    draw, begun = random.Random(8), time.monotonic()
    while (now := time.monotonic() - begun) < seconds and not faults:
        chosen = draw.sample(known, draw.randint(1, MOST_AT_ONCE))
        tokens = [draw.randint(1, ANSWER) for _ in chosen]
        asked = {"prompts": [prompt for prompt, _ in chosen], "tokens": tokens}
        answers = worker.request("answer", deadline=LATE_S, **asked)["answers"]
        for answer, most, (_, expected) in zip(answers, tokens, chosen, strict=True):
            if answer != expected[:most]:
                faults.append(f"after {now:.0f} s: {answer} instead of {expected[:most]}")
        state = worker.request("state", deadline=LATE_S)
        yield Turn(
            seconds=round(time.monotonic() - begun, 1),
            tokens=sum(tokens),
            rss=state["rss"],
            charged={} if cap is None else cap.stat(),
            descriptors=state["descriptors"],
            threads=state["threads"],
        )


def soak(args: argparse.Namespace) -> tuple[Soak, list[Turn]]:
    prompts, answers = reference(args)
    known, faults, seen = list(zip(prompts, answers, strict=True)), list[str](), list[Turn]()
    with ExitStack() as stack:
        cap = MemoryCap.open(args.memory, "soak")
        if cap is not None:
            stack.enter_context(cap)
        worker = start(stack, args, args.memory, cap)
        begun = time.monotonic()
        for turn in turns(worker, cap, known, 60 * args.minutes, faults):
            seen.append(turn)
            note = f"\r{turn.seconds:6.0f} s, RSS {turn.rss >> 20} MiB, {turn.descriptors} files"
            print(note, end="", file=sys.stderr, flush=True)
        took = time.monotonic() - begun
        print(file=sys.stderr)
        state = worker.request("state", deadline=LATE_S)
        found = summary(args, seen, state, cap, took)
    return Soak(**found, faults=(*faults, *faults_of(found, seen))), seen


def summary(
    args: argparse.Namespace,
    seen: Sequence[Turn],
    state: dict[str, Any],
    cap: MemoryCap | None,
    took: float,
) -> dict[str, Any]:
    settled = [turn for turn in seen if turn.seconds >= SETTLED * took] or list(seen)
    swapped = max((turn.charged.get("swap", 0) for turn in seen), default=0)
    return {
        "budget": args.memory,
        "file_bytes": sum(read_packed_header(args.folder).files.values()),
        "minutes": round(took / 60, 2),
        "capped": cap is not None,
        "turns": len(seen),
        "tokens": sum(turn.tokens for turn in seen),
        "tokens_per_s": round(sum(turn.tokens for turn in seen) / took, 2),
        "peak": state["peak_rss"] if cap is None else cap.peak,
        "peak_rss": state["peak_rss"],
        "reclaims": 0 if cap is None else cap.reclaims,
        "swap": max(state["swap"], swapped),
        "rss_settled": settled[0].rss,
        "rss_last": settled[-1].rss,
        "descriptors": (settled[0].descriptors, settled[-1].descriptors),
        "counts": state["counts"],
    }


def faults_of(found: dict[str, Any], seen: Sequence[Turn]) -> Iterator[str]:
    if not seen:
        yield "there was no time for a single answer"
    for name in ("peak", "peak_rss"):
        if found[name] > found["budget"]:
            yield f"{name} of {found[name]} bytes is above the budget of {found['budget']}"
    if found["swap"]:
        yield f"{found['swap']} bytes were swapped"
    first, last = found["descriptors"]
    if last > first:
        yield f"descriptors grew from {first} to {last}"


def size(text: str) -> int:
    found = parse_bytes(text)
    if not isinstance(found, int):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 1GiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="one that `moeserve quantize --packed` wrote")
    parser.add_argument("--memory", type=size, required=True, help="the budget, such as 2GiB")
    parser.add_argument("--kv-memory", type=size, default=32 << 20)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything here")
    args = parser.parse_args()
    try:
        found, seen = soak(args)
    except MoeserveError as error:
        sys.exit(error.message)
    if args.json is not None:
        kept = {"soak": asdict(found), "turns": [asdict(turn) for turn in seen]}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(asdict(found), indent=1))
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
