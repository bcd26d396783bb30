"""Dispatch and combine: records are written and read on the device.

Areas and segments lie where the exchange has them. In host memory each is one copy, and sums are
the reference's byte by byte. On the device (``Wire.wide``) nothing of the exact and the fast
combine waits: sums are wide, and a slot that is none of this rank's experts cannot be refused, so
its token becomes NaN. The ordered combine asks the device how many rows there are.

Letters: see ``wire``; L limbs, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ops import Experts, MoeWeights, Ops, Part, Routed
from moeserve.kernels.reference.combine import limbs_of
from moeserve.kernels.reference.wire import ReferenceWire
from moeserve.kernels.triton.experts import Features, contributions
from moeserve.kernels.triton.sums import add_copies, by_token, chain, exact_sums
from moeserve.kernels.wire import (
    Combine,
    Copies,
    Sums,
    Wire,
    header_bytes,
    read_wide,
    record_rows,
    record_slots,
    require_length,
    up_to,
    write_wide,
)


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """N of them, unpacked, on the device; ``slots_NC`` int32."""

    features: Features
    units_N: Tensor
    weights_NC: Tensor
    slots_NC: Tensor


def unpacked(wire: Wire, rows: Tensor, device: torch.device) -> RecordBatch:
    rows = rows.to(device)

    def numbers(start: int, end: int, dtype: torch.dtype) -> Tensor:
        return rows[:, start:end].contiguous().view(dtype)

    x_NH = numbers(0, wire.feature_bytes, wire.payload)
    scale_N = numbers(wire.scale_at, wire.unit_at, torch.float32)[:, 0].contiguous()
    coded = wire.payload is torch.int8
    return RecordBatch(
        Features(x_NH, scale_N) if coded else Features(x_NH.float(), None),
        numbers(wire.unit_at, wire.weights_at, torch.float32)[:, 0].contiguous(),
        numbers(wire.weights_at, wire.slots_at, torch.float32),
        record_slots(wire, rows).int(),
    )


def hand_out(rows: Tensor, copies: Copies, areas_R: Sequence[Tensor]) -> None:
    """Records of the copies, in their order, to the areas of their ranks."""
    bounds = copies.start_R1.tolist()
    for area, start, end in zip(areas_R, bounds, bounds[1:], strict=False):
        part = rows[start:end].reshape(-1)
        area[: len(part)].copy_(part)


def with_slots(wire: Wire, rows: Tensor, copies: Copies) -> Tensor:
    """The rows of the copies' tokens, with their slots."""
    chosen = rows.index_select(0, copies.token_N.long().to(rows.device))
    slots = copies.slot_NC.contiguous().view(torch.uint8).to(rows.device)
    chosen[:, wire.slots_at : wire.slots_at + slots.shape[1]] = slots
    return chosen


