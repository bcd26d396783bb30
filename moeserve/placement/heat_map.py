"""Heat maps as HTML that needs nothing beside it: a small PNG, scaled up, with borders drawn over.

Each cell is one pixel. Colour is opacity: what is ordinary is transparent, so that one picture is
right on light and on dark ground. ``LOAD`` is centred at 1, the fair share: half of it is blue and
twice of it orange at their fullest, in steps of the logarithm. ``SHARE`` goes from 0 to ``most``,
or to the largest value of the matrix. PNG is written as ISO/IEC 15948 has it: one chunk each of
header, palette, opacity and pixels.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
LOW, HIGH, SHARE_COLOUR = (59, 130, 246), (240, 110, 20), (20, 160, 145)
_MIDDLE, _LAST = 127, 254  # palette entries: below and above the middle, as far each


class Scale(StrEnum):
    LOAD = "load"
    SHARE = "share"


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """``matrix`` [rows, columns]; ``across`` and ``down`` name what is counted; borders lie before
    these rows and columns."""

    title: str
    matrix: F64
    scale: Scale
    across: str
    down: str
    says: str = ""
    columns_before: Sequence[int] = field(default=())
    rows_before: Sequence[int] = field(default=())
    most: float | None = None

    @property
    def is_square(self) -> bool:
        rows, columns = self.matrix.shape
        return bool(rows == columns)


def entries(shown: HeatMap) -> NDArray[np.uint8]:
    """The palette entry of each cell."""
    if shown.scale is Scale.LOAD:
        part = np.log2(np.maximum(shown.matrix, 1e-9))
    else:
        most = float(shown.matrix.max()) if shown.most is None else shown.most
        part = shown.matrix / max(most, 1e-300)
    entry_RC: NDArray[np.uint8] = np.rint(_MIDDLE * (1 + np.clip(part, -1, 1))).astype(np.uint8)
    return entry_RC


def png(entry_RC: NDArray[np.uint8], scale: Scale) -> bytes:
    """One pixel for each entry."""
    rows, columns = entry_RC.shape
    below = SHARE_COLOUR if scale is Scale.SHARE else LOW
    above = SHARE_COLOUR if scale is Scale.SHARE else HIGH
    palette = bytes(below) * _MIDDLE + bytes(above) * (_LAST + 1 - _MIDDLE)
    opacity = bytes(abs(i - _MIDDLE) * 2 for i in range(_LAST + 1))
    lines = np.zeros((rows, columns + 1), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = entry_RC
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def figure(shown: HeatMap) -> str:
    """As HTML."""
    rows, columns = shown.matrix.shape
    picture = base64.b64encode(png(entries(shown), shown.scale)).decode("ascii")
    lines = [f"M{c} 0V{rows}" for c in shown.columns_before]
    lines += [f"M0 {r}H{columns}" for r in shown.rows_before]
    title, says = html.escape(shown.title), html.escape(shown.says)
    kind = "square" if shown.is_square else "wide"
    return (
        f'<figure class="{kind}"><figcaption>{title}</figcaption>'
        f'<p class="axis">{html.escape(shown.across)} →</p>'
        f'<svg role="img" aria-label="{title}. {says}" viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none"><image width="{columns}" height="{rows}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{picture}"/>'
        f'<path d="{"".join(lines)}"/></svg>'
        f'<p class="axis">↓ {html.escape(shown.down)}</p><p class="says">{says}</p></figure>'
    )
