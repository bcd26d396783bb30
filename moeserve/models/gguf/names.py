"""Tensors of a GGUF file under the names that a folder's have.

Floats keep their name's end (``weight``, ``bias``); blocks stand beside the module as bytes of
rows, under an end that says their type (``gguf_q4_k``). Experts, which lie in one tensor, become
one each, where they lie. What no name here explains keeps its own, so that it is not dropped in
silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moeserve.errors import CheckpointError
from moeserve.models.gguf.arrange import Make, alternating, latent_projection, neighbours_apart
from moeserve.models.gguf.block_types import suffix_of
from moeserve.models.gguf.header import GgufTensor
from moeserve.models.gguf.metadata import Metadata
from moeserve.models.names import TensorNames

MOST_EXPERTS = 4096
# Of names: four times what the largest published models have.
MOST_PARTS = 1 << 18

_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}
_PARTS = ("gate", "up", "down")
_IN_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class NamedPart:
    """A tensor as a folder has it: bytes ``start`` to ``end`` of the file that ``tensor`` is in, or
    what ``make`` makes. ``kind`` is the type's name in safetensors; ``U8`` for blocks."""

    name: str
    kind: str
    shape: tuple[int, ...]
    tensor: GgufTensor
    start: int
    end: int
    make: Make | None = None


@dataclass(frozen=True, slots=True)
class Naming:
    """How a family calls its tensors. ``turned`` as in ``config.Architecture``; experts of
    ``alternating`` families have their biases of gate and up in one."""

    names: TensorNames
    turned: bool
    heads: int
    kv_heads: int
    experts: int

    @property
    def block(self) -> str:
        return self.names.blocks[0]


def named_parts(m: Metadata, naming: Naming) -> Iterator[NamedPart]:
    """Of all tensors. CheckpointError for shapes that no model has."""
    if naming.experts > MOST_EXPERTS:
        raise CheckpointError(
            f"{m.file}: {naming.experts} experts, at most {MOST_EXPERTS} are read"
        )
    for tensor in m.tensors.values():
        top, _, end = tensor.name.rpartition(".")
        inside = _IN_LAYER.fullmatch(tensor.name)
        if inside is not None:
            layer, stem, end = inside.groups()
            yield from _in_layer(m, naming, tensor, f"model.layers.{int(layer)}", stem, end)
        elif top in _TOP:
            yield _whole(tensor, _TOP[top], end)
        else:
            yield _unknown(tensor)


def _in_layer(
    m: Metadata, naming: Naming, tensor: GgufTensor, prefix: str, stem: str, end: str
) -> Iterator[NamedPart]:
    names, block = naming.names, f"{prefix}.{naming.block}"
    own: Mapping[str, str] = {
        "ffn_gate_inp": f"{block}.{names.router}",
        **{f"ffn_{p}_shexp": f"{block}.{names.shared}.{p}_proj" for p in _PARTS},
    }
    experts = re.fullmatch(r"ffn_(gate|up|down|gate_up)_exps", stem)
    one = re.fullmatch(r"ffn_(gate|up|down)\.(\d{1,4})", stem)  # as files had them at first
    if one is not None:
        part = naming.names.expert_parts[_PARTS.index(one[1])]
        yield _whole(tensor, f"{block}.experts.{int(one[2])}.{part}", end)
    elif experts is not None:
        yield from _experts(m, naming, tensor, f"{block}.experts", experts[1], end)
    elif naming.turned and stem in ("attn_q", "attn_k"):
        heads = naming.heads if stem == "attn_q" else naming.kv_heads
        if tensor.shape[0] % (2 * heads):
            raise _wrong(m, tensor, f"rows of {heads} heads")
        make = neighbours_apart(tensor, heads)
        yield _whole(tensor, f"{prefix}.{_LAYER[stem]}", end, make)
    elif stem in own or stem in _LAYER:
        yield _whole(tensor, own.get(stem) or f"{prefix}.{_LAYER[stem]}", end)
    elif stem == "attn_sinks":
        yield _as(tensor, f"{prefix}.self_attn.sinks", tensor.shape)
    elif stem == "exp_probs_b":
        yield _as(tensor, f"{block}.{names.router}.{names.selection_bias}", tensor.shape)
    elif stem == "ffn_gate_inp_shexp" and tensor.type.plain:
        yield _as(tensor, f"{block}.{names.shared_gate}.{end}", (1, tensor.shape[-1]))
    elif stem == "attn_k_b":
        yield _latent(m, tensor, prefix)
    elif stem != "attn_v_b":
        yield _unknown(tensor)


