"""The native kernels by raw pointers; ``cpu`` is the only caller and checks everything.

Addresses are of contiguous memory; 0 stands for an absent tensor. Every call gives the GIL back
while it runs. Those that return a bool do nothing and return False on an index out of range.
"""

def isas() -> list[str]:
    """Instruction sets that this machine can run, best first."""

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def packed_bytes(kind: int, n: int, k: int, group: int, paired: bool, /) -> int:
    """Of one matrix [n, k]; ``group`` is int4's."""

def pack(
    kind: int, source: int, count: int, n: int, k: int, group: int, paired: bool, target: int, /
) -> None: ...
def pack_floats(
    source: int, count: int, n: int, columns: int, paired: bool, target: int, /
) -> None:
    """[count, n, columns] to [count, panels, columns, 32 lanes]."""

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
    def __init__(self, gate_up: Matrix, down: Matrix, count: int, clamped: bool, /) -> None: ...

def linear(x: int, rows: int, heads: int, weight: Matrix, out: int, /) -> None: ...
def moe_ffn(
    x: int, rows: int, experts: Experts, ids: int, weights: int, chosen: int, out: int, /
) -> bool: ...
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
def write_kv(
    cache: int,
    is_bf16: bool,
    blocks: int,
    block_size: int,
    block_stride: int,
    position_stride: int,
    head_stride: int,
    x: int,
    rows: int,
    heads: int,
    size: int,
    slots: int,
    /,
) -> bool: ...
def paged_attention(
    q: int,
    k: int,
    k_block_stride: int,
    k_position_stride: int,
    k_head_stride: int,
    v: int,
    v_block_stride: int,
    v_position_stride: int,
    v_head_stride: int,
    is_bf16: bool,
    starts: int,
    context: int,
    blocks: int,
    sequences: int,
    table_width: int,
    num_blocks: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    value_size: int,
    scale: float,
    window: int,
    sinks: int,
    out: int,
    /,
) -> bool: ...
