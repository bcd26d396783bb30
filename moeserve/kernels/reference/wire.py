"""Dispatch and combine of ``ReferenceOps``: the oracle, row by row.

Letters: see ``wire``; L limbs of an exact sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix
from moeserve.kernels.ops import Experts, Linear, MoeWeights, Ops, Part, Routed
from moeserve.kernels.reference.combine import (
    add_sums,
    exact_sum,
    limbs_of,
    matrix_of,
    sum_to_float,
    unit_of,
)
from moeserve.kernels.reference.products import product, product_of_codes
from moeserve.kernels.wire import (
    SLOT_DTYPE,
    Combine,
    Copies,
    Sums,
    Wire,
    header_bytes,
    most_bytes,
    up_to,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One, unpacked. ``features_1H`` are codes, bfloat16 or float32."""

    features_1H: Tensor
    scale_1: Tensor
    unit: float
    weights_C: Tensor
    slots: list[int]


def records_of(wire: Wire, segments: Sequence[Tensor]) -> list[Record]:
    return [unpack(wire, row) for row in rows_of(wire, segments)]


def rows_of(wire: Wire, segments: Sequence[Tensor]) -> list[Tensor]:
    for segment in segments:
        if len(segment) % wire.row_bytes:
            raise InternalError(f"{len(segment)} bytes are not records of {wire}")
    return [row for segment in segments for row in segment.view(-1, wire.row_bytes)]


def unpack(wire: Wire, row: Tensor) -> Record:
    def numbers(start: int, end: int, dtype: torch.dtype) -> Tensor:
        return row[start:end].clone().view(dtype)  # a copy is aligned

    return Record(
        features_1H=numbers(0, wire.feature_bytes, wire.payload)[None],
        scale_1=numbers(wire.scale_at, wire.unit_at, torch.float32),
        unit=float(numbers(wire.unit_at, wire.weights_at, torch.float32)),
        weights_C=numbers(wire.weights_at, wire.slots_at, torch.float32),
        slots=numbers(wire.slots_at, wire.row_bytes, SLOT_DTYPE)[: wire.top_k].tolist(),
    )


def pack(wire: Wire, record: Record) -> Tensor:
    """uint8 [row_bytes]."""
    row = torch.zeros(wire.row_bytes, dtype=torch.uint8)
    for start, numbers in (
        (0, record.features_1H[0]),
        (wire.scale_at, record.scale_1),
        (wire.unit_at, torch.tensor([record.unit])),
        (wire.weights_at, record.weights_C),
        (wire.slots_at, torch.tensor(record.slots, dtype=SLOT_DTYPE)),
    ):
        data = numbers.contiguous().view(torch.uint8)
        row[start : start + len(data)] = data
    return row


def by_rank(copies: Copies) -> Iterator[tuple[int, int]]:
    """Rank and copy, in order of copies."""
    for rank in range(len(copies.start_R1) - 1):
        for n in copies_for(copies, rank):
            yield rank, n


def copies_for(copies: Copies, rank: int) -> range:
    return range(int(copies.start_R1[rank]), int(copies.start_R1[rank + 1]))


def copies_of_token(copies: Copies, token: int) -> list[int]:
    return [n for n, t in enumerate(copies.token_N.tolist()) if t == token]


def apply_expert(ops: Ops, record: Record, experts: Experts, slot: int) -> Tensor:
    """What the expert makes of the record, fp32 [H]."""
    ups, downs = cast("tuple[list[Linear], list[Linear]]", experts.data)
    if not 0 <= slot < experts.num_experts:
        raise InternalError(f"run_experts: slot {slot} is not in 0..{experts.num_experts - 1}")
    matrix, bias = cast("tuple[Matrix, Tensor | None]", ups[slot].data)
    if isinstance(matrix, Int8Matrix | Int4Matrix):
        inner = product_of_codes(record.features_1H, record.scale_1, matrix, bias)
    else:
        inner = product(record.features_1H.float(), matrix, bias)
    return ops.linear(ops.glu(inner, experts.activation), downs[slot])[0]


def stack_sums(part: Part[MoeWeights], wire: Wire, rows: Sequence[Tensor]) -> Sums:
    """Of so many records; of each contribution where ordered."""
    experts, exact = part.weights.experts, part.weights.combine is Combine.EXACT
    size = (limbs_of(experts), wire.hidden) if exact else (wire.hidden,)
    empty = torch.empty(0, *size, dtype=torch.int32 if exact else torch.float32)
    return Sums(len(rows), torch.stack(list(rows)) if rows else empty)


