"""The table's part of dispatch and combine: ``wire`` moves bytes, the device runs the experts.

Where a layer's experts fell back to the host, so does all of this. Letters: see ``wire``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from moeserve.kernels.ascend import grid, matrices, wire
from moeserve.kernels.ascend.matrices import DeviceExperts
from moeserve.kernels.ops import Experts, MoeWeights, Ops, Part, Routed
from moeserve.kernels.wire import (
    Combine,
    Copies,
    Sums,
    Wire,
    most_bytes,
    record_rows,
    record_slots,
    write_wide,
)


class Contributing(Protocol):
    """What is needed of the table."""

    device: torch.device
    host: Ops

    def contributions(
        self, rows_TH: Tensor, scale_T: Tensor | None, ids_TC: Tensor, experts: Experts
    ) -> Tensor: ...

    def units(self, x_TH: Tensor, experts: Experts) -> Tensor: ...


def host_of(part: Part[MoeWeights]) -> Part[MoeWeights] | None:
    """The host's part, where its experts are there."""
    return cast("Part[MoeWeights] | None", part.data)


def experts_of(part: Part[MoeWeights]) -> DeviceExperts:
    return cast("DeviceExperts", part.weights.experts.data)


def routed_on_host(routed: Routed) -> Routed:
    return Routed(routed.normed_TH.cpu(), routed.ids_TC.cpu(), routed.weights_TC.cpu())