def exact_bytes(sums_NLH: Tensor) -> Tensor:
    """uint8: the header, then rows of int16 where all of a row fit, else of int32."""
    count, limbs, hidden = sums_NLH.shape
    narrow_N = (sums_NLH.abs() <= 32767).view(count, -1).all(1) & (sums_NLH > -32768).view(
        count, -1
    ).all(1)
    if limbs > 1:
        narrow_N = torch.zeros_like(narrow_N)
    header = header_bytes(count)
    words_N = torch.where(narrow_N, up_to(2 * hidden, 4) // 2, 2 * limbs * hidden)
    starts_N = words_N.cumsum(0) - words_N + header // 2
    whole = torch.zeros(header // 2 + int(words_N.sum()), dtype=torch.int16)
    whole.view(torch.uint8)[:count] = torch.where(narrow_N, 2, 4).to(torch.uint8)
    for rows, where in (
        (sums_NLH[narrow_N].short().flatten(1), starts_N[narrow_N]),
        (sums_NLH[~narrow_N].flatten(1).view(torch.int16), starts_N[~narrow_N]),
    ):
        if len(rows):
            whole[where[:, None] + torch.arange(rows.shape[1])] = rows
    return whole.view(torch.uint8)


def exact_sums_in(segment: Tensor, count: int, limbs: int, hidden: int) -> Tensor:
    """int32 [N, L, H] of ``exact_bytes`` or ``write_wide``; InternalError where the segment is of
    another length."""
    if (wide := read_wide(segment, count, limbs, hidden)) is not None:
        return wide
    segment = segment.cpu()
    header = header_bytes(count)
    narrow_N = segment[:count] == 2
    words_N = torch.where(narrow_N, up_to(2 * hidden, 4) // 2, 2 * limbs * hidden)
    require_length(segment, count, header + 2 * int(words_N.sum()))
    words = segment[header:].clone().view(torch.int16)
    starts_N = words_N.cumsum(0) - words_N
    sums = torch.empty(count, limbs * hidden, dtype=torch.int32)
    near = torch.arange(hidden)
    if bool(narrow_N.any()):
        sums[narrow_N] = words[starts_N[narrow_N][:, None] + near].int()
    if not bool(narrow_N.all()):
        far = torch.arange(2 * limbs * hidden)
        sums[~narrow_N] = words[starts_N[~narrow_N][:, None] + far].view(torch.int32)
    return sums.view(count, limbs, hidden)


def float_bytes(rows: Tensor) -> Tensor:
    """uint8 of rows, each padded to 4 bytes."""
    flat = rows.contiguous().view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, up_to(flat.shape[1], 4) - flat.shape[1])).flatten()


def float_rows_in(segment: Tensor, count: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """fp32 [count, H] of ``float_bytes``."""
    width = up_to(hidden * dtype.itemsize, 4)
    require_length(segment, count, count * width)
    rows = segment.clone().view(count, width)[:, : hidden * dtype.itemsize]
    return rows.contiguous().view(dtype).float()


def pairs_of(copies: Copies, top_k: int) -> Tensor:
    """t * C + c of every contribution that is sent back in ``ordered``, in their order; int64."""
    n, c = (copies.slot_NC >= 0).nonzero(as_tuple=True)
    return copies.token_N.long()[n] * top_k + c


class TritonWire(ReferenceWire):
    """The half of the op table that ranks need of each other. ``wire`` and ``sums_bytes`` are the
    reference's."""

    def keeps_records(self, part: Part[MoeWeights]) -> bool:
        """Whether records of this layer can stay on the device (``comm.build``)."""
        return True

    def pack_tokens(
        self: Ops,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        areas_R: Sequence[Tensor],
    ) -> None:
        wire = self.wire(part, copies.slot_NC.shape[1])
        normed_TH, device = routed.normed_TH, routed.normed_TH.device
        rows = torch.zeros(len(x_TH), wire.row_bytes, dtype=torch.uint8, device=device)
        features_TH = normed_TH.to(wire.payload) if wire.payload is not torch.int8 else None
        if features_TH is None:
            features_TH, scale_T = self.quantize_per_token(normed_TH)
            rows[:, wire.scale_at : wire.unit_at] = scale_T[:, None].view(torch.uint8)
        rows[:, : wire.feature_bytes] = features_TH.contiguous().view(torch.uint8)
        if part.weights.combine is Combine.EXACT:
            units_T = self.units(x_TH, part.weights.experts)
            rows[:, wire.unit_at : wire.weights_at] = units_T[:, None].view(torch.uint8)
        weights = routed.weights_TC.contiguous().view(torch.uint8)
        rows[:, wire.weights_at : wire.slots_at] = weights
        hand_out(with_slots(wire, rows, copies), copies, areas_R)

    def relay_tokens(
        self, wire: Wire, segments: Sequence[Tensor], copies: Copies, areas_R: Sequence[Tensor]
    ) -> None:
        hand_out(with_slots(wire, record_rows(wire, segments), copies), copies, areas_R)

    def run_experts(
        self: Ops, part: Part[MoeWeights], wire: Wire, segments: Sequence[Tensor]
    ) -> Sums:
        experts, combine = part.weights.experts, part.weights.combine
        rows = record_rows(wire, segments)
        if not wire.wide:
            check_slots(record_slots(wire, rows), experts)
        r = unpacked(wire, rows, self.device)
        if wire.wide:
            r = without_strange_slots(r, experts)
        y_PH = contributions(r.features, experts, r.slots_NC)
        if combine is Combine.EXACT:
            return Sums(len(rows), exact_sums(y_PH, r.slots_NC, r.weights_NC, r.units_N, experts))
        if combine is Combine.ORDERED:
            return Sums(len(rows), y_PH[r.slots_NC.flatten() >= 0])
        return Sums(len(rows), chain(y_PH, r.slots_NC, r.weights_NC))

    def pack_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        sums: Sums,
        segments: Sequence[Tensor],
        areas_R: Sequence[Tensor],
    ) -> list[int]:
        combine, nbytes, done = part.weights.combine, list[int](), 0
        data = sums.data if wire.wide else sums.data.cpu()
        for segment, area in zip(segments, areas_R, strict=True):
            rows = record_rows(wire, [segment])
            count = len(rows)
            if combine is Combine.ORDERED:
                count = int((record_slots(wire, rows) >= 0).sum())
            found = data[done : done + count]
            done += count
            if combine is Combine.EXACT and wire.wide:
                nbytes.append(write_wide(found, area))
                continue
            if combine is Combine.EXACT:
                whole = exact_bytes(found)
            else:
                whole = float_bytes(found.bfloat16() if combine is Combine.FAST else found)
            area[: len(whole)] = whole
            nbytes.append(len(whole))
        return nbytes

    def relay_sums(
        self: Ops,
        part: Part[MoeWeights],
        wire: Wire,
        copies: Copies,
        segments_R: Sequence[Tensor],
        rows: int,
    ) -> Sums:
        combine = part.weights.combine
        found = returned(part, wire.hidden, copies, segments_R).to(self.device)
        token_N = copies.token_N.to(self.device)
        if combine is Combine.EXACT:
            return Sums(rows, add_copies(found, token_N, rows))
        if combine is Combine.ORDERED:
            return Sums(rows, found[pairs_of(copies, wire.top_k).argsort().to(self.device)])
        return Sums(rows, added(found, token_N, rows, len(segments_R)))

    def combine(
        self: Ops,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        segments_R: Sequence[Tensor],
        shared_TH: Tensor | None,
    ) -> None:
        combine, (rows, hidden) = part.weights.combine, x_TH.shape
        found = returned(part, hidden, copies, segments_R).to(x_TH.device)
        token_N = copies.token_N.to(x_TH.device)
        if combine is Combine.EXACT:
            units_T = self.units(x_TH, part.weights.experts)
            total_TH = add_copies(found, token_N, rows, units_T)
        elif combine is Combine.ORDERED:
            pairs = pairs_of(copies, routed.ids_TC.shape[1]).to(x_TH.device)
            y_PH = torch.zeros(routed.ids_TC.numel(), hidden, device=x_TH.device)
            there = torch.full_like(routed.ids_TC, -1)
            y_PH[pairs] = found
            there.view(-1)[pairs] = 0
            total_TH = chain(y_PH, there, routed.weights_TC)
        else:
            total_TH = added(found, token_N, rows, len(segments_R))
        x_TH += total_TH if shared_TH is None else total_TH + shared_TH


def returned(
    part: Part[MoeWeights], hidden: int, copies: Copies, segments_R: Sequence[Tensor]
) -> Tensor:
    """What came back, in order of copies: exact, int32 [N, L, H]; else fp32 [.., H]."""
    combine, bounds, found = part.weights.combine, copies.start_R1.tolist(), []
    for segment, start, end in zip(segments_R, bounds, bounds[1:], strict=False):
        if combine is Combine.EXACT:
            limbs = limbs_of(part.weights.experts)
            found.append(exact_sums_in(segment, end - start, limbs, hidden))
        elif combine is Combine.ORDERED:
            count = int((copies.slot_NC[start:end] >= 0).sum())
            found.append(float_rows_in(segment, count, hidden, torch.float32))
        else:
            found.append(float_rows_in(segment, end - start, hidden, torch.bfloat16))
    return torch.cat(found)


def added(rows_NH: Tensor, token_N: Tensor, rows: int, most: int) -> Tensor:
    """fp32 [rows, H]: those of each token, of which there are at most ``most``, in order of
    copies."""
    order, first = by_token(token_N, rows)
    place = torch.arange(len(order), device=order.device) - first[token_N[order].long()]
    y_PH = torch.zeros(rows * most, rows_NH.shape[1], device=rows_NH.device)
    there = torch.full((rows, most), -1, dtype=torch.int32, device=rows_NH.device)
    at = token_N[order].long() * most + place
    y_PH[at] = rows_NH[order]
    there.view(-1)[at] = 0
    return chain(y_PH, there, torch.ones(rows, most, device=rows_NH.device))


def without_strange_slots(r: RecordBatch, experts: Experts) -> RecordBatch:
    """A slot that is none of these experts makes its token NaN, for nothing here can refuse it."""
    strange_NC = (r.slots_NC < -1) | (r.slots_NC >= experts.num_experts)
    return replace(
        r,
        slots_NC=r.slots_NC.masked_fill(strange_NC, 0),
        weights_NC=r.weights_NC.masked_fill(strange_NC, torch.nan),
    )


def check_slots(slots_NC: Tensor, experts: Experts) -> None:
    if not slots_NC.numel():
        return
    least, most = (int(end) for end in slots_NC.aminmax())
    if least < -1 or most >= experts.num_experts:
        wrong = least if least < -1 else most
        raise InternalError(f"run_experts: slot {wrong} is not in 0..{experts.num_experts - 1}")
