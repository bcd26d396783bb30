"""How the memory of an accelerator is shared out: weights, workspace, graphs, and KV from the rest.

A model that cannot fit is refused before its weights are read, as far as the headers tell
(``least_weights``); what weights really took is known when they are loaded, and KV blocks are made
of what workspace and graphs then leave. Errors name every number. Sizes are bytes.

``workspace_of`` is an upper bound by counting: the tensors that live at the same time in the part
of a layer that needs most, for the most tokens of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moeserve.comm.build import device_bytes
from moeserve.config.options import LoadOptions, RankModelOptions
from moeserve.engine.policies.layered import most_kept
from moeserve.errors import ConfigError
from moeserve.host import read_memory
from moeserve.kernels.device import Card, free_memory
from moeserve.kernels.ops import KvShape, Ops
from moeserve.models.attention import kv_shape
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble
from moeserve.models.library import resolve_model
from moeserve.models.packed.layout import is_packed
from moeserve.models.spec import DenseSpec, LayerSpec, MlaSpec, ModelSpec
from moeserve.models.survey import survey
from moeserve.offload.process_memory import kept_bytes

# What the graphs of all buckets may take together: they share one pool. None are captured on NPUs.
GRAPH_BYTES = {"cuda": 512 << 20}
# What drawing tokens takes for each logit of so many rows at once (``kernels.triton.sampling``).
SAMPLING_BYTES, SAMPLED_AT_ONCE = {"cuda": 40}, 1 << 23
# How much smaller weights become that are rounded as they are loaded, at most: those of fp32.
SHRINKS = {"int8": 4, "int4": 8}
FP32 = 4


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """``kv`` is what is left for the KV cache."""

    total: int
    weights: int
    workspace: int
    graphs: int
    kv: int


def plan_device(card: Card, weights: int, workspace: int, graphs: int, least_kv: int) -> DevicePlan:
    """Of a card on which nothing lies yet; ConfigError where that leaves less than ``least_kv``,
    the KV of one block. Pure."""
    kv = card.free - weights - workspace - graphs
    if kv < least_kv:
        raise ConfigError(
            f"{card.name} has {card.free} of {card.total} bytes free, and {weights} for weights, "
            f"{workspace} for the workspace of a step and {graphs} for graphs leave {max(0, kv)} "
            f"for KV, whose least is {least_kv}: lower max_num_batched_tokens, quantize the model "
            "(--quantization int8), spread it over more ranks (--ep), or free the card"
        )
    return DevicePlan(card.total, weights, workspace, graphs, kv)


def within(card: Card, limit: int | None) -> Card:
    """The card as it is for those who may take ``limit`` bytes of it (``--device-memory``)."""
    if limit is None:
        return card
    return Card(f"{card.name}, within device_memory={limit},", card.total, min(card.free, limit))


def least_weights(stored: int, options: LoadOptions, ranks: int) -> int:
    """What a rank's share of a checkpoint takes at least, of ``stored`` bytes in all."""
    halved = 2 if options.dtype == "bfloat16" else 1
    return stored // SHRINKS.get(options.quantization, halved) // ranks


def workspace_of(spec: ModelSpec, tokens: int, rows: int) -> int:
    """For steps of at most so many tokens, of which ``rows`` have logits."""
    layer = max(per_token(layer, spec.hidden) for layer in spec.layers)
    return tokens * (3 * FP32 * spec.hidden + layer) + 2 * FP32 * rows * spec.vocab


def per_token(layer: LayerSpec, hidden: int) -> int:
    """Of attention or of the other half, whichever is more: integer sums, their floats, and what is
    made of them, in fp32 all."""
    a, mlp = layer.attention, layer.mlp
    if isinstance(a, MlaSpec):
        attention = a.heads * (2 * (a.nope + a.rope) + 3 * a.kv_lora + 2 * a.rope + a.value)
    else:
        attention = (3 * a.heads + 4 * a.kv_heads) * a.head_dim
    if isinstance(mlp, DenseSpec):
        other = 6 * mlp.intermediate + 2 * hidden
    else:
        # Rows are gathered for each choice, and a shared expert is one more of them.
        routed = mlp.router.top_k * (6 * mlp.intermediate + 3 * hidden)
        other = routed + 6 * mlp.shared + 2 * hidden + 2 * mlp.router.num_experts
    return FP32 * max(attention + 2 * hidden, other)


@runtime_checkable
class MayKeepKvInHost(Protocol):
    """A table that keeps the KV of layers in host memory whose attention it leaves to the host."""

    def kv_in_host(self, shape: KvShape) -> bool: ...


def host_keeps_kv(decoder: Decoder, block_size: int, *, all_of_it: bool = False) -> bool:
    """Of any layer, or of all."""
    ops = decoder.ops
    if not isinstance(ops, MayKeepKvInHost):
        return False
    shapes = (kv_shape(x.attention, 1, block_size, decoder.kv_dtype) for x in decoder.spec.layers)
    kept = [ops.kv_in_host(shape) for shape in shapes]
    return all(kept) if all_of_it else any(kept)


