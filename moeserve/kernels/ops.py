"""The op table: every tensor operation a decoder may use, once per backend.

Activations are fp32 in and out. What a product does follows from its weights:

- fp32: fp32 activations, one chain of fused multiply-adds per output, K ascending.
- bf16: activations rounded to bf16 (to nearest, ties to even), products exact, fp32 accumulation
  in a fixed order: features 2i + 1 then 2i of each pair, pairs ascending, denormals as zero. That
  is what one VDPBF16PS does, and what every instruction set can do.
- int8: activations quantised per token (``matrix.quantize_rows``), exact integer sums, then
  float(sum) * activation scale * weight scale, multiplied in this order, plus the bias.
- int4: the same activations, exact integer sums within a group, then
  total = fma(float(sum - zero * sum of codes), group scale, total) with groups ascending, and
  total * activation scale, plus the bias.

Attention over an fp32 cache is all fp32. Over the others the past is cut, by absolute position,
into segments of ``ATTENTION_SEGMENT`` and these into steps of ``ATTENTION_STEP``: a running softmax
goes over the steps of a segment, and segments are merged in ascending order.

- bf16: queries are rounded to bf16, and so are the probabilities of a step, relative to the
  highest score of the segment so far; products as above, in pairs of positions 2i and 2i + 1. The
  rounded probabilities also make the denominator, so that they add up to one.
- int8: keys and values are codes with one scale per position and head. Queries are quantised per
  row and head (a latent's two parts each by itself); probabilities times value scales are quantised
  to 0..255 per step, relative to the step's greatest. The denominator adds the probabilities as
  they are: one whose value is tiny has code 0 and yet counts.

How the contributions w_c * y_c of a token's experts become one row is ``wire.Combine``.

Every reduction has a fixed order per output element, or is exact, so a row's result never depends
on the rows beside it (law 1). Backends may repack weights: whoever holds a ``Linear``,
``Experts`` or ``KvCache`` only passes it back to the table that made it.

Letters: T tokens, K input features, N output features, H hidden, A query heads, G KV heads,
D head size, V value size, E experts, I expert intermediate size, C experts per token,
S sequences, B cache blocks, P tokens per block, M blocks in the longest table, R rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.matrix import Source
from moeserve.kernels.records import PAGE, MatrixForm, rounded_up
from moeserve.kernels.sampling import SampledRow, SamplingRow
from moeserve.kernels.wire import Combine, Copies, Sums, Wire

if TYPE_CHECKING:
    from moeserve.kernels.guesses import Guesser, GuessModule

ATTENTION_SEGMENT = 512
ATTENTION_STEP = 64


class Activation(StrEnum):
    """``SWIGLU``: silu(gate) * up. ``CLAMPED``: GPT-OSS, (up + 1) * gate * sigmoid(1.702 gate)
    with gate clamped above at 7 and up to [-7, 7]."""

    SWIGLU = "swiglu"
    CLAMPED = "clamped"


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed matrix [N, K] with an optional bias [N]; ``data`` belongs to the backend."""

    out_features: int
    in_features: int
    data: Any


@dataclass(frozen=True, slots=True)
class Experts:
    """Packed gate/up [E, 2I, H] (gate rows first) and down [E, H, I] with optional biases."""

    num_experts: int
    hidden: int
    intermediate: int
    activation: Activation
    data: Any


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """All that one routed expert needs, as ``nbytes`` contiguous bytes: gate and up, then down.

    Equal layouts lie alike, so memory of one takes records of the other. ``nbytes`` is a multiple
    of ``PAGE``; ``down_at`` of a line.
    """

    gate_up: MatrixForm
    down: MatrixForm
    activation: Activation
    down_at: int
    nbytes: int

    @property
    def hidden(self) -> int:
        return self.down.out_features

    @property
    def intermediate(self) -> int:
        return self.down.in_features


