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