def weighted_chain(choices: Sequence[Tensor], weights: Sequence[Tensor], hidden: int) -> Tensor:
    """The chain of ``ReferenceOps.moe_ffn``."""
    total_H = torch.zeros(hidden)
    for y_H, weight in zip(choices, weights, strict=True):
        total_H += weight * y_H
    return total_H


class ReferenceWire:
    """Parts are those that ``ReferenceOps`` prepared."""

    def units(self, x_TH: Tensor, experts: Experts) -> Tensor:
        return torch.tensor([unit_of(x_H, experts) for x_H in x_TH], dtype=torch.float32)

    def wire(self, part: Part[MoeWeights], top_k: int) -> Wire:
        experts = part.weights.experts
        matrix = matrix_of(experts.data[0][0])
        payload = matrix.dtype if isinstance(matrix, Tensor) else torch.int8
        return Wire(payload, experts.hidden, top_k)

    def pack_tokens(
        self: Ops,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        areas_R: Sequence[Tensor],
    ) -> None:
        wire = self.wire(part, copies.slot_NC.shape[1])
        normed_TH, scale_T = routed.normed_TH, torch.zeros(len(x_TH))
        features_TH = normed_TH.to(wire.payload)
        if wire.payload is torch.int8:
            features_TH, scale_T = self.quantize_per_token(normed_TH)
        units_T = torch.zeros(len(x_TH))
        if part.weights.combine is Combine.EXACT:
            units_T = self.units(x_TH, part.weights.experts)
        written = [0] * len(areas_R)
        for rank, n in by_rank(copies):
            t = int(copies.token_N[n])
            row = pack(
                wire,
                Record(
                    features_TH[t : t + 1],
                    scale_T[t : t + 1],
                    float(units_T[t]),
                    routed.weights_TC[t],
                    copies.slot_NC[n].tolist(),
                ),
            )
            areas_R[rank][written[rank] : written[rank] + len(row)] = row
            written[rank] += len(row)

    def relay_tokens(
        self, wire: Wire, segments: Sequence[Tensor], copies: Copies, areas_R: Sequence[Tensor]
    ) -> None:
        records, written = records_of(wire, segments), [0] * len(areas_R)
        for rank, n in by_rank(copies):
            r = records[int(copies.token_N[n])]
            slots = copies.slot_NC[n].tolist()
            row = pack(wire, Record(r.features_1H, r.scale_1, r.unit, r.weights_C, slots))
            areas_R[rank][written[rank] : written[rank] + len(row)] = row
            written[rank] += len(row)

    def run_experts(
        self: Ops, part: Part[MoeWeights], wire: Wire, segments: Sequence[Tensor]
    ) -> Sums:
        experts, combine, rows = part.weights.experts, part.weights.combine, []
        records = records_of(wire, segments)
        for r in records:
            here = [c for c, slot in enumerate(r.slots) if slot != -1]
            made = [apply_expert(self, r, experts, r.slots[c]) for c in here]
            weights = [r.weights_C[c] for c in here]
            if combine is Combine.ORDERED:
                rows += made
            elif combine is Combine.FAST:
                rows.append(weighted_chain(made, weights, wire.hidden))
            else:
                shares = [weight * y_H for weight, y_H in zip(weights, made, strict=True)]
                rows.append(exact_sum(shares, r.unit, limbs_of(experts), wire.top_k, wire.hidden))
        return Sums(len(records), stack_sums(part, wire, rows).data)

    def sums_bytes(self, part: Part[MoeWeights], wire: Wire, rows: int) -> int:
        return most_bytes(part.weights.combine, wire, limbs_of(part.weights.experts), rows)

    def pack_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        sums: Sums,
        segments: Sequence[Tensor],
        areas_R: Sequence[Tensor],
    ) -> list[int]:
        combine, data, nbytes, done = part.weights.combine, sums.data, [], 0
        for segment, area in zip(segments, areas_R, strict=True):
            records = records_of(wire, [segment])
            count = len(records)
            if combine is Combine.ORDERED:
                count = sum(slot != -1 for r in records for slot in r.slots)
            rows = [packed_sum(combine, row) for row in data[done : done + count]]
            done += count
            whole = torch.cat([torch.empty(0, dtype=torch.uint8), *(row for _, row in rows)])
            if combine is Combine.EXACT:
                head = torch.zeros(header_bytes(count), dtype=torch.uint8)
                head[:count] = torch.tensor([width for width, _ in rows], dtype=torch.uint8)
                whole = torch.cat((head, whole))
            area[: len(whole)] = whole
            nbytes.append(len(whole))
        return nbytes

    def relay_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        copies: Copies,
        segments_R: Sequence[Tensor],
        rows: int,
    ) -> Sums:
        combine = part.weights.combine
        sums = unpack_sums(part, wire.hidden, copies, segments_R)
        out: list[Tensor] = []
        for t in range(rows):
            sent = copies_of_token(copies, t)
            if combine is Combine.ORDERED:
                out += [sums[n, c] for c in range(wire.top_k) for n in sent if (n, c) in sums]
                continue
            here = [sums[n, 0] for n in sent]
            if combine is Combine.EXACT:
                out.append(add_sums(here, limbs_of(part.weights.experts), wire.hidden))
            else:
                out.append(sum(here, torch.zeros(wire.hidden)))
        return Sums(rows, stack_sums(part, wire, out).data)

    def combine(
        self: Ops,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        segments_R: Sequence[Tensor],
        shared_TH: Tensor | None,
    ) -> None:
        experts, combine, hidden = part.weights.experts, part.weights.combine, x_TH.shape[1]
        sums = unpack_sums(part, hidden, copies, segments_R)
        for t, x_H in enumerate(x_TH):
            sent = copies_of_token(copies, t)
            if combine is Combine.ORDERED:
                found = sorted((c, n) for n, c in sums if n in sent)
                made = [sums[n, c] for c, n in found]
                total_H = weighted_chain(made, [routed.weights_TC[t, c] for c, _ in found], hidden)
            elif combine is Combine.FAST:
                total_H = sum((sums[n, 0] for n in sent), torch.zeros(hidden))
            else:
                unit = unit_of(x_H, experts)
                here = [sums[n, 0] for n in sent]
                total_H = sum_to_float(add_sums(here, limbs_of(experts), hidden), unit)
            x_TH[t] += total_H if shared_TH is None else total_H + shared_TH[t]


