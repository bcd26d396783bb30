"""Make a GGUF file to measure with, of any size: random blocks as llama.cpp's Q4_K_M has them.

    PEERS/llamacpp/bin/python bench/models/make_q4_k_m.py FOLDER [OUT.gguf]

FOLDER has a config of Qwen3-MoE and a tokenizer (`make_packed.py`, `make.py`); without OUT the file
is FOLDER/gguf/q4_k_m.gguf. Runs in llama.cpp's venv. There is no checkpoint: codes are drawn, and
scales such that a matrix keeps the size of what passes through it. Which tensors have Q6_K is what
``llama_model_quantize`` gives for the kind: of values and down projections the first and last
eighth of layers and every third between, and the head. Memory holds a tensor. The same config
gives the same bytes; a file that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from to_gguf import add_config, add_tokenizer

Kind = gguf.GGMLQuantizationType
Bytes = NDArray[np.uint8]
VALUES = 256  # of a block of Q4_K and of Q6_K
SEED = 11
# Standard deviations of codes that are all equally likely.
SPREAD_4, SPREAD_6 = (255 / 12) ** 0.5, (4095 / 12) ** 0.5


@dataclass(frozen=True, slots=True)
class Drawn:
    """A tensor to write: ``shape`` as llama.cpp's converter has it, features last."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * size

    def make(self) -> np.ndarray:
        """uint8 of the blocks, or fp32."""
        draw = np.random.default_rng(SEED + zlib.crc32(self.name.encode()))
        if self.kind is Kind.F32:
            near = 1.0 if "norm" in self.name else 0.0
            spread = 0.1 if near else 1.2 * self.shape[-1] ** -0.5
            return (near + spread * draw.standard_normal(self.shape)).astype(np.float32)
        blocks = math.prod(self.shape) // VALUES
        made = BLOCKS[self.kind](draw, blocks, 1.2 * self.shape[-1] ** -0.5)
        return made.reshape(*self.shape[:-1], -1)


def q4_k(draw: np.random.Generator, blocks: int, spread: float) -> Bytes:
    """d, dmin, scales and minima of 8 groups in 6 bits each, codes: 144 bytes. A group's minimum is
    its scale, and dmin such that values lie evenly around 0."""
    made = drawn_bytes(draw, blocks, 144)
    scale = draw.integers(32, 64, (blocks, 8), np.uint8)
    low, high = scale[:, :4], scale[:, 4:]
    made[:, :2] = half(spread / (SPREAD_4 * 48))
    made[:, 2:4] = half(7.5 * spread / (SPREAD_4 * 48))
    made[:, 4:8] = made[:, 8:12] = low | (high >> 4) << 6
    made[:, 12:16] = (high & 15) | (high & 15) << 4
    return made


def q6_k(draw: np.random.Generator, blocks: int, spread: float) -> Bytes:
    """Codes, scales of 16 groups in 8 bits, d: 210 bytes."""
    made = drawn_bytes(draw, blocks, 210)
    made[:, 192:208] = draw.integers(64, 128, (blocks, 16), np.uint8)
    made[:, 208:] = half(spread / (SPREAD_6 * 96))
    return made


BLOCKS: dict[Kind, Callable[[np.random.Generator, int, float], Bytes]] = {
    Kind.Q4_K: q4_k,
    Kind.Q6_K: q6_k,
}


def drawn_bytes(draw: np.random.Generator, blocks: int, size: int) -> Bytes:
    words = draw.integers(0, 1 << 64, -(-blocks * size // 8), np.uint64)
    return words.view(np.uint8)[: blocks * size].reshape(blocks, size)


def half(value: float) -> Bytes:
    return np.array([value], "<f2").view(np.uint8)


def takes_more_bits(layer: int, layers: int) -> bool:
    """Whether values and down projections of a layer are in Q6_K."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def tensors(c: dict[str, Any]) -> Iterator[Drawn]:
    hidden, vocab, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    size, inner, experts = c["head_dim"], c["moe_intermediate_size"], c["num_experts"]
    wide, narrow = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    yield Drawn("token_embd.weight", (vocab, hidden), Kind.Q4_K)
    yield Drawn("output.weight", (vocab, hidden), Kind.Q6_K)
    yield Drawn("output_norm.weight", (hidden,), Kind.F32)
    for i in range(layers):
        more = Kind.Q6_K if takes_more_bits(i, layers) else Kind.Q4_K
        for name, shape, kind in (
            ("attn_norm", (hidden,), Kind.F32),
            ("attn_q", (wide, hidden), Kind.Q4_K),
            ("attn_k", (narrow, hidden), Kind.Q4_K),
            ("attn_v", (narrow, hidden), more),
            ("attn_q_norm", (size,), Kind.F32),
            ("attn_k_norm", (size,), Kind.F32),
            ("attn_output", (hidden, wide), Kind.Q4_K),
            ("ffn_norm", (hidden,), Kind.F32),
            ("ffn_gate_inp", (experts, hidden), Kind.F32),
            ("ffn_gate_exps", (experts, inner, hidden), Kind.Q4_K),
            ("ffn_up_exps", (experts, inner, hidden), Kind.Q4_K),
            ("ffn_down_exps", (experts, hidden, inner), more),
        ):
            yield Drawn(f"blk.{i}.{name}.weight", shape, kind)


def write(folder: Path, target: Path) -> None:
    """Beside its place, and moved there when it is whole."""
    config = json.loads((folder / "config.json").read_text())
    listed, partial = list(tensors(config)), target.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_config(writer, config)
    add_tokenizer(writer, folder, config)
    for one in listed:
        plain = one.kind is Kind.F32
        shape = one.shape if plain else gguf.quant_shape_to_byte_shape(one.shape, one.kind)
        dtype = np.dtype(np.float32 if plain else np.uint8)
        raw = None if plain else one.kind
        writer.add_tensor_info(one.name, shape, dtype, one.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in listed:
        writer.write_tensor_data(one.make())
    writer.close()
    partial.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    args = parser.parse_args()
    target = args.out or args.folder / "gguf" / "q4_k_m.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write(args.folder, target)
    print(target)


if __name__ == "__main__":
    main()
