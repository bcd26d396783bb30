"""Dispatch and combine over records wherever the exchange has them; experts run on the device.

In host memory what is sent is brought there once, what arrived is taken to the device once. On the
device (``Wire.wide``) nothing of the exact and the fast combine waits: sums are wide, and a slot
that is none of this rank's experts cannot be refused, so its token becomes NaN. Everything is done
for all rows at a time, by copies and by sums of integers.

Letters: see ``wire``; L limbs of an exact sum, K returned rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ascend.grid import add_rows
from moeserve.kernels.wire import (
    Combine,
    Copies,
    Wire,
    header_bytes,
    read_wide,
    record_rows,
    record_slots,
    require_length,
    up_to,
)


@dataclass(frozen=True, slots=True)
class Arrived:
    """Records of one layer, taken apart; ``slots_NC`` is -1 where a choice goes elsewhere."""

    features_NH: Tensor
    scale_N: Tensor
    unit_N: Tensor
    weights_NC: Tensor
    slots_NC: Tensor


@dataclass(frozen=True, slots=True)
class Returned:
    """Sums that came back: of copy ``copy_K``, unless ordered of all its choices (``choice_K`` 0).
    Exact: int32 [K, L, H]; else fp32 [K, H]."""

    rows: Tensor
    copy_K: Tensor
    choice_K: Tensor


def as_bytes(numbers: Tensor) -> Tensor:
    """uint8 [N, X] of [N, ...]."""
    if not numbers.numel():
        width = math.prod(numbers.shape[1:]) * numbers.itemsize
        return torch.empty(len(numbers), width, dtype=torch.uint8, device=numbers.device)
    return numbers.contiguous().view(len(numbers), -1).view(torch.uint8)


def records(
    wire: Wire,
    features_TH: Tensor,
    scale_T: Tensor,
    unit_T: Tensor,
    weights_TC: Tensor,
    where: torch.device,
) -> Tensor:
    """uint8 [T, row_bytes] there, without slots."""
    rows_TX = torch.zeros(len(features_TH), wire.row_bytes, dtype=torch.uint8, device=where)
    for start, numbers in (
        (0, features_TH),
        (wire.scale_at, scale_T),
        (wire.unit_at, unit_T),
        (wire.weights_at, weights_TC),
    ):
        part = as_bytes(numbers.to(where))
        rows_TX[:, start : start + part.shape[1]] = part
    return rows_TX


def send(wire: Wire, rows_TX: Tensor, copies: Copies, areas_R: Sequence[Tensor]) -> None:
    """Each copy with its slots to the area of its rank."""
    rows_NX = rows_TX[copies.token_N.long()]
    rows_NX[:, wire.slots_at : wire.slots_at + 2 * wire.top_k] = as_bytes(copies.slot_NC)
    starts = copies.start_R1.tolist()
    for area, start, end in zip(areas_R, starts, starts[1:], strict=False):
        area[: (end - start) * wire.row_bytes] = rows_NX[start:end].flatten()


def take_apart(wire: Wire, segments: Sequence[Tensor], experts: int) -> Arrived:
    """InternalError where a slot is none of so many experts; if ``wide``, its token becomes NaN."""
    rows_NX = record_rows(wire, segments)

    def numbers(start: int, end: int, dtype: torch.dtype) -> Tensor:
        return rows_NX[:, start:end].contiguous().view(dtype)

    slots_NC = record_slots(wire, rows_NX)
    weights_NC = numbers(wire.weights_at, wire.slots_at, torch.float32)
    strange_NC = (slots_NC < -1) | (slots_NC >= experts)
    if wire.wide:
        slots_NC = slots_NC.masked_fill(strange_NC, 0)
        weights_NC = weights_NC.masked_fill(strange_NC, torch.nan)
    elif bool(strange_NC.any()):
        wrong = int(slots_NC[strange_NC][0])
        raise InternalError(f"run_experts: slot {wrong} is not in 0..{experts - 1}")
    return Arrived(
        numbers(0, wire.feature_bytes, wire.payload),
        numbers(wire.scale_at, wire.unit_at, torch.float32)[:, 0],
        numbers(wire.unit_at, wire.weights_at, torch.float32)[:, 0],
        weights_NC,
        slots_NC,
    )


def padded(rows_KX: Tensor) -> Tensor:
    """uint8 rows of a multiple of 4 bytes."""
    width = rows_KX.shape[1]
    return torch.nn.functional.pad(rows_KX, (0, up_to(width, 4) - width))


def runs(widths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Width, first row and number of rows of those that follow one another with one width."""
    at = 0
    for width, same in groupby(widths):
        count = len(list(same))
        yield width, at, count
        at += count