def packed_sum(combine: Combine, row: Tensor) -> tuple[int, Tensor]:
    """Bytes of an element, and the row in bytes: a multiple of 4."""
    if combine is Combine.FAST:
        row = row.bfloat16()
    elif combine is Combine.EXACT and len(row) == 1 and int(row.long().abs().max()) <= 32767:
        row = row.short()
    flat = row.flatten().contiguous().view(torch.uint8)
    return row.itemsize, torch.nn.functional.pad(flat, (0, up_to(len(flat), 4) - len(flat)))


def unpack_sums(
    part: Part[MoeWeights], hidden: int, copies: Copies, segments_R: Sequence[Tensor]
) -> dict[tuple[int, int], Tensor]:
    """By copy and choice; unless ordered the choice is 0. Exact: int32 [L, H]; else fp32 [H].

    InternalError if a segment is not as long as the sums of its rank's copies.
    """
    combine, found = part.weights.combine, dict[tuple[int, int], Tensor]()
    exact = combine is Combine.EXACT
    limbs = limbs_of(part.weights.experts) if exact else 1
    for rank, segment in enumerate(segments_R):
        keys = returned_rows(combine, copies, rank)
        first, dtypes = row_dtypes(combine, segment, len(keys))
        rows = read_rows(segment, first, dtypes, limbs * hidden)
        for key, row in zip(keys, rows, strict=True):
            found[key] = row.int().view(limbs, hidden) if exact else row.float()
    return found


def returned_rows(combine: Combine, copies: Copies, rank: int) -> list[tuple[int, int]]:
    """Copy and choice of every row that a rank sends back, in their order."""
    sent = copies_for(copies, rank)
    if combine is not Combine.ORDERED:
        return [(n, 0) for n in sent]
    return [(n, c) for n in sent for c, slot in enumerate(copies.slot_NC[n].tolist()) if slot != -1]


def row_dtypes(combine: Combine, segment: Tensor, rows: int) -> tuple[int, list[torch.dtype]]:
    """Where the first row begins, and what each row's elements are; exact: the header says it."""
    if combine is Combine.EXACT:
        widths = segment[:rows].tolist()
        return header_bytes(rows), [torch.int16 if w == 2 else torch.int32 for w in widths]
    return 0, [torch.float32 if combine is Combine.ORDERED else torch.bfloat16] * rows


def read_rows(
    segment: Tensor, first: int, dtypes: Sequence[torch.dtype], size: int
) -> list[Tensor]:
    """Rows of ``size`` elements from byte ``first`` on, each padded to 4 bytes."""
    bounds = [first]
    for dtype in dtypes:
        bounds.append(bounds[-1] + up_to(size * dtype.itemsize, 4))
    if bounds[-1] != len(segment):
        raise InternalError(
            f"{len(segment)} bytes are not the sums of {len(dtypes)} rows, which take {bounds[-1]}"
        )
    return [
        segment[start : start + size * dtype.itemsize].clone().view(dtype)
        for start, dtype in zip(bounds, dtypes, strict=False)
    ]
