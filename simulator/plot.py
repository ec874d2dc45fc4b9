"""A run's times to first token as a picture: an SVG that needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

import numpy as np

_WIDTH, _HEIGHT, _MARGIN = 720, 420, 60
_NUM_POINTS: Final = 400
_TICKS_S: Final = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)


def ttft_svg(ttft_s: Sequence[float], title: str) -> str:
    """Which share of the requests had their first token within which time (logarithmic axis). Refused
    requests, whose time is negative, count as never."""
    times = np.array(ttft_s, dtype=np.float64)
    served = np.sort(times[times >= 0])
    least, most = _range(served)
    points = _points(served, len(times), least, most)
    ticks = [_tick_x(tick, least, most) for tick in _TICKS_S if least <= tick <= most]
    shares = [_tick_y(share) for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
            ' font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_WIDTH / 2}" y="24" text-anchor="middle" font-size="14">{escape(title)}</text>',
            *ticks,
            *shares,
            f'<polyline fill="none" stroke="#1f6fb4" stroke-width="2" points="{points}"/>',
            f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 14}" text-anchor="middle">TTFT, seconds</text>',
            "</svg>",
            "",
        ]
    )


def _range(served: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    if not len(served):
        return 0.01, 10.0
    least = max(float(served[0]), 1e-4)
    return least / 1.2, max(float(served[-1]), least * 2) * 1.2


def _points(served: np.ndarray[tuple[int], np.dtype[np.float64]], num: int, least: float, most: float) -> str:
    if not len(served):
        return ""
    ranks = np.unique(np.linspace(0, len(served) - 1, _NUM_POINTS).astype(int))
    return " ".join(
        f"{_x(max(float(served[rank]), least), least, most):.1f},{_y((rank + 1) / num):.1f}" for rank in ranks
    )


def _x(time_s: float, least: float, most: float) -> float:
    share = float(np.log(time_s / least) / np.log(most / least))
    return _MARGIN + share * (_WIDTH - 2 * _MARGIN)


def _y(share: float) -> float:
    return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)


def _tick_x(time_s: float, least: float, most: float) -> str:
    x, bottom = _x(time_s, least, most), _HEIGHT - _MARGIN
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_MARGIN}" y2="{bottom}" stroke="#ddd"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{time_s:g}</text>'
    )


def _tick_y(share: float) -> str:
    y = _y(share)
    return (
        f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
    )