def write_exact(sum_NLH: Tensor, area: Tensor) -> int:
    """Bytes written: a header of widths, then rows of int16 where all their elements fit."""
    count, limbs, _ = sum_NLH.shape
    # In int64, for the lowest int32 has no positive twin.
    fits_N = (sum_NLH.long().abs().flatten(1).amax(1) <= 32767) & (limbs == 1)
    width_N = torch.where(fits_N, 2, 4).to(torch.uint8)
    at = header_bytes(count)
    area[:at] = 0
    area[:count] = width_N
    for width, first, n in runs(width_N.tolist()):
        some = sum_NLH[first : first + n]
        data = padded(as_bytes(some.to(torch.int16) if width == 2 else some)).flatten()
        area[at : at + len(data)] = data
        at += len(data)
    return at


def write_rows(rows_KH: Tensor, area: Tensor) -> int:
    """Bytes written."""
    data = padded(as_bytes(rows_KH)).flatten()
    area[: len(data)] = data
    return len(data)


def read_returned(
    combine: Combine, limbs: int, hidden: int, copies: Copies, segments_R: Sequence[Tensor]
) -> Returned:
    """InternalError where a segment is not as long as the sums of its rank's copies."""
    rows: list[Tensor] = []
    copy: list[Tensor] = []
    choice: list[Tensor] = []
    starts = copies.start_R1.tolist()
    for segment, start, end in zip(segments_R, starts, starts[1:], strict=False):
        copy_K = torch.arange(start, end, device=segment.device)
        choice_K = torch.zeros_like(copy_K)
        if combine is Combine.ORDERED:
            here, choice_K = (copies.slot_NC[start:end] != -1).nonzero(as_tuple=True)
            copy_K = here + start
        if combine is Combine.EXACT:
            rows.append(read_exact(segment, len(copy_K), limbs, hidden))
        else:
            kind = torch.float32 if combine is Combine.ORDERED else torch.bfloat16
            rows.append(read_plain(segment, len(copy_K), hidden, kind).float())
        copy.append(copy_K)
        choice.append(choice_K)
    return Returned(torch.cat(rows), torch.cat(copy), torch.cat(choice))


def read_exact(segment: Tensor, count: int, limbs: int, hidden: int) -> Tensor:
    """int32 [count, L, H]."""
    if (wide := read_wide(segment, count, limbs, hidden)) is not None:
        return wide
    at, parts = header_bytes(count), [torch.empty(0, limbs, hidden, dtype=torch.int32)]
    for width, _, n in runs(segment[:count].tolist()):
        kind = torch.int16 if width == 2 else torch.int32
        size = n * up_to(limbs * hidden * kind.itemsize, 4)
        part = read_plain(segment[at : at + size], n, limbs * hidden, kind)
        parts.append(part.int().view(n, limbs, hidden))
        at += size
    require_length(segment, count, at)
    return torch.cat(parts)


def read_plain(data: Tensor, count: int, size: int, kind: torch.dtype) -> Tensor:
    """[count, size] of rows that are padded to 4 bytes."""
    width = up_to(size * kind.itemsize, 4)
    require_length(data, count, count * width)
    rows = data.view(count, width) if count else data.view(0, width)
    return rows[:, : size * kind.itemsize].contiguous().view(kind)


def by_token(
    combine: Combine, back: Returned, copies: Copies, weights_TC: Tensor, rows: int
) -> Tensor:
    """What came back for each token: exact int32 [T, L, H], else fp32 [T, H]: ordered, the chain of
    its choices with their weights, and fast, what ranks made of it in order of ranks."""
    token_K = copies.token_N.long()[back.copy_K]
    if combine is Combine.EXACT:
        return add_rows(back.rows, token_K, rows)
    total_TH = torch.zeros(rows, back.rows.shape[1], device=back.rows.device)
    if combine is Combine.FAST:
        starts = copies.start_R1.tolist()
        for start, end in pairwise(starts):  # a token is once in each
            total_TH[token_K[start:end]] += back.rows[start:end]
        return total_TH
    for c in range(weights_TC.shape[1]):
        chosen = back.choice_K == c
        token = token_K[chosen]
        total_TH[token] += weights_TC[token, c, None] * back.rows[chosen]
    return total_TH


def relayed(combine: Combine, back: Returned, copies: Copies, rows: int) -> Tensor:
    """To be packed once more: exact and fast, one row each; ordered, by row and choice."""
    token_K = copies.token_N.long()[back.copy_K]
    if combine is Combine.ORDERED:
        most = copies.slot_NC.shape[1]
        return back.rows[(token_K * most + back.choice_K).argsort(stable=True)]
    weights_TC = torch.ones(rows, 1, device=back.rows.device)
    return by_token(combine, back, copies, weights_TC, rows)
