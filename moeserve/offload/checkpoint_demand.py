"""What the model in a folder will ask of a machine: its ``ModelDemand``, from headers alone.

``StoredSizes`` is all that depends on how a folder stores its weights: bytes of each part of each
layer, and how they are held. ``stored_sizes`` finds it for whatever a model is stored in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from moeserve.config.options import AS_STORED, LoadOptions, RankModelOptions
from moeserve.kernels.matrix import GROUP
from moeserve.kernels.ops import Ops
from moeserve.kernels.records import MatrixForm
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.attention import kv_shape
from moeserve.models.decoder import assemble, skeleton_decoder
from moeserve.models.packed.checkpoint import PackedCheckpoint
from moeserve.models.packed.layout import ExpertForm, Leaf, is_packed
from moeserve.models.spec import AttentionSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec
from moeserve.models.survey import Headers
from moeserve.models.weights import torch_dtype
from moeserve.offload.model.demand import (
    AttentionDemand,
    ExpertsDemand,
    LayerDemand,
    MatrixDemand,
    ModelDemand,
)
from moeserve.offload.process_memory import drafting_bytes

PARTS = ("attention", "router", "shared", "experts", "dense")
# Bytes of a weight; of int8 and int4 with scales, as products of usual length have them.
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 1024, "int4": 0.5 + 5 / GROUP}
KIND_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
BLOCK = 16


@dataclass(frozen=True, slots=True)
class StoredSizes:
    """``layers[i]`` has the bytes of each of ``PARTS`` that layer i has, as they are held in
    memory where nothing is rounded. ``floats`` is the kind of what is not quantised. ``drafts`` and
    ``draft_experts`` are those of multi-token prediction's module, without its routed experts, and
    these."""

    spec: ModelSpec
    floats: str
    layers: tuple[Mapping[str, int], ...]
    embedding: int
    head: int
    other: int = 0
    drafts: int = 0
    draft_experts: int = 0

    @property
    def total(self) -> int:
        outside = self.embedding + self.head + self.other + self.drafts + self.draft_experts
        return sum(sum(of.values()) for of in self.layers) + outside


def stored_sizes(path: Path, options: LoadOptions = AS_STORED) -> StoredSizes:
    """Of a folder or file; raises what loading it would about its config, tensors and shapes."""
    if is_packed(path):
        return sizes_in_packed(PackedCheckpoint.open(path))
    return sizes_in_tensors(path, options)


def sizes_in_packed(checkpoint: PackedCheckpoint) -> StoredSizes:
    """As the regions have them: nothing is rounded when they are loaded."""
    header, decoder = checkpoint.header, skeleton_decoder(checkpoint)
    layers = []
    for layer, _ in zip(header.layers, decoder.spec.layers, strict=False):
        of: Counter[str] = Counter()
        for name, leaf in layer.trunk.leaves.items():
            of[part_of_leaf(name)] += packed_bytes(leaf)
        if layer.experts is not None:
            of["experts"] = layer.experts.total
        layers.append(dict(of))
    ends = {name: packed_bytes(leaf) for name, leaf in header.ends.leaves.items()}
    embedding, head = ends.pop("embedding"), ends.pop("head.head")
    drafts = draft_experts = 0
    if header.mtp is not None:
        module = header.layers[len(decoder.spec.layers) :]
        drafts = header.mtp.region.nbytes + sum(of.trunk.region.nbytes for of in module)
        draft_experts = sum(of.experts.total for of in module if of.experts is not None)
    floats, other = KIND_OF[checkpoint.dtype_held], sum(ends.values())
    return StoredSizes(
        decoder.spec, floats, tuple(layers), embedding, head, other, drafts, draft_experts
    )


def part_of_leaf(name: str) -> str:
    """Which of ``PARTS`` a leaf of a layer's trunk belongs to; norms go with attention."""
    words = name.split(".")
    if words[-1] == "norm_H":
        return "attention"
    if words[0] == "moe":
        return "shared"
    return words[0] if words[0] in PARTS else "dense"


