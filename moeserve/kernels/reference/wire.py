"""The half of ``ReferenceOps`` for tokens that travel: the oracle, row by row.

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
    exact_sum,
    limbs_of,
    matrix_of,
    number,
    together,
    unit_of,
)
from moeserve.kernels.reference.products import product, product_of_codes
from moeserve.kernels.wire import Combine, Copies, Sums, Wire, heading, most_bytes


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
    row = row.clone()
    features_1H = row[: wire.hidden * wire.payload.itemsize].view(wire.payload)[None]
    rest = row[wire.scale_at :].clone()
    weights_C = rest[8 : 8 + 4 * wire.top_k].clone().view(torch.float32)
    slots_C = rest[8 + 4 * wire.top_k :].clone().view(torch.int16)[: wire.top_k]
    scale, unit = rest[:8].view(torch.float32)
    return Record(features_1H, scale[None], float(unit), weights_C, slots_C.tolist())


def pack(wire: Wire, record: Record) -> Tensor:
    """uint8 [row_bytes]."""
    row = torch.zeros(wire.row_bytes, dtype=torch.uint8)
    features = record.features_1H[0].contiguous().view(torch.uint8)
    row[: len(features)] = features
    rest = torch.cat((record.scale_1, torch.tensor([record.unit]), record.weights_C))
    slots = torch.tensor(record.slots, dtype=torch.int16).view(torch.uint8)
    end = wire.scale_at + 8 + 4 * wire.top_k
    row[wire.scale_at : end] = rest.view(torch.uint8)
    row[end : end + len(slots)] = slots
    return row


def of_ranks(copies: Copies) -> Iterator[tuple[int, int]]:
    """Rank and copy, in order of copies."""
    bounds = copies.start_R1.tolist()
    for rank in range(len(bounds) - 1):
        for n in range(bounds[rank], bounds[rank + 1]):
            yield rank, n


def apply(ops: Ops, record: Record, experts: Experts, slot: int) -> Tensor:
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


def sums_of(part: Part[MoeWeights], wire: Wire, rows: Sequence[Tensor]) -> Sums:
    """Of so many records; of each contribution where ordered."""
    experts, exact = part.weights.experts, part.weights.combine is Combine.EXACT
    size = (limbs_of(experts), wire.hidden) if exact else (wire.hidden,)
    empty = torch.empty(0, *size, dtype=torch.int32 if exact else torch.float32)
    return Sums(len(rows), torch.stack(list(rows)) if rows else empty)


def in_order(choices: Sequence[Tensor], weights: Sequence[Tensor], hidden: int) -> Tensor:
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
        for rank, n in of_ranks(copies):
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
        came, written = records_of(wire, segments), [0] * len(areas_R)
        for rank, n in of_ranks(copies):
            r = came[int(copies.token_N[n])]
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
            made = [apply(self, r, experts, r.slots[c]) for c in here]
            weights = [r.weights_C[c] for c in here]
            if combine is Combine.ORDERED:
                rows += made
            elif combine is Combine.FAST:
                rows.append(in_order(made, weights, wire.hidden))
            else:
                shares = [weight * y_H for weight, y_H in zip(weights, made, strict=True)]
                rows.append(exact_sum(shares, r.unit, limbs_of(experts), wire.top_k, wire.hidden))
        return Sums(len(records), sums_of(part, wire, rows).data)

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
                head = torch.zeros(heading(count), dtype=torch.uint8)
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
        came = unpack_sums(part, wire.hidden, copies, segments_R)
        out: list[Tensor] = []
        for t in range(rows):
            of_row = [n for n, token in enumerate(copies.token_N.tolist()) if token == t]
            if combine is Combine.ORDERED:
                out += [came[n, c] for c in range(wire.top_k) for n in of_row if (n, c) in came]
                continue
            here = [came[n, 0] for n in of_row]
            if combine is Combine.EXACT:
                out.append(together(here, limbs_of(part.weights.experts), wire.hidden))
            else:
                out.append(sum(here, torch.zeros(wire.hidden)))
        return Sums(rows, sums_of(part, wire, out).data)

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
        came = unpack_sums(part, hidden, copies, segments_R)
        tokens = copies.token_N.tolist()
        for t, x_H in enumerate(x_TH):
            of_row = [n for n, token in enumerate(tokens) if token == t]
            if combine is Combine.ORDERED:
                found = sorted((c, n) for n, c in came if n in of_row)
                made = [came[n, c] for c, n in found]
                total_H = in_order(made, [routed.weights_TC[t, c] for c, _ in found], hidden)
            elif combine is Combine.FAST:
                total_H = sum((came[n, 0] for n in of_row), torch.zeros(hidden))
            else:
                unit = unit_of(x_H, experts)
                here = [came[n, 0] for n in of_row]
                total_H = number(together(here, limbs_of(experts), hidden), unit)
            x_TH[t] += total_H if shared_TH is None else total_H + shared_TH[t]


def packed_sum(combine: Combine, row: Tensor) -> tuple[int, Tensor]:
    """Bytes of an element, and the row in bytes: a multiple of 4."""
    if combine is Combine.FAST:
        row = row.bfloat16()
    elif combine is Combine.EXACT and len(row) == 1 and int(row.long().abs().max()) <= 32767:
        row = row.short()
    flat = row.flatten().contiguous().view(torch.uint8)
    return row.itemsize, torch.nn.functional.pad(flat, (0, -len(flat) % 4))


def unpack_sums(
    part: Part[MoeWeights], hidden: int, copies: Copies, segments_R: Sequence[Tensor]
) -> dict[tuple[int, int], Tensor]:
    """By copy and choice; unless ordered the choice is 0. Exact: int32 [L, H]; else fp32."""
    combine, bounds = part.weights.combine, copies.start_R1.tolist()
    limbs = limbs_of(part.weights.experts) if combine is Combine.EXACT else 1
    found: dict[tuple[int, int], Tensor] = {}
    for rank, segment in enumerate(segments_R):
        here = range(bounds[rank], bounds[rank + 1])
        at = heading(len(here)) if combine is Combine.EXACT else 0
        keys = [(n, 0) for n in here]
        if combine is Combine.ORDERED:
            chosen = copies.slot_NC.shape[1]
            keys = [(n, c) for n in here for c in range(chosen) if copies.slot_NC[n, c] != -1]
        for i, key in enumerate(keys):
            if combine is Combine.EXACT:
                dtype = torch.int16 if int(segment[i]) == 2 else torch.int32
            else:
                dtype = torch.float32 if combine is Combine.ORDERED else torch.bfloat16
            size = limbs * hidden * dtype.itemsize
            row = segment[at : at + size].clone()
            at += -(-size // 4) * 4
            if at <= len(segment):
                exact = combine is Combine.EXACT
                values = row.view(dtype)
                found[key] = values.int().view(limbs, hidden) if exact else values.float()
        if at != len(segment):
            raise InternalError(f"{len(segment)} bytes are not the sums of {len(here)} copies")
    return found
