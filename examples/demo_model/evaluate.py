"""Measure the demo model with the runtime, on text that was held out of its training.

``python examples/demo_model/evaluate.py --model DIR --data DIR --out evaluation.json`` prints and
writes, by domain: next-token loss (nats per token, bits per byte), acceptance of the MTP module's
greedy draft, and, by kind of arithmetic, the share of held-out problems whose greedy answer is
exactly right, for the corpus's problems and for small ones drawn here. Problems that also occur in
the training text are left out. ``card.py`` turns the
file into the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import GENERATED, MIXTURE
from numpy.typing import NDArray
from rich.progress import track

from moeserve.core import Request, RequestId, SamplingParams
from moeserve.evaluate.answers import BLOCK, answer
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.tokenizer import Tokenizer

WINDOW = 512
MAX_WINDOWS = 48
PROBLEMS_PER_KIND = 100
DRAFT_PROMPT, DRAFT_TOKENS, DRAFT_SEQUENCES = 48, 80, 12


@dataclass(frozen=True, slots=True)
class Problem:
    """``prompt`` ends where the answer begins; ``answer`` must follow within ``max_tokens``.

    ``marker`` stands before the answer where the model works it out first.
    """

    kind: str
    prompt: str
    answer: str
    max_tokens: int = 24
    marker: str = ""


LINE = re.compile(r"^-?\d+ ([-+*/]|mod) -?\d+ = (.+)$")
KINDS = {
    "+": "addition",
    "-": "subtraction",
    "*": "multiplication",
    "/": "division",
    "mod": "remainder",
}


def problems_of(piece: str) -> list[Problem]:
    """What can be asked from one held-out piece of arithmetic."""
    found = []
    lines = piece.splitlines()
    for i, line in enumerate(lines):
        if m := LINE.match(line):
            prompt = line[: line.index("=") + 1]
            found.append(Problem(KINDS[m[1]], prompt, m[2]))
        elif m := re.match(r"^Compute \d+ \+ \d+\.$", line):
            for later in lines[i + 1 :]:
                if later.startswith("answer: "):
                    found.append(
                        Problem("addition, written out", line + "\n", later[8:], 220, "answer: ")
                    )
                    break
        elif line.startswith("Solve ") and i + 2 < len(lines):
            answer = lines[i + 2].rpartition("x = ")[2]
            found.append(Problem("linear equation", line + "\n", answer, 64, ": x = "))
        elif m := re.match(r"^(\\frac\{d\}\{dx\} \(.*\) =) (.*)$", line):
            found.append(Problem("derivative", m[1], m[2]))
        elif m := re.match(r"^(gcd\(.*?\) =) (\d+) and", line):
            found.append(Problem("greatest common divisor", m[1], m[2]))
    return found


def drawn_problems(known: set[str]) -> list[Problem]:
    """Small sums and differences, drawn here; no line of training has any of them."""
    draw = random.Random(5)
    found = []
    for limit, name in ((100, "two digits"), (1000, "three digits")):
        for sign, kind in (("+", "addition"), ("-", "subtraction")):
            problems: dict[str, Problem] = {}
            while len(problems) < PROBLEMS_PER_KIND:
                b, a = sorted(draw.randrange(limit // 10, limit) for _ in range(2))
                answer = str(a + b if sign == "+" else a - b)
                prompt = f"{a} {sign} {b} ="
                if f"{prompt} {answer}" not in known:
                    problems[prompt] = Problem(f"{kind}, {name} (drawn)", prompt, answer)
            found += problems.values()
    return found


def held_out_problems(data: Path, known: set[str]) -> list[Problem]:
    """At most ``PROBLEMS_PER_KIND`` of each kind, none of them known from training."""
    kept: dict[str, list[Problem]] = defaultdict(list)
    for piece in json.loads((data / "math_arithmetic.held.json").read_text()):
        for problem in problems_of(piece):
            first_line = (problem.prompt + " " + problem.answer).splitlines()[0].strip()
            new = first_line not in known and problem.prompt.strip() not in known
            if new and len(kept[problem.kind]) < PROBLEMS_PER_KIND:
                kept[problem.kind].append(problem)
    return [p for problems in kept.values() for p in problems]


def complete(
    decoder: Decoder, prompts: list[list[int]], max_tokens: list[int], eos: frozenset[int]
) -> list[list[int]]:
    """Greedy answers, batched by the runtime's own scheduler."""
    requests = [
        Request(RequestId(str(i)), tuple(ids), SamplingParams(max_tokens=most, temperature=0.0))
        for i, (ids, most) in enumerate(zip(prompts, max_tokens, strict=True))
    ]
    return answer(decoder, requests, eos)