def packed_bytes(leaf: Leaf) -> int:
    """Without what fills up lines and panels."""
    if isinstance(leaf, ExpertForm):
        return packed_bytes(leaf.gate_up) + packed_bytes(leaf.down)
    if isinstance(leaf, MatrixForm):
        weights = (leaf.count or 1) * leaf.out_features * leaf.in_features
        return round(weights * BYTES[leaf.kind])
    return math.prod(leaf.shape) * (4 if leaf.dtype == "float32" else 2)


def sizes_in_tensors(path: Path, options: LoadOptions = AS_STORED) -> StoredSizes:
    """Of safetensors and GGUF."""
    headers = Headers.open(path)
    with torch.device("meta"):
        decoder = assemble(headers, ReferenceOps())
    spec = decoder.spec
    held = torch_dtype(options.dtype) or decoder.dtype
    layers: list[dict[str, int]] = [{} for _ in spec.layers]
    embedding = head = other = drafts = draft_experts = 0
    for name, size in headers.held_bytes(held).items():
        words = name.split(".")
        if words[:2] == ["model", "layers"] and int(words[2]) < len(layers):
            of, part = layers[int(words[2])], part_of(words)
            of[part] = of.get(part, 0) + size
        elif words[:2] == ["model", "layers"] and part_of(words) == "experts":
            draft_experts += size
        elif words[:2] == ["model", "layers"]:
            drafts += size
        elif "lm_head" in words:
            head += size
        elif "embed_tokens" in words:
            embedding += size
        else:
            other += size
    if spec.tied_embeddings:
        head = embedding
    return StoredSizes(
        spec, KIND_OF[held], tuple(layers), embedding, head, other, drafts, draft_experts
    )


def part_of(words: list[str]) -> str:
    """Which of ``PARTS`` a tensor of a layer belongs to; norms go with attention."""
    if "experts" in words:
        return "experts"
    if "shared_expert" in words or "shared_experts" in words or "shared_expert_gate" in words:
        return "shared"
    if "mlp" not in words and "block_sparse_moe" not in words:
        return "attention"
    return "router" if "gate" in words or "router" in words else "dense"


def demand_of(sizes: StoredSizes, options: LoadOptions, ops: Ops) -> ModelDemand:
    """With weights and KV as ``options`` have them; what dtype floats have is in ``sizes``.
    ``ops`` knows what a block of KV takes."""
    spec = sizes.spec
    floats = torch.bfloat16 if sizes.floats == "bf16" else torch.float32
    kv_dtype = torch_dtype(options.kv_dtype) or floats
    layers = [
        layer_demand(layer, sizes, of, options, kv_dtype, ops)
        for layer, of in zip(spec.layers, sizes.layers, strict=True)
    ]
    head = matrix_demand(
        spec.vocab * spec.hidden, sizes.head, rounded_to(options, "head"), sizes.floats
    )
    return ModelDemand(
        layers=tuple((len(list(run)), layer) for layer, run in groupby(layers)),
        head=head,
        embedding_bytes=sizes.embedding,
        hidden=spec.hidden,
        vocab=spec.vocab,
        max_positions=spec.max_positions,
        other_bytes=sizes.other + module_bytes(sizes, options, ops, kv_dtype),
    )


def module_bytes(sizes: StoredSizes, options: LoadOptions, ops: Ops, kv_dtype: torch.dtype) -> int:
    """Of multi-token prediction, held beside what the layers stream into: all of it as it comes
    with the model; within a budget only where it guesses, and then without its experts."""
    if not isinstance(options, RankModelOptions) or options.memory is None or not sizes.drafts:
        return sizes.drafts + sizes.draft_experts
    if not options.asks_the_module:
        return 0
    return sizes.drafts + drafting_bytes(sizes.spec, ops, kv_dtype, options)


