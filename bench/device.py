"""The op table on a GPU: right, the same bits in any batch, how fast; or what to expect of it.

On a machine with one: ``python bench/device.py --json out.json`` compares every operation with the
reference, a row alone with the row among 2..2,048, and times the experts and paged attention beside
their rooflines. Without one: ``--predict`` compiles the kernels for an H200 and gives the same
tables, and whole decode steps, from bytes, multiplications and the instructions of the compiled
code (``moeserve.kernels.triton.predict`` says how, and what it does not know), each row marked as a
prediction. Rooflines take the memory as it was read once (4.3 TB/s copied) and the multipliers as
they are stated (1,979 TOP/s of int8, 989 TFLOP/s of bf16). Then two ranks share the experts of a
layer on this one GPU (``device_ranks``); ``--double`` runs that part alone, on a device in name.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moeserve.kernels.matrix import to_int4, to_int8
from moeserve.kernels.ops import AttentionBatch, KvShape, Ops, RouterSpec
from moeserve.kernels.reference.ops import ReferenceOps

BANDWIDTH, INT8, BF16 = 4.3e12, 1.979e15, 0.989e15
HIDDEN, INNER, EXPERTS, CHOSEN = 7168, 2048, 32, 8  # DeepSeek-V3, a rank of eight
TOKENS = (1, 16, 256, 4096)
BATCHES = (1, 32, 128)
CONTEXT, SHORT = 4096, 1024
RUNS = 20


@dataclass(frozen=True)
class Row:
    """One line of a table. ``nbytes`` and ``operations`` are what there is to do at least, and
    ``bound_s`` their time; ``seconds`` was measured, or is None in a prediction, which is
    ``predicted_s`` and by what it is bound."""

    table: str
    name: str
    nbytes: float
    operations: float
    bound_s: float
    bound_by: str
    seconds: float | None = None
    predicted_s: float | None = None
    predicted_by: str = ""

    @property
    def text(self) -> str:
        took = "" if self.seconds is None else f"{1e6 * self.seconds:10.1f} us measured"
        if self.predicted_s is not None:
            took = f"{1e6 * self.predicted_s:10.1f} us predicted, by {self.predicted_by}"
        return (
            f"{self.table:10} {self.name:28} {self.nbytes / 1e6:10.1f} MB "
            f"{self.operations / 1e9:10.1f} Gop  at least {1e6 * self.bound_s:9.1f} us by "
            f"{self.bound_by:8} {took}"
        )


def row(table: str, name: str, nbytes: float, operations: float, peak: float) -> Row:
    memory, compute = nbytes / BANDWIDTH, operations / peak
    by = "memory" if memory >= compute else "products"
    return Row(table, name, nbytes, operations, max(memory, compute), by)


def expert_rows() -> Iterator[tuple[Row, int]]:
    """INT8 experts of one rank: the weights touched, read once, and pairs written and read."""
    for tokens in TOKENS:
        touched = EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** tokens)
        pairs = tokens * CHOSEN
        weights = touched * 3 * HIDDEN * INNER
        moved = tokens * HIDDEN * 9 + pairs * (INNER * 13 + HIDDEN * 8)
        work = 2 * 3 * HIDDEN * INNER * pairs
        yield row("experts", f"int8, {tokens} tokens", weights + moved, work, INT8), tokens


def attention_shapes(blocks: int, dtype: torch.dtype) -> dict[str, tuple[int, KvShape]]:
    """Query heads, and the cache."""
    return {
        "MLA": (128, KvShape(blocks, 64, 1, 576, 512, dtype, True)),
        "GQA": (64, KvShape(blocks, 64, 8, 128, 128, dtype)),
    }


def attention_rows(
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[Row, int, int, KvShape]]:
    """A decode step of one layer at ``CONTEXT`` positions each."""
    kind, peak = ("int8", INT8) if dtype is torch.int8 else ("bf16", BF16)
    for batch in BATCHES:
        shapes = attention_shapes(batch * CONTEXT // 64, dtype)
        for name, (heads, shape) in shapes.items():
            width = shape.head_size + (0 if shape.latent else shape.value_size)
            nbytes = batch * CONTEXT * shape.kv_heads * width * dtype.itemsize
            work = 2 * batch * CONTEXT * heads * (shape.head_size + shape.value_size)
            found = row("attention", f"{name} {kind}, {batch} sequences", nbytes, work, peak)
            yield found, batch, heads, shape


def predictions() -> Iterator[Row]:
    """The rows without times, with what the compiled kernels would take."""
    from moeserve.kernels.triton import predict
    from moeserve.kernels.triton.variants import SHAPES

    def told(found: Row, taken: predict.Taken) -> Row:
        return replace(found, predicted_s=taken.seconds, predicted_by=taken.by)

    for found, tokens in expert_rows():
        yield told(found, predict.experts(tokens, EXPERTS, CHOSEN, HIDDEN, INNER))
    shapes = {shape.name.upper(): shape for shape in SHAPES}
    for dtype in (torch.bfloat16, torch.int8):
        for found, batch, _, kv in attention_rows(dtype):
            shape = shapes["MLA" if kv.latent else "GQA"]
            yield told(found, predict.attention(shape, batch, CONTEXT, dtype))
    for model in predict.MODELS:
        for batch in BATCHES:
            taken = predict.step(model, batch, SHORT)
            found = row("step", f"{model.name}, {batch} at {SHORT}", taken.nbytes, 0.0, INT8)
            yield told(found, taken)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run: the median of many, each between two events of the device."""
    run()
    taken = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return sorted(taken)[len(taken) // 2]


def measured(ops: Ops) -> Iterator[Row]:
    device = ops.device
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5
    experts = ops.pack_experts(to_int8(gate_up), to_int8(down))
    for found, tokens in expert_rows():
        x = torch.randn(tokens, HIDDEN, device=device)
        ids = torch.rand(tokens, EXPERTS, device=device).topk(CHOSEN).indices.int()
        weights, units = torch.rand(tokens, CHOSEN, device=device), ops.units(x, experts)
        yield with_time(found, timed(lambda: ops.moe_ffn(x, experts, ids, weights, units)))  # noqa: B023
    for found, batch, heads, shape in attention_rows():
        cache, q = ops.new_kv(shape), torch.randn(batch, heads, shape.head_size, device=device)
        step = ops.new_step(no_rope(), *one_token_each(batch)).attention
        yield with_time(found, timed(lambda: ops.paged_attention(q, cache, step, scale=0.1)))  # noqa: B023


def no_rope() -> object:
    from moeserve.kernels.ops import Rope

    return Rope(torch.ones(1, 1), torch.zeros(1, 1), False)


def one_token_each(batch: int) -> tuple[Tensor, Tensor, AttentionBatch]:
    starts = torch.arange(batch + 1, dtype=torch.int32)
    contexts = torch.full((batch,), CONTEXT, dtype=torch.int32)
    blocks = torch.arange(batch * CONTEXT // 64, dtype=torch.int32).view(batch, -1)
    zeros = torch.zeros(batch, dtype=torch.int64)
    return zeros, zeros, AttentionBatch(starts, contexts, blocks)


def over_ranks(double: bool) -> tuple[list[tuple[str, bool]], list[Row]]:
    """Experts over two ranks: checks, and rows. The bound is of one GPU that does the work of both:
    all experts touched, and records and sums written and read once more."""
    from device_ranks import TINY, V3, every_way

    shape = TINY if double else V3
    held, rows = [], []
    for m in every_way(double):
        name = f"2 {m.way}, {m.tokens} tokens each"
        tokens = 2 * m.tokens
        touched = shape.experts * (1 - (1 - shape.chosen / shape.experts) ** tokens)
        work = 6 * shape.hidden * shape.inner * shape.chosen * tokens
        nbytes = touched * 3 * shape.hidden * shape.inner + tokens * 2 * 2 * 5 * shape.hidden
        held.append((f"experts over {name}: the bits of one process", m.same))
        rows.append(with_time(row("ranks", name, nbytes, work, INT8), m.seconds))
    return held, rows


def with_time(found: Row, seconds: float) -> Row:
    return Row(**{**asdict(found), "seconds": seconds})


def outputs(ops: Ops, kind: str, x: Tensor) -> dict[str, Tensor]:
    """What the row operations make of ``x`` [T, 512], by name, on the host."""
    torch.manual_seed(5)
    make = {"int8": to_int8, "int4": to_int4, "bf16": lambda w: w.bfloat16()}.get(kind, lambda w: w)
    linear = ops.pack_linear(make(torch.randn(384, 512) / 23))
    experts = ops.pack_experts(
        make(torch.randn(8, 512, 512) / 23), make(torch.randn(8, 512, 256) / 16)
    )
    x = x.to(ops.device)
    ids, weights = ops.route_topk(x[:, :8].contiguous(), RouterSpec(8, 2))
    codes, scale = ops.quantize_per_token(x)
    found = {
        "codes": codes.float(),
        "scale": scale,
        "ids": ids.float(),
        "weights": weights,
        "linear": ops.linear(x, linear),
        "experts": ops.moe_ffn(x, experts, ids, weights, ops.units(x, experts)),
        "norm": ops.rms_norm(x, torch.ones(512), 1e-6),
    }
    return {name: value.cpu() for name, value in found.items()}


def checks(ops: Ops) -> Iterator[tuple[str, bool]]:
    """(what, whether it holds)."""
    exact = {"codes", "scale", "ids"}
    for kind in ("fp32", "bf16", "int8", "int4"):
        x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(3))
        whole = outputs(ops, kind, x)
        few = outputs(ReferenceOps(), kind, x[:8])
        for name, theirs in few.items():
            ours = whole[name][:8]
            whole_numbers = name in exact or (name == "linear" and kind in ("int8", "int4"))
            near = torch.allclose(ours, theirs, rtol=1e-3, atol=0.03)
            same = torch.equal(ours, theirs) if whole_numbers else near
            yield f"{kind} {name} is the reference's", same
        for rows in (1, 2, 16, 17, 64, 65, 256, 1024):
            part = outputs(ops, kind, x[:rows])
            same = all(torch.equal(part[name], whole[name][:rows]) for name in part)
            yield f"{kind} {rows} rows are those among 2,048, to the bit", same


def device_name(predicted: bool, double: bool) -> str:
    if predicted:
        return "none: predicted"
    return "none: one in name, seconds mean nothing" if double else torch.cuda.get_device_name()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predict", action="store_true", help="no device: from compiled kernels")
    parser.add_argument("--double", action="store_true", help="no device: two ranks on one in name")
    parser.add_argument("--json", type=Path, help="write rows and checks there")
    given = parser.parse_args(arguments)
    held: list[tuple[str, bool]] = []
    if given.predict:
        rows = list(predictions())
    elif given.double:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        held, rows = over_ranks(double=True)
    else:
        from moeserve.kernels.triton.ops import TritonOps

        ops = TritonOps(torch.device("cuda"))
        held = list(checks(ops))
        rows = list(measured(ops))
        more, between = over_ranks(double=False)
        held, rows = held + more, rows + between
    for what, holds in held:
        print(f"{'holds' if holds else 'FAILS'}  {what}")
    for found in rows:
        print(found.text)
    if given.json:
        said = {
            "device": device_name(given.predict, given.double),
            "torch": torch.__version__,
            "checks": [{"what": what, "holds": holds} for what, holds in held],
            "rows": [asdict(found) for found in rows],
        }
        given.json.write_text(json.dumps(said, indent=1) + "\n")
    if not all(holds for _, holds in held):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
