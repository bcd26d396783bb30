"""Make a packed folder to measure with, of any size: random experts in int4, layer by layer.

    python bench/models/make_packed.py qwen3-30b-a3b [--dir FOLDER] [--set num_hidden_layers=4 ...]

``FOLDER/NAME-int4`` is what `moeserve quantize --packed --scheme int4` would write of a checkpoint
of that config: attention in int8, routed experts as random int4 codes. There is no checkpoint: a
tensor is drawn as it is asked for, experts as codes, so that memory holds a layer, and 17 GB take
minutes. The same name and settings give the same bytes. A folder that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import mmap
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from make import HOME, MODELS, SEED, Config, Weight, settings_of, weights, write_tokenizer
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.kernels.matrix import GROUP, Int4Matrix
from moeserve.kernels.ops import Experts
from moeserve.kernels.select import choose_ops
from moeserve.models.checkpoint import Checkpoint, Entry
from moeserve.models.decoder import open_weights
from moeserve.models.packed.layout import Origin
from moeserve.models.packed.writer import Noted, pack_weights
from moeserve.models.spec import MoeSpec

OPTIONS = LoadOptions(quantization="int4")
# Around the mean of codes that are all equally likely. With one of these alone weights would lean
# to one side, and layer by layer all tokens would become alike and choose the same experts.
ZEROS = (7, 8)
# Of such codes.
SPREAD = (255 / 12) ** 0.5


def drawn(weight: Weight) -> Tensor:
    """The same for a name and a shape, whatever was drawn before."""
    draw = torch.Generator().manual_seed(SEED + zlib.crc32(weight.name.encode()))
    values = torch.randn(weight.shape, generator=draw).mul_(weight.spread).add_(weight.mean)
    return values.to(weight.dtype)


def drawn_codes(name: str, experts: int, out: int, into: int) -> Int4Matrix:
    """Keeps the size of what passes through it, as ``make.matrix`` does."""
    draw = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    shape, groups = (experts, out, into // 2), -(-into // GROUP)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (experts * out * into // 16,), generator=draw)
    scale = torch.rand(experts, out, groups, generator=draw).add_(0.5)
    scale *= 1.2 * into**-0.5 / SPREAD
    zero = torch.randint(ZEROS[0], ZEROS[1] + 1, scale.shape, generator=draw, dtype=torch.uint8)
    return Int4Matrix(words.view(torch.uint8).view(shape), scale, zero)


@dataclass(frozen=True, slots=True)
class DrawnExperts(Noted):
    """Weights whose routed experts are random codes; all others are the checkpoint's."""

    def routed(self, prefix: str, spec: MoeSpec, hidden: int, own: Sequence[int]) -> Experts | None:
        num, inner = len(own), spec.intermediate
        gate_up = drawn_codes(f"{prefix}.gate_up", num, 2 * inner, hidden)
        return self.ops.pack_experts(gate_up, drawn_codes(f"{prefix}.down", num, hidden, inner))


def checkpoint_of(folder: Path, config: Config) -> Checkpoint:
    """Of ``folder``, which has a config and a tokenizer; tensors are drawn when they are read."""
    page, entries = mmap.mmap(-1, mmap.PAGESIZE), dict[str, Entry]()
    kinds = {torch.bfloat16: "BF16", torch.float32: "F32"}

    def maker(weight: Weight) -> Callable[[], Tensor]:
        return lambda: drawn(weight)

    file = folder / "config.json"
    for w in weights(config):
        if ".experts." not in w.name:
            entries[w.name] = Entry(file, page, kinds[w.dtype], w.shape, 0, w.nbytes, maker(w))
    return Checkpoint(folder, config, {}, {file: entries})


def make_packed(name: str, home: Path, changes: Config) -> Path:
    """The folder, made if it is not there or was made otherwise."""
    config, out = settings_of(name, changes), home / f"{name}-int4"
    written = out / "config.json"
    if written.exists() and json.loads(written.read_text()) == config:
        return out
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        (source / "config.json").write_text(json.dumps(config, indent=1))
        write_tokenizer(source, config["vocab_size"])
        w = open_weights(checkpoint_of(source, config), choose_ops(), OPTIONS)
        noted = DrawnExperts(*(getattr(w, f.name) for f in fields(w)))
        pack_weights(noted, out, OPTIONS, Origin({}, {}))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/models/make_packed.py qwen3-30b-a3b",
    )
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--dir", type=Path, default=HOME, help=f"default: {HOME}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=INTEGER")
    args = parser.parse_args()
    changes = {key: int(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    print(make_packed(args.name, args.dir, changes))


if __name__ == "__main__":
    main()