def _latent(m: Metadata, keys: GgufTensor, prefix: str) -> NamedPart:
    values = m.tensor(keys.name.replace("attn_k_b", "attn_v_b"))
    if len(keys.shape) != 3 or len(values.shape) != 3:
        raise _wrong(m, keys, "three dimensions")
    (heads, latent, nope), (others, width, size) = keys.shape, values.shape
    if heads != others or latent != size:
        raise _wrong(m, keys, f"those of {values.name}, {list(values.shape)}")
    shape = (heads * (nope + width), latent)
    make = latent_projection(keys, values)
    name = f"{prefix}.self_attn.kv_b_proj.weight"
    return NamedPart(name, "F32", shape, keys, keys.start, keys.end, make)


def _experts(
    m: Metadata, naming: Naming, tensor: GgufTensor, prefix: str, part: str, end: str
) -> Iterator[NamedPart]:
    if tensor.shape[0] != naming.experts:
        raise _wrong(m, tensor, f"{naming.experts} experts")
    if end == "bias":
        yield from _expert_biases(m, tensor, prefix, part)
        return
    if len(tensor.shape) != 3:
        raise _wrong(m, tensor, "three dimensions")
    gate, up, down = naming.names.expert_parts
    called = {"gate": (gate,), "up": (up,), "down": (down,), "gate_up": (gate, up)}[part]
    count, rows, _ = tensor.shape
    if rows % len(called):
        raise _wrong(m, tensor, "as many rows of gate as of up")
    rows //= len(called)
    nbytes, at = rows * tensor.row_bytes, tensor.start
    for expert in range(count):
        for own in called:
            yield _rows(tensor, f"{prefix}.{expert}.{own}", rows, at, at + nbytes)
            at += nbytes


def _expert_biases(m: Metadata, tensor: GgufTensor, prefix: str, part: str) -> Iterator[NamedPart]:
    if part == "down":
        yield _as(tensor, f"{prefix}.down_proj_bias", tensor.shape)
    elif part == "gate":
        up = m.tensor(tensor.name.replace("ffn_gate_exps", "ffn_up_exps"))
        if up.shape != tensor.shape or len(up.shape) != 2:
            raise _wrong(m, tensor, f"those of {up.name}, {list(up.shape)}")
        shape = (up.shape[0], 2 * up.shape[1])
        made = (tensor.start, tensor.end, alternating(tensor, up))
        yield NamedPart(f"{prefix}.gate_up_proj_bias", "F32", shape, tensor, *made)


def _whole(tensor: GgufTensor, module: str, end: str, make: Make | None = None) -> NamedPart:
    if tensor.type.plain or end != "weight":
        return _as(tensor, f"{module}.{end}", tensor.shape, make)
    return _rows(tensor, module, None, tensor.start, tensor.end, make)


def _rows(
    tensor: GgufTensor, module: str, rows: int | None, start: int, end: int,
    make: Make | None = None,
) -> NamedPart:  # fmt: skip
    """Some rows of a tensor, as a matrix."""
    kind = tensor.type
    outer = tensor.shape[:-1] if rows is None else (rows,)
    if kind.plain:
        name, shape = f"{module}.weight", (*outer, tensor.shape[-1])
        return NamedPart(name, kind.name, shape, tensor, start, end, make)
    name, shape = f"{module}.{suffix_of(kind.name)}", (*outer, tensor.row_bytes)
    return NamedPart(name, "U8", shape, tensor, start, end, make)


def _as(
    tensor: GgufTensor, name: str, shape: tuple[int, ...], make: Make | None = None
) -> NamedPart:
    kind = tensor.type.name if tensor.type.plain else "U8"
    if not tensor.type.plain:
        shape = (*shape[:-1], tensor.row_bytes)
    return NamedPart(name, kind, shape, tensor, tensor.start, tensor.end, make)


def _unknown(tensor: GgufTensor) -> NamedPart:
    return _as(tensor, tensor.name, tensor.shape)


def _wrong(m: Metadata, tensor: GgufTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{m.file}: tensor {tensor.name} has the shape {list(tensor.shape)}, expected {expected}; "
        f"download it again"
    )