class AscendDispatch:
    """Parts are those that ``AscendOps`` prepared; areas and segments lie in host memory, or, where
    a ``Wire`` is wide, on the device."""

    def host_part(self: Contributing, weights: MoeWeights) -> Part[MoeWeights] | None:
        experts = weights.experts.data
        if isinstance(experts, DeviceExperts):
            return None
        return self.host.prepare(MoeWeights(experts, None, weights.combine))

    def keeps_records(self, part: Part[MoeWeights]) -> bool:
        """Whether records of this layer can stay on the device (``comm.build``)."""
        return host_of(part) is None

    def units(self: Contributing, x_TH: Tensor, experts: Experts) -> Tensor:
        if not isinstance(experts.data, DeviceExperts):
            return self.host.units(x_TH.cpu(), experts.data).to(self.device)
        return grid.units_of(x_TH, experts.data.limbs)

    def wire(self: Contributing, part: Part[MoeWeights], top_k: int) -> Wire:
        if (there := host_of(part)) is not None:
            return self.host.wire(there, top_k)
        return Wire(experts_of(part).ups.data_EKN.dtype, part.weights.experts.hidden, top_k)

    def pack_tokens(
        self: Contributing,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        areas_R: Sequence[Tensor],
    ) -> None:
        if (there := host_of(part)) is not None:
            self.host.pack_tokens(x_TH.cpu(), there, routed_on_host(routed), copies, areas_R)
            return
        experts, rows = part.weights.experts, len(x_TH)
        form = Wire(experts_of(part).ups.data_EKN.dtype, experts.hidden, copies.slot_NC.shape[1])
        features_TH, scale_T = matrices.rounded(routed.normed_TH, experts_of(part).ups)
        unit_T = torch.zeros(rows, device=self.device)
        if part.weights.combine is Combine.EXACT:
            unit_T = self.units(x_TH, experts)
        scales = torch.zeros_like(unit_T) if scale_T is None else scale_T
        where = areas_R[0].device
        rows_TX = wire.records(form, features_TH, scales, unit_T, routed.weights_TC, where)
        wire.send(form, rows_TX, copies, areas_R)

    def relay_tokens(
        self, form: Wire, segments: Sequence[Tensor], copies: Copies, areas_R: Sequence[Tensor]
    ) -> None:
        wire.send(form, record_rows(form, segments), copies, areas_R)

    def run_experts(
        self: Contributing, part: Part[MoeWeights], form: Wire, segments: Sequence[Tensor]
    ) -> Sums:
        if (there := host_of(part)) is not None:
            return self.host.run_experts(there, form, segments)
        experts, combine = part.weights.experts, part.weights.combine
        came = wire.take_apart(form, segments, experts.num_experts)
        count, limbs = len(came.slots_NC), experts_of(part).limbs
        if not count:
            exact = combine is Combine.EXACT
            size = (0, limbs, form.hidden) if exact else (0, form.hidden)
            kind, where = torch.int32 if exact else torch.float32, segments[0].device
            return Sums(0, torch.empty(size, dtype=kind, device=where))
        here_NC = came.slots_NC >= 0
        ids_NC = torch.where(here_NC, came.slots_NC, experts.num_experts).int()
        scale_N = came.scale_N.to(self.device) if form.payload is torch.int8 else None
        y_NCH = self.contributions(
            came.features_NH.to(self.device), scale_N, ids_NC.to(self.device), experts
        )
        if combine is Combine.ORDERED:
            return Sums(count, y_NCH[here_NC.to(self.device)].to(segments[0].device))
        zero_NC = torch.zeros_like(came.weights_NC)
        weights_NC = torch.where(here_NC, came.weights_NC, zero_NC).to(self.device)
        if combine is Combine.EXACT:
            sums = grid.exact_sums(y_NCH, weights_NC, came.unit_N.to(self.device), limbs)
            return Sums(count, sums.to(segments[0].device))
        total_NH = torch.zeros_like(y_NCH[:, 0])
        for c in range(form.top_k):
            total_NH = total_NH + weights_NC[:, c, None] * y_NCH[:, c]
        return Sums(count, total_NH.to(segments[0].device))

    def sums_bytes(self: Contributing, part: Part[MoeWeights], form: Wire, rows: int) -> int:
        if (there := host_of(part)) is not None:
            return self.host.sums_bytes(there, form, rows)
        return most_bytes(part.weights.combine, form, experts_of(part).limbs, rows)

    def pack_sums(
        self: Contributing,
        part: Part[MoeWeights],
        form: Wire,
        sums: Sums,
        segments: Sequence[Tensor],
        areas_R: Sequence[Tensor],
    ) -> list[int]:
        if (there := host_of(part)) is not None:
            return self.host.pack_sums(there, form, sums, segments, areas_R)
        combine, nbytes, done = part.weights.combine, list[int](), 0
        for segment, area in zip(segments, areas_R, strict=True):
            rows_NX = record_rows(form, [segment])
            count = len(rows_NX)
            if combine is Combine.ORDERED:
                count = int((record_slots(form, rows_NX) != -1).sum())
            some = sums.data[done : done + count]
            done += count
            if combine is Combine.EXACT:
                write = write_wide if form.wide else wire.write_exact
                nbytes.append(write(some, area) if count else 0)
            else:
                kind = torch.bfloat16 if combine is Combine.FAST else torch.float32
                nbytes.append(wire.write_rows(some.to(kind), area) if count else 0)
        return nbytes

    def relay_sums(
        self: Contributing,
        part: Part[MoeWeights],
        form: Wire,
        copies: Copies,
        segments_R: Sequence[Tensor],
        rows: int,
    ) -> Sums:
        if (there := host_of(part)) is not None:
            return self.host.relay_sums(there, form, copies, segments_R, rows)
        combine, limbs = part.weights.combine, experts_of(part).limbs
        back = wire.read_returned(combine, limbs, form.hidden, copies, segments_R)
        return Sums(rows, wire.relayed(combine, back, copies, rows))

    def combine(
        self: Contributing,
        x_TH: Tensor,
        part: Part[MoeWeights],
        routed: Routed,
        copies: Copies,
        segments_R: Sequence[Tensor],
        shared_TH: Tensor | None,
    ) -> None:
        if (there := host_of(part)) is not None:
            x_host = x_TH.cpu().clone()
            shared_host = None if shared_TH is None else shared_TH.cpu()
            self.host.combine(
                x_host, there, routed_on_host(routed), copies, segments_R, shared_host
            )
            x_TH.copy_(x_host)
            return
        combine, experts, rows = part.weights.combine, part.weights.experts, len(x_TH)
        limbs = experts_of(part).limbs
        back = wire.read_returned(combine, limbs, x_TH.shape[1], copies, segments_R)
        weights_TC = routed.weights_TC.to(back.rows.device)
        total = wire.by_token(combine, back, copies, weights_TC, rows)
        total_TH = total.to(self.device)
        if combine is Combine.EXACT:
            total_TH = grid.sums_to_float(total_TH, self.units(x_TH, experts))
        x_TH += total_TH if shared_TH is None else total_TH + shared_TH
