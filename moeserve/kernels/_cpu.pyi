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
def kv_bytes_per_block(
    block_size: int, kv_heads: int, head_size: int, value_size: int, kind: int, latent: bool, /
) -> int: ...
def write_kv(
    data: int,
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_size: int,
    value_size: int,
    kind: int,
    latent: bool,
    k: int,
    v: int,
    rows: int,
    slots: int,
    /,
) -> bool: ...
def paged_attention(
    data: int,
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_size: int,
    value_size: int,
    kind: int,
    latent: bool,
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
