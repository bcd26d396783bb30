"""The native kernels by raw pointers; ``cpu`` is the only caller and checks everything.

Addresses are of contiguous memory; 0 stands for an absent tensor. Every call gives the GIL back
while it runs, but for a ``route`` of few rows. Those that return a bool do nothing and return
False on an index out of range.
"""

from collections.abc import Sequence
from typing import overload

def isas() -> list[str]:
    """Instruction sets that this machine can run, best first."""

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def calls() -> int:
    """Kernels called since the process began, by any thread."""

def measure(on: bool) -> None: ...
def nanoseconds() -> int:
    """CPU time of the callers' threads in calls, while they were measured."""

def cpus_of_nodes() -> list[list[int]]:
    """The CPUs this process may use, by NUMA node; empty where the system does not say."""

def probe_ways(what: str, /) -> list[str]:
    """Ways of ``probe`` that run here, best first; ``what`` is read, int8, bf16 or fp32."""

def probe(
    what: str, way: str, threads: int, rounds: int, seconds: float, size: int, /
) -> list[float]:
    """Bytes or operations per second of all threads, one figure per round of so many seconds.

    ``size`` is the memory in bytes that "read" reads.
    """

def packed_bytes(kind: int, n: int, k: int, group: int, paired: bool, /) -> int:
    """Of one matrix [n, k]; ``group`` is int4's."""

# Rows to be packed lie in blocks: ``sources`` has the address of every block of the first matrix,
# then of the next, and ``rows`` how many rows each block of a matrix has.

def pack(
    kind: int,
    sources: list[int],
    rows: list[int],
    k: int,
    group: int,
    paired: bool,
    target: int,
    /,
) -> None: ...
def pack_floats(
    sources: list[int], rows: list[int], columns: int, paired: bool, target: int, /
) -> None:
    """Rows of ``columns`` floats to [matrices, panels, columns, 32 lanes]."""

def round_and_pack(
    kind: int, sources: list[int], rows: list[int], k: int, paired: bool, target: int, scale: int, /
) -> bool:
    """Floats of ``kind`` to int8; False if one is NaN or infinite."""

def use_huge_pages(data: int, nbytes: int, /) -> None: ...

class Matrix:
    """One packed matrix, or a stack of them: addresses and sizes. ``kind`` counts fp32, bf16,
    int8, int4 from 0. Whoever holds it holds the memory too."""

    def __init__(
        self,
        kind: int,
        n: int,
        k: int,
        data: int,
        scale: int,
        bias: int,
        zero: int,
        levels: int,
        group: int,
        same_zero: int,
        /,
    ) -> None: ...

class Experts:
    """``record_bytes``: from any array of one expert to the same of the next; 0: each array has
    those of all experts one after the other. ``order``: the record of each expert, int32; 0: its
    own number."""

    def __init__(
        self,
        gate_up: Matrix,
        down: Matrix,
        count: int,
        clamped: bool,
        record_bytes: int,
        order: int,
        /,
    ) -> None: ...
    @property
    def payload(self) -> int:
        """The kind of gate and up."""

    @property
    def contribution(self) -> int:
        """The kind of down."""

def linear(x: int, rows: int, heads: int, weight: Matrix, out: int, /) -> None: ...
def moe_ffn(
    x: int,
    rows: int,
    experts: Experts,
    ids: int,
    weights: int,
    chosen: int,
    units: int,
    out: int,
    /,
) -> bool: ...
def units(x: int, rows: int, experts: Experts, out: int, /) -> None: ...
def quantize_per_token(x: int, rows: int, k: int, codes: int, scale: int, /) -> None: ...
def rms_norm(x: int, rows: int, size: int, weight: int, eps: float, out: int, /) -> None: ...
def glu(x: int, rows: int, intermediate: int, clamped: bool, out: int, /) -> None: ...
def rope(
    x: int,
    rows: int,
    heads: int,
    size: int,
    cos: int,
    sin: int,
    pairs: int,
    interleaved: bool,
    out: int,
    /,
) -> None: ...
def route_topk(
    logits: int,
    rows: int,
    experts: int,
    top_k: int,
    scoring: int,
    normalise: bool,
    scale: float,
    groups: int,
    kept_groups: int,
    top2: bool,
    bias: int,
    ids: int,
    weights: int,
    /,
) -> None: ...
def kv_bytes_per_block(
    block_size: int, kv_heads: int, head_size: int, value_size: int, kind: int, latent: bool, /
) -> int: ...
def write_kv(cache: Cache, k: int, v: int, rows: int, slots: int, /) -> bool: ...
def export_kv(cache: Cache, blocks: int, count: int, data: int, /) -> bool: ...
def import_kv(cache: Cache, blocks: int, count: int, data: int, /) -> bool: ...
def export_runs(
    caches: Sequence[Cache], places: tuple[int, int, int, int, int, int, int, int], digests: int, /
) -> bool: ...
def import_runs(
    caches: Sequence[Cache],
    places: tuple[int, int, int, int, int, int, int, int],
    digests: int,
    right: int,
    /,
) -> bool: ...
def passes(cache: Cache, /) -> int: ...
def paged_attention(
    cache: Cache,
    q: int,
    heads: int,
    starts: int,
    context: int,
    tables: int,
    sequences: int,
    table_width: int,
    scale: float,
    window: int,
    sinks: int,
    out: int,
    /,
) -> bool: ...

