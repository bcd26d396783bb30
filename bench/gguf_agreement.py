"""How near a GGUF file as we hold it is to llama.cpp's reading of the same file.

    python bench/gguf_agreement.py FILE.gguf --peer PEERS/llamacpp/bin/python [--text FILE ...]

Both are given the same tokens of the same texts (teacher-forced), and their next-token
distributions compared: the mean and the 99.9th percentile of KL(llama.cpp | ours), the share of
equal likeliest tokens, and the mean loss of each on the text. Ours is held in several ways:
``auto`` as served, ``exact`` in fp32 from the values of the blocks, which leaves what llama.cpp
itself rounds (activations, to 8 bits) and the order of sums. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder
from moeserve.models.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "auto": LoadOptions(),
    "exact": LoadOptions(dtype="float32", quantization="none"),
}
BLOCK = 16
PEER_S = 600.0


def windows_of(file: Path, texts: list[Path], tokens: int, count: int) -> list[list[int]]:
    """``count`` texts of so many tokens each, spread over the files."""
    tokenizer = Tokenizer.load(file)
    ids = [i for text in texts for i in tokenizer.encode(text.read_text("utf-8"), False)]
    if len(ids) < tokens * count:
        sys.exit(f"the texts have {len(ids)} tokens, {tokens * count} are wanted: give more --text")
    step = len(ids) // count
    return [ids[i * step : i * step + tokens] for i in range(count)]


def ours(file: Path, windows: list[list[int]], options: LoadOptions) -> Tensor:
    """Logits [tokens, vocab] of every window by itself."""
    torch.set_num_threads(1)
    decoder = load_decoder(file, choose_ops(), options)
    found = []
    for ids in windows:
        blocks = list(range(-(-len(ids) // BLOCK)))
        step = pack_spans([Span(ids, 0, blocks, len(ids))], BLOCK)
        found.append(decoder.forward(step, decoder.new_cache(len(blocks), BLOCK)).float())
    return torch.cat(found)


def theirs(file: Path, windows: list[list[int]], python: Path, threads: int) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        worker = ROOT / "bench/peers/llamacpp_logits.py"
        words = [str(python), str(worker), str(file), str(out), str(threads)]
        subprocess.run(words, input=json.dumps(windows).encode(), check=True, timeout=PEER_S)
        return torch.from_numpy(np.load(out, allow_pickle=False))


def compare(peer: Tensor, own: Tensor, windows: list[list[int]]) -> dict[str, float]:
    p, q = (torch.log_softmax(x.double(), -1) for x in (peer, own))
    kl = (p.exp() * (p - q)).sum(-1)
    starts = [0, *np.cumsum([len(ids) for ids in windows]).tolist()]
    next_ids = torch.tensor([i for ids in windows for i in [*ids[1:], -1]])
    told = torch.ones(len(next_ids), dtype=torch.bool)
    told[torch.tensor(starts[1:]) - 1] = False
    losses = [-x[told].gather(1, next_ids[told, None]).mean().item() for x in (p, q)]
    return {
        "tokens": len(kl),
        "kl_mean": kl.mean().item(),
        "kl_99.9%": kl.quantile(0.999).item(),
        "same_top": (peer.argmax(-1) == own.argmax(-1)).double().mean().item(),
        "loss_llamacpp": losses[0],
        "loss_ours": losses[1],
    }


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("file", type=Path)
    command.add_argument("--peer", type=Path, required=True, help="python of llama.cpp's venv")
    command.add_argument("--text", type=Path, nargs="*", default=sorted(ROOT.glob("docs/*.md")))
    command.add_argument("--tokens", type=int, default=256, help="of a text [256]")
    command.add_argument("--count", type=int, default=16, help="texts [16]")
    command.add_argument("--threads", type=int, default=2)
    args = command.parse_args()
    windows = windows_of(args.file, args.text, args.tokens, args.count)
    peer = theirs(args.file, windows, args.peer, args.threads)
    ways = {
        name: compare(peer, ours(args.file, windows, how), windows) for name, how in WAYS.items()
    }
    print(json.dumps({"file": args.file.name, **ways}))


if __name__ == "__main__":
    main()
