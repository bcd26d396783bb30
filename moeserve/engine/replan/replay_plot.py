"""A replay over time as one SVG: seconds of steps on the three ways, and where plans change.

Plain text made here: no library is needed to draw three lines.
"""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.replan.replay import Replay

F64 = NDArray[np.float64]

WIDTH, HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 44
_LINES = (("nothing", "#b0523c"), ("policy", "#2f6db3"), ("hindsight", "#3d8b57"))
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.axis{stroke:#888;fill:none}"
    "svg{background:#fff}@media(prefers-color-scheme:dark)"
    "{svg{background:#1c1c1e}text{fill:#ddd}.axis{stroke:#777}}"
)


def svg(replayed: Replay, every_s: float) -> str:
    """Seconds of steps in each interval; circles are changes of plan, bars where traffic shifts."""
    series = {
        "nothing": replayed.nothing_I,
        "policy": replayed.policy_I,
        "hindsight": replayed.hindsight_I,
    }
    low = min(float(values.min()) for values in series.values())
    high = max(float(values.max()) for values in series.values())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    count = len(replayed.policy_I)
    parts = [_frame(low, high, count * every_s / 60)]
    for i, name in enumerate(replayed.phase_I):
        if i == 0 or name != replayed.phase_I[i - 1]:
            x = _x(i, count)
            parts.append(f'<path class="axis" stroke-dasharray="3 4" d="M{x:.1f} {_TOP}V'
                         f'{HEIGHT - _BOTTOM}"/>')  # fmt: skip
            parts.append(f'<text x="{x + 4:.1f}" y="{_TOP + 12}">{escape(name)}</text>')
    for at, (name, colour) in enumerate(_LINES):
        parts.append(_steps(series[name], low, high, colour))
        parts.append(f'<text x="{_LEFT + 110 * at}" y="18" style="fill:{colour}">{name}</text>')
    for change in replayed.changes:
        i = min(count - 1, change.interval + 1)
        y = _y(float(replayed.policy_I[i]), low, high)
        parts.append(f'<circle cx="{_x(i, count):.1f}" cy="{y:.1f}" r="4" fill="#2f6db3"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>Re-planning replayed</title><style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _frame(low: float, high: float, minutes: float) -> str:
    base = HEIGHT - _BOTTOM
    return (
        f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{high:.3g} s</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">{low:.3g} s</text>'
        f'<text x="{_LEFT}" y="{base + 16}">0</text>'
        f'<text x="{WIDTH - _RIGHT}" y="{base + 16}" text-anchor="end">{minutes:g} min</text>'
        f'<text x="{_LEFT}" y="{HEIGHT - 8}">seconds of steps in each interval</text>'
    )


def _steps(values_I: F64, low: float, high: float, colour: str) -> str:
    path = [f"M{_x(0, len(values_I)):.1f} {_y(float(values_I[0]), low, high):.1f}"]
    for i, value in enumerate(values_I.tolist()):
        path.append(f"V{_y(value, low, high):.1f}H{_x(i + 1, len(values_I)):.1f}")
    return f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _x(interval: int, count: int) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * interval / count


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (value - low) / (high - low)