@torch.inference_mode()
def loss_of(decoder: Decoder, ids: NDArray[np.int64]) -> tuple[float, int]:
    """Summed nats over the windows of ``ids``, and how many tokens they predict."""
    total, count = 0.0, 0
    for start in range(0, min(len(ids) - 1, WINDOW * MAX_WINDOWS), WINDOW):
        window = ids[start : start + WINDOW + 1]
        if len(window) < 2:
            break
        blocks = range(-(-len(window) // BLOCK))
        step = pack_spans([Span(window[:-1].tolist(), 0, blocks, len(window) - 1)], BLOCK)
        logits = decoder.forward(step, decoder.new_cache(len(blocks), BLOCK))
        targets = torch.from_numpy(window[1:])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total, count


@torch.inference_mode()
def accepted(decoder: Decoder, sequence: list[int], generated: int) -> tuple[int, int]:
    """Drafts of the MTP module that equal the trunk's own greedy token, and drafts in all.

    From the state at p and the token at p + 1 the module guesses the token at p + 2; only
    generated tokens are counted, which are the trunk's greedy choices.
    """
    blocks = range(-(-len(sequence) // BLOCK))
    cache = decoder.new_cache(len(blocks), BLOCK, mtp=True)
    states = decoder.trunk(pack_spans([Span(sequence[:-1], 0, blocks)], BLOCK), cache)
    ahead = pack_spans([Span(sequence[1:], 0, blocks, len(sequence) - 1)], BLOCK)
    drafts = decoder.mtp_forward(decoder.final_norm(states), ahead, cache).argmax(-1).tolist()
    first = len(sequence) - generated
    pairs = [(drafts[p], sequence[p + 2]) for p in range(first - 2, len(sequence) - 2)]
    return sum(a == b for a, b in pairs), len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder written by data.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoder = load_decoder(args.model, ops=choose_ops())
    tokenizer = Tokenizer.load(args.model)
    eos = frozenset(decoder.spec.eos_ids)
    stats = json.loads((args.data / "stats.json").read_text())["domains"]

    domains: dict[str, dict[str, float]] = {}
    for domain in track(MIXTURE, "held-out loss and drafts"):
        ids = np.load(args.data / f"{domain}.held.npy").astype(np.int64)
        nats, count = loss_of(decoder, ids)
        held = stats[domain]["held"]
        prompts = [
            ids[i * 997 % (len(ids) - DRAFT_PROMPT) :][:DRAFT_PROMPT].tolist()
            for i in range(DRAFT_SEQUENCES)
        ]
        answers = complete(decoder, prompts, [DRAFT_TOKENS] * len(prompts), eos)
        hits = [
            accepted(decoder, p + a, len(a)) for p, a in zip(prompts, answers, strict=True) if a
        ]
        domains[domain] = {
            "train_tokens": stats[domain]["train"]["tokens"],
            "held_out_tokens": count,
            "loss_nats_per_token": round(nats / count, 4),
            "bits_per_byte": round(nats / count / math.log(2) * held["tokens"] / held["bytes"], 4),
            "mtp_acceptance": round(sum(h for h, _ in hits) / sum(n for _, n in hits), 4),
        }

    known: set[str] = set()
    for domain in ("math_arithmetic", GENERATED):
        ids = np.load(args.data / f"{domain}.train.npy")
        known.update(tokenizer.decode(ids.tolist(), skip_special_tokens=True).splitlines())
    problems = held_out_problems(args.data, known) + drawn_problems(known)
    answers = complete(
        decoder,
        [tokenizer.encode(p.prompt) for p in problems],
        [p.max_tokens for p in problems],
        eos,
    )
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, made in zip(problems, answers, strict=True):
        text = tokenizer.decode(made)
        said = text.partition(problem.marker)[2] if problem.marker else text
        right[problem.kind].append(said.split("\n")[0].strip() == problem.answer.strip())
    arithmetic = {
        kind: {"problems": len(marks), "exact_match": round(sum(marks) / len(marks), 4)}
        for kind, marks in sorted(right.items())
    }
    report = {"domains": domains, "arithmetic": arithmetic}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
