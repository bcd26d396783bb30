"""Dispatch and combine of ``CpuOps``: one native call each, on the bytes where they lie.

What a call needs of a segment is its address and its length; the kernels check both, and every row
and slot, before they read or write. Letters: see ``wire``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.handles import rows_at
from moeserve.kernels.cpu.packing import BF16, FP32, INT4, INT8
from moeserve.kernels.ops import MoeWeights, Part, Routed
from moeserve.kernels.wire import SLOT_DTYPE, Combine, Copies, Sums, Wire, most_bytes

PAYLOADS = {FP32: torch.float32, BF16: torch.bfloat16, INT8: torch.int8, INT4: torch.int8}
KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.int8: INT8}


class NativeWire:
    """Stateless; parts are those that ``CpuOps`` prepared."""

    def wire(self, part: Part[MoeWeights], top_k: int) -> Wire:
        experts = part.weights.experts
        return Wire(PAYLOADS[experts.data.handle.payload], experts.hidden, top_k)

    def pack_tokens(
        self,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        areas_R: Sequence[Tensor],
    ) -> None:
        rows, hidden = x_TH.shape
        weights = routed.weights_TC
        if not _cpu.pack_tokens(
            rows_at(x_TH, rows, part.data.hidden),
            rows_at(routed.normed_TH, rows, hidden),
            rows_at(weights, rows, copies.slot_NC.shape[1]),
            rows,
            part.data.handle,
            copies_at(copies),
            *segments_at(areas_R),
        ):
            raise InternalError(
                f"pack_tokens: {copies} are not of {rows} rows and {len(areas_R)} areas"
            )

    def relay_tokens(
        self, wire: Wire, segments: Sequence[Tensor], copies: Copies, areas_R: Sequence[Tensor]
    ) -> None:
        if not _cpu.relay_tokens(
            KINDS[wire.payload],
            wire.hidden,
            *segments_at(segments),
            copies_at(copies),
            *segments_at(areas_R),
        ):
            raise InternalError(
                f"relay_tokens: {copies} are not of {sizes(segments)} bytes of {wire} and "
                f"{len(areas_R)} areas"
            )

    def run_experts(self, part: Part[MoeWeights], wire: Wire, segments: Sequence[Tensor]) -> Sums:
        at, nbytes = segments_at(segments)
        rows = sum(nbytes) // wire.row_bytes
        data = sums_of(part, wire.top_k, rows)
        made = _cpu.run_experts(part.data.handle, wire.top_k, at, nbytes, data.data_ptr())
        if made < 0:
            raise InternalError(
                f"run_experts: {nbytes} bytes are not records of {wire} with slots of "
                f"{part.weights.experts.num_experts} experts"
            )
        return Sums(rows, data[:made])

    def sums_bytes(self, part: Part[MoeWeights], wire: Wire, rows: int) -> int:
        return most_bytes(part.weights.combine, wire, limbs_of(part), rows)

    def pack_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        sums: Sums,
        segments: Sequence[Tensor],
        areas_R: Sequence[Tensor],
    ) -> list[int]:
        at, nbytes = segments_at(segments)
        assert sum(nbytes) == sums.rows * wire.row_bytes, (nbytes, sums.rows, wire)
        data: Tensor = sums.data
        written = _cpu.pack_sums(
            part.data.handle,
            wire.top_k,
            data.data_ptr(),
            sums.rows,
            at,
            nbytes,
            *segments_at(areas_R),
        )
        if len(written) != len(at):
            raise InternalError(
                f"pack_sums: {sums.rows} sums do not fit areas of {sizes(areas_R)} bytes"
            )
        return written

    def relay_sums(
        self,
        part: Part[MoeWeights],
        wire: Wire,
        copies: Copies,
        segments_R: Sequence[Tensor],
        rows: int,
    ) -> Sums:
        data = sums_of(part, wire.top_k, rows)
        made = _cpu.relay_sums(
            part.data.handle,
            copies_at(copies),
            *segments_at(segments_R),
            rows,
            data.data_ptr(),
        )
        if made < 0:
            raise unexpected("relay_sums", copies, segments_R)
        return Sums(rows, data[:made])

    def shared(self, part: Part[MoeWeights], routed: Routed) -> Tensor | None:
        if part.weights.shared is None:
            return None
        rows, hidden = routed.normed_TH.shape
        out = torch.empty(rows, hidden)
        normed = rows_at(routed.normed_TH, rows, part.data.hidden)
        _cpu.shared(normed, rows, part.data.handle, out.data_ptr())
        return out

    def combine(
        self,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        segments_R: Sequence[Tensor],
        shared_TH: Tensor | None,
    ) -> None:
        rows, hidden = x_TH.shape
        if not _cpu.combine(
            rows_at(x_TH, rows, part.data.hidden),
            rows_at(routed.weights_TC, rows, copies.slot_NC.shape[1]),
            rows,
            part.data.handle,
            copies_at(copies),
            *segments_at(segments_R),
            0 if shared_TH is None else rows_at(shared_TH, rows, hidden),
        ):
            raise unexpected("combine", copies, segments_R)


def limbs_of(part: Part[MoeWeights]) -> int:
    return 2 if part.weights.experts.data.handle.contribution == FP32 else 1


def sums_of(part: Part[MoeWeights], top_k: int, rows: int) -> Tensor:
    """Room for them."""
    combine, hidden = part.weights.combine, part.weights.experts.hidden
    if combine is Combine.EXACT:
        return torch.empty(rows, limbs_of(part), hidden, dtype=torch.int32)
    return torch.empty(rows * (top_k if combine is Combine.ORDERED else 1), hidden)


def copies_at(copies: Copies) -> _cpu.Copies:
    start, token, slot = copies.start_R1, copies.token_N, copies.slot_NC
    assert start.dtype is token.dtype is torch.int32, (start.dtype, token.dtype)
    assert slot.dtype is SLOT_DTYPE, slot.dtype
    assert slot.is_contiguous(), slot.stride()
    count, chosen = slot.shape
    assert token.shape[0] == count, (token.shape, count)
    ranks = start.shape[0] - 1
    return start.data_ptr(), token.data_ptr(), slot.data_ptr(), ranks, count, chosen


def segments_at(segments: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses and lengths of uint8 tensors."""
    return [s.data_ptr() for s in segments], [s.numel() for s in segments]


def sizes(segments: Sequence[Tensor]) -> list[int]:
    return [s.numel() for s in segments]


def unexpected(what: str, copies: Copies, segments: Sequence[Tensor]) -> InternalError:
    return InternalError(
        f"{what}: segments of {sizes(segments)} bytes are not the sums of "
        f"{copies.start_R1.diff().tolist()} copies"
    )