@dataclass(frozen=True, slots=True)
class DeviceNeeds:
    """Of a card before anything is loaded, ``free`` of all of it: at least so many bytes of
    ``weights``, and a ``block`` of KV."""

    card: Card
    free: int
    weights: int
    workspace: int
    graphs: int
    block: int

    def fits(self, options: RankModelOptions, beside: int = 0) -> bool:
        """Whether all weights may lie there, beside the KV that was asked for there, of which a
        token has ``beside`` bytes of a draft model's too."""
        size = options.block_size
        blocks = options.num_blocks or -(-(options.max_model_len or size) // size)
        kv = options.kv_memory or blocks * (self.block + size * beside)
        if options.attention_device == "cpu":
            kv = 0
        return self.card.free >= self.weights + self.workspace + self.graphs + kv


def needs_of(ops: Ops, options: RankModelOptions, ranks: tuple[int, int]) -> DeviceNeeds:
    """By the checkpoint's headers."""
    folder = resolve_model(options.model)
    known = survey(folder)
    graphs = GRAPH_BYTES.get(ops.device.type, 0) if ops.replays else 0
    kept = most_kept(options.max_num_batched_tokens, options.prefill_mode)
    rows = options.max_num_batched_tokens + kept
    workspace = workspace_of(known.spec, rows, options.max_num_seqs)
    workspace += kept_bytes(kept, known.spec.hidden)
    sampled = min(SAMPLED_AT_ONCE, options.max_num_seqs * known.spec.vocab)
    workspace += SAMPLING_BYTES.get(ops.device.type, 0) * sampled
    found = free_memory(ops.device)
    card = within(found, options.device_memory)
    rounds = LoadOptions() if is_packed(folder) else options  # what is packed is as it will be
    weights = least_weights(known.weight_bytes, rounds, ranks[0])
    block = known.kv_bytes_per_token * options.block_size
    return DeviceNeeds(card, found.free, weights, workspace, graphs, block)


def load_on_device(
    checkpoint: Checkpoint,
    ops: Ops,
    options: RankModelOptions,
    own: Mapping[int, Sequence[int]] | None,
    progress: Callable[[int, int], None] | None,
    ranks: tuple[int, int],
) -> tuple[Decoder, int]:
    """The decoder on the device of ``ops``, and the bytes that KV may take, there or in the host's
    memory. ``ranks`` are all, and those of this node."""
    needs = needs_of(ops, options, ranks)
    card = needs.card
    plan_device(card, needs.weights, needs.workspace, needs.graphs, needs.block)
    try:
        decoder = assemble(checkpoint, ops, options, experts=own, progress=progress)
    except RuntimeError as full:
        if not is_full(full):
            raise
        raise ConfigError(
            f"{card.name} has {card.free} of {card.total} bytes free, and the weights need more: "
            "quantize the model (--quantization int8), or spread it over more ranks (--ep)"
        ) from full
    weights = needs.free - free_memory(ops.device).free
    block = decoder.kv_bytes_per_token * options.block_size
    plan = plan_device(card, weights, needs.workspace, needs.graphs, block)
    logging.getLogger("moeserve.engine").info(
        "%s: of %d bytes %d are weights, %d workspace, %d graphs; %d are left for KV",
        card.name,
        plan.total,
        plan.weights,
        plan.workspace,
        plan.graphs,
        plan.kv,
    )
    plan = with_exchange(plan, card, decoder, options, ranks[0])
    room = read_memory().available // ranks[1]
    if host_keeps_kv(decoder, options.block_size, all_of_it=True):
        return decoder, room
    if host_keeps_kv(decoder, options.block_size):
        return decoder, min(plan.kv, room)
    return decoder, plan.kv


def is_full(error: RuntimeError) -> bool:
    """Whether a device says so that it has no memory left."""
    return "out of memory" in str(error)


def with_exchange(
    plan: DevicePlan, card: Card, decoder: Decoder, options: RankModelOptions, world: int
) -> DevicePlan:
    """The plan with room for what travels between the devices of so many ranks; ConfigError as
    ``plan_device``."""
    budget = options.max_num_batched_tokens
    tokens = budget + most_kept(budget, options.prefill_mode)
    between = device_bytes(decoder.ops, decoder.stack.layers, tokens, world)
    if not between:
        return plan
    log = logging.getLogger("moeserve.engine")
    log.info("%s: of KV's %d bytes %d are kept for tokens of ranks", card.name, plan.kv, between)
    block = decoder.kv_bytes_per_token * options.block_size
    return plan_device(card, plan.weights, plan.workspace + between, plan.graphs, block)
