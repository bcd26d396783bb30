"""What ranks send each other for a mixture: records of tokens, and sums of what experts make.

How the contributions w_c * y_c of a token's experts become one row is a ``Combine``:

- exact: each, in fp32, is rounded to nearest (ties to even) to a whole number of the row's
  ``unit``; these are added as integers, and float(sum) * unit is the result. So a sum is the same
  whoever made parts of it (law 1 over devices). unit is 2^(e - grid_bits), where 2^e is the power
  of two at or below the root of the mean square of the row of x that the result is added to (e at
  least -40). Experts in fp32 have ``grid_bits`` 20 and sums of 64 bits, carried as two int32
  ("limbs": contribution = high * 2^16 + low, low in -2^15..2^15 as rounding to nearest leaves it);
  all others 11 and int32. A contribution beyond 2^(30 - ceil(log2 C)) units (of the high limb,
  where there are two), or that is no number, makes the element NaN: in integers the lowest int32,
  which stays the lowest whatever is added.
  Why 11: the demo model in bf16 is 2.2e-4 nats from the same in fp32 (ordered 1.8e-4), in int8
  1.83e-3 (1.78e-3), with 10 to 14 bits within the error of that; and of the sums of a rank of four
  99.94 % of rows fit int16, 99.8 % with 12 bits, 98.7 % with 13. With 20 in fp32: 2e-12 nats from
  ordered, as adding the other way round gives 6e-13.
- ordered: fma of the contributions in order of c, in fp32; over devices every contribution is sent.
- fast: as ordered in one process; over devices fp32 sums of each device, rounded to bf16.

Letters: T tokens, H hidden, C experts per token, R ranks, N copies (or records), M contributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from moeserve.errors import InternalError

HEADER = 64
GRID_BITS, WIDE_GRID_BITS = 11, 20
LEAST_EXPONENT = -40
LOWEST = -(2**31)
SLOT_DTYPE = torch.int16
MOST_SLOTS = torch.iinfo(SLOT_DTYPE).max + 1  # of a unit that records are sent to: 0..32767


class Combine(StrEnum):
    """How contributions become a row; see above."""

    EXACT = "exact"
    ORDERED = "ordered"
    FAST = "fast"


@dataclass(frozen=True, slots=True)
class Wire:
    """The record in which a token is sent to experts of one layer, ``row_bytes`` long.

    The only place (beside its native twin, ``Record`` in dispatch.inc) that knows where in a record
    something lies; ``..._at`` are bytes from its beginning.

    First H features as the experts' products want them (``payload``: int8 codes, bfloat16 or
    float32, so that nothing is rounded twice), padded to 4 bytes; then fp32 scale (int8; else 0),
    fp32 unit, C fp32 weights, C int16 slots, padded to 4 bytes. A slot is one of the unit that the
    record is sent to (a rank, or under the hierarchical dispatcher a node, whose slots are numbered
    through its ranks): 0..``MOST_SLOTS`` - 1, or -1 where that choice goes elsewhere. The weight
    stands at its choice's place.

    ``wide``: exact sums come back with four bytes an element in every row, so that their length is
    known before they are; for ranks whose records never leave their devices, where asking for a
    length would make the host wait. Only tables of accelerators make and read such.
    """

    payload: torch.dtype
    hidden: int
    top_k: int
    wide: bool = False

    @property
    def feature_bytes(self) -> int:
        return self.hidden * self.payload.itemsize

    @property
    def scale_at(self) -> int:
        return up_to(self.feature_bytes, 4)

    @property
    def unit_at(self) -> int:
        return self.scale_at + 4

    @property
    def weights_at(self) -> int:
        return self.unit_at + 4

    @property
    def slots_at(self) -> int:
        return self.weights_at + 4 * self.top_k

    @property
    def row_bytes(self) -> int:
        return self.slots_at + up_to(2 * self.top_k, 4)


@dataclass(frozen=True, slots=True)
class Copies:
    """Which tokens of a batch go where. Copy n is of row ``token_N[n]``; those for rank r are
    ``start_R1[r] : start_R1[r + 1]``, tokens ascending. ``slot_NC`` as in a record.
    int32, int32, int16.
    """

    start_R1: Tensor
    token_N: Tensor
    slot_NC: Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """What experts of one rank made of the records they got, in the records' order; not weighed
    further. ``data`` belongs to the backend: exact, int32 [N, limbs, H]; ordered, fp32 of each
    (record, choice) that was here [M, H], not yet times its weight; fast, fp32 [N, H].
    """

    rows: int
    data: Any


def up_to(size: int, multiple: int) -> int:
    """The least multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def record_rows(wire: Wire, segments: Sequence[Tensor]) -> Tensor:
    """uint8 [N, row_bytes] of all segments in turn, where they lie. InternalError where one is not
    of whole records."""
    for segment in segments:
        if len(segment) % wire.row_bytes:
            raise InternalError(f"{len(segment)} bytes are not records of {wire}")
    whole = segments[0] if len(segments) == 1 else torch.cat(list(segments))
    return whole.view(-1, wire.row_bytes)


def record_slots(wire: Wire, rows_NX: Tensor) -> Tensor:
    """int16 [N, C] of ``record_rows``."""
    part = rows_NX[:, wire.slots_at : wire.slots_at + 2 * wire.top_k]
    return part.contiguous().view(SLOT_DTYPE)


def require_length(segment: Tensor, count: int, nbytes: int) -> None:
    """InternalError where the sums of so many rows are of another length."""
    if len(segment) != nbytes:
        raise InternalError(
            f"{len(segment)} bytes are not the sums of {count} rows, which take {nbytes}"
        )


def header_bytes(rows: int) -> int:
    """Of the bytes before so many exact sums, one of each, that say how wide its elements are."""
    return up_to(rows, HEADER)


def wide_bytes(rows: int, limbs: int, hidden: int) -> int:
    """Of so many exact sums, all of them wide."""
    return header_bytes(rows) + rows * 4 * limbs * hidden


def write_wide(sums_NLH: Tensor, area: Tensor) -> int:
    """Exact sums int32, wherever they lie, in the form that ``pack_sums`` writes, none of them in
    two bytes. The bytes written; nothing of a length waits for the device."""
    count = len(sums_NLH)
    header, end = header_bytes(count), wide_bytes(count, *sums_NLH.shape[1:])
    area[:header].zero_()
    area[:count].fill_(4)
    area[header:end].copy_(sums_NLH.contiguous().view(-1).view(torch.uint8))
    return end


def read_wide(segment: Tensor, count: int, limbs: int, hidden: int) -> Tensor | None:
    """int32 [count, L, H] over the segment itself, where its length says that all rows are wide;
    else None."""
    if len(segment) != wide_bytes(count, limbs, hidden) or limbs * hidden == 1:
        return None
    return segment[header_bytes(count) :].view(torch.int32).view(count, limbs, hidden)


def most_bytes(combine: Combine, wire: Wire, limbs: int, rows: int) -> int:
    """The most that so many records' sums take on their way back."""
    if combine is Combine.EXACT:
        return wide_bytes(rows, limbs, wire.hidden)
    if combine is Combine.ORDERED:
        return rows * wire.top_k * 4 * wire.hidden
    return rows * up_to(2 * wire.hidden, 4)
