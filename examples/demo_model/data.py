"""Tokenizer and token arrays for the demo model.

``python examples/demo_model/data.py --corpus DIR --out DIR`` reads the text mixture, holds
out one document in fifty of every domain, trains a byte-level BPE tokenizer on the rest and
writes one uint16 array per domain and split. The same input gives the same bytes.

A corpus folder holds ``NAME.txt.xz`` files whose documents end with ``<|endoftext|>``; the
``code_py`` domain is the standard library of the running Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import platform
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
HELD_OUT_ONE_IN = 50
# Long documents (novels, modules) are cut at line ends, so that held-out text comes from all.
PIECE_CHARS = 6000
# Share of training windows per domain, and of the tokenizer's training text.
MIXTURE = {
    "stories_en": 0.30,
    "math_arithmetic": 0.20,
    "novels_en": 0.12,
    "code_py": 0.12,
    "math_wordproblems": 0.11,
    "novels_fr": 0.09,
    "technical_zh": 0.06,
}
TOKENIZER_CHARS = 8_000_000
# Sums drawn anew, for the finish of training; none of them is a held-out problem.
GENERATED = "math_generated"
GENERATED_DOCUMENTS = 9000


def documents(corpus: Path, domain: str) -> Iterator[str]:
    """Whole documents of ``domain``, in a fixed order."""
    if domain == "code_py":
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
                continue
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
        return
    with lzma.open(corpus / f"{domain}.txt.xz", "rt", encoding="utf-8") as file:
        for doc in file.read().split(EOS):
            if doc.strip():
                yield doc.strip("\n") + "\n"


def pieces(doc: str) -> Iterator[str]:
    """``doc`` cut at line ends into pieces of about ``PIECE_CHARS``."""
    start = 0
    while start < len(doc):
        end = doc.find("\n", start + PIECE_CHARS)
        end = len(doc) if end < 0 else end + 1
        yield doc[start:end]
        start = end


def is_held_out(piece: str) -> bool:
    """Decided by content, so that equal pieces never straddle the split."""
    digest = hashlib.sha256(piece.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def generated_sums(held_out: set[str]) -> Iterator[str]:
    """Documents of short sums, and of sums written out digit by digit; the same every time."""
    draw = random.Random(1)
    for i in range(GENERATED_DOCUMENTS):
        lines: list[str] = []
        digits = (1, 3) if i % 2 else (2, 5)
        while len(lines) < 24:
            a, b = (draw.randrange(10 ** draw.randint(*digits)) for _ in range(2))
            if i % 3:
                text = written_out(a, b)
            else:
                a, b = max(a, b), min(a, b)
                text = f"{a} + {b} = {a + b}" if draw.random() < 0.5 else f"{a} - {b} = {a - b}"
            problem, *working = text.splitlines()
            if problem not in held_out:
                lines += [problem, *working]
        yield "\n".join(lines) + "\n"


def written_out(a: int, b: int) -> str:
    """``a + b`` as the corpus writes it: from the lowest digit up, with carries."""
    lines, carry, place = [f"Compute {a} + {b}."], 0, 0
    while place < max(len(str(a)), len(str(b))) or carry:
        x, y = (n // 10**place % 10 for n in (a, b))
        total = x + y + carry
        lines.append(
            f"digit {place}: {x} + {y} + carry {carry} = {total}, "
            f"write {total % 10}, carry {total // 10}"
        )
        carry, place = total // 10, place + 1
    return "\n".join([*lines, f"answer: {a + b}"])


def train_tokenizer(texts: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE with every digit its own token, so that carries stay aligned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def mixture() -> Iterator[str]:
        for domain, share in MIXTURE.items():
            budget = int(share * TOKENIZER_CHARS)
            for text in texts[domain]:
                if budget <= 0:
                    break
                yield text[:budget]
                budget -= len(text)

    tokenizer.train_from_iterator(mixture(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, 0)]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of NAME.txt.xz")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for domain in MIXTURE:
        train[domain], held[domain] = [], []
        for doc in documents(args.corpus, domain):
            for piece in pieces(doc):
                (held if is_held_out(piece) else train)[domain].append(piece)
        print(f"{domain}: {len(train[domain])} pieces, {len(held[domain])} held out", flush=True)

    tokenizer = train_tokenizer(train)
    held_out = {line for piece in held["math_arithmetic"] for line in piece.splitlines()}
    sums = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(generated_sums(held_out))]
    np.save(args.out / f"{GENERATED}.train.npy", np.concatenate(sums))
    print(f"{GENERATED}: {sum(map(len, sums))} tokens", flush=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    stats: dict[str, object] = {"python": platform.python_version(), "domains": {}}
    for domain in MIXTURE:
        sizes = {}
        for split, texts in (("train", train[domain]), ("held", held[domain])):
            # Every piece begins with EOS, which is also what a prompt begins with.
            ids = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(texts)]
            flat = np.concatenate(ids)
            np.save(args.out / f"{domain}.{split}.npy", flat)
            sizes[split] = {"tokens": len(flat), "bytes": sum(len(t.encode()) for t in texts)}
        stats["domains"][domain] = sizes  # type: ignore[index]
        (args.out / f"{domain}.held.json").write_text(json.dumps(held[domain]))
        print(f"{domain}: {sizes}", flush=True)
    (args.out / "stats.json").write_text(json.dumps(stats, indent=1))


if __name__ == "__main__":
    main()