def rounded_to(options: LoadOptions, part: str) -> str:
    """As ``weights.Rounding`` has it: "auto" as stored, "none" floats, "int8" or "int4"."""
    if options.quantization not in ("int8", "int4") or part == "router":
        return "none" if options.quantization == "none" else "auto"
    if part == "attention" and not options.quantize_attention:
        return "none"
    return options.quantization if part in ("experts", "shared", "dense") else "int8"


def matrix_demand(weights: int, stored: int, to: str, floats: str) -> MatrixDemand:
    """``weights`` of which ``stored`` bytes are held unless they are rounded."""
    kind = kind_of(stored, weights)
    if to == "none":
        kind = kind if kind in ("fp32", "bf16") else floats
    elif to != "auto":
        kind = to
    if kind == kind_of(stored, weights):
        return MatrixDemand(weights, stored, kind)
    return MatrixDemand(weights, round(weights * BYTES[kind]), kind)


def kind_of(nbytes: int, weights: int) -> str:
    """How so many weights are held in so many bytes, scales and norms included."""
    each = nbytes / max(1, weights)
    return next((kind for kind, least in KINDS_FROM if each >= least), "int4")


KINDS_FROM = (("fp32", 3.5), ("bf16", 1.75), ("int8", 0.9))


def layer_demand(
    layer: LayerSpec,
    sizes: StoredSizes,
    of: Mapping[str, int],
    options: LoadOptions,
    kv_dtype: torch.dtype,
    ops: Ops,
) -> LayerDemand:
    hidden, floats, mlp = sizes.spec.hidden, sizes.floats, layer.mlp

    def matrix(part: str, weights: int) -> MatrixDemand:
        return matrix_demand(weights, of.get(part, 0), rounded_to(options, part), floats)

    always = [matrix("attention", attention_weights(layer.attention, hidden))]
    experts = None
    if isinstance(mlp, MoeSpec):
        router = mlp.router
        weights = router.num_experts * hidden
        always.append(MatrixDemand(weights, 4 * weights, "fp32"))
        if mlp.shared:
            always.append(matrix("shared", 3 * mlp.shared * hidden))
        all_of_them = matrix("experts", router.num_experts * 3 * mlp.intermediate * hidden)
        each = MatrixDemand(
            3 * mlp.intermediate * hidden,
            all_of_them.nbytes // router.num_experts,
            all_of_them.kind,
        )
        experts = ExpertsDemand(each, router.num_experts, router.top_k)
    else:
        always.append(matrix("dense", 3 * mlp.intermediate * hidden))
    return LayerDemand(tuple(always), attention_demand(layer.attention, kv_dtype, ops), experts)


def attention_weights(a: AttentionSpec, hidden: int) -> int:
    """Of all matrices of a layer's attention."""
    return sum(attention_matrices(a, hidden))


def attention_matrices(a: AttentionSpec, hidden: int) -> Iterator[int]:
    """Weights of each of them."""
    if isinstance(a, GqaSpec):
        wide, narrow = a.heads * a.head_dim, a.kv_heads * a.head_dim
        yield from (wide * hidden, narrow * hidden, narrow * hidden, hidden * wide)
        return
    queries = a.heads * (a.nope + a.rope)
    if a.q_lora is None:
        yield queries * hidden
    else:
        yield from (a.q_lora * hidden, queries * a.q_lora)
    yield (a.kv_lora + a.rope) * hidden
    yield a.heads * a.kv_lora * (a.nope + a.value)
    yield hidden * a.heads * a.value


def attention_demand(a: AttentionSpec, kv_dtype: torch.dtype, ops: Ops) -> AttentionDemand:
    nbytes = ops.kv_bytes_per_block(kv_shape(a, 1, BLOCK, kv_dtype)) // BLOCK
    kind = KIND_OF[kv_dtype]
    if isinstance(a, GqaSpec):
        return AttentionDemand(kind, nbytes, 4 * a.heads * a.head_dim, a.window)
    operations = 2 * a.heads * (2 * a.kv_lora + a.rope)
    return AttentionDemand(f"{kind}-latent", nbytes, operations)