def lay_out_record(
    matrix_bytes: Callable[[MatrixForm], int],
    gate_up: MatrixForm,
    down: MatrixForm,
    activation: Activation,
) -> RecordLayout:
    """Of an expert whose matrices have these forms, in the backend whose ``matrix_bytes`` it is."""
    assert (gate_up.count, down.count, gate_up.paired, down.paired) == (None, None, True, False)
    assert gate_up.out_features == 2 * down.in_features, (gate_up, down)
    assert gate_up.in_features == down.out_features, (gate_up, down)
    down_at = matrix_bytes(gate_up)
    nbytes = rounded_up(down_at + matrix_bytes(down), PAGE)
    return RecordLayout(gate_up, down, activation, down_at, nbytes)


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How logits become experts.

    ``scoring``: "softmax" over all experts, "sigmoid" of each, or "topk_softmax" (softmax over
    the chosen logits: GPT-OSS). With ``num_groups`` > 1 only experts of the ``topk_groups`` best
    groups may be chosen; a group's score is the sum of its two best ("top2", DeepSeek-V3) or its
    best ("max", DeepSeek-V2). A selection bias [E] changes the choice, never the weights.
    Weights are divided by their sum if ``normalise``, then multiplied by ``scale``.
    Equal scores: the lower expert id wins.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2"


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which query rows belong to which sequence, and where its past lies.

    Sequence s owns query rows ``query_start_S1[s] : query_start_S1[s + 1]``, which are its last
    tokens; ``context_S[s]`` counts its tokens including them, so row j sits at position
    ``context_S[s] - (query_start_S1[s + 1] - j)`` and sees positions 0 up to its own.
    Position p lies in block ``blocks_SM[s, p // P]`` at offset ``p % P``. All int32, on the CPU.
    """

    query_start_S1: Tensor
    context_S: Tensor
    blocks_SM: Tensor


@dataclass(frozen=True, slots=True)
class KvShape:
    """The KV of one layer. ``latent`` (MLA): one head, and the value is the key's first
    ``value_size`` features. ``dtype`` is float32, bfloat16 or int8; int8 keeps an fp32 scale
    beside every head of every position (for a latent: one for the value part, one for the rest).
    """

    num_blocks: int
    block_size: int
    kv_heads: int
    head_size: int
    value_size: int
    dtype: torch.dtype
    latent: bool = False


@dataclass(frozen=True, slots=True)
class KvCache:
    """Blocks of one layer; ``data`` belongs to the backend, ``nbytes`` is all it takes."""

    shape: KvShape
    nbytes: int
    data: Any


@dataclass(frozen=True, slots=True)
class KvRuns:
    """Runs (``kv_runs``) of one sequence, R of them. ``runs_R4``, int64: the cache's number, the
    first position, how many, and the byte at which the run begins; ``heads_RH``, uint8: what a
    run's digest is of beside its bytes, 17 to 256 bytes each."""

    runs_R4: Tensor
    heads_RH: Tensor

    def __post_init__(self) -> None:
        runs, heads = self.runs_R4, self.heads_RH
        sound = (
            runs.dtype is torch.int64
            and heads.dtype is torch.uint8
            and runs.shape == (len(heads), 4)
            and heads.dim() == 2
            and 17 <= heads.shape[1] <= 256
            and runs.is_contiguous()
            and heads.is_contiguous()
        )
        if not sound:
            raise InternalError(
                f"runs {runs.dtype} {list(runs.shape)} with heads {heads.dtype} "
                f"{list(heads.shape)}: expected int64 [R, 4] and uint8 [R, 17..256]"
            )

    def __len__(self) -> int:
        return len(self.runs_R4)


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """x + o(attention(rope(clip(norm(qkv(rms_norm(x))))))), k and v written to the cache before.

    ``qkv`` has A * D rows of queries, then G * D of keys and of values. ``q_norm`` and ``k_norm``
    are of one head's size, or of the whole row's (OLMoE); v has none. ``clip`` bounds all three.
    """

    norm_H: Tensor
    eps: float
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    qkv: Linear
    o: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    clip: float | None = None
    window: int | None = None
    sinks_A: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """Absorbed latent attention, added to x; L is the latent's size, R' the rotated part's.

    ``down`` has the rows of the queries (low-rank ones where ``q_up`` is there, else A heads of
    nope + R'), then L of the latent and R' of the rotated key. ``into_latent`` [A, L, nope] and
    ``out_of_latent`` [A, V, L] are of ``pack_heads``.
    """

    norm_H: Tensor
    eps: float
    heads: int
    nope: int
    rotated: int
    latent: int
    scale: float
    latent_eps: float
    down: Linear
    latent_norm: Tensor
    into_latent: Linear
    out_of_latent: Linear
    o: Linear
    q_norm: Tensor | None = None
    q_up: Linear | None = None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """down(silu(gate x) * up x); ``gate_up`` has the gate's rows first."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """x + mlp(rms_norm(x))."""

    norm_H: Tensor
    eps: float
    mlp: MlpWeights


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """route_topk(router(rms_norm(x)))."""

    norm_H: Tensor
    eps: float
    router: Linear
    spec: RouterSpec
    bias_E: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GatedWeights:
    """A shared expert weighed by a gate (Qwen2): a group of one under a sigmoid router of one."""

    gate: Linear
    experts: Experts


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """x + (routed + shared), both of the normed row that was routed.

    On a rank of several, ``experts`` are those of its slots, in order of slots.
    """

    experts: Experts
    shared: MlpWeights | GatedWeights | None = None
    combine: Combine = Combine.EXACT


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """head(rms_norm(x))."""

    norm_H: Tensor
    eps: float
    head: Linear


PartWeights = GqaWeights | MlaWeights | DenseWeights | RouterWeights | MoeWeights | HeadWeights
W = TypeVar("W", bound=PartWeights)
W_co = TypeVar("W_co", bound=PartWeights, covariant=True)


@dataclass(frozen=True, slots=True)
class Part(Generic[W_co]):
    """A piece of a layer, ready to run; ``data`` belongs to the backend."""

    weights: W_co
    data: Any


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention, then either a dense half or a router and the experts it chooses from."""

    attention: Part[GqaWeights | MlaWeights]
    mlp: Part[DenseWeights] | tuple[Part[RouterWeights], Part[MoeWeights]]


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers in their order; ``data`` belongs to the backend."""

    layers: tuple[Layer, ...]
    data: Any


@dataclass(frozen=True, slots=True)
class Rope:
    """cos and sin of every position that may come (W of them), fp32."""

    cos_WR: Tensor
    sin_WR: Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share; ``data`` belongs to the backend."""

    rows: int
    rope: Rope
    position_T: Tensor
    slot_T: Tensor
    attention: AttentionBatch
    data: Any


@dataclass(frozen=True, slots=True)
class Trunk:
    """All of a model that a forward pass needs, in this order."""

    embedding_WH: Tensor
    rope: Rope
    stack: Stack
    head: Part[HeadWeights]


@dataclass(frozen=True, slots=True)
class Routed:
    """Where rows go. Valid until the next ``route`` of the same step."""

    normed_TH: Tensor
    ids_TC: Tensor
    weights_TC: Tensor


class Ops(Protocol):
    """One backend. Tensors are contiguous unless said otherwise, and lie on ``device``.

    A decoder calls the fused ones at the end, each of which is the composition that ``fused``
    spells out, to the bit. ``packing`` names the layout of packed weights: tables of equal names
    understand each other's bytes. Where it ``replays``, a pass of ``new_pass`` costs nothing to
    make, and less to run than its parts.
    """

    name: str
    device: torch.device
    packing: str
    replays: bool

    def pack_linear(self, weight_NK: Source, bias_N: Tensor | None = None) -> Linear: ...

    def pack_experts(
        self,
        gate_up_E2IH: Source,
        down_EHI: Source,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts: ...

    def matrix_form(self, linear: Linear) -> MatrixForm:
        """Of what ``pack_linear`` or ``pack_heads`` made."""
        ...

    def matrix_bytes(self, form: MatrixForm) -> int:
        """What ``write_matrix`` writes: a multiple of ``records.LINE``."""
        ...

    def write_matrix(self, linear: Linear, into: Tensor) -> None:
        """Its packed bytes; ``into`` is uint8 and has ``matrix_bytes``."""
        ...

    def linear_over(self, memory: Tensor, form: MatrixForm) -> Linear:
        """The matrix whose bytes lie in ``memory``, or will when it is used: nothing is copied.

        ``memory`` is uint8 of ``matrix_bytes``, begins on a line, and lives as long as what is
        made of it. InternalError where it is too small or begins elsewhere.
        """
        ...

    def record_layout(self, experts: Experts) -> RecordLayout: ...

    def write_record(self, experts: Experts, e: int, into: Tensor) -> None:
        """All of expert ``e``; ``into`` is uint8 [nbytes] of the layout."""
        ...

    def experts_over(
        self, memory: Tensor, layout: RecordLayout, slots: int, order: Sequence[int] | None = None
    ) -> Experts:
        """Experts whose records lie in ``memory``, or will when they are used: nothing is copied.

        Expert s is record s, or ``order[s]`` where that is given: ``slots`` records of any that
        ``memory`` (uint8, whole records, beginning on a line) has. Their results are those of the
        experts that were written, to the bit. InternalError where the memory does not fit.
        """
        ...

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; any leading ones."""
        ...

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        """[T, N]."""
        ...

    def quantize_per_token(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        """codes int8 [T, K] and scale fp32 [T], as ``matrix.quantize_rows``, to the bit."""
        ...

    def pack_heads(self, weight_ANK: Source) -> Linear:
        """One matrix per head, for ``linear_heads``; ``out_features`` is N, ``in_features`` K."""
        ...

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        """[T, A, N]: head a of every row times matrix a (MLA's absorbed projections)."""
        ...

    def glu(self, gate_up_T2I: Tensor, activation: Activation) -> Tensor:
        """[T, I] from gate (first half) and up (second half)."""
        ...

    def rope(self, x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        """Rotates the first 2R features of each head and copies the rest.

        ``interleaved`` pairs features (0, 1), (2, 3), ...; otherwise (i, i + R). The result keeps
        the place of each feature.
        """
        ...

    def route_topk(
        self, logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids_TC int32, best first by selection score, and weights_TC fp32."""
        ...

    def moe_ffn(
        self,
        x_TH: Tensor,
        experts: Experts,
        ids_TC: Tensor,
        weights_TC: Tensor,
        units_T: Tensor | None = None,
    ) -> Tensor:
        """[T, H]: sum over c of weights[t, c] * expert[ids[t, c]](x[t]): exact if the rows' units
        are given, else added in order of c."""
        ...

    def units(self, x_TH: Tensor, experts: Experts) -> Tensor:
        """[T]: of the residual rows that sums of these experts are added to; see ``Combine``."""
        ...

    def new_kv(self, shape: KvShape) -> KvCache: ...

    def kv_bytes_per_block(self, shape: KvShape) -> int:
        """What one more block costs; known before memory is taken."""
        ...

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        """Row t goes to block slot // P, offset slot % P, rounded to the cache's dtype.

        ``v_TGV`` is None where the cache is latent.
        """
        ...

    def export_kv(self, cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
        """uint8 [N, X]: whole blocks (int64 numbers) as ``kv_layout`` describes them; a copy, in
        ``out_NX`` where that is given, which is contiguous then.

        InternalError if a block is not one of the cache, or ``out_NX`` has not their size.
        """
        ...

    def import_kv(self, cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
        """Put exported blocks in the places ``blocks_N``, which are distinct; attention over them
        is the same bits as over the cache they came from.

        InternalError if a block is not one of the cache, or the bytes are not N of its blocks.
        """
        ...

    def export_runs(
        self, caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor
    ) -> Tensor:
        """Writes the runs (``kv_runs``) of a sequence whose blocks are ``blocks_B`` (int64) to
        ``out_X`` (uint8), each where it says; uint8 [R, 16]: their digests. In one pass, by the
        calling thread alone.

        InternalError if a run names what does not exist; nothing is written then.
        """
        ...

    def import_runs(
        self,
        caches: Sequence[KvCache],
        blocks_B: Tensor,
        runs: KvRuns,
        digests_RD: Tensor,
        data_X: Tensor,
    ) -> Tensor:
        """The runs whose bytes in ``data_X`` have these digests enter the caches, the others do
        not; bool [R]: which did. Otherwise as ``export_runs``."""
        ...

    def kv_passes(self, cache: KvCache) -> int:
        """How many times ``attend``, or the layer's part of ``forward_layers``, has been done over
        it. Any thread may ask: the KV of the rows of so many is there, and can be exported."""
        ...

    def paged_attention(
        self,
        q_TAD: Tensor,
        cache: KvCache,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, V]: causal softmax attention over the paged cache.

        Query head a reads KV head a // (A / G). With ``window`` w a query at p sees positions
        p - w + 1 .. p. A sink is one more logit in the softmax with no value (GPT-OSS).
        """
        ...

    def prepare(self, weights: W) -> Part[W]:
        """Once, when a model is loaded."""
        ...

    def new_step(
        self,
        rope: Rope,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
    ) -> Step:
        """Once per forward pass; the tensors, int64 and int32, must stay as they are meanwhile."""
        ...

    def attend(
        self, x_TH: Tensor, part: Part[GqaWeights | MlaWeights], step: Step, cache: KvCache
    ) -> None:
        """The attention half of a layer, added to ``x_TH``."""
        ...

    def dense(self, x_TH: Tensor, part: Part[DenseWeights]) -> None:
        """The other half where nothing is routed, added to ``x_TH``."""
        ...

    def route(self, x_TH: Tensor, part: Part[RouterWeights], step: Step) -> Routed: ...

    def moe(self, x_TH: Tensor, part: Part[MoeWeights], routed: Routed) -> None:
        """Experts and shared expert, added to ``x_TH``."""
        ...

    def wire(self, part: Part[MoeWeights], top_k: int) -> Wire: ...

    def pack_tokens(
        self,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        areas_R: Sequence[Tensor],
    ) -> None:
        """Write the records of ``copies`` to the areas of the ranks they go to (uint8), each
        rounded once however many copies it has. ``x_TH`` is the residual before the mixture."""
        ...

    def relay_tokens(
        self, wire: Wire, segments: Sequence[Tensor], copies: Copies, areas_R: Sequence[Tensor]
    ) -> None:
        """As ``pack_tokens`` of received records: row n of all segments, with other slots."""
        ...

    def run_experts(self, part: Part[MoeWeights], wire: Wire, segments: Sequence[Tensor]) -> Sums:
        """The contributions of this rank's slots to the records of all segments in turn.

        InternalError if a slot is not one of ``part.weights.experts``.
        """
        ...

    def sums_bytes(self, part: Part[MoeWeights], wire: Wire, rows: int) -> int:
        """The most that ``pack_sums`` writes for so many records."""
        ...

    def pack_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        sums: Sums,
        segments: Sequence[Tensor],
        areas_R: Sequence[Tensor],
    ) -> list[int]:
        """Write what goes back to the rank of each segment; the bytes of each.

        Exact: a byte a record (2 or 4: bytes an element; padded to 64 in all), then the rows: int16
        where all of a row fit, else int32. Two limbs are always int32. Ordered and fast: fp32 and
        bf16 rows.
        """
        ...

    def relay_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        copies: Copies,
        segments_R: Sequence[Tensor],
        rows: int,
    ) -> Sums:
        """The sums returned for ``relay_tokens``' copies, added by row; to be packed once more."""
        ...

    def shared(self, part: Part[MoeWeights], routed: Routed) -> Tensor | None:
        """[T, H] of the shared expert, for ``combine``; to be done while tokens are sent."""
        ...

    def combine(
        self,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        segments_R: Sequence[Tensor],
        shared_TH: Tensor | None,
    ) -> None:
        """Add the returned sums and the shared expert's rows to ``x_TH``: what ``moe`` adds, to
        the bit, unless combine is fast. ``x_TH`` must be as it was in ``pack_tokens``."""
        ...

    def stack_layers(self, layers: Sequence[Layer]) -> Stack:
        """Once, when a model is loaded."""
        ...

    def forward_layers(
        self,
        x_TH: Tensor,
        stack: Stack,
        step: Step,
        caches: Sequence[KvCache],
        routed: list[Tensor] | None = None,
    ) -> None:
        """Every layer in turn, each with its cache: attend, then dense, or route and mix.

        The ids_TC of the layers that route are appended to ``routed``.
        """
        ...

    def embed(self, table_WH: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of an fp32 or bf16 table as fp32; ids int64."""
        ...

    def head(self, x_TH: Tensor, rows_R: Tensor, part: Part[HeadWeights]) -> Tensor:
        """[R, N] of the rows (int64) that are wanted."""
        ...

    def new_pass(
        self,
        trunk: Trunk,
        caches: Sequence[KvCache],
        token_ids_T: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
        rows_R: Tensor,
        states_TH: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """A forward pass to be run again and again: embed, new_step, forward_layers, head.

        Each run takes the numbers that the tensors hold then, and gives logits [R, N], which may be
        the same tensor each time: valid until the next run. There is at least one token. What the
        layers give is left in ``states_TH``.
        """
        ...

    def new_guesser(self, module: GuessModule, cache: KvCache, block_size: int) -> Guesser:
        """Chains of guesses over a cache of the module's one layer."""
        ...

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]
    ) -> list[SampledRow]:
        """One token for every row of logits, each by itself; once per step.

        ``eos_ids`` are banned as long as a request has fewer tokens than ``min_tokens``, unless it
        ignores them. The results are on the host.
        """
        ...
