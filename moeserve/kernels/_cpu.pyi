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
def probe_ways(what: str, /) -> list[str]:
    """Ways of ``probe`` that run here, best first; ``what`` is read, int8, bf16 or fp32."""

def probe(
    what: str, way: str, threads: int, rounds: int, seconds: float, size: int, /
) -> list[float]:
    """Bytes or operations per second of all threads, one figure per round of so many seconds.

    ``size`` is the memory in bytes that "read" walks through.
    """

def pack(
    source: int, count: int, n: int, k: int, paired: bool, is_bf16: bool, target: int, /
) -> None: ...
def linear(
    x: int, rows: int, heads: int, data: int, bias: int, n: int, k: int, is_bf16: bool, out: int, /
) -> None: ...
def moe_ffn(
    x: int,
    rows: int,
    gate_up: int,
    gate_up_bias: int,
    down: int,
    down_bias: int,
    experts: int,
    hidden: int,
    intermediate: int,
    is_bf16: bool,
    clamped: bool,
    ids: int,
    weights: int,
    chosen: int,
    out: int,
    /,
) -> bool: ...
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
