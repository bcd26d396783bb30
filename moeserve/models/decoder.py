"""The one decoder: token ids in, logits out, over a paged cache and an op table.

Every row's logits depend only on its own sequence (law 1): all arithmetic goes through ``Ops``,
whose rows are independent; in between there are gathers, copies and exact elementwise adds. The
residual stream is fp32. Letters as in ``kernels.ops``, R wanted rows, W vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moeserve.config.options import AS_STORED, LoadOptions
from moeserve.errors import CheckpointError
from moeserve.kernels.guesses import GuessModule, module_states
from moeserve.kernels.host_copy import to_host
from moeserve.kernels.ops import (
    HeadWeights,
    KvCache,
    Layer,
    Linear,
    Ops,
    Part,
    Rope,
    Stack,
    Step,
    Trunk,
)
from moeserve.kernels.wire import Combine
from moeserve.models.attention import kv_shape, load_attention
from moeserve.models.batch import GroupPass, KeptPass, StepBatch, first_rows
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.families import read_spec
from moeserve.models.fields import Fields
from moeserve.models.formats.layouts import Stored
from moeserve.models.formats.method import read_method
from moeserve.models.group_routing import take_routed
from moeserve.models.layer_runner import GroupRows, LayerRunner, LocalLayerRunner
from moeserve.models.moe import RoutingObserver, load_mlp
from moeserve.models.names import TensorNames
from moeserve.models.packed.checkpoint import PackedCheckpoint, open_checkpoint
from moeserve.models.packed.decoder import map_decoder
from moeserve.models.packed.skeleton import skeleton_of
from moeserve.models.rope import rope_tables
from moeserve.models.spec import LayerSpec, ModelSpec, MoeSpec
from moeserve.models.unread import explained
from moeserve.models.weights import Rounding, Weights, torch_dtype

# Logits that stay in memory from step to step, 16 MiB: of more, Python's share is small anyway.
MOST_KEPT = 1 << 22


@dataclass(frozen=True, slots=True)
class ModelKvCache:
    """One ``KvCache`` per decoder layer, and the MTP block's last if it was asked for."""

    layers: tuple[KvCache, ...]
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Mtp:
    """DeepSeek-V3's multi-token prediction module: one more block that looks one token ahead.
    ``runner`` runs it."""

    embedding_WH: Tensor
    embedding_norm_H: Tensor
    hidden_norm_H: Tensor
    project: Linear
    stack: Stack
    head: Part[HeadWeights]
    runner: LayerRunner


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model. ``unread`` lists tensors that were left aside on purpose. ``stack`` are the
    layers as they were loaded, on a rank of several with its own experts alone; ``runner`` runs
    them."""

    spec: ModelSpec
    ops: Ops
    dtype: torch.dtype
    kv_dtype: torch.dtype
    embedding_WH: Tensor
    stack: Stack
    head: Part[HeadWeights]
    rope: Rope
    mtp: Mtp | None
    unread: tuple[str, ...]
    runner: LayerRunner

    def over(self, runner: LayerRunner) -> Decoder:
        """The same with other means to run its layers. These are the runner's alone from here on:
        what it lets go of is freed."""
        return replace(self, stack=Stack((), None), runner=runner)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all decoder layers, without the MTP block; a block costs as much for each token."""
        shapes = (kv_shape(layer.attention, 1, 1, self.kv_dtype) for layer in self.spec.layers)
        return sum(self.ops.kv_bytes_per_block(shape) for shape in shapes)

    def new_cache(self, num_blocks: int, block_size: int, *, mtp: bool = False) -> ModelKvCache:
        specs = [layer.attention for layer in self.spec.layers]
        if mtp and self.spec.mtp is not None:
            specs.append(self.spec.mtp.attention)
        shapes = (kv_shape(s, num_blocks, block_size, self.kv_dtype) for s in specs)
        return ModelKvCache(tuple(self.ops.new_kv(s) for s in shapes), num_blocks, block_size)

    def forward(
        self, step: StepBatch, cache: ModelKvCache, observer: RoutingObserver | None = None
    ) -> Tensor:
        """Runs the step's tokens, writes their KV, and returns logits_RW of the wanted rows."""
        return self.forward_micro([step], cache, observer)[0]

    def forward_micro(
        self,
        steps: Sequence[StepBatch],
        cache: ModelKvCache,
        observer: RoutingObserver | None = None,
        states: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """``forward`` of microbatches; ``trunk`` of each is appended to ``states``.

        Where there are several ranks, all come with the same number of microbatches, some of which
        may be empty. Where a sequence is in several, the earlier one has the earlier tokens. The
        logits and states of a step that comes again (``StepBatch.kept``) are valid until it does.
        Only the first may have a ``StepBatch.group``, which is brought up to date.
        """
        kept = steps[0].kept
        if kept is None and len(steps) == 1 and self.ops.replays and steps[0].decodes:
            kept = KeptPass()
        if steps[0].group is not None or (states is not None and self.ops.replays):
            kept = None
        if kept is not None and observer is None and self._keeps(steps[0]):
            logits = self._run_again(steps[0], kept, cache)
            if states is not None:
                assert kept.states_TH is not None, "where passes are not replayed"
                states.append(kept.states_TH)
            return [logits]
        hidden = self._layers(steps, cache, observer)
        if states is not None:
            states += hidden
        return [
            self.ops.head(x_TH, step.logit_rows_R, self.head)
            for step, x_TH in zip(steps, hidden, strict=True)
        ]

    def _keeps(self, step: StepBatch) -> bool:
        """Whether the logits of a step may stay in memory, and its layers are all here."""
        small = len(step.logit_rows_R) * self.spec.vocab <= MOST_KEPT
        return (small or self.ops.replays) and isinstance(self.runner, LocalLayerRunner)

    def _run_again(self, step: StepBatch, kept: KeptPass, cache: ModelKvCache) -> Tensor:
        """The one step, with what was made of it when it came first."""
        if kept.run is None or kept.decoder is not self or kept.cache is not cache:
            kept.decoder, kept.cache = self, cache
            if not self.ops.replays:
                size = len(step.token_ids_T), self.spec.hidden
                kept.states_TH = torch.empty(size, device=self.ops.device)
            kept.run = self.ops.new_pass(
                Trunk(self.embedding_WH, self.rope, self.stack, self.head),
                cache.layers[: len(self.spec.layers)],
                step.token_ids_T,
                step.positions_T,
                step.slot_T,
                step.attention,
                step.logit_rows_R,
                kept.states_TH,
            )
        return kept.run()

    def trunk(
        self, step: StepBatch, cache: ModelKvCache, observer: RoutingObserver | None = None
    ) -> Tensor:
        """The residual stream after the last block, before the final norm: [T, H]."""
        return self._layers([step], cache, observer)[0]

    def _layers(
        self, steps: Sequence[StepBatch], cache: ModelKvCache, observer: RoutingObserver | None
    ) -> list[Tensor]:
        caches = cache.layers[: len(self.spec.layers)]
        hidden = [self.ops.embed(self.embedding_WH, step.token_ids_T) for step in steps]
        routed: list[list[Tensor]] | None = None if observer is None else [[] for _ in steps]
        if (group := steps[0].group) is not None:
            self._run_group(group, steps, hidden, caches, routed)
        else:
            shared = [self._shared(step) if len(step.token_ids_T) else None for step in steps]
            self.runner.run(hidden, shared, caches, routed)
        if observer is not None and routed is not None:
            if group is not None:
                routed[0] = take_routed(group, routed[0], self.spec)
            self._show_routing(observer, routed)
        return hidden

    def _run_group(
        self,
        group: GroupPass,
        steps: Sequence[StepBatch],
        hidden: Sequence[Tensor],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None,
    ) -> None:
        """All layers, of which the last rows of the first step run in the group's alone."""
        everywhere = len(hidden[0]) - group.rows
        behind_PH = hidden[0][everywhere:]
        if group.states_PH is not None:
            behind_PH.copy_(group.states_PH)
        parts = (first_rows(steps[0], everywhere), *steps[1:])
        shared = [self._shared(step) if len(step.token_ids_T) else None for step in parts]
        rows = GroupRows(group.start, group.stop, self._shared(steps[0]))
        self.runner.run(hidden, shared, caches, routed, rows)
        group.states_PH = None if group.last else behind_PH

    def _show_routing(self, observer: RoutingObserver, routed: Sequence[list[Tensor]]) -> None:
        """Every MoE layer's choices for the tokens of all microbatches, of which there may be
        none. Here they are copied to the host. Those of a group of layers are shown with the last
        of these, for all layers."""
        for l, layer in enumerate(self.spec.moe_layers):
            parts = [of_layers[l] for of_layers in routed if of_layers]
            if not parts:
                mlp = self.spec.layers[layer].mlp
                assert isinstance(mlp, MoeSpec), layer
                parts = [torch.empty(0, mlp.router.top_k, dtype=torch.int32)]
            observer.record(layer, to_host(parts[0] if len(parts) == 1 else torch.cat(parts)))

    def final_norm(self, hidden_RH: Tensor) -> Tensor:
        weights = self.head.weights
        return self.ops.rms_norm(hidden_RH, weights.norm_H, weights.eps)

    def _shared(self, step: StepBatch) -> Step:
        """What all layers need of the step."""
        return self.ops.new_step(self.rope, step.positions_T, step.slot_T, step.attention)

    def mtp_forward(self, normed_TH: Tensor, step: StepBatch, cache: ModelKvCache) -> Tensor:
        """Draft logits_RW of the token after next: what the MTP block's head makes of its states.

        Row t joins the trunk's state at position p, after the final norm, with the token at p + 1:
        ``step.token_ids_T`` are those next tokens, ``step.positions_T`` their states' positions.
        The block's KV is the cache's last.
        """
        module, ids_T, kv = self.guess_module(), step.token_ids_T, cache.layers[-1]
        x_TH = module_states(self.ops, module, normed_TH, ids_T, self._shared(step), kv)
        return self.ops.head(x_TH, step.logit_rows_R, module.head)

    def guess_module(self) -> GuessModule:
        """The MTP module as chains of guesses take it."""
        mtp, trunk = self.mtp, self.head.weights
        if mtp is None:
            raise CheckpointError(f"{self.spec.architecture}: this checkpoint has no MTP module")
        norms = trunk.norm_H, mtp.embedding_norm_H, mtp.hidden_norm_H
        eps, table, project = self.spec.norm_eps, mtp.embedding_WH, mtp.project
        run = None if isinstance(mtp.runner, LocalLayerRunner) else _one_layer(mtp.runner)
        return GuessModule(*norms, eps, table, project, self.rope, mtp.stack, mtp.head, run)

    def new_mtp_cache(self, num_blocks: int, block_size: int) -> ModelKvCache:
        """Of the MTP block alone, which the model must have."""
        assert self.spec.mtp is not None, "asked for before"
        shape = kv_shape(self.spec.mtp.attention, num_blocks, block_size, self.kv_dtype)
        return ModelKvCache((self.ops.new_kv(shape),), num_blocks, block_size)


def _one_layer(runner: LayerRunner) -> Callable[[Tensor, Step, KvCache], None]:
    return lambda x_TH, step, cache: runner.run([x_TH], [step], [cache])


def load_decoder(
    path: str | Path,
    ops: Ops,
    options: LoadOptions = AS_STORED,
    *,
    experts: Mapping[int, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model in a folder, its floats and KV held as ``options`` say.

    A float16 checkpoint is held as float32, which is exact. Quantised matrices stay as they are
    stored, unless ``quantization`` says otherwise (see ``weights.Rounding``). Tensors that the
    model does not explain are an error. ``experts`` are those to hold of each layer, by its number
    and in this order (one may occur twice); None is all, and so is a layer that is left out. Of
    other experts only headers are read. ``progress`` gets bytes read and bytes in all.
    """
    return assemble(open_checkpoint(path), ops, options, experts=experts, progress=progress)


def skeleton_decoder(checkpoint: PackedCheckpoint, combine: Combine = Combine.EXACT) -> Decoder:
    """Every part of the model with the shapes that its config implies, and no data."""
    return build_decoder(skeleton_of(checkpoint, checkpoint.dtype_held, combine))


def assemble(
    checkpoint: Checkpoint,
    ops: Ops,
    options: LoadOptions = AS_STORED,
    *,
    experts: Mapping[int, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """``load_decoder`` of an open folder."""
    if isinstance(checkpoint, PackedCheckpoint):
        skeleton = skeleton_decoder(checkpoint, Combine(options.combine))
        return map_decoder(skeleton, checkpoint, ops, options, experts or {}, progress)
    w = open_weights(checkpoint, ops, options, experts, progress)
    decoder = build_decoder(w, torch_dtype(options.kv_dtype))
    for method, count in w.stored.rounded.items():
        logging.getLogger("moeserve.models").info(
            "%s: %d matrices of %s rounded to int8, which holds them best",
            checkpoint.path,
            count,
            method,
        )
    if progress is not None:
        progress(checkpoint.total_bytes, checkpoint.total_bytes)
    return decoder


def open_weights(
    checkpoint: Checkpoint,
    ops: Ops,
    options: LoadOptions,
    experts: Mapping[int, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Floats of dtype "auto" are those of the embedding."""
    read_spec(checkpoint)  # a config that no family understands is the first thing to be said
    config = Fields(checkpoint.config, checkpoint.config_name)
    stored = Stored(checkpoint, read_method(config))
    held = torch_dtype(options.dtype) or stored.plain_dtype("model.embed_tokens")
    return Weights(
        checkpoint,
        stored,
        ops,
        torch.bfloat16 if held is torch.bfloat16 else torch.float32,
        Rounding(options.quantization, options.quantize_attention),
        progress,
        experts or {},
        Combine(options.combine),
    )


def build_decoder(w: Weights, kv_dtype: torch.dtype | None = None) -> Decoder:
    """Reads every tensor of the model, and accounts for the others."""
    spec, names = read_spec(w.checkpoint)
    embedding_WH, head = load_ends(w, spec)
    layers = [load_layer(w, i, layer, names, spec) for i, layer in enumerate(spec.layers)]
    stack = w.ops.stack_layers(layers)
    return Decoder(
        spec=spec,
        ops=w.ops,
        dtype=w.dtype,
        kv_dtype=kv_dtype or w.dtype,
        embedding_WH=embedding_WH,
        stack=stack,
        head=head,
        rope=rope_tables(spec.rope, spec.max_positions),
        mtp=load_mtp(w, names, spec, embedding_WH, head.weights.head),
        unread=explained(w, spec),
        runner=LocalLayerRunner(w.ops, stack),
    )


def load_ends(w: Weights, spec: ModelSpec) -> tuple[Tensor, Part[HeadWeights]]:
    """What comes before the layers and after them."""
    embedding_WH = w.embedding("model.embed_tokens", spec.vocab, spec.hidden)
    if spec.tied_embeddings:
        head = w.ops.pack_linear(w.held("lm_head", embedding_WH))
    else:
        head = w.linear("lm_head", spec.vocab, spec.hidden)
    norm_H = w.vector("model.norm.weight", spec.hidden)
    w.checkpoint.release()
    return embedding_WH, w.ops.prepare(HeadWeights(norm_H, spec.norm_eps, head))


def load_layer(
    w: Weights, index: int, layer: LayerSpec, names: TensorNames, spec: ModelSpec
) -> Layer:
    prefix = f"model.layers.{index}"
    input_norm_H = w.vector(f"{prefix}.input_layernorm.weight", spec.hidden)
    post_norm_H = w.vector(f"{prefix}.post_attention_layernorm.weight", spec.hidden)
    attention = load_attention(
        w, f"{prefix}.self_attn", layer.attention, input_norm_H, spec.norm_eps
    )
    mlp = load_mlp(w, index, layer.mlp, names, post_norm_H, spec.norm_eps)
    w.checkpoint.release()
    return Layer(w.ops.prepare(attention), mlp)


def load_mtp(
    w: Weights, names: TensorNames, spec: ModelSpec, embedding_WH: Tensor, head: Linear
) -> Mtp | None:
    prefix = f"model.layers.{len(spec.layers)}"
    if spec.mtp is None or not w.has_module(f"{prefix}.eh_proj"):
        return None
    own_embedding, own_head = f"{prefix}.embed_tokens", f"{prefix}.shared_head.head"
    if w.has_module(own_embedding):
        embedding_WH = w.embedding(own_embedding, spec.vocab, spec.hidden)
    if w.has_module(own_head):
        head = w.linear(own_head, spec.vocab, spec.hidden)
    stack = w.ops.stack_layers([load_layer(w, len(spec.layers), spec.mtp, names, spec)])
    return Mtp(
        embedding_WH=embedding_WH,
        embedding_norm_H=w.vector(f"{prefix}.enorm.weight", spec.hidden),
        hidden_norm_H=w.vector(f"{prefix}.hnorm.weight", spec.hidden),
        project=w.linear(f"{prefix}.eh_proj", spec.hidden, 2 * spec.hidden),
        stack=stack,
        head=w.ops.prepare(
            HeadWeights(
                w.vector(f"{prefix}.shared_head.norm.weight", spec.hidden), spec.norm_eps, head
            )
        ),
        runner=LocalLayerRunner(w.ops, stack),
    )