# What a decoder calls in every step: handles made once, then a call passes one and a few numbers.
# ``fused`` says what is computed. An absent norm has address 0.

class Cache:
    """A KV cache: its memory, and the sizes of ``ops.KvShape``."""

    def __init__(
        self,
        data: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_size: int,
        value_size: int,
        kind: int,
        latent: bool,
        /,
    ) -> None: ...

class Step:
    """Making one wakes the threads. IndexError where a position is outside the rotary tables."""

    def __init__(
        self,
        positions: int,
        rows: int,
        cos: int,
        sin: int,
        table: int,
        pairs: int,
        interleaved: bool,
        slots: int,
        starts: int,
        context: int,
        blocks: int,
        sequences: int,
        table_width: int,
        /,
    ) -> None: ...

class Norm:
    def __init__(self, weight: int, eps: float, /) -> None: ...

class Gqa:
    def __init__(
        self,
        norm: Norm,
        qkv: Matrix,
        o: Matrix,
        heads: int,
        kv_heads: int,
        head_size: int,
        scale: float,
        q_norm: Norm,
        q_norm_size: int,
        k_norm: Norm,
        k_norm_size: int,
        clip: float,
        window: int,
        sinks: int,
        /,
    ) -> None: ...

class Mla:
    def __init__(
        self,
        norm: Norm,
        down: Matrix,
        q_norm: Norm,
        q_up: Matrix | None,
        latent_norm: Norm,
        into_latent: Matrix,
        out_of_latent: Matrix,
        o: Matrix,
        heads: int,
        nope: int,
        rotated: int,
        latent: int,
        scale: float,
        /,
    ) -> None: ...

class Mlp:
    def __init__(self, gate_up: Matrix, down: Matrix, /) -> None: ...

class Dense:
    def __init__(self, norm: Norm, mlp: Mlp, /) -> None: ...

class Router:
    def __init__(
        self,
        norm: Norm,
        matrix: Matrix,
        top_k: int,
        scoring: int,
        normalise: bool,
        scale: float,
        groups: int,
        kept_groups: int,
        top2: bool,
        bias: int,
        /,
    ) -> None: ...

class Mixture:
    """No shared expert, one that every token passes, or one behind a gate. ``combine`` counts
    exact, ordered, fast from 0."""

    @overload
    def __init__(self, combine: int, experts: Experts, /) -> None: ...
    @overload
    def __init__(self, combine: int, experts: Experts, shared: Mlp, /) -> None: ...
    @overload
    def __init__(self, combine: int, experts: Experts, gate: Matrix, gated: Experts, /) -> None: ...

class Head:
    def __init__(self, norm: Norm, matrix: Matrix, /) -> None: ...

class Layer:
    """Attention, then a dense half, or a router and what it chooses from."""

    @overload
    def __init__(self, attention: Gqa | Mla, dense: Dense, /) -> None: ...
    @overload
    def __init__(self, attention: Gqa | Mla, router: Router, mixture: Mixture, /) -> None: ...

class Stack:
    def __init__(self, layers: list[Layer], /) -> None: ...

def forward_layers(x: int, stack: Stack, step: Step, caches: list[Cache], ids: int, /) -> bool:
    """All layers; [T, C] ids of the routed ones follow one another."""

class Pass:
    """Embedding, all layers and head over tensors that stay where they are, as must ``step``,
    ``stack``, ``caches`` and ``head``."""

    def __init__(
        self,
        step: Step,
        positions: int,
        cos: int,
        sin: int,
        table: int,
        embedding: int,
        is_bf16: bool,
        vocabulary: int,
        hidden: int,
        token_ids: int,
        x: int,
        stack: Stack,
        caches: list[Cache],
        chosen: int,
        wanted_at: int,
        wanted: int,
        head: Head,
        logits: int,
        /,
    ) -> None: ...

def run_pass(once: Pass, /) -> int:
    """0, or what does not fit: 1 a position, 2 a token id, 3 caches, 4 a wanted row."""

class Guesser:
    """A multi-token prediction module over tensors that stay where they are, as must ``stack``,
    ``head`` and ``cache``. ``cos`` and ``sin`` are rotary tables of ``table`` rows."""

    def __init__(
        self,
        embedding: int,
        is_bf16: bool,
        vocabulary: int,
        trunk_norm: Norm,
        embedding_norm: Norm,
        hidden_norm: Norm,
        project: Matrix,
        stack: Stack,
        head: Head,
        cos: int,
        sin: int,
        table: int,
        pairs: int,
        interleaved: bool,
        cache: Cache,
        /,
    ) -> None: ...

def guess(
    module: Guesser,
    states: int,
    state_rows: Sequence[int],
    token_ids: Sequence[int],
    counts: Sequence[int],
    starts: Sequence[int],
    shifts: Sequence[int],
    blocks: Sequence[int],
    width: int,
    count: int,
    /,
) -> list[int]:
    """Token of each guess, of each sequence; empty where something does not fit."""

def best_of_rows(values: int, rows: int, size: int, /) -> list[int]:
    """The first of the greatest of each row; -1 where that is not finite, or one is no number."""

def attend_gqa(x: int, weights: Gqa, step: Step, cache: Cache, /) -> bool: ...
def attend_mla(x: int, weights: Mla, step: Step, cache: Cache, /) -> bool: ...
def dense(x: int, rows: int, weights: Dense, /) -> None: ...
def route(x: int, rows: int, weights: Router, normed: int, ids: int, shares: int, /) -> None: ...
def moe(
    x: int, rows: int, weights: Mixture, normed: int, ids: int, chosen: int, shares: int, /
) -> bool: ...

# Dispatch and combine: ``wire`` says what lies in a segment. Segments and areas are two lists, of
# addresses and of bytes, with one of each rank. Copies are (starts, tokens, slots; ranks, copies,
# choices of a token). False, -1 or an empty list where a row, a slot or a size cannot be.

Copies = tuple[int, int, int, int, int, int]

def pack_tokens(
    x: int,
    normed: int,
    shares: int,
    rows: int,
    weights: Mixture,
    copies: Copies,
    areas: list[int],
    sizes: list[int],
    /,
) -> bool: ...
def relay_tokens(
    payload: int,
    hidden: int,
    segments: list[int],
    nbytes: list[int],
    copies: Copies,
    areas: list[int],
    sizes: list[int],
    /,
) -> bool: ...
def run_experts(
    weights: Mixture, chosen: int, segments: list[int], nbytes: list[int], out: int, /
) -> int:
    """The rows of ``out``."""

def pack_sums(
    weights: Mixture,
    chosen: int,
    sums: int,
    rows: int,
    segments: list[int],
    nbytes: list[int],
    areas: list[int],
    sizes: list[int],
    /,
) -> list[int]:
    """The bytes of every segment."""

def relay_sums(
    weights: Mixture,
    copies: Copies,
    segments: list[int],
    nbytes: list[int],
    rows: int,
    out: int,
    /,
) -> int:
    """The rows of ``out``."""

def combine(
    x: int,
    shares: int,
    rows: int,
    weights: Mixture,
    copies: Copies,
    segments: list[int],
    nbytes: list[int],
    shared: int,
    /,
) -> bool: ...
def shared(normed: int, rows: int, weights: Mixture, out: int, /) -> None: ...
def embed(
    table: int, is_bf16: bool, vocabulary: int, size: int, ids: int, rows: int, out: int, /
) -> bool: ...
def head(x: int, rows: int, wanted: int, count: int, weights: Head, out: int, /) -> bool: ...
